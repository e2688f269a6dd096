"""Partial forward passes through the user's own model.

Nothing is re-implemented: the model's `forward` runs as it is, with blocks below the point of interest replaced by
stubs that pass stored hidden states on, and with the head applied only at the positions that are needed. So masks,
rotary embeddings, soft-caps and logit scales of every family are the model's own.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from hf_alphaedit.models.architecture import Architecture
from hf_alphaedit.models.encoding import TokenRow
from hf_alphaedit.models.hooks import captured_inputs, on_input, on_output, replaced_forward, stop_after


logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class AlignedRows:
    """Rows split before the subject's last token, so that all rows have it in the same column.

    What precedes it doesn't depend on the delta: it is kept as the attention keys and values of every block. What
    follows is kept as the hidden states that enter the first block to run.

    Attributes:
        token_ids: (B, S) from the subject's last token on, padded on the right.
        attention_mask: (B, P + S); the P positions before are padded on the left.
        position_ids: (B, S) positions in the unpadded rows.
        entry: (B, S, h) output of the last block that is skipped; None if none is.
        subject: (B,) column of the subject's last token: 0 throughout, or anything if P is 0.
        attention_keys, attention_values: per block (B, heads, P, head size); empty if P is 0.
        block_form: type and length of what the blocks return.
    """

    token_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    entry: Tensor | None
    subject: Tensor
    attention_keys: tuple[Tensor, ...]
    attention_values: tuple[Tensor, ...]
    block_form: tuple[type, int]

    def select(self, rows: Tensor) -> AlignedRows:
        """The rows with these indices (n,)."""

        def pick(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, rows.to(tensor.device))

        return replace(
            self,
            token_ids=pick(self.token_ids),
            attention_mask=pick(self.attention_mask),
            position_ids=pick(self.position_ids),
            entry=None if self.entry is None else pick(self.entry),
            subject=pick(self.subject),
            attention_keys=tuple(pick(keys) for keys in self.attention_keys),
            attention_values=tuple(pick(values) for values in self.attention_values),
        )


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
    return _run_rows(architecture, rows, delta_layer, cached=False)  # ty: ignore[invalid-return-type]


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
            on_output(value_module, lambda hidden: values.append(_at(_by_row(hidden, len(rows)), value_index)))
        )
        if skipped is not None:
            stack.enter_context(on_output(skipped, lambda hidden: entry.append(hidden[:, before:].clone())))
            handle = skipped.register_forward_hook(lambda _, __, output: form.append(_form(output)))
            stack.callback(handle.remove)
        positions = prediction_positions(rows, subject, before)
        logits = _logits(
            architecture, positions, input_ids=token_ids, attention_mask=attention_mask,
            **_position_keywords(architecture, position_ids),
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


def prediction_positions(rows: Sequence[TokenRow], subject: Tensor, before: int = 0) -> tuple[Tensor, Tensor]:
    """Row and column of every position from a row's first prediction to its end, row by row: two (p,) tensors."""
    row_index, columns = [], []
    for index, (row, subject_column) in enumerate(zip(rows, subject.tolist(), strict=True)):
        for position in range(row.first_prediction, len(row.token_ids)):
            row_index.append(index)
            columns.append(before + subject_column + position - row.subject)
    return torch.tensor(row_index, device=subject.device), torch.tensor(columns, device=subject.device)


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
        by_row = _by_row(hidden, len(delta))
        index = (rows.to(hidden.device), aligned.subject.to(hidden.device))
        changed = by_row.index_put(index, delta.to(hidden.device, hidden.dtype), accumulate=True)
        return changed.view_as(hidden)

    keywords: dict[str, Any] = {"use_cache": False}
    if aligned.attention_keys:
        keywords = {"past_key_values": _cache_of(aligned), "use_cache": True}
    with (
        skipped_blocks(architecture, aligned, architecture.resume_block(delta_layer)),
        on_output(architecture.value_module(delta_layer), add_delta),
    ):
        return _logits(
            architecture, positions, input_ids=aligned.token_ids, attention_mask=aligned.attention_mask,
            **_position_keywords(architecture, aligned.position_ids), **keywords,
        )  # fmt: skip


@contextmanager
def skipped_blocks(architecture: Architecture, aligned: AlignedRows, first_block: int) -> Iterator[None]:
    """Blocks below `first_block` don't run; the last of them returns the stored hidden states."""
    kind, length = aligned.block_form

    def returning(hidden: Tensor) -> Any:
        return hidden if kind is Tensor else kind([hidden, *[None] * (length - 1)])

    def passing(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return returning(hidden_states)

    def entering(*_: Any, **__: Any) -> Any:
        return returning(aligned.entry)  # ty: ignore[invalid-argument-type]

    stubs = {block: passing for block in architecture.blocks[: max(first_block - 1, 0)]}
    if first_block:
        stubs[architecture.blocks[first_block - 1]] = entering
    with replaced_forward(stubs):
        yield


class KeyWalk:
    """Keys and current values of the same rows, layer after layer, while the weights change underneath.

    The rows end at the subject's last token. Each call of `advance` starts from the stored input of the layer it was
    called for last and stops at the layer whose output is the value, so nothing that can't have changed runs twice.
    """

    def __init__(self, architecture: Architecture, rows: Sequence[TokenRow], last_layer: int) -> None:
        rows = [row.until_subject() for row in rows]
        self.architecture, self.last_layer = architecture, last_layer
        self.aligned = whole_rows(architecture, rows)
        self.first_block = 0

    @torch.no_grad()
    def advance(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys (B, d) that enter `layer`'s down-projection, and values (B, h) at the last layer's value module."""
        architecture, aligned = self.architecture, self.aligned
        rows = torch.arange(len(aligned.subject), device=aligned.subject.device)

        def at_subject(hidden: Tensor) -> Tensor:
            return _at(_by_row(hidden.detach(), len(rows)), (rows, aligned.subject))

        values: list[Tensor] = []
        inputs: list[Tensor] = []
        form: list[tuple[type, int]] = [aligned.block_form]
        stop = architecture.value_module(self.last_layer)
        with (
            skipped_blocks(architecture, aligned, self.first_block),
            captured_inputs({layer: architecture.site(layer).module}, at_subject) as keys,
            on_input(architecture.blocks[layer], lambda hidden: inputs.append(hidden.detach().clone())),
            on_output(stop, lambda hidden: values.append(at_subject(hidden))),
            _form_of(architecture.blocks[max(layer - 1, 0)], form),
            stop_after(stop),
        ):
            architecture.model(
                input_ids=aligned.token_ids, attention_mask=aligned.attention_mask, use_cache=False,
                **_position_keywords(architecture, aligned.position_ids),
            )  # fmt: skip
        self.aligned, self.first_block = replace(aligned, entry=inputs[0], block_form=form[-1]), layer
        return keys[layer], values[0]


def whole_rows(architecture: Architecture, rows: Sequence[TokenRow]) -> AlignedRows:
    """Rows padded on the right, with nothing stored yet."""
    device, length = architecture.input_device, max(len(row.token_ids) for row in rows)
    token_ids = torch.zeros(len(rows), length, dtype=torch.long)  # (B, S)
    attention_mask = torch.zeros_like(token_ids)
    for index, row in enumerate(rows):
        token_ids[index, : len(row.token_ids)] = torch.tensor(row.token_ids)
        attention_mask[index, : len(row.token_ids)] = 1
    position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0).to(device)
    subject = torch.tensor([row.subject for row in rows], device=device)
    return AlignedRows(
        token_ids.to(device), attention_mask.to(device), position_ids, None, subject, (), (), (Tensor, 1)
    )


def _logits(architecture: Architecture, positions: tuple[Tensor, Tensor], **inputs: Any) -> Tensor:
    """The model's logits (p, vocabulary) at (row, column) positions; the head runs on these alone."""
    with on_input(architecture.head, lambda hidden: _at(hidden, positions)[None]):  # (B, S, h) -> (1, p, h)
        return architecture.model(**inputs).logits[0]


def _by_row(hidden: Tensor, count: int) -> Tensor:
    """(B, S, h), also where a family flattens it to (B S, h) around its feed-forward."""
    return hidden if hidden.dim() == 3 else hidden.reshape(count, -1, hidden.shape[-1])


def _at(hidden: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
    """(B, S, h) -> (p, h), a copy of the hidden states at (row, column)."""
    rows, columns = positions
    return hidden[rows.to(hidden.device), columns.to(hidden.device)]


def _position_keywords(architecture: Architecture, position_ids: Tensor) -> dict[str, Tensor]:
    """`position_ids`, for the families whose forward takes them; the others read positions off the mask."""
    takes = "position_ids" in inspect.signature(type(architecture.model).forward).parameters
    return {"position_ids": position_ids} if takes else {}


def _cache_of(aligned: AlignedRows) -> DynamicCache:
    """A fresh cache that holds the stored states without copying them (an update makes new tensors)."""
    cache = DynamicCache()
    for keys, values in zip(aligned.attention_keys, aligned.attention_values, strict=True):
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _form(output: Any) -> tuple[type, int]:
    return (Tensor, 1) if isinstance(output, Tensor) else (type(output), len(output))


@contextmanager
def _form_of(block: torch.nn.Module, forms: list[tuple[type, int]]) -> Iterator[None]:
    handle = block.register_forward_hook(lambda _, __, output: forms.append(_form(output)))
    try:
        yield
    finally:
        handle.remove()
