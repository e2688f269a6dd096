"""One target search shared out over the processes of a launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_alphaedit.errors import EditingError
from hf_alphaedit.processes import Processes


if TYPE_CHECKING:
    from hf_alphaedit.targets import Targets


def search_shared(
    processes: Processes, order: Sequence[int], search: Callable[[Sequence[int]], Targets], empty: Targets
) -> Targets:
    """Let each process search for its share of the targets, and give all of them to all processes.

    Args:
        processes: all of them must call this, with the same requests.
        order: indices of all requests, neighbours alike in length; process r of p takes every p-th from the r-th on.
        search: indices -> their targets, in that order. Not called where a process gets none.
        empty: n rows of any content.

    Raises:
        EditingError: the search failed in another process; that one raises its own error.
    """
    mine = list(order[processes.rank :: processes.count])
    error: Exception | None = None
    found: Targets | None = None
    try:
        found = search(mine) if mine else None
    except Exception as raised:  # noqa: BLE001 - told to the others, who would wait for ever, and raised below
        error = raised
    failures = int(processes.sum(torch.tensor(0 if error is None else 1)))
    if error is not None:
        raise error
    if failures:
        raise EditingError(f"the target search failed in {failures} other process(es); their messages say why")

    def gathered(name: str) -> Tensor:
        whole = torch.zeros_like(getattr(empty, name))
        if found is not None:
            whole[mine] = getattr(found, name)
        exact = whole.long() if whole.dtype == torch.bool else whole
        return processes.sum(exact).to(whole.dtype)  # each row comes from one process: the sum is exact

    return type(empty)(**{name: gathered(name) for name in vars(empty)})
