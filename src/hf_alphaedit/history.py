"""What was edited: the batches of edits of one model, and its weights as they were before."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from hf_alphaedit import __version__
from hf_alphaedit.algorithm.update import LowRankUpdate
from hf_alphaedit.batches import (
    Batch,
    applied_updates,
    decode_batches,
    delta_in_chunks,
    encode_batches,
    past_keys,
    shape_of,
)
from hf_alphaedit.errors import StateError
from hf_alphaedit.models.fingerprint import weight_digest
from hf_alphaedit.requests import EditRequest
from hf_alphaedit.state import entry_of, read_state, write_state


if TYPE_CHECKING:
    from hf_alphaedit.models.weights import EditSite

__all__ = ["HISTORY_NAME", "Batch", "History"]

HISTORY_NAME = "alphaedit_history.safetensors"
HISTORY_KIND = "hf_alphaedit.history"


class History:
    """All edits of one model since its unedited base, and that base's weights at the edited sites.

    The weight after any of its batches is a pure function of the base weight and the batches' factors, see `weight`.
    So undoing is computing it again with fewer batches, and rounding to a narrow dtype never accumulates.

    Attributes:
        base_fingerprint: `model_fingerprint` of the unedited model.
        tokenizer_fingerprint: `tokenizer_fingerprint` of the tokenizer that found the subjects.
        base_model: Hub id or path of the unedited model, where known.
        base_revision: commit of `base_model`, where known.
        contexts: context templates sampled for the first batch; all later ones use the same.
        base_weights: site -> (h, d) on the CPU, in the model's dtype, before the first edit.
        batches: the edits, oldest first.
    """

    def __init__(
        self,
        base_fingerprint: str,
        tokenizer_fingerprint: str,
        *,
        base_model: str | None = None,
        base_revision: str | None = None,
        contexts: Sequence[str] | None = None,
    ) -> None:
        self.base_fingerprint = base_fingerprint
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.base_model = base_model
        self.base_revision = base_revision
        self.contexts = None if contexts is None else tuple(contexts)
        self.base_weights: dict[str, Tensor] = {}
        self.batches: list[Batch] = []
        self.edited_digests: dict[str, str] = {}  # as read from a file: site -> digest of the weight saved with it

    def __len__(self) -> int:
        """Number of edits, those with withheld texts included."""
        return sum(len(batch) for batch in self.batches)

    @property
    def requests(self) -> list[EditRequest]:
        """All requests whose texts are known, oldest first."""
        return [request for batch in self.batches for request in batch.requests]

    def remember_base(self, sites: Sequence[EditSite]) -> None:
        """Keep a copy of the weight of every site that isn't kept yet. Call it before the first write to a site."""
        for site in sites:
            if site.name not in self.base_weights:
                self.base_weights[site.name] = site.read().cpu()

    def record_outcomes(self, outcomes: Sequence[Mapping[str, Any]]) -> None:
        """Keep what was measured for the last `len(outcomes)` edits (plain JSON types), for the model card."""
        remaining = [dict(outcome) for outcome in outcomes]
        for index in reversed(range(len(self.batches))):
            if not remaining:
                break
            count = len(self.batches[index])
            self.batches[index] = replace(self.batches[index], outcomes=tuple(remaining[-count:]))
            del remaining[-count:]

    def past_keys(self, site_name: str, again: Sequence[EditRequest] = ()) -> Tensor | None:
        """The keys that a batch of the requests `again` has to protect at one site; see `hf_alphaedit.batches`."""
        return past_keys(self.batches, site_name, again)

    def factors(self, site_name: str, batches: Sequence[Batch] | None = None) -> LowRankUpdate | None:
        """The factors of all `batches` (default: of the history) at one site, one after another; None if untouched."""
        updates = self._updates(site_name, batches)
        if not updates:
            return None
        return LowRankUpdate(torch.cat([u.inputs for u in updates]), torch.cat([u.outputs for u in updates]))

    def delta(self, site_name: str, batches: Sequence[Batch] | None = None) -> Tensor:
        """What the batches (default: all) add to the weight of one site: (h, d) float32 on the CPU.

        Summed in float64 in the order of the edits, and rounded once. Raises as `weight` does.
        """
        base = self._base(site_name)
        delta = torch.zeros(base.shape)  # (h, d)
        for rows, chunk in self._chunks(site_name, batches, torch.device("cpu")):
            delta[rows] = chunk
        return delta

    def weight(
        self, site_name: str, batches: Sequence[Batch] | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The weight of one site after `batches` (default: all): (h, d) in the base's dtype, on `device`.

        It is `base + delta` with the delta of the method of that name, added in float32 (float64 for a float64 base)
        and rounded once. Without a batch it is a copy of the base, bit for bit. The same device, machine and library
        versions give the same bits.

        Raises:
            StateError: the site's base weight isn't kept.
        """
        device = torch.device(device)
        base = self._base(site_name).to(device, copy=True)  # (h, d)
        wide = torch.promote_types(base.dtype, torch.float32)
        for rows, chunk in self._chunks(site_name, batches, device):
            # A float64 sum is rounded to float32 first, so that a stored float32 delta gives the same weight.
            added = chunk if wide == torch.float64 else chunk.float()
            base[rows] = (base[rows].to(wide) + added).to(base.dtype)
        return base

    def check(self, *, base_fingerprint: str, tokenizer_fingerprint: str, sites: Sequence[EditSite]) -> None:
        """Refuse a history that belongs to another base model, tokenizer, layer or dtype.

        Args:
            base_fingerprint: `model_fingerprint(model, history.base_weights)` of the model in hand.
            tokenizer_fingerprint: that of the tokenizer in hand.
            sites: what the editor's settings let it edit.

        Raises:
            StateError: with what differs and what to do.
        """
        known = {site.name: site for site in sites}
        foreign = sorted(set(self.base_weights) - set(known))
        if foreign:
            raise StateError(
                f"the saved edits changed {foreign}, but the settings edit {sorted(known)}: "
                "use the layers and target_module that the edits were made with"
            )
        for name, base in self.base_weights.items():
            current = known[name].read()
            if current.dtype != base.dtype:
                raise StateError(
                    f"{name} was edited in {base.dtype} and is {current.dtype} here; load the model with "
                    f"dtype={str(base.dtype).removeprefix('torch.')!r}"
                )
            if current.shape != base.shape:
                raise StateError(
                    f"{name} is {tuple(current.shape)} here and was {tuple(base.shape)} when it was edited; load "
                    f"{self.base_model or 'the model the edits were made on'}"
                )
        if tokenizer_fingerprint != self.tokenizer_fingerprint:
            raise StateError(
                f"the saved edits were made with another tokenizer (fingerprint {self.tokenizer_fingerprint[:12]}, "
                f"here {tokenizer_fingerprint[:12]}); load the tokenizer of {self.base_model or 'the base model'}"
            )
        if base_fingerprint != self.base_fingerprint:
            raise StateError(
                f"the saved edits belong to another base model (fingerprint {self.base_fingerprint[:12]}, here "
                f"{base_fingerprint[:12]}); load {self.base_model or 'the model they were made on'}"
                + (f" at revision {self.base_revision}" if self.base_revision else "")
            )

    def check_edited(self, sites: Sequence[EditSite]) -> None:
        """Refuse weights that were changed by something else after this history was saved with them.

        Raises:
            StateError: naming the first weight that differs.
        """
        for site in sites:
            wanted = self.edited_digests.get(site.name)
            if wanted is not None and weight_digest(site.read()) != wanted:
                raise StateError(
                    f"{site.name} is not the weight that was saved with these edits: the checkpoint was changed "
                    "afterwards. Load the checkpoint and its history from the same save, or delete "
                    f"{HISTORY_NAME} to edit this model as a new base"
                )

    def header(self) -> dict[str, Any]:
        """What identifies the model that the edits belong to, and the versions in use, in plain JSON types."""
        return {
            "base_fingerprint": self.base_fingerprint,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "base_model": self.base_model,
            "base_revision": self.base_revision,
            "contexts": None if self.contexts is None else list(self.contexts),
            "versions": {
                "hf_alphaedit": __version__,
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
            },
        }

    @classmethod
    def from_header(cls, document: Mapping[str, Any], path: Path) -> History:
        """A history without batches from what `header` gave; `StateError` where an entry is missing or wrong."""
        fingerprints = [entry_of(document, name, str, path) for name in ("base_fingerprint", "tokenizer_fingerprint")]
        for value in fingerprints:
            if not re.fullmatch("[0-9a-f]{64}", value):
                raise StateError(f"{path}: {value!r} is no fingerprint (64 hexadecimal digits); save it again")
        contexts = entry_of(document, "contexts", (list, type(None)), path)
        if contexts is not None and not all(isinstance(text, str) for text in contexts):
            raise StateError(f"{path}: contexts={contexts!r} must be a list of texts; save it again")
        return cls(
            *fingerprints,
            base_model=entry_of(document, "base_model", (str, type(None)), path),
            base_revision=entry_of(document, "base_revision", (str, type(None)), path),
            contexts=contexts,
        )

    def save(
        self,
        directory: str | Path,
        *,
        include_requests: bool = True,
        is_main_process: bool = True,
        sites: Sequence[EditSite] = (),
    ) -> None:
        """Write `alphaedit_history.safetensors` into `directory`, atomically.

        Args:
            directory: is made if it doesn't exist.
            include_requests: with False no text of a request or of its outcome is written, only their number; going
                on and undoing work all the same.
            is_main_process: with False nothing is written.
            sites: where the edited weights are, for the digests that `check_edited` wants; others are computed.
        """
        if not is_main_process:
            return
        current = {site.name: site for site in sites}
        digests = {
            name: weight_digest(current[name].read() if name in current else self.weight(name))
            for name in self.base_weights
        }
        entries, tensors = encode_batches(self.batches, include_requests=include_requests)
        tensors |= {f"base/{name}": weight for name, weight in self.base_weights.items()}
        document = {**self.header(), "batches": entries, "edited_digests": digests}
        write_state(Path(directory) / HISTORY_NAME, HISTORY_KIND, document, tensors)

    @classmethod
    def load(cls, directory: str | Path) -> History:
        """Read what `save` wrote, from the directory or the file. Follow it with `check` and `check_edited`.

        `StateError` where there is no such file, or it is damaged, cut short, newer or contradicts itself.
        """
        path = Path(directory) / HISTORY_NAME if Path(directory).is_dir() else Path(directory)
        document, tensors = read_state(path, HISTORY_KIND)
        history = cls.from_header(document, path)
        history.edited_digests = entry_of(document, "edited_digests", dict, path)
        names = [name for name in tensors if name.startswith("base/")]
        history.base_weights = {name.removeprefix("base/"): tensors.pop(name) for name in names}
        history.batches = decode_batches(entry_of(document, "batches", list, path), tensors, path)
        if tensors:
            raise StateError(f"{path} holds tensors that no batch mentions: {sorted(tensors)[:3]}; save it again")
        for name, base in history.base_weights.items():
            if base.ndim != 2 or not base.dtype.is_floating_point:
                raise StateError(f"{path}: the unedited {name} is {base.dtype} {tuple(base.shape)}, no float matrix")
        for number, batch in enumerate(history.batches):
            for name, update in batch.updates.items():
                if name not in history.base_weights or history.base_weights[name].shape != shape_of(update):
                    raise StateError(
                        f"{path}: batch {number} changes {name} as {shape_of(update)}, which isn't its shape"
                    )
        return history

    def _base(self, site_name: str) -> Tensor:
        if site_name not in self.base_weights:
            raise StateError(f"the unedited weight of {site_name} isn't kept; kept are {sorted(self.base_weights)}")
        return self.base_weights[site_name]

    def _chunks(
        self, site_name: str, batches: Sequence[Batch] | None, device: torch.device
    ) -> Iterator[tuple[slice, Tensor]]:
        return delta_in_chunks(self._updates(site_name, batches), self._base(site_name).shape, device)

    def _updates(self, site_name: str, batches: Sequence[Batch] | None) -> list[LowRankUpdate]:
        base = self.base_weights.get(site_name)
        dtype = torch.float32 if base is None else base.dtype
        return applied_updates(site_name, self.batches if batches is None else batches, dtype)
