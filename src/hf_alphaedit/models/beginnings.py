"""What rows begin with in common: it runs once for all of them, and they continue from its attention states."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from hf_alphaedit.models.architecture import Architecture
from hf_alphaedit.models.encoding import TokenRow
from hf_alphaedit.models.rows import AlignedRows, position_keywords, whole_rows


# Largest relative difference between a resumed pass and a whole one that is rounding.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
LOW_PRECISION_TOLERANCE = 5e-2
# What a pass through all blocks takes however few tokens run, in tokens.
PASS_COST = 128


@dataclass(frozen=True, eq=False)
class Beginnings:
    """The tokens that all rows of a group begin with, up to the first subject among them; a row alone shares none.

    Attributes:
        aligned: one row (G, C) for each group, padded on the right; nothing is stored yet.
        row_group: (B,) the group of each row.
        lengths: tokens of each row that are in its group's beginning.
    """

    aligned: AlignedRows
    row_group: Tensor
    lengths: list[int]

    @classmethod
    def of(cls, architecture: Architecture, rows: Sequence[TokenRow], groups: Sequence[int]) -> Beginnings | None:
        """The beginnings of `rows`, of which `groups` gives the groups; None if no row shares a token."""
        members: dict[int, list[tuple[int, ...]]] = {}
        for row, group in zip(rows, groups, strict=True):
            members.setdefault(group, []).append(row.token_ids[: row.subject])
        common = {group: tuple(commonprefix(found)) if len(found) > 1 else () for group, found in members.items()}
        if not any(common.values()):
            return None
        # A group without a beginning still needs one token: nothing at all can't be attended to.
        aligned = whole_rows(architecture, [TokenRow(tokens or (0,), 0, 0) for tokens in common.values()])
        place = {group: index for index, group in enumerate(common)}
        row_group = torch.tensor([place[group] for group in groups])
        return cls(aligned, row_group, [len(common[group]) for group in groups])

    def for_rows(self, states: Iterable[DynamicLayer], rows: Sequence[int] | None = None) -> DynamicCache:
        """A cache with the beginning of each of `rows`, or of all, from the groups' states (G, heads, C, size)."""
        groups = self.row_group if rows is None else self.row_group[list(rows)]
        picked = []
        for layer in states:
            index = groups.to(layer.keys.device)
            picked.append((layer.keys.index_select(0, index), layer.values.index_select(0, index)))
        return cache_of(picked)


def continued_rows(
    architecture: Architecture, rows: Sequence[TokenRow], lengths: Sequence[int], shared: int
) -> AlignedRows:
    """Rows whose first `lengths` tokens have run already.

    What has run is in C = `shared` columns, padded on the right; then come R columns up to the subject's last token,
    padded on the left, and S from there on, padded on the right. Tokens are (B, R + S), the mask is (B, C + R + S).
    """
    own = max(row.subject - length for row, length in zip(rows, lengths, strict=True))  # R
    after = max(len(row.token_ids) - row.subject for row in rows)  # S
    token_ids = torch.zeros(len(rows), own + after, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), shared + own + after, dtype=torch.long)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        rest = row.token_ids[length:]
        start = own - (row.subject - length)
        token_ids[index, start : start + len(rest)] = torch.tensor(rest)
        attention_mask[index, :length] = 1
        attention_mask[index, shared + start : shared + start + len(rest)] = 1
    position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)[:, shared:]  # (B, R + S)
    device, subject = architecture.input_device, torch.full((len(rows),), own)
    return AlignedRows(
        token_ids.to(device), attention_mask.to(device), position_ids.to(device), None, subject.to(device), (), (),
        (Tensor, 1),
    )  # fmt: skip


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of rows of these lengths, longest first, cut where padding would cost more than another pass."""
    chunks: list[list[int]] = []
    padding = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        padding += lengths[chunks[-1][0]] - lengths[index] if chunks else 0
        if not chunks or padding > PASS_COST:
            chunks.append([])
            padding = 0
        chunks[-1].append(index)
    return chunks


def most_shifted(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """The two rows whose subjects end last and first: side by side, they are shifted against each other the most."""
    ordered = sorted(rows, key=lambda row: row.subject)
    return [ordered[-1], ordered[0]]


def continuing(architecture: Architecture, cache: DynamicCache, aligned: AlignedRows) -> dict[str, Any]:
    """Keywords for a pass of rows that go on from the states in `cache`, and add their own."""
    return {
        "past_key_values": cache,
        "use_cache": True,
        **position_keywords(architecture, aligned.position_ids),
    }


def cache_of(states: Iterable[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A fresh cache of these keys and values, one pair for each block, without copying them.

    A pass that continues from it makes new tensors, so they stay what they are.
    """
    cache = DynamicCache()
    for keys, values in states:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def is_plain(layers: Sequence[DynamicLayer], count: int, length: int) -> bool:
    """Whether these are `count` blocks' states, each a key and a value of every one of `length` positions."""
    lengths = [layer.keys.shape[-2] if type(layer) is DynamicLayer else 0 for layer in layers]
    return len(lengths) == count and set(lengths) == {length}


def agree(found: Tensor, reference: Tensor) -> bool:
    """Whether two ways of running the same rows differ by rounding alone, in the dtype of `reference`."""
    error = (found.float() - reference.float()).norm() / reference.float().norm()
    return bool(error < TOLERANCE.get(reference.dtype, LOW_PRECISION_TOLERANCE))
