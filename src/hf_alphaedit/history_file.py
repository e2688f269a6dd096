"""Batches of edits as JSON and named tensors, for the history beside a checkpoint and for the edit pack."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import torch
import transformers
from torch import Tensor

from hf_alphaedit import __version__
from hf_alphaedit.algorithm.update import LowRankUpdate
from hf_alphaedit.errors import RequestError, StateError
from hf_alphaedit.history import Batch, History
from hf_alphaedit.models.fingerprint import weight_digest
from hf_alphaedit.requests import EditRequest
from hf_alphaedit.state import read_state, write_state


if TYPE_CHECKING:
    from hf_alphaedit.models.weights import EditSite

HISTORY_KIND = "hf_alphaedit.history"


def save_history(history: History, path: Path, include_requests: bool, sites: Sequence[EditSite]) -> None:
    """Write `history` to `path`; see `History.save`."""
    entries, tensors = encode_batches(history.batches, include_requests=include_requests)
    current = {site.name: site for site in sites}
    edited = {
        name: weight_digest(current[name].read() if name in current else history.weight(name))
        for name in history.base_weights
    }
    document = {**encode_base(history), "batches": entries, "edited_digests": edited}
    tensors |= {f"base/{name}": weight for name, weight in history.base_weights.items()}
    write_state(path, HISTORY_KIND, document, tensors)


def load_history(path: Path) -> History:
    """Read what `save_history` wrote; see `History.load`."""
    document, tensors = read_state(path, HISTORY_KIND)
    history = decode_base(document, path)
    names = [name for name in tensors if name.startswith("base/")]
    history.base_weights = {name.removeprefix("base/"): tensors.pop(name) for name in names}
    history.edited_digests = entry_of(document, "edited_digests", dict, path)
    history.batches = decode_batches(entry_of(document, "batches", list, path), tensors, path)
    if tensors:
        raise StateError(f"{path} holds tensors that no batch mentions: {sorted(tensors)[:3]}; save it again")
    for name, base in history.base_weights.items():
        if base.ndim != 2 or not base.dtype.is_floating_point:
            raise StateError(f"{path}: the unedited {name} is {base.dtype} {tuple(base.shape)}, no float matrix")
    for number, batch in enumerate(history.batches):
        for name, update in batch.updates.items():
            shape = (update.outputs.shape[1], update.inputs.shape[1])  # (h, d)
            if name not in history.base_weights or tuple(history.base_weights[name].shape) != shape:
                raise StateError(f"{path}: batch {number} has a {shape} update of {name}, but no such unedited weight")
    return history


def encode_base(history: History) -> dict[str, Any]:
    """What identifies the model that the edits belong to, and the versions that wrote it, in plain JSON types."""
    return {
        "base_fingerprint": history.base_fingerprint,
        "tokenizer_fingerprint": history.tokenizer_fingerprint,
        "base_model": history.base_model,
        "base_revision": history.base_revision,
        "contexts": None if history.contexts is None else list(history.contexts),
        "versions": {
            "hf_alphaedit": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
    }


def decode_base(document: Mapping[str, Any], path: Path) -> History:
    """A history without batches from what `encode_base` returned; `StateError` where an entry is missing or wrong."""
    fingerprints = [entry_of(document, name, str, path) for name in ("base_fingerprint", "tokenizer_fingerprint")]
    for value in fingerprints:
        if not re.fullmatch("[0-9a-f]{64}", value):
            raise StateError(f"{path}: {value!r} is not a fingerprint (64 hexadecimal digits); save it again")
    contexts = entry_of(document, "contexts", (list, type(None)), path)
    if contexts is not None and not all(isinstance(text, str) for text in contexts):
        raise StateError(f"{path}: contexts={contexts!r} must be a list of texts; save it again")
    return History(
        *fingerprints,
        base_model=entry_of(document, "base_model", (str, type(None)), path),
        base_revision=entry_of(document, "base_revision", (str, type(None)), path),
        contexts=contexts,
    )


def encode_batches(
    batches: Sequence[Batch],
    *,
    include_requests: bool = True,
    include_keys: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """JSON entries and named tensors of `batches`; the tensors are rounded to `dtype`."""
    entries, tensors = [], {}
    for number, batch in enumerate(batches):
        keys = batch.keys if include_keys else {}
        entry: dict[str, Any] = {
            "count": len(batch),
            "settings": dict(batch.settings),
            "created": batch.created,
            "updates": sorted(batch.updates),
            "keys": sorted(keys),
        }
        if include_requests and batch.requests:
            entry["requests"] = [request.to_dict() for request in batch.requests]
            entry["outcomes"] = [dict(outcome) for outcome in batch.outcomes]
        entries.append(entry)
        for site, update in batch.updates.items():
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

    updates = {
        str(site): LowRankUpdate(taken(site, "inputs"), taken(site, "outputs"))
        for site in entry_of(entry, "updates", list, where)
    }
    keys = {str(site): taken(site, "keys") for site in entry_of(entry, "keys", list, where)}
    for site, update in updates.items():
        rows = {len(update.inputs), len(update.outputs)} | ({len(keys[site])} if site in keys else set())
        if len(rows) > 1 or (site in keys and keys[site].shape[1] != update.inputs.shape[1]):
            raise StateError(f"{where}: inputs, outputs and keys of {site} don't fit together; save it again")
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


def entry_of(entry: Mapping[str, Any], name: str, kind: type | tuple[type, ...], where: Path | str) -> Any:
    """`entry[name]`, or `StateError` if it is missing or of another type."""
    if name not in entry or not isinstance(entry[name], kind):
        raise StateError(f"{where}: {name}={entry.get(name, 'missing')!r} is not as save_pretrained writes it")
    return entry[name]
