"""One safetensors file of tensors and one JSON document, written whole or not at all, and checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_alphaedit.errors import StateError
from hf_alphaedit.models.fingerprint import memory_of


FORMAT_VERSION = 1
METADATA_KEY = "hf_alphaedit"


def write_state(path: Path, kind: str, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write `document` (JSON types) and `tensors` into the safetensors file `path`, atomically.

    The file appears under its name only when it is complete; what stood there before stays until then. The JSON lies
    in the safetensors metadata, with a SHA-256 over it and every tensor, so that any damaged byte is noticed. The same
    content gives the same bytes.
    """
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    entry = {"kind": kind, "format_version": FORMAT_VERSION, "document": document}
    entry["sha256"] = _checksum(entry, tensors)
    with replacing(path) as temporary:
        # One entry, because safetensors writes several in random order.
        save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(entry, sort_keys=True)})


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """A name to write to in the directory of `path`; the file takes the name `path` when the block ends well.

    On any failure it is removed, and what stood at `path` stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp lets only the owner read, which would surprise on a shared disk
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_state(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write_state` wrote: the document and the tensors, on the CPU.

    Raises:
        StateError: there is no such file, it is of another kind or a newer format, or any byte of it is damaged.
    """
    if not path.is_file():
        raise StateError(f"{path} doesn't exist; give the directory that save_pretrained or save_edits wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Clones, because safetensors maps the file, and the file may be replaced while the tensors live.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        entry = json.loads(metadata.get(METADATA_KEY, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise StateError(
            f"{path} can't be read ({error}); it is damaged or cut short: fetch or save it again"
        ) from error
    if entry_of(entry, "kind", str, path) != kind:
        raise StateError(f"{path} holds {entry['kind']!r}, not {kind!r}; give the file that its name says")
    version = entry_of(entry, "format_version", int, path)
    if not 1 <= version <= FORMAT_VERSION:
        raise StateError(f"{path} has format {version}; this hf_alphaedit reads 1 to {FORMAT_VERSION}: upgrade it")
    if entry_of(entry, "sha256", str, path) != _checksum(entry, tensors):
        raise StateError(f"{path} is damaged: its content doesn't match its SHA-256; fetch or save it again")
    return entry_of(entry, "document", dict, path), tensors


def entry_of(entry: Mapping[str, Any], name: str, kind: type | tuple[type, ...], where: Path | str) -> Any:
    """`entry[name]`, or `StateError` if it is missing or of another type."""
    if not isinstance(entry, Mapping) or name not in entry or not isinstance(entry[name], kind):
        value = repr(entry[name]) if isinstance(entry, Mapping) and name in entry else "missing"
        raise StateError(f"{where}: {name} is {value}, which is not what hf_alphaedit writes; save it again")
    return entry[name]


def _checksum(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    signed = {name: value for name, value in entry.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(signed, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"\n{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(memory_of(tensors[name]))
    return digest.hexdigest()
