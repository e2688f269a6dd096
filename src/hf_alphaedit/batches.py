"""Batches of edits: the factors that each adds to the weights, and their form as JSON and named tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_alphaedit.algorithm.update import LowRankUpdate
from hf_alphaedit.errors import RequestError, StateError
from hf_alphaedit.requests import EditRequest
from hf_alphaedit.state import entry_of


# A delta is summed in float64 for this many elements at a time (128 MiB), whatever the size of the weight.
CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True, eq=False)
class Batch:
    """The edits of one solve, in order.

    Attributes:
        requests: what was asked; empty where the texts were withheld from the file that this batch was read from.
        keys: site -> (n, d) float32, filtered keys F^½ k. A site without them isn't protected from later edits.
        updates: site -> the factors of what was added to its weight.
        settings: `AlphaEditConfig.to_dict()` at the time.
        created: when, ISO 8601, UTC.
        withheld: number of edits whose request isn't in `requests`.
        outcomes: for each request, what was measured (plain JSON types), e.g. {"before": ..., "after": ...}; may be
            empty.
    """

    requests: tuple[EditRequest, ...]
    keys: Mapping[str, Tensor]
    updates: Mapping[str, LowRankUpdate]
    settings: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""
    withheld: int = 0
    outcomes: tuple[Mapping[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.requests) + self.withheld


def shape_of(update: LowRankUpdate) -> tuple[int, int]:
    """(h, d) of the weight that `update` is for."""
    return update.outputs.shape[1], update.inputs.shape[1]


def dense_update(delta: Tensor) -> LowRankUpdate:
    """A dense (h, d) float32 delta as factors, exactly: every row of the weight is an output of its own."""
    return LowRankUpdate(delta, torch.eye(len(delta)))


def _is_dense(update: LowRankUpdate) -> bool:
    rows, height = update.outputs.shape
    return rows == height and torch.equal(update.outputs, torch.eye(rows))


def in_force(batches: Sequence[Batch], again: Sequence[EditRequest] = ()) -> list[list[int]]:
    """For each batch, the places of those of its edits that no later one takes the place of.

    An edit takes the place of earlier ones with the same text. One whose text was withheld stays in force: nobody
    can tell what it was.

    Args:
        batches: oldest first.
        again: requests that are about to follow them.
    """
    later, places = {request.text for request in again}, []
    for batch in reversed(batches):
        known = len(batch.requests)
        kept = list(range(known, len(batch)))
        for place in reversed(range(known)):
            if (text := batch.requests[place].text) not in later:
                later.add(text)
                kept.append(place)
        places.append(sorted(kept))
    return places[::-1]


def requests_in_force(batches: Sequence[Batch], again: Sequence[EditRequest] = ()) -> list[EditRequest]:
    """The requests of the edits in force, oldest first, as far as their texts are known."""
    return [
        batch.requests[place]
        for batch, places in zip(batches, in_force(batches, again), strict=True)
        for place in places
        if place < len(batch.requests)
    ]


def count_facts(batches: Sequence[Batch], again: Sequence[EditRequest] = ()) -> int:
    """How many edits are in force."""
    return sum(map(len, in_force(batches, again)))


def past_keys(batches: Sequence[Batch], site_name: str, again: Sequence[EditRequest] = ()) -> Tensor | None:
    """(p, d) float32 filtered keys of all edits in force at one site, oldest first; None without any.

    A solve that protected the keys of an edit that it makes anew would hold on to what is to change.
    """
    keys = []
    for batch, places in zip(batches, in_force(batches, again), strict=True):
        found = batch.keys.get(site_name)
        if found is not None:  # a pack of one summed batch may hold keys of some edits only: then all stay
            keys.append(found[places] if len(found) == len(batch) else found)
    return torch.cat(keys) if any(map(len, keys)) else None


def applied_updates(site_name: str, batches: Sequence[Batch], dtype: torch.dtype) -> list[LowRankUpdate]:
    """The updates of one site, oldest first, as they are applied to a weight of `dtype`.

    Those of a bfloat16 weight are applied with their factors in bfloat16, so that the edit pack, which stores them so,
    gives the same bits. That changes a product by less than 0.4 %; rounding the edited weight changes far more.
    """
    updates = [batch.updates[site_name] for batch in batches if site_name in batch.updates]
    if dtype != torch.bfloat16:
        return updates
    return [
        update
        if _is_dense(update)
        else LowRankUpdate(update.inputs.to(dtype).float(), update.outputs.to(dtype).float())
        for update in updates
    ]


def delta_in_chunks(
    updates: Sequence[LowRankUpdate], shape: Sequence[int], device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the (h, d) sum of `updates`, and their float64 values (r, d) on `device`; nothing without an update.

    The order of the sum depends on nothing but the order of the updates, so the same call gives the same bits.
    """
    if not updates:
        return
    height, width = shape
    # Inputs (n, d) are read by every chunk, so they are widened once.
    factors = [(update.outputs.to(device), update.inputs.to(device).double()) for update in updates]
    step = max(1, CHUNK_ELEMENTS // width)
    for start in range(0, height, step):
        rows = slice(start, min(start + step, height))
        total = torch.zeros(rows.stop - start, width, dtype=torch.float64, device=device)  # (r, d)
        for outputs, inputs in factors:
            total += outputs[:, rows].double().T @ inputs  # (r, n) (n, d) -> (r, d)
        yield rows, total


def encode_batches(
    batches: Sequence[Batch],
    *,
    include_requests: bool = True,
    include_keys: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """JSON entries and named tensors of `batches`.

    Factors and keys are rounded to `dtype`; a dense update (see `dense_update`) is stored once, in float32.
    """
    entries, tensors = [], {}
    for number, batch in enumerate(batches):
        keys = batch.keys if include_keys else {}
        entry: dict[str, Any] = {
            "count": len(batch),
            "settings": dict(batch.settings),
            "created": batch.created,
            "updates": sorted(batch.updates),
            "dense": [],
            "keys": sorted(keys),
        }
        if include_requests and batch.requests:
            entry["requests"] = [request.to_dict() for request in batch.requests]
            entry["outcomes"] = [dict(outcome) for outcome in batch.outcomes]
        entries.append(entry)
        for site, update in batch.updates.items():
            if _is_dense(update):
                entry["dense"].append(site)
                tensors[f"{number}/{site}/inputs"] = update.inputs
            else:
                tensors[f"{number}/{site}/inputs"] = update.inputs.to(dtype)
                tensors[f"{number}/{site}/outputs"] = update.outputs.to(dtype)
        for site, rows in keys.items():
            tensors[f"{number}/{site}/keys"] = rows.to(dtype)
    return entries, tensors


def decode_batches(entries: Sequence[Any], tensors: dict[str, Tensor], path: Path) -> list[Batch]:
    """The inverse of `encode_batches`. Takes what it uses out of `tensors`; all of it becomes float32.

    Raises:
        StateError: naming `path`, the batch and what is wrong with it.
    """
    return [_decode_batch(number, entry, tensors, path) for number, entry in enumerate(entries)]


def _decode_batch(number: int, entry: Any, tensors: dict[str, Tensor], path: Path) -> Batch:
    where = f"{path}: batch {number}"
    if not isinstance(entry, dict):
        raise StateError(f"{where} is a {type(entry).__name__} instead of an object; save it again")

    def taken(site: str, part: str) -> Tensor:
        tensor = tensors.pop(f"{number}/{site}/{part}", None)
        if tensor is None:
            raise StateError(f"{where} has no {part} for {site}; save it again")
        if tensor.ndim != 2 or not tensor.dtype.is_floating_point or not tensor.isfinite().all():
            raise StateError(f"{where}: the {part} of {site} are no finite matrix; save it again")
        return tensor.float()

    dense = entry_of(entry, "dense", list, where)
    updates = {}
    for site in map(str, entry_of(entry, "updates", list, where)):
        inputs = taken(site, "inputs")
        updates[site] = dense_update(inputs) if site in dense else LowRankUpdate(inputs, taken(site, "outputs"))
        if len(updates[site].inputs) != len(updates[site].outputs):
            raise StateError(f"{where}: inputs and outputs of {site} have different numbers of rows; save it again")
    keys = {site: taken(site, "keys") for site in map(str, entry_of(entry, "keys", list, where))}
    for site, rows in keys.items():
        if site not in updates or rows.shape[1] != updates[site].inputs.shape[1]:
            raise StateError(f"{where}: the keys of {site} don't fit its update; save it again")
    count = entry_of(entry, "count", int, where)
    outcomes = entry.get("outcomes", [])
    if not isinstance(outcomes, list) or not all(isinstance(outcome, dict) for outcome in outcomes):
        raise StateError(f"{where}: outcomes={outcomes!r} must be a list of objects; save it again")
    try:
        requests = tuple(EditRequest(**fields) for fields in entry.get("requests", []))
    except (TypeError, RequestError) as error:
        raise StateError(f"{where} holds a request that can't be read ({error}); save it again") from error
    if count < 1 or len(requests) not in (0, count):
        raise StateError(f"{where} counts {count} edits and holds {len(requests)} requests; save it again")
    return Batch(
        requests=requests,
        keys=keys,
        updates=updates,
        settings=entry_of(entry, "settings", dict, where),
        created=entry_of(entry, "created", str, where),
        withheld=count - len(requests),
        outcomes=tuple(outcomes),
    )
