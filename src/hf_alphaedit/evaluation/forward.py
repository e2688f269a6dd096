"""Forward passes for measuring: batches of similar length, and logits only at the positions that are looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_alphaedit.errors import RequestError
from hf_alphaedit.models.hooks import on_input


# Tokens of one batch where the caller sets no batch size: enough to keep the matrix products busy.
TOKEN_BUDGET = 4096
# Logits of one batch, in elements (1 GiB as float32).
LOGITS_BUDGET = 2**28


def batches(lengths: Sequence[int], batch_size: int | None, logits_per_row: int = 0) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, so that running out of memory shows at once.

    Without `batch_size`, a batch has as many rows as fit `TOKEN_BUDGET` padded tokens and `LOGITS_BUDGET` logits.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        longest = max(1, lengths[order[0]])
        size = batch_size or max(1, min(TOKEN_BUDGET // longest, LOGITS_BUDGET // max(1, logits_per_row)))
        yield order[:size]
        order = order[size:]


def padded(rows: Sequence[Sequence[int]], device: torch.device, side: str = "right") -> dict[str, Tensor]:
    """Token ids (b, t) and attention mask (b, t). The tokenizer's own padding settings are neither used nor changed.

    Pads are copies of each row's first token: any valid id will do behind the mask.
    """
    length = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        pads, zeros = [row[0]] * (length - len(row)), [0] * (length - len(row))
        ids.append([*row, *pads] if side == "right" else [*pads, *row])
        mask.append([1] * len(row) + zeros if side == "right" else zeros + [1] * len(row))
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def logits_at(
    model: PreTrainedModel, rows: Tensor, positions: Tensor, *, extra: Tensor | None = None, **inputs: Any
) -> tuple[Tensor, Any]:
    """Logits at chosen positions, and the model's output.

    The hidden states are gathered just before the head, so the head's matrix product costs only what is looked at,
    while whatever the model does to its logits (soft-caps, scales) still happens.

    Args:
        model: a causal language model.
        rows: (n,) batch index of each wanted position.
        positions: (n,) its token index.
        extra: (m, h) more inputs for the head, stored earlier; their logits follow those of the positions.
        inputs: what the model's forward takes.

    Returns:
        Logits (n + m, vocabulary) float32, and the output object (its own `logits` are those of the positions only).
    """
    gathered = []

    def gather(hidden: Tensor) -> Tensor:  # (b, t, h) -> (1, n + m, h)
        chosen = hidden[rows.to(hidden.device), positions.to(hidden.device)]
        gathered.append(chosen)
        return (chosen if extra is None else torch.cat([chosen, extra.to(chosen)]))[None]

    with on_input(model.get_output_embeddings(), gather):
        output = model(**inputs)
    if len(gathered) != 1:
        raise RuntimeError(
            f"{type(model).__name__} called its head {len(gathered)} times in one pass; once is expected"
        )
    return output.logits[0].float(), output


def check_length(model: PreTrainedModel, length: int, text: str) -> None:
    """Refuse what the model's positions can't hold; learned positions would fail without saying why."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise RequestError(f"{text[:80]!r}... has {length} tokens; {type(model).__name__} takes {limit}. Shorten it")
