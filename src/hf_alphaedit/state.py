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


def write_state(path: Path, kind: str, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write `document` (JSON types) and `tensors` into the safetensors file `path`, atomically.

    The file appears under its name only when it is complete; what stood there before stays until then. The JSON lies
    in the safetensors metadata, with a SHA-256 over it and every tensor, so that any damaged byte is noticed.
    """
    text = json.dumps(document, sort_keys=True, ensure_ascii=False, allow_nan=False)
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    metadata = {
        "kind": kind,
        "format_version": str(FORMAT_VERSION),
        "document": text,
        "sha256": _checksum(kind, text, tensors),
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


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
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise StateError(f"{path} can't be read as safetensors ({error}); it is damaged or cut short") from error
    if metadata.get("kind") != kind:
        raise StateError(f"{path} holds {metadata.get('kind', 'nothing of hf_alphaedit')!r}, not {kind!r}")
    version = metadata.get("format_version", "")
    if not version.isdecimal() or not 1 <= int(version) <= FORMAT_VERSION:
        raise StateError(
            f"{path} has format version {version!r}; this hf_alphaedit reads 1 to {FORMAT_VERSION}: upgrade it"
        )
    text = metadata.get("document", "")
    if metadata.get("sha256") != _checksum(kind, text, tensors):
        raise StateError(f"{path} is damaged: its content doesn't match its SHA-256; fetch or save it again")
    try:
        document = json.loads(text)
    except ValueError as error:
        raise StateError(f"{path} holds no valid JSON document ({error}); save it again") from error
    if not isinstance(document, dict):
        raise StateError(f"{path} holds a {type(document).__name__} instead of an object; save it again")
    return document, tensors


def entry_of(entry: Mapping[str, Any], name: str, kind: type | tuple[type, ...], where: Path | str) -> Any:
    """`entry[name]`, or `StateError` if it is missing or of another type."""
    if name not in entry or not isinstance(entry[name], kind):
        raise StateError(f"{where}: {name}={entry.get(name, 'missing')!r} is not as save_pretrained writes it")
    return entry[name]


def _checksum(kind: str, text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{kind}\n{FORMAT_VERSION}\n{text}\n".encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(memory_of(tensors[name]))
    return digest.hexdigest()
