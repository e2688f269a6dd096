"""Files and commits of a directory or a Hub repository, also offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.utils import EntryNotFoundError
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash


def local_copy(name: str, file: str, **hub: Any) -> Path | None:
    """Path of one file in a directory, or of its cached download from a Hub repository; None if there is no such file.

    Args:
        name: a directory or a Hub id.
        file: name of the file inside it.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`.
    """
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    try:
        found = cached_file(
            name, file, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False, **hub,
        )  # fmt: skip
    except EntryNotFoundError:
        return None
    return None if found is None else Path(found)


def commit_of(name: str, **hub: Any) -> str | None:
    """Commit of a Hub repository as cached; None for a directory.

    Args:
        name: a Hub id or a directory.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`.
    """
    path = local_copy(name, "config.json", **hub)
    return None if path is None or Path(name).is_dir() else extract_commit_hash(str(path), None)
