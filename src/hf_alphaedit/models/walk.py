"""The walk over the edited layers: keys and current values, while the weights change underneath."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from hf_alphaedit.models.architecture import Architecture
from hf_alphaedit.models.encoding import TokenRow
from hf_alphaedit.models.hooks import on_input, on_output, stop_after
from hf_alphaedit.models.keys import captured_keys, side_by_side
from hf_alphaedit.models.rows import (
    at_positions,
    by_row,
    form_of_output,
    skipped_blocks,
    whole_rows,
)


class KeyWalk:
    """Keys and current values of the same rows, layer after layer, while the weights change underneath.

    The rows end at the subject's last token. Each call of `advance` starts from the stored input of the layer it was
    called for last and stops at the layer whose output is the value, or, if no values are wanted, behind the key, so
    nothing that can't have changed runs twice.
    """

    def __init__(self, architecture: Architecture, rows: Sequence[TokenRow]) -> None:
        rows = [row.until_subject() for row in rows]
        self.architecture = architecture
        self.aligned = whole_rows(architecture, rows)
        self.first_block = 0

    @torch.no_grad()
    def advance(self, layer: int, value_layer: int | None) -> tuple[Tensor, Tensor | None]:
        """Keys (B, d) that enter `layer`'s down-projection, and values (B, h) at `value_layer`'s value module."""
        architecture, aligned = self.architecture, self.aligned
        rows = torch.arange(len(aligned.subject), device=aligned.subject.device)

        def at_subject(hidden: Tensor) -> Tensor:
            return at_positions(by_row(hidden.detach(), len(rows)), (rows, aligned.subject))

        def keep_value(hidden: Tensor) -> None:
            values.append(at_subject(hidden))

        values: list[Tensor] = []
        inputs: list[Tensor] = []
        form: list[tuple[type, int]] = [aligned.block_form]
        site = architecture.site(layer)
        stop = site.module if value_layer is None else architecture.value_module(value_layer)
        with (
            skipped_blocks(architecture, aligned, self.first_block),
            captured_keys([site], at_subject) as keys,
            on_input(architecture.blocks[layer], lambda hidden: inputs.append(hidden.detach().clone())),
            nullcontext() if value_layer is None else on_output(stop, keep_value),
            _form_of(architecture.blocks[max(layer - 1, 0)], form),
            stop_after(stop),
        ):
            architecture.model(input_ids=aligned.token_ids, attention_mask=aligned.attention_mask, use_cache=False)
        self.aligned, self.first_block = replace(aligned, entry=inputs[0], block_form=form[-1]), layer
        return side_by_side(site, keys[site.name], len(rows)), None if value_layer is None else values[0]


@contextmanager
def _form_of(block: torch.nn.Module, forms: list[tuple[type, int]]) -> Iterator[None]:
    handle = block.register_forward_hook(lambda _, __, output: forms.append(form_of_output(output)))
    try:
        yield
    finally:
        handle.remove()
