"""Keys of edit sites, taken from a forward pass while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor

from hf_alphaedit.models.experts import ExpertsSite, Routing, expert_keys, on_routing
from hf_alphaedit.models.hooks import on_input
from hf_alphaedit.models.weights import EditSite


Block = tuple[Tensor, Tensor]  # rows (m,) that have a key in this block, and these keys (m, d)
Keys = dict[str, Block]  # block name -> the part of the keys that lies in it; a block without a key may be missing


@contextmanager
def captured_keys(sites: Sequence[EditSite], select: Callable[[Tensor], Tensor]) -> Iterator[dict[str, Keys]]:
    """Keep the keys of every site that runs inside the block: site name -> keys by block.

    Args:
        sites: where keys are taken.
        select: takes the wanted positions out of a tensor with one row for each position, (B, T, x) or (B T, x),
            and gives (n, x).
    """
    captured: dict[str, Keys] = {}
    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(_keeping(site, select, captured))
        yield captured


def _keeping(
    site: EditSite, select: Callable[[Tensor], Tensor], captured: dict[str, Keys]
) -> AbstractContextManager[None]:
    def keep(hidden: Tensor) -> None:
        keys = select(hidden.detach())  # (n, d)
        captured[site.name] = {site.name: (torch.arange(len(keys), device=keys.device), keys)}

    def keep_routed(routing: Routing) -> None:
        blocks, found = site.blocks, expert_keys(site.module, routing.map(select))
        captured[site.name] = {blocks[expert]: (rows, keys) for expert, rows, keys in found}

    return on_routing(site.module, keep_routed) if isinstance(site, ExpertsSite) else on_input(site.module, keep)


def side_by_side(site: EditSite, keys: Keys, count: int) -> Tensor:
    """All blocks as whole keys (count, d) of the site, zero where a row has no key in a block."""
    if len(site.blocks) == 1:
        return keys[site.blocks[0]][1]
    parts = next(iter(keys.values()))[1].new_zeros(count, len(site.blocks), site.dimension)
    for index, name in enumerate(site.blocks):
        if name in keys:
            rows, part = keys[name]
            parts[:, index].index_add_(0, rows, part)
    return parts.flatten(1)
