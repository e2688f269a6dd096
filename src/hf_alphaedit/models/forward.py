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
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicCache

from hf_alphaedit.models.architecture import Architecture
from hf_alphaedit.models.beginnings import Beginnings, alike, cache_of, continued_rows, continuing, is_plain
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
) -> tuple[AlignedRows, Tensor]:
    """Run rows once, as far as a delta at `delta_layer` can't reach, and keep what later passes with it need.

    Args:
        architecture: the model's parts.
        rows: the rows, each with its own subject.
        delta_layer: the layer whose value is to be changed; blocks below `resume_block` won't run again.
        cached: split the rows at the subject and keep attention states, where every block has such states; otherwise,
            or with False, keep whole rows, which works for every causal model, whatever its cache.
        groups: one number per row; tokens that all rows of a group begin with run once for the group, if `cached`.

    Returns:
        The rows, and the values (B, h) at each row's subject.
    """
    if cached:
        try:
            split = _split_with_states(architecture, rows, groups or range(len(rows)))
            if split is not None:
                return _run_to_values(architecture, split, delta_layer)
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError) as error:
            if should_reduce_batch_size(error):
                raise
            logger.info("%s can't keep plain attention states (%s)", type(architecture.model).__name__, error)
    return _run_to_values(architecture, whole_rows(architecture, rows), delta_layer)


def _split_with_states(
    architecture: Architecture, rows: Sequence[TokenRow], groups: Sequence[int]
) -> AlignedRows | None:
    """The rows split at the subject, with the attention states of what precedes it.

    Rows run beside others of their length, so that little of what runs is padding. None if nothing precedes a subject,
    or if some block's state isn't one attention key and value for each position.
    """
    split, before = split_rows(architecture, rows), max(row.subject for row in rows)  # P
    beginnings, blocks = Beginnings.of(architecture, rows, groups), len(architecture.blocks)
    common = [0] * len(rows) if beginnings is None else beginnings.lengths
    preceding = [TokenRow(row.token_ids[: row.subject], row.subject, row.subject) for row in rows]
    shared, begun = max(common), DynamicCache()  # C
    if beginnings is not None:
        _run_through(architecture, beginnings.aligned, {"past_key_values": begun, "use_cache": True})
        if not is_plain(begun.layers, blocks, shared):
            return None
    kept: list[tuple[Tensor, Tensor]] = []  # keys and values of each block, (B, heads, P, size)
    for members in alike([row.subject - length for row, length in zip(rows, common, strict=True)]):
        lengths = [common[index] for index in members]
        running = continued_rows(architecture, [preceding[index] for index in members], lengths, shared)
        own = running.token_ids.shape[1]  # R
        cache = DynamicCache() if beginnings is None else beginnings.for_rows(begun.layers, members)
        if own:
            _run_through(architecture, running, continuing(architecture, cache, running))
        if not is_plain(cache.layers, blocks, before and shared + own):
            return None
        row, column, ran_in, ran_at = [], [], [], []  # where each token before a subject belongs, and where it ran
        for place, (index, length) in enumerate(zip(members, lengths, strict=True)):
            count = rows[index].subject
            row += [index] * count
            column += range(before - count, before)
            ran_in += [place] * count
            ran_at += [*range(length), *range(shared + own - (count - length), shared + own)]
        for block, layer in enumerate(cache.layers):
            if len(kept) == block:
                kept.append((_room(layer.keys, len(rows), before), _room(layer.values, len(rows), before)))
            for states, ran in zip(kept[block], (layer.keys, layer.values), strict=True):
                states[row, :, column] = ran[ran_in, :, ran_at]
    return replace(
        split, attention_keys=tuple(keys for keys, _ in kept), attention_values=tuple(values for _, values in kept)
    )


def _room(states: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros for such states (b, heads, n, size): padding is masked, but a NaN in it would survive a weight of zero."""
    return states.new_zeros(rows, states.shape[1], columns, states.shape[3])


def _run_through(architecture: Architecture, aligned: AlignedRows, keywords: dict[str, Any]) -> None:
    """Run all blocks, but not the head; what they keep goes into the cache that is among the `keywords`."""
    with stop_after(architecture.blocks[-1]):
        architecture.model(input_ids=aligned.token_ids, attention_mask=aligned.attention_mask, **keywords)


def _run_to_values(architecture: Architecture, aligned: AlignedRows, delta_layer: int) -> tuple[AlignedRows, Tensor]:
    """Run up to the value module: `aligned` with what enters the first block to run again, and the values (B, h).

    Here, too, rows run beside others of their length. What is kept are the states of the blocks that will run again.
    """
    running = aligned.for_blocks(0, delta_layer + 1)
    aligned = aligned.for_blocks(architecture.resume_block(delta_layer), len(architecture.blocks))
    chunks = alike(aligned.attention_mask[:, aligned.before :].sum(-1).tolist())
    rows_of = [torch.tensor(rows) for rows in chunks]
    parts = [_run_side_by_side(architecture, running.select(rows), delta_layer) for rows in rows_of]
    order = torch.tensor([row for rows in chunks for row in rows]).argsort()
    values = torch.cat([found for _, found in parts])  # (B, h)
    aligned = replace(aligned, block_form=parts[0][0].block_form)
    entries = [part.entry for part, _ in parts if part.entry is not None]
    if entries:
        columns = aligned.token_ids.shape[1]
        padded = [functional.pad(entry, (0, 0, 0, columns - entry.shape[1])) for entry in entries]
        aligned = replace(aligned, entry=torch.cat(padded)[order.to(padded[0].device)])
    return aligned, values[order.to(values.device)]


def _run_side_by_side(
    architecture: Architecture, aligned: AlignedRows, delta_layer: int
) -> tuple[AlignedRows, Tensor]:
    """One pass of `_run_to_values`."""
    first_block, value_module = architecture.resume_block(delta_layer), architecture.value_module(delta_layer)
    entry: list[Tensor] = []
    values: list[Tensor] = []
    form: list[tuple[type, int]] = []
    count = len(aligned.token_ids)
    with ExitStack() as stack:
        if first_block:
            skipped = architecture.blocks[first_block - 1]
            stack.enter_context(on_output(skipped, lambda hidden: entry.append(hidden.clone())))
            handle = skipped.register_forward_hook(lambda _, __, output: form.append(form_of_output(output)))
            stack.callback(handle.remove)

        def keep_values(hidden: Tensor) -> None:
            values.append(at_positions(by_row(hidden, count), aligned.subjects))

        stack.enter_context(on_output(value_module, keep_values))
        with stop_after(value_module):
            architecture.model(
                input_ids=aligned.token_ids,
                attention_mask=aligned.attention_mask,
                **_continuing(architecture, aligned),
            )
    if first_block:
        aligned = replace(aligned, entry=entry[0], block_form=form[0])
    return aligned, values[0]


@torch.no_grad()
def whole_logits(architecture: Architecture, rows: Sequence[TokenRow]) -> Tensor:
    """The logits (p, vocabulary) of whole rows at their predictions (see `prediction_positions`)."""
    aligned = whole_rows(architecture, rows)
    return _logits(architecture, aligned, prediction_positions(rows, aligned.subject))


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
        delta: (B, h) added to the output of the value module of `delta_layer` at each subject.
        positions: (row, column) of the (p,) positions whose logits are wanted.

    Returns:
        (p, vocabulary) logits.
    """
    rows, columns = aligned.subjects

    def add_delta(hidden: Tensor) -> Tensor:  # (B, S, h)
        aside = by_row(hidden, len(aligned.token_ids))
        index = (rows.to(hidden.device), columns.to(hidden.device))
        changed = aside.index_put(index, delta.to(hidden.device, hidden.dtype), accumulate=True)
        return changed.view_as(hidden)

    with (
        skipped_blocks(architecture, aligned, architecture.resume_block(delta_layer)),
        on_output(architecture.value_module(delta_layer), add_delta),
    ):
        return _logits(architecture, aligned, positions)


def _logits(architecture: Architecture, aligned: AlignedRows, positions: tuple[Tensor, Tensor]) -> Tensor:
    """The model's logits (p, vocabulary) at (row, column) positions; the head runs on these alone."""
    with on_input(architecture.head, lambda hidden: at_positions(hidden, positions)[None]):  # (B, S, h) -> (1, p, h)
        output = architecture.model(
            input_ids=aligned.token_ids, attention_mask=aligned.attention_mask, **_continuing(architecture, aligned)
        )
    return output.logits.squeeze(0)  # whose backward pass, unlike that of an index, copies nothing


def _continuing(architecture: Architecture, aligned: AlignedRows) -> dict[str, Any]:
    """Keywords for a pass that continues from the stored attention states, if there are any."""
    if aligned.attention_mask.dim() == 4:  # packed rows, which look after their states themselves
        return {"use_cache": False, **position_keywords(architecture, aligned.position_ids)}
    if not aligned.attention_keys:
        return {"use_cache": False}
    states = zip(aligned.attention_keys, aligned.attention_values, strict=True)
    return continuing(architecture, cache_of(states), aligned)
