"""Records in JSON, JSONL and CSV files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from hf_alphaedit.errors import RequestError


def read_file(path: Path) -> list[tuple[int, Any]]:
    """The records of a file as plain values, each with its number: index, line or row.

    Raises:
        RequestError: the suffix is unknown, or the content isn't what it says.
    """
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise RequestError(f"{path} has the suffix {path.suffix!r}; files end in .json, .jsonl or .csv")
    try:
        return readers[path.suffix.lower()](path)
    except (json.JSONDecodeError, UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"{path} can't be read as {path.suffix[1:]} in UTF-8: {error}") from error


def _read_json(path: Path) -> list[tuple[int, Any]]:
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    return list(enumerate(content if isinstance(content, list) else [content]))


def _read_jsonl(path: Path) -> list[tuple[int, Any]]:
    lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would also split inside JSON strings
    return [(number, json.loads(line)) for number, line in enumerate(lines, start=1) if line.strip()]


def _read_csv(path: Path) -> list[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    if any(None in row for row in rows):
        raise RequestError(f"{path} has a row with more cells than the header; quote cells that contain commas")
    cells = [{name: cell for name, cell in row.items() if cell and cell.strip()} for row in rows]
    return [
        (number, {name: json.loads(cell) if cell.lstrip().startswith("[") else cell for name, cell in row.items()})
        for number, row in enumerate(cells, start=1)
    ]
