"""Rows whose tokens stand one behind the other, without padding, for everything but attention.

Products, norms and activations don't care which row a token is in. Attention does: it gets the tokens laid out in
padded rows, behind the stored states of what precedes them. A third of what the target search runs would be padding
otherwise, since of '<subject> is a' it runs a single token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_alphaedit.models.architecture import Architecture
from hf_alphaedit.models.forward import resume_rows
from hf_alphaedit.models.rows import AlignedRows


ATTENTION = "sdpa"
# Settings of families in which some blocks attend to so many positions at most.
WINDOWS = ("sliding_window", "attention_chunk_size")


@dataclass(frozen=True, eq=False)
class Group:
    """Some rows as attention finds them: b rows of s columns that hold t tokens, p columns of stored states before.

    Rows of a group should be alike in length: attention runs for each group by itself, and padding costs it most.

    Attributes:
        rows: the rows, padded.
        column: (t,) place of each token among the b·s columns.
        token: (b, s) place of each column's token among the t; 0 for padding.
        mask: (b, 1, s, p + s) what each column sees.
    """

    rows: AlignedRows
    column: Tensor
    token: Tensor
    mask: Tensor

    @classmethod
    def of(cls, rows: AlignedRows) -> Group:
        """A group of these rows, with what is stored of them."""
        count, columns = rows.token_ids.shape
        seen, device = rows.attention_mask.bool(), rows.token_ids.device  # (b, p + s)
        column = seen[:, rows.before :].flatten().nonzero()[:, 0]
        token = torch.zeros(count * columns, dtype=torch.long, device=device)
        token[column] = torch.arange(len(column), device=device)
        # Padding stands behind all tokens of its row, so that causality alone hides it.
        causal = torch.ones(columns, columns, dtype=torch.bool, device=device).tril().expand(count, -1, -1)
        mask = torch.cat([seen[:, None, : rows.before].expand(-1, columns, -1), causal], dim=-1)[:, None]
        return cls(rows, column, token.view(count, columns), mask)

    @property
    def padded(self) -> bool:
        """Whether any of the columns is padding. Otherwise the tokens are in place as they are."""
        return len(self.column) < self.token.numel()

    def spread(self, states: Tensor) -> Tensor:
        """(t, heads, size) -> (b, heads, s, size); in padding stands the first token's."""
        if not self.padded:
            return states.unflatten(0, self.token.shape).transpose(1, 2)
        token = self.token.to(states.device)
        return states.index_select(0, token.flatten()).unflatten(0, token.shape).transpose(1, 2)

    def gather(self, states: Tensor) -> Tensor:
        """(b, s, ...) -> (t, ...)."""
        if not self.padded:
            return states.flatten(0, 1)
        return states.flatten(0, 1).index_select(0, self.column.to(states.device))


@dataclass(frozen=True, eq=False)
class PackedRows:
    """B rows of S columns at most, as one row of their T tokens.

    Attributes:
        line: the tokens as one row: ids, positions and entry are (1, T), `subject` says where each row's subject is
            among them, and nothing is stored. Its mask only tells the model's code to make none.
        token: (B, S) place of each column's token in the line; in padding stands another one's.
        groups: the rows as attention finds them.
    """

    line: AlignedRows
    token: Tensor
    groups: Sequence[Group]

    @classmethod
    def of(cls, groups: Sequence[Group]) -> PackedRows:
        """The rows of all groups, one group behind the other."""
        columns = max(group.token.shape[1] for group in groups)  # S
        tokens, start = [], 0
        for group in groups:
            in_line = group.token + start
            tokens.append(functional.pad(in_line, (0, columns - in_line.shape[1])))
            start += len(group.column)
        token = torch.cat(tokens)  # (B, S)
        subject = torch.cat([group.rows.subject for group in groups])  # (B,)

        def joined(name: str) -> Tensor:  # (1, T, ...)
            return torch.cat([group.gather(getattr(group.rows, name)) for group in groups])[None]

        line = replace(
            groups[0].rows, token_ids=joined("token_ids"), position_ids=joined("position_ids"),
            entry=None if groups[0].rows.entry is None else joined("entry"), attention_mask=groups[0].mask,
            subject=token[torch.arange(len(token), device=token.device), subject],
            attention_keys=(), attention_values=(),
        )  # fmt: skip
        return cls(line, token, groups)

    @contextmanager
    def attention(self) -> Iterator[None]:
        """transformers' attention gets the rows instead of the line, as far as this thread calls it."""
        attend, thread = ALL_ATTENTION_FUNCTIONS[ATTENTION], get_ident()
        sizes = [len(group.column) for group in self.groups]

        def attend_in_rows(
            module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **keywords: Any
        ) -> tuple[Tensor, None]:
            if get_ident() != thread:
                return attend(module, query, key, value, mask, **keywords)
            # Three times (1, heads, T, size), cut into (t, heads, size) for each group.
            parts = zip(*[states[0].transpose(0, 1).split(sizes) for states in (query, key, value)], strict=True)
            attended = []
            for group, part in zip(self.groups, parts, strict=True):
                query, key, value = map(group.spread, part)
                if group.rows.attention_keys:
                    block = module.layer_idx
                    key = torch.cat([group.rows.attention_keys[block], key], dim=2)  # (b, heads, p + s, size)
                    value = torch.cat([group.rows.attention_values[block], value], dim=2)
                output, _ = attend(module, query, key, value, group.mask.to(query.device), **keywords)
                attended.append(group.gather(output))  # (b, s, heads, size) -> (t, heads, size)
            return torch.cat(attended)[None], None

        ALL_ATTENTION_FUNCTIONS[ATTENTION] = attend_in_rows
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS[ATTENTION]
            if ALL_ATTENTION_FUNCTIONS[ATTENTION] is not attend:  # what was there was somebody's own
                ALL_ATTENTION_FUNCTIONS[ATTENTION] = attend


def resume_packed(
    architecture: Architecture,
    packed: PackedRows,
    delta_layer: int,
    delta: Tensor,
    positions: tuple[Tensor, Tensor],
) -> Tensor:
    """As `forward.resume_rows`, of packed rows; `positions` are (row, column) in the padded ones."""
    place = packed.token[positions]  # (p,)
    with packed.attention():
        return resume_rows(architecture, packed.line, delta_layer, delta, (torch.zeros_like(place), place))


def sees_everything(architecture: Architecture, length: int) -> bool:
    """Whether every block attends to all of `length` positions: the mask of packed rows is the same for all blocks."""
    config = architecture.model.config.get_text_config(decoder=True)
    return all(length <= (getattr(config, window, None) or length) for window in WINDOWS)
