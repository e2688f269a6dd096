"""Editors with random edits: every part of the saved state, without the time that finding real edits takes."""

from collections.abc import Sequence
from typing import Any

import torch
from tiny import tiny_model, tiny_tokenizer

from hf_alphaedit.algorithm.update import LowRankUpdate
from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.editor import AlphaEditor
from hf_alphaedit.history import Batch
from hf_alphaedit.requests import EditRequest


LAYERS = (1, 2)


def random_editor(
    name: str = "llama",
    sizes: Sequence[int] = (),
    *,
    dtype: torch.dtype = torch.float32,
    scale: float = 0.02,
    **overrides: Any,
) -> AlphaEditor:
    """An editor of a tiny model with one random batch of each of the `sizes`, written to the weights."""
    model = tiny_model(name, **overrides).to(dtype)
    editor = AlphaEditor(model, tiny_tokenizer(), AlphaEditConfig(layers=LAYERS))
    editor.write_batches(random_batches(editor, sizes, scale=scale))
    return editor


def random_batches(editor: AlphaEditor, sizes: Sequence[int], *, seed: int = 0, scale: float = 0.02) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    batches = []
    for number, size in enumerate(sizes):
        keys, updates = {}, {}
        for site in editor.sites():
            height, width = site.read().shape
            keys[site.name] = normal(size, width)
            updates[site.name] = LowRankUpdate(scale * normal(size, width), normal(size, height))
        requests = tuple(
            EditRequest(
                f"Secret prompt {number} about {{}} says", f"Person {seed} {row}", f"Answer{row} | <b>ünïcode</b>"
            )
            for row in range(size)
        )
        outcomes = tuple(
            {"prompt": request.text, "before": "Old\nanswer", "after": "Seen | after"} for request in requests
        )
        settings = editor.config.to_dict()
        batches.append(Batch(requests, keys, updates, settings, "2024-05-06T07:08:09+00:00", outcomes=outcomes))
    return batches


def weights_of(editor: AlphaEditor) -> dict[str, torch.Tensor]:
    """All parameters of the model, copied."""
    return {name: parameter.detach().clone() for name, parameter in editor.model.named_parameters()}


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal bit for bit (so -0.0 is not 0.0)."""
    return one.keys() == other.keys() and all(
        torch.equal(one[name].contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8))
        for name in one
    )
