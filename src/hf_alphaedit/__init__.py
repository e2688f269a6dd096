"""Change facts in a language model, with AlphaEdit, and keep a plain transformers checkpoint."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_alphaedit.config import AlphaEditConfig as AlphaEditConfig
    from hf_alphaedit.editor import AlphaEditor as AlphaEditor
    from hf_alphaedit.records import Record as Record
    from hf_alphaedit.records import read_records as read_records
    from hf_alphaedit.report import EditReport as EditReport
    from hf_alphaedit.requests import EditRequest as EditRequest

__version__ = "0.1.0"

# Public name -> module. Imported when first asked for, so that `import hf_alphaedit` costs nothing.
_PUBLIC = {
    "AlphaEditConfig": "config",
    "AlphaEditor": "editor",
    "EditReport": "report",
    "EditRequest": "requests",
    "Record": "records",
    "read_records": "records",
}
__all__ = ["AlphaEditConfig", "AlphaEditor", "EditReport", "EditRequest", "Record", "read_records"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
