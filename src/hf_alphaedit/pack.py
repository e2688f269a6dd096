"""The edit pack: one small file that turns the stock base model into the edited one."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_alphaedit.batches import Batch, decode_batches, dense_update, encode_batches, shape_of
from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.errors import StateError
from hf_alphaedit.history import History
from hf_alphaedit.models.fingerprint import weight_digest
from hf_alphaedit.models.weights import EditSite
from hf_alphaedit.repository import local_copy
from hf_alphaedit.state import entry_of, read_state, write_state


if TYPE_CHECKING:
    from hf_alphaedit.editor import AlphaEditor

logger = logging.getLogger(__name__)

PACK_NAME = "alphaedit_edits.safetensors"
PACK_KIND = "hf_alphaedit.edits"


@dataclass(frozen=True)
class PackReport:
    """What an edit pack holds.

    Attributes:
        path: the file.
        edits: number of edits in it.
        size: of the file, in bytes.
        form: "factors", or "dense" where the summed deltas are smaller.
        dtype: of the factors; dense deltas are float32.
        keys: whether the keys that protect these edits from later ones are in it.
        requests: whether the texts of the requests are in it.
    """

    path: str
    edits: int
    size: int
    form: str
    dtype: str
    keys: bool
    requests: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        content = f"{self.form} in {self.dtype}" if self.form == "factors" else "summed deltas in float32 (smaller)"
        return (
            f"{self.edits} edits, {self.size / 1e6:.1f} MB, {content}, {'with' if self.keys else 'without'} keys, "
            f"requests {'included' if self.requests else 'withheld'}: {self.path}"
        )


def save_edits(
    editor: AlphaEditor,
    directory: str | Path,
    *,
    include_requests: bool = True,
    include_keys: bool = False,
    is_main_process: bool = True,
) -> PackReport:
    """Write the edits, without the model, to `alphaedit_edits.safetensors` in `directory`, atomically.

    The factors are float32, or bfloat16 for a bfloat16 model: applied to the stock base on the same kind of machine,
    the pack gives the edited weights bit for bit. Where the summed deltas would be smaller
    than the factors (many edits), these are written instead, as one batch.

    Args:
        editor: is not changed.
        directory: is made if it doesn't exist.
        include_requests: with False no text of a request is written, only their number.
        include_keys: write the keys too, so that edits made after `load_edits` leave these in place. Without them the
            file is about d / (d + h) smaller, and later edits are solved as if these had not been made.
        is_main_process: with False nothing is written.

    Raises:
        StateError: there are no edits.
    """
    history = editor.history
    if not history.batches:
        raise StateError("there are no edits to save; call apply_edits first")
    dtypes = {weight.dtype for weight in history.base_weights.values()}
    dtype = torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
    dense = _dense_is_smaller(history, dtype)
    batches = [_merged(history)] if dense else history.batches
    entries, tensors = encode_batches(
        batches, include_requests=include_requests, include_keys=include_keys, dtype=dtype
    )
    document = {
        **history.header(),
        "batches": entries,
        "base_digests": {name: weight_digest(weight) for name, weight in history.base_weights.items()},
        "base_dtypes": {name: str(weight.dtype) for name, weight in history.base_weights.items()},
    }
    path = Path(directory) / PACK_NAME
    if is_main_process:
        write_state(path, PACK_KIND, document, tensors)
    return PackReport(
        path=str(path),
        edits=len(history),
        size=path.stat().st_size if path.is_file() else 0,
        form="dense" if dense else "factors",
        dtype=str(dtype).removeprefix("torch."),
        keys=include_keys,
        requests=include_requests,
    )


def load_edits(editor: AlphaEditor, directory_or_repo: str | Path, **hub: Any) -> None:
    """Apply an edit pack to the editor's model, on top of the edits it has.

    The base model is checked before anything is written: fingerprint, tokenizer, and every byte of the weights that
    will change. The edits then stand in the history and can be undone batch by batch. A pack without keys doesn't
    protect its edits from later ones (they are solved as if these had not been made); a warning says so.

    Args:
        editor: its weights and history are changed; on any failure both are as before. An editor without edits takes
            over the pack's settings and context templates.
        directory_or_repo: what `save_edits` wrote, or a Hub repository that holds it.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`, as in transformers.

    Raises:
        StateError: the pack is damaged, or belongs to another base model, layer, tokenizer or dtype.
    """
    path = local_copy(str(directory_or_repo), PACK_NAME, **hub)
    if path is None:
        raise StateError(
            f"{directory_or_repo} holds no {PACK_NAME}; give a directory that save_edits wrote or the name of a Hub "
            "repository that can be reached or is cached"
        )
    pack, document = read_pack(path)
    history, config = editor.history, editor.config
    settings = dict(pack.batches[-1].settings)
    if not history.batches and settings:
        editor.reconfigure(AlphaEditConfig.from_dict(settings))
    try:
        _check_base(editor, pack, document, path)
        editor.write_batches([*history.batches, *pack.batches])
    except BaseException:
        editor.reconfigure(config)
        raise
    if history.contexts is None:
        history.contexts = pack.contexts
    if not all(batch.keys for batch in pack.batches):
        logger.warning("%s has no keys: later edits are not kept from changing its %d edits", path, len(pack))


def read_pack(path: Path) -> tuple[History, dict[str, Any]]:
    """The edits in the file `path`, as a history without base weights, and the file's document.

    Raises:
        StateError: it is no pack, or a damaged one.
    """
    document, tensors = read_state(path, PACK_KIND)
    pack = History.from_header(document, path)
    pack.batches = decode_batches(entry_of(document, "batches", list, path), tensors, path)
    if tensors or not pack.batches:
        raise StateError(f"{path} holds {sorted(tensors)[:3] or 'no batch'}; save it again with save_edits")
    return pack, document


def _check_base(editor: AlphaEditor, pack: History, document: dict[str, Any], path: Path) -> None:
    """Refuse a pack whose base isn't the editor's: by site, dtype, shape, bytes of the weight, and fingerprints."""
    names = {name for batch in pack.batches for name in batch.updates}
    sites: dict[str, EditSite] = {site.name: site for site in editor.sites()}
    if missing := sorted(names - set(sites)):
        raise StateError(
            f"{path} changes {missing}, which this editor doesn't edit; undo its own edits first, or give it the "
            "pack's layers and target_module"
        )
    model_of_pack = pack.base_model or "the model the pack was made on"
    digests = entry_of(document, "base_digests", dict, path)
    dtypes = entry_of(document, "base_dtypes", dict, path)
    for name in sorted(names):
        base = editor.history.base_weights.get(name)
        base = sites[name].read() if base is None else base
        wanted = str(dtypes.get(name)).removeprefix("torch.")
        if str(base.dtype) != f"torch.{wanted}":
            raise StateError(
                f"{path} was made on {wanted} weights, here {name} is {base.dtype}; load the model with "
                f"dtype={wanted!r}"
            )
        for number, batch in enumerate(pack.batches):
            if name in batch.updates and shape_of(batch.updates[name]) != tuple(base.shape):
                raise StateError(
                    f"{path}: batch {number} changes {name} as {shape_of(batch.updates[name])}, here it is "
                    f"{tuple(base.shape)}; load {model_of_pack}"
                )
        if weight_digest(base) != digests.get(name):
            raise StateError(
                f"{name} is not the weight {path} was made on; load {model_of_pack}, unedited"
                + (f", at revision {pack.base_revision}" if pack.base_revision else "")
            )
    pack.check(
        base_fingerprint=editor.history.base_fingerprint,
        tokenizer_fingerprint=editor.history.tokenizer_fingerprint,
        sites=list(sites.values()),
    )


def _dense_is_smaller(history: History, dtype: torch.dtype) -> bool:
    if any(weight.dtype == torch.float64 for weight in history.base_weights.values()):
        return False  # a float32 sum would not give the same float64 weight
    updates = [update for batch in history.batches for update in batch.updates.values()]
    factors = sum(update.inputs.numel() + update.outputs.numel() for update in updates) * dtype.itemsize
    touched = {name: update for batch in history.batches for name, update in batch.updates.items()}
    dense = sum(shape_of(update)[0] * shape_of(update)[1] for update in touched.values()) * torch.float32.itemsize
    return dense < factors


def _merged(history: History) -> Batch:
    """All batches as one, with the summed delta of every site."""
    batches = history.batches
    names = sorted({name for batch in batches for name in batch.updates})
    protected = [name for name in names if all(name in b.keys for b in batches if name in b.updates)]
    withheld = sum(batch.withheld for batch in batches)
    return Batch(
        # A batch knows all of its requests or none: the place of a request is the place of its edit.
        requests=() if withheld else tuple(history.requests),
        withheld=len(history) if withheld else 0,
        outcomes=() if withheld else tuple(outcome for batch in batches for outcome in batch.outcomes),
        keys={name: torch.cat([b.keys[name] for b in batches if name in b.keys]) for name in protected},
        updates={name: dense_update(history.delta(name)) for name in names},
        settings=batches[-1].settings,
        created=batches[-1].created,
    )
