"""The walk over the edited layers: keys and current values, while the weights change underneath."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from hf_alphaedit.models.architecture import Architecture
from hf_alphaedit.models.beginnings import Beginnings, agree, continued_rows, continuing, is_plain, most_shifted
from hf_alphaedit.models.encoding import TokenRow
from hf_alphaedit.models.hooks import on_input, on_output, stop_after
from hf_alphaedit.models.keys import captured_keys, side_by_side
from hf_alphaedit.models.rows import (
    AlignedRows,
    at_positions,
    by_row,
    form_of_output,
    skipped_blocks,
    whole_rows,
)


logger = logging.getLogger(__name__)


class KeyWalk:
    """Keys and current values of the same rows, layer after layer, while the weights change underneath.

    The rows end at the subject's last token. Each call of `advance` starts from the stored input of the layer it was
    called for last and stops at the layer whose output is the value, or, if no values are wanted, behind the key, so
    nothing that can't have changed runs twice. What the rows of a group begin with runs once for the group.
    """

    def __init__(
        self, architecture: Architecture, rows: Sequence[TokenRow], groups: Sequence[int] | None = None
    ) -> None:
        """With `groups`, one number per row, the tokens that a group begins with are shared.

        That takes a model for which `beginnings_can_be_shared`.
        """
        rows = [row.until_subject() for row in rows]
        self.architecture = architecture
        self.beginnings = None if groups is None else Beginnings.of(architecture, rows, groups)
        if self.beginnings is None:
            self.aligned = whole_rows(architecture, rows)
        else:
            self.begun = self.beginnings.aligned
            self.aligned = continued_rows(architecture, rows, self.beginnings.lengths, max(self.beginnings.lengths))
        self.states: list[DynamicLayer] = []  # of the beginnings, for every block that has run
        self.first_block = 0

    @torch.no_grad()
    def advance(self, layer: int, value_layer: int | None) -> tuple[Tensor, Tensor | None]:
        """Keys (B, d) that enter `layer`'s down-projection, and values (B, h) at `value_layer`'s value module."""
        architecture = self.architecture
        count, subjects = len(self.aligned.token_ids), self.aligned.subjects

        def at_subject(hidden: Tensor) -> Tensor:
            return at_positions(by_row(hidden.detach(), count), subjects)

        def keep_value(hidden: Tensor) -> None:
            values.append(at_subject(hidden))

        values: list[Tensor] = []
        site = architecture.site(layer)
        stop = site.module if value_layer is None else architecture.value_module(value_layer)
        keywords = {"use_cache": False} if self.beginnings is None else self._begin(self.beginnings, layer, stop)
        with (
            captured_keys([site], at_subject) as keys,
            nullcontext() if value_layer is None else on_output(stop, keep_value),
        ):
            self.aligned = self._pass(self.aligned, layer, stop, keywords)
        self.first_block = layer
        return side_by_side(site, keys[site.name], count), None if value_layer is None else values[0]

    @property
    def entry(self) -> Tensor:
        """Hidden states (B, S, h) of these rows that entered the layer that `advance` was called for last."""
        if self.aligned.entry is None:
            raise ValueError("the walk hasn't begun: call advance first")
        return by_row(self.aligned.entry, len(self.aligned.subject))

    def _begin(self, beginnings: Beginnings, layer: int, stop: torch.nn.Module) -> dict[str, Any]:
        """Run the beginnings as far as the rows are about to run; keywords for a pass that continues from them."""
        cache = DynamicCache()
        self.begun = self._pass(self.begun, layer, stop, {"past_key_values": cache, "use_cache": True})
        # Blocks below don't run again; what is kept of them only says how many positions there are.
        self.states[self.first_block :] = cache.layers[self.first_block :]
        return continuing(self.architecture, beginnings.for_rows(self.states), self.aligned)

    def _pass(self, aligned: AlignedRows, layer: int, stop: torch.nn.Module, keywords: dict[str, Any]) -> AlignedRows:
        """Run from the first block that can have changed to `stop`; `aligned` with what entered `layer`."""
        blocks = self.architecture.blocks
        inputs: list[Tensor] = []
        form: list[tuple[type, int]] = [aligned.block_form]
        with (
            skipped_blocks(self.architecture, aligned, self.first_block),
            on_input(blocks[layer], lambda hidden: inputs.append(hidden.detach().clone())),
            _form_of(blocks[max(layer - 1, 0)], form),
            stop_after(stop),
        ):
            self.architecture.model(input_ids=aligned.token_ids, attention_mask=aligned.attention_mask, **keywords)
        return replace(aligned, entry=inputs[0], block_form=form[-1])


def beginnings_can_be_shared(
    architecture: Architecture, rows: Sequence[TokenRow], groups: Sequence[int], layers: Sequence[int]
) -> bool:
    """Whether rows that continue from a shared beginning have the keys of whole rows, to rounding.

    Found out by walking both ways over the first and the last of `layers` with the most shifted rows of one group.
    False for families that keep other states than plain attention keys and values.
    """
    members = [row for row, group in zip(rows, groups, strict=True) if group == groups[0]]
    pair, ends = most_shifted(members), (layers[0], layers[-1])
    try:
        shared = KeyWalk(architecture, pair, [0, 0])
        if shared.beginnings is None:
            return False
        found = [shared.advance(layer, None)[0] for layer in ends]
        if not is_plain(shared.states, len(shared.states), shared.begun.token_ids.shape[1]):
            return False
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError) as error:
        if should_reduce_batch_size(error):
            raise
        logger.info("%s can't continue from shared beginnings (%s)", type(architecture.model).__name__, error)
        return False
    whole = KeyWalk(architecture, pair)
    return all(agree(keys, whole.advance(layer, None)[0]) for layer, keys in zip(ends, found, strict=True))


@contextmanager
def _form_of(block: torch.nn.Module, forms: list[tuple[type, int]]) -> Iterator[None]:
    handle = block.register_forward_hook(lambda _, __, output: forms.append(form_of_output(output)))
    try:
        yield
    finally:
        handle.remove()
