"""Rows as the model takes them, split before the subject, and the small things that all partial passes need."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from hf_alphaedit.models.architecture import Architecture
from hf_alphaedit.models.encoding import TokenRow
from hf_alphaedit.models.hooks import replaced_forward


class RowForm(Enum):
    """How rows are resumed at the subject's last token; the first that a family can do is the fastest."""

    PACKED = "from stored attention states, without padding"
    PADDED = "from stored attention states, padded"
    WHOLE = "whole rows, from stored hidden states"


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
        attention_keys, attention_values: per block (B, heads, P, head size); empty if P is 0. Those of blocks that
            won't run again are small stand-ins (see `for_blocks`).
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

    @property
    def before(self) -> int:
        """P, the columns before the subject's."""
        return self.attention_mask.shape[1] - self.token_ids.shape[1]

    @property
    def subjects(self) -> tuple[Tensor, Tensor]:
        """Row and column of each subject's last token: one for every row, or all in the only one (`models.packed`)."""
        alone = len(self.token_ids) == 1
        columns = self.subject
        return torch.zeros_like(columns) if alone else torch.arange(len(columns), device=columns.device), columns

    def for_blocks(self, first: int, end: int) -> AlignedRows:
        """The rows with the attention states of blocks `first` to `end` - 1; others only say how many positions."""

        def of_blocks(states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(
                one if first <= block < end else one.new_zeros(len(one), 1, one.shape[2], 1)
                for block, one in enumerate(states)
            )

        return replace(
            self, attention_keys=of_blocks(self.attention_keys), attention_values=of_blocks(self.attention_values)
        )

    def select(self, rows: Tensor) -> AlignedRows:
        """The rows with these indices (n,), and no more columns than they need on either side."""

        def pick(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, rows.to(tensor.device))

        attention_mask = pick(self.attention_mask)
        seen = attention_mask.any(0).nonzero()[:, 0].tolist()  # the other columns are padding in all of these rows
        first, end = min(seen[0], max(self.before - 1, 0)), seen[-1] + 1
        columns = end - self.before
        return replace(
            self,
            token_ids=pick(self.token_ids)[:, :columns],
            attention_mask=attention_mask[:, first:end],
            position_ids=pick(self.position_ids)[:, :columns],
            entry=None if self.entry is None else pick(self.entry)[:, :columns].contiguous(),  # Conv1D takes views
            subject=pick(self.subject),
            attention_keys=tuple(pick(keys[:, :, first:]) for keys in self.attention_keys),
            attention_values=tuple(pick(values[:, :, first:]) for values in self.attention_values),
        )


def whole_rows(architecture: Architecture, rows: Sequence[TokenRow]) -> AlignedRows:
    """Rows padded on the right, with nothing stored yet."""
    return _laid_out(architecture, rows, [0] * len(rows))


def split_rows(architecture: Architecture, rows: Sequence[TokenRow]) -> AlignedRows:
    """Rows split before the subject's last token, with nothing stored yet."""
    return _laid_out(architecture, rows, [row.subject for row in rows])


def _laid_out(architecture: Architecture, rows: Sequence[TokenRow], splits: Sequence[int]) -> AlignedRows:
    """Rows of which the first `splits` tokens are in the P columns, and the others in the S."""
    device, before = architecture.input_device, max(splits)
    after = max(len(row.token_ids) - split for row, split in zip(rows, splits, strict=True))
    token_ids = torch.zeros(len(rows), after, dtype=torch.long)  # (B, S)
    attention_mask = torch.zeros(len(rows), before + after, dtype=torch.long)  # (B, P + S)
    for index, (row, split) in enumerate(zip(rows, splits, strict=True)):
        suffix = row.token_ids[split:]
        token_ids[index, : len(suffix)] = torch.tensor(suffix)
        attention_mask[index, before - split : before + len(suffix)] = 1
    position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)[:, before:]  # (B, S)
    subject = torch.tensor([row.subject - split for row, split in zip(rows, splits, strict=True)])
    return AlignedRows(
        token_ids.to(device), attention_mask.to(device), position_ids.to(device), None, subject.to(device), (), (),
        (Tensor, 1),
    )  # fmt: skip


def prediction_positions(rows: Sequence[TokenRow], subject: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every position from a row's first prediction to its end, row by row: two (p,) tensors."""
    row_index, columns = [], []
    for index, (row, subject_column) in enumerate(zip(rows, subject.tolist(), strict=True)):
        for position in range(row.first_prediction, len(row.token_ids)):
            row_index.append(index)
            columns.append(subject_column + position - row.subject)
    return torch.tensor(row_index, device=subject.device), torch.tensor(columns, device=subject.device)


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


def by_row(hidden: Tensor, count: int) -> Tensor:
    """(B, S, h), also where a family flattens it to (B S, h) around its feed-forward."""
    return hidden if hidden.dim() == 3 else hidden.reshape(count, -1, hidden.shape[-1])


def at_positions(hidden: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
    """(B, S, h) -> (p, h), a copy of the hidden states at (row, column)."""
    rows, columns = positions
    return hidden[rows.to(hidden.device), columns.to(hidden.device)]


def position_keywords(architecture: Architecture, position_ids: Tensor) -> dict[str, Tensor]:
    """`position_ids`, for the families whose forward takes them, where rows are padded on the left or resumed.

    Whole rows padded on the right need none, and are better off without: some families count from another number.
    """
    takes = "position_ids" in inspect.signature(type(architecture.model).forward).parameters
    return {"position_ids": position_ids} if takes else {}


def form_of_output(output: Any) -> tuple[type, int]:
    """Type and length of what a block returns; see `AlignedRows.block_form`."""
    return (Tensor, 1) if isinstance(output, Tensor) else (type(output), len(output))
