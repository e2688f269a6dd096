"""Rows whose tokens stand one behind the other, without padding, for everything but attention.

Products, norms and activations don't care which row a token is in. Attention does: it gets the tokens laid out in
padded rows, behind the stored states of what precedes them. A third of what the target search runs would be padding
otherwise, since of '<subject> is a' it runs a single token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_alphaedit.models.architecture import Architecture
from hf_alphaedit.models.forward import resume_rows
from hf_alphaedit.models.rows import AlignedRows


ATTENTION = "sdpa"
# Settings of families in which some blocks attend to so many positions at most.
WINDOWS = ("sliding_window", "attention_chunk_size")


@dataclass(frozen=True, eq=False)
class PackedRows:
    """B rows of S columns that hold T tokens, as one row of T tokens.

    Attributes:
        padded: the rows as attention finds them.
        line: the same tokens as one row: ids, positions and entry are (1, T), `subject` is where each row's subject is
            among them, the mask is attention's own, (B, 1, S, P + S), and nothing is stored.
        column: (T,) place of each token among the B·S columns.
        token: (B, S) place of each column's token in the line; 0 for padding.
    """

    padded: AlignedRows
    line: AlignedRows
    column: Tensor
    token: Tensor

    @classmethod
    def of(cls, padded: AlignedRows) -> PackedRows:
        """The same rows, packed."""
        count, columns = padded.token_ids.shape
        seen, device = padded.attention_mask.bool(), padded.token_ids.device  # (B, P + S)
        before = seen.shape[1] - columns  # P
        column = seen[:, before:].flatten().nonzero()[:, 0]  # (T,)
        token = torch.zeros(count * columns, dtype=torch.long, device=device)
        token[column] = torch.arange(len(column), device=device)
        token = token.view(count, columns)
        # Padding stands behind all tokens of its row, so that causality alone hides it.
        causal = torch.ones(columns, columns, dtype=torch.bool, device=device).tril().expand(count, -1, -1)
        mask = torch.cat([seen[:, None, :before].expand(-1, columns, -1), causal], dim=-1)[:, None]

        def in_line(states: Tensor) -> Tensor:  # (B, S, ...) -> (1, T, ...)
            return states.flatten(0, 1).index_select(0, column.to(states.device))[None]

        line = replace(
            padded, token_ids=in_line(padded.token_ids), position_ids=in_line(padded.position_ids),
            entry=None if padded.entry is None else in_line(padded.entry), attention_mask=mask,
            subject=token[torch.arange(count, device=device), padded.subject], attention_keys=(), attention_values=(),
        )  # fmt: skip
        return cls(padded, line, column, token)

    def spread(self, states: Tensor) -> Tensor:
        """(1, heads, T, size) -> (B, heads, S, size); in padding stands the first token's."""
        token = self.token.to(states.device)  # (B, S)
        rows = states[0].transpose(0, 1).index_select(0, token.flatten())  # (B·S, heads, size)
        return rows.unflatten(0, token.shape).transpose(1, 2)

    def gather(self, states: Tensor) -> Tensor:
        """(B, S, heads, size) -> (1, T, heads, size)."""
        return states.flatten(0, 1).index_select(0, self.column.to(states.device))[None]

    @contextmanager
    def attention(self) -> Iterator[None]:
        """transformers' attention gets the rows instead of the line, as far as this thread calls it."""
        attend, thread = ALL_ATTENTION_FUNCTIONS[ATTENTION], get_ident()

        def attend_in_rows(
            module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **keywords: Any
        ) -> tuple[Tensor, Any]:
            if get_ident() != thread:
                return attend(module, query, key, value, *arguments, **keywords)
            query, key, value = self.spread(query), self.spread(key), self.spread(value)
            if self.padded.attention_keys:
                block = module.layer_idx
                key = torch.cat([self.padded.attention_keys[block], key], dim=2)  # (B, heads, P + S, size)
                value = torch.cat([self.padded.attention_values[block], value], dim=2)
            attended, weights = attend(module, query, key, value, *arguments, **keywords)  # (B, S, heads, size)
            return self.gather(attended), weights

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
