"""Partial forward passes through the user's own model.

Nothing is re-implemented: the model's `forward` runs as it is, with blocks below the point of interest replaced by
stubs that pass stored hidden states on, and with the head applied only at the positions that are needed. So masks,
rotary embeddings, soft-caps and logit scales of every family are the model's own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from hf_alphaedit.models.architecture import Architecture
from hf_alphaedit.models.encoding import TokenRow
from hf_alphaedit.models.hooks import on_input, on_output
from hf_alphaedit.models.rows import (
    AlignedRows,
    at_positions,
    by_row,
    form_of_output,
    position_keywords,
    prediction_positions,
    skipped_blocks,
)


logger = logging.getLogger(__name__)


@torch.no_grad()
def align_rows(
    architecture: Architecture, rows: Sequence[TokenRow], delta_layer: int, *, cached: bool = True
) -> tuple[AlignedRows, Tensor, Tensor]:
    """Run whole rows once and keep what later passes with a delta at `delta_layer` need.

    Args:
        architecture: the model's parts.
        rows: the rows, each with its own subject.
        delta_layer: the layer whose value is to be changed; blocks below `resume_block` won't run again.
        cached: split the rows at the subject and keep attention states, where every block has such states; otherwise,
            or with False, keep whole rows, which works for every causal model, whatever its cache.

    Returns:
        The rows, the values (B, h) at each row's subject, and the logits (p, vocabulary) of this pass at each row's
        predictions (see `prediction_positions`).
    """
    if cached:
        try:
            found = _run_rows(architecture, rows, delta_layer, cached=True)
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError) as error:
            if should_reduce_batch_size(error):
                raise
            logger.info("%s can't keep plain attention states (%s)", type(architecture.model).__name__, error)
            found = None
        if found is not None:
            return found
    return _run_rows(architecture, rows, delta_layer, cached=False)  # ty: ignore[invalid-explicit-return]


def _run_rows(
    architecture: Architecture, rows: Sequence[TokenRow], delta_layer: int, *, cached: bool
) -> tuple[AlignedRows, Tensor, Tensor] | None:
    """See `align_rows`. None if some block's state isn't one attention key and value for each position."""
    device, first_block = architecture.input_device, architecture.resume_block(delta_layer)
    before = max(row.subject for row in rows) if cached else 0  # P
    after = max(len(row.token_ids) - (row.subject if cached else 0) for row in rows)  # S
    token_ids = torch.zeros(len(rows), before + after, dtype=torch.long)  # (B, P + S)
    attention_mask = torch.zeros_like(token_ids)
    for index, row in enumerate(rows):
        start = before - row.subject if cached else 0
        token_ids[index, start : start + len(row.token_ids)] = torch.tensor(row.token_ids)
        attention_mask[index, start : start + len(row.token_ids)] = 1
    position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)  # (B, P + S)
    token_ids, attention_mask, position_ids = (x.to(device) for x in (token_ids, attention_mask, position_ids))
    subject = torch.tensor([0 if cached else row.subject for row in rows], device=device)  # (B,)

    cache = DynamicCache()
    entry: list[Tensor] = []
    values: list[Tensor] = []
    form: list[tuple[type, int]] = []
    skipped = architecture.blocks[first_block - 1] if first_block else None
    value_index = (torch.arange(len(rows), device=device), subject + before)
    with ExitStack() as stack:
        value_module = architecture.value_module(delta_layer)
        stack.enter_context(
            on_output(value_module, lambda hidden: values.append(at_positions(by_row(hidden, len(rows)), value_index)))
        )
        if skipped is not None:
            stack.enter_context(on_output(skipped, lambda hidden: entry.append(hidden[:, before:].clone())))
            handle = skipped.register_forward_hook(lambda _, __, output: form.append(form_of_output(output)))
            stack.callback(handle.remove)
        positions = prediction_positions(rows, subject, before)
        logits = _logits(
            architecture, positions, input_ids=token_ids, attention_mask=attention_mask,
            **(position_keywords(architecture, position_ids) if cached else {}),
            **({"past_key_values": cache, "use_cache": True} if cached else {"use_cache": False}),
        )  # fmt: skip
    attention: list[tuple[Tensor, ...]] = [(), ()]
    if cached:
        lengths = [layer.keys.shape[-2] if type(layer) is DynamicLayer else 0 for layer in cache.layers]
        if len(lengths) != len(architecture.blocks) or set(lengths) != {before + after}:
            return None
        padding = attention_mask[:, None, :before, None] == 0  # (B, 1, P, 1)
        # Padded positions are masked, but a NaN in them would survive a zero attention weight.
        attention = [
            tuple(states[:, :, :before].masked_fill(padding.to(states.device), 0) for states in kind)
            for kind in ([layer.keys for layer in cache.layers], [layer.values for layer in cache.layers])
        ]
    aligned = AlignedRows(
        token_ids[:, before:], attention_mask, position_ids[:, before:], entry[0] if entry else None, subject,
        *attention, form[0] if form else (Tensor, 1),
    )  # fmt: skip
    return aligned, values[0], logits


def resume_rows(
    architecture: Architecture,
    aligned: AlignedRows,
    delta_layer: int,
    delta: Tensor,
    positions: tuple[Tensor, Tensor],
) -> Tensor:
    """Run the blocks that a delta at `delta_layer` reaches, with it added at the subject; differentiable in `delta`.

    Args:
        architecture: the model's parts.
        aligned: what `align_rows` kept, made for the same `delta_layer`.
        delta_layer: the layer whose value is changed.
        delta: (B, h) added to the output of the value module of `delta_layer` at each row's subject column.
        positions: (row, column) of the (p,) positions whose logits are wanted.

    Returns:
        (p, vocabulary) logits.
    """
    rows = torch.arange(len(delta), device=aligned.subject.device)

    def add_delta(hidden: Tensor) -> Tensor:  # (B, S, h)
        aside = by_row(hidden, len(delta))
        index = (rows.to(hidden.device), aligned.subject.to(hidden.device))
        changed = aside.index_put(index, delta.to(hidden.device, hidden.dtype), accumulate=True)
        return changed.view_as(hidden)

    keywords: dict[str, Any] = {"use_cache": False}
    if aligned.attention_keys:
        keywords = {"past_key_values": _cache_of(aligned), "use_cache": True}
        keywords |= position_keywords(architecture, aligned.position_ids)
    with (
        skipped_blocks(architecture, aligned, architecture.resume_block(delta_layer)),
        on_output(architecture.value_module(delta_layer), add_delta),
    ):
        return _logits(
            architecture, positions, input_ids=aligned.token_ids, attention_mask=aligned.attention_mask,
            **keywords,
        )  # fmt: skip


def _logits(architecture: Architecture, positions: tuple[Tensor, Tensor], **inputs: Any) -> Tensor:
    """The model's logits (p, vocabulary) at (row, column) positions; the head runs on these alone."""
    with on_input(architecture.head, lambda hidden: at_positions(hidden, positions)[None]):  # (B, S, h) -> (1, p, h)
        return architecture.model(**inputs).logits[0]


def _cache_of(aligned: AlignedRows) -> DynamicCache:
    """A fresh cache that holds the stored states without copying them (an update makes new tensors)."""
    cache = DynamicCache()
    for keys, values in zip(aligned.attention_keys, aligned.attention_values, strict=True):
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache
