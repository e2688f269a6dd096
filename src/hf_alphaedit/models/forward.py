"""Partial forward passes through the user's own model.

Nothing is re-implemented: the model's `forward` runs as it is, with blocks below the point of interest replaced by
stubs that pass stored hidden states on, and with the head applied only at the positions that are needed. So masks,
rotary embeddings, soft-caps and logit scales of every family are the model's own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from os.path import commonprefix
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from hf_alphaedit.models.architecture import Architecture
from hf_alphaedit.models.encoding import TokenRow
from hf_alphaedit.models.hooks import on_input, on_output, stop_after
from hf_alphaedit.models.rows import (
    AlignedRows,
    at_positions,
    by_row,
    form_of_output,
    position_keywords,
    prediction_positions,
    skipped_blocks,
    split_rows,
    whole_rows,
)


logger = logging.getLogger(__name__)


@torch.no_grad()
def align_rows(
    architecture: Architecture,
    rows: Sequence[TokenRow],
    delta_layer: int,
    *,
    cached: bool = True,
    groups: Sequence[int] | None = None,
) -> tuple[AlignedRows, Tensor, Tensor]:
    """Run whole rows once and keep what later passes with a delta at `delta_layer` need.

    Args:
        architecture: the model's parts.
        rows: the rows, each with its own subject.
        delta_layer: the layer whose value is to be changed; blocks below `resume_block` won't run again.
        cached: split the rows at the subject and keep attention states, where every block has such states; otherwise,
            or with False, keep whole rows, which works for every causal model, whatever its cache.
        groups: one number per row; tokens that all rows of a group begin with run once for the group, if `cached`.

    Returns:
        The rows, the values (B, h) at each row's subject, and the logits (p, vocabulary) of this pass at each row's
        predictions (see `prediction_positions`).
    """
    if cached:
        try:
            found = _run_split_rows(architecture, rows, delta_layer, groups or range(len(rows)))
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError) as error:
            if should_reduce_batch_size(error):
                raise
            logger.info("%s can't keep plain attention states (%s)", type(architecture.model).__name__, error)
            found = None
        if found is not None:
            return found
    aligned = whole_rows(architecture, rows)
    return _run_rows(architecture, rows, delta_layer, aligned, {"use_cache": False})


def _run_split_rows(
    architecture: Architecture, rows: Sequence[TokenRow], delta_layer: int, groups: Sequence[int]
) -> tuple[AlignedRows, Tensor, Tensor] | None:
    """See `align_rows`. None if some block's state isn't one attention key and value for each position."""
    begun = _run_beginnings(architecture, rows, groups)
    if begun is None:
        return None
    cache, common = begun
    shared = max(common)  # C columns, padded on the right
    own = max(row.subject - length for row, length in zip(rows, common, strict=True))  # R columns, padded on the left
    before = max(row.subject for row in rows)  # P
    split = split_rows(architecture, rows)
    device, width = split.token_ids.device, split.token_ids.shape[1]  # S
    token_ids = torch.zeros(len(rows), own + width, dtype=torch.long)  # (B, R + S)
    attention_mask = torch.zeros(len(rows), shared + own + width, dtype=torch.long)  # (B, C + R + S)
    column = torch.zeros(len(rows), before, dtype=torch.long)  # (B, P) where each token before the subject has run
    for index, (row, length) in enumerate(zip(rows, common, strict=True)):
        rest = row.token_ids[length:]
        start = own - (row.subject - length)
        token_ids[index, start : start + len(rest)] = torch.tensor(rest)
        attention_mask[index, :length] = 1
        attention_mask[index, shared + start : shared + start + len(rest)] = 1
        ran_at = [*range(length), *range(shared + start, shared + own)]
        column[index, before - row.subject :] = torch.tensor(ran_at, dtype=torch.long)
    position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)[:, shared:]  # (B, R + S)
    running = replace(
        split, token_ids=token_ids.to(device), attention_mask=attention_mask.to(device),
        position_ids=position_ids.to(device), subject=split.subject + own,
    )  # fmt: skip
    keywords = {
        "past_key_values": cache, "use_cache": True, **position_keywords(architecture, running.position_ids)
    }  # fmt: skip
    found, values, logits = _run_rows(architecture, rows, delta_layer, running, keywords)
    if not _is_plain(cache, len(architecture.blocks), shared + own + width):
        return None
    padding = split.attention_mask[:, :before, None, None] == 0  # (B, P, 1, 1)

    def before_subject(states: Tensor) -> Tensor:  # (B, heads, C + R + S, size) -> (B, heads, P, size)
        picked = states.transpose(1, 2)[torch.arange(len(rows))[:, None], column]  # (B, P, heads, size)
        # Padded positions are masked, but a NaN in them would survive a zero attention weight.
        return picked.masked_fill(padding.to(states.device), 0).transpose(1, 2).contiguous()

    aligned = replace(
        split,
        entry=None if found.entry is None else found.entry[:, own:].clone(),
        attention_keys=tuple(before_subject(layer.keys) for layer in cache.layers),
        attention_values=tuple(before_subject(layer.values) for layer in cache.layers),
        block_form=found.block_form,
    )
    return aligned, values, logits


def _run_beginnings(
    architecture: Architecture, rows: Sequence[TokenRow], groups: Sequence[int]
) -> tuple[DynamicCache, list[int]] | None:
    """Attention states (B, heads, C, size) of what each row's group begins with, and how many tokens that are.

    None if the states aren't plain.
    """
    members: dict[int, list[tuple[int, ...]]] = {}
    for row, group in zip(rows, groups, strict=True):
        members.setdefault(group, []).append(row.token_ids[: row.subject])
    beginnings = {group: commonprefix(found) if len(found) > 1 else () for group, found in members.items()}
    common = [len(beginnings[group]) for group in groups]
    cache = DynamicCache()
    if not any(common):
        return cache, common
    order = {group: index for index, group in enumerate(beginnings)}
    token_ids = torch.zeros(len(order), max(common), dtype=torch.long)  # (groups, C)
    attention_mask = torch.zeros_like(token_ids)
    attention_mask[:, 0] = 1  # nothing at all can't be attended to
    for group, beginning in beginnings.items():
        token_ids[order[group], : len(beginning)] = torch.tensor(beginning, dtype=torch.long)
        attention_mask[order[group], : len(beginning)] = 1
    device = architecture.input_device
    with stop_after(architecture.blocks[-1]):
        architecture.model(
            input_ids=token_ids.to(device), attention_mask=attention_mask.to(device), past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
    if not _is_plain(cache, len(architecture.blocks), max(common)):
        return None
    row_group = torch.tensor([order[group] for group in groups])
    for layer in cache.layers:
        layer.keys, layer.values = (
            states.index_select(0, row_group.to(states.device)) for states in (layer.keys, layer.values)
        )
    return cache, common


def _is_plain(cache: DynamicCache, count: int, length: int) -> bool:
    """Whether `cache` holds a key and a value of every one of `length` positions for `count` blocks."""
    lengths = [layer.keys.shape[-2] if type(layer) is DynamicLayer else 0 for layer in cache.layers]
    return len(lengths) == count and set(lengths) == {length}


def _run_rows(
    architecture: Architecture, rows: Sequence[TokenRow], delta_layer: int, aligned: AlignedRows, keywords: dict
) -> tuple[AlignedRows, Tensor, Tensor]:
    """One pass: `aligned` with what enters the first block to run, values (B, h) and logits (p, vocabulary)."""
    first_block = architecture.resume_block(delta_layer)
    entry: list[Tensor] = []
    values: list[Tensor] = []
    form: list[tuple[type, int]] = []
    value_index = (torch.arange(len(rows), device=aligned.subject.device), aligned.subject)
    with ExitStack() as stack:
        value_module = architecture.value_module(delta_layer)
        stack.enter_context(
            on_output(value_module, lambda hidden: values.append(at_positions(by_row(hidden, len(rows)), value_index)))
        )
        if first_block:
            skipped = architecture.blocks[first_block - 1]
            stack.enter_context(on_output(skipped, lambda hidden: entry.append(hidden.clone())))
            handle = skipped.register_forward_hook(lambda _, __, output: form.append(form_of_output(output)))
            stack.callback(handle.remove)
        logits = _logits(
            architecture, prediction_positions(rows, aligned.subject), input_ids=aligned.token_ids,
            attention_mask=aligned.attention_mask, **keywords,
        )  # fmt: skip
    if first_block:
        aligned = replace(aligned, entry=entry[0], block_form=form[0])
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
