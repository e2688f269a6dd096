"""What the preflight check found: printed as a table, or as plain JSON types."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from hf_alphaedit.errors import RequestError
from hf_alphaedit.report import as_text


@dataclass(frozen=True)
class RequestCheck:
    """How one request will be read.

    Attributes:
        text: the prompt with the subject in place.
        subject_token: the token at which the fact is written, the subject's last one.
        subject_position: its index in the bare prompt, special tokens included.
        target_tokens: the new target, token by token.
        space_added: whether a space was put between prompt and target.
        already_true: whether the model predicts the new target already, token by token; None if it wasn't asked.
        similarity: largest cosine of its filtered key with another request's or an earlier edit's; None if unknown.
        nearest: the text of that request.
    """

    text: str
    subject_token: str
    subject_position: int
    target_tokens: tuple[str, ...]
    space_added: bool
    already_true: bool | None = None
    similarity: float | None = None
    nearest: str | None = None


@dataclass(frozen=True)
class PreflightReport:
    """Result of `AlphaEditor.preflight`; `str()` gives a table.

    Attributes:
        checks: one per request that can be read, in order.
        errors: what makes an edit impossible; `apply_edits` would raise it.
        warnings: what may make it worse than expected.
        edits_so_far: edits in the history.
        free_directions: site -> directions that its filter leaves free; empty while there are no filters.
        seconds: estimated time of the edit without the second moments; None if unknown. Expect a factor of two.
        memory: estimated memory beyond the loaded model, in bytes; None if unknown. Expect a factor of two.
    """

    checks: tuple[RequestCheck, ...]
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    edits_so_far: int = 0
    free_directions: Mapping[str, int] = field(default_factory=dict)
    seconds: float | None = None
    memory: int | None = None

    def raise_errors(self) -> None:
        """Raise `RequestError` with all errors, if there are any."""
        if self.errors:
            raise RequestError("\n".join(self.errors))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return json.loads(json.dumps(asdict(self)))

    def __str__(self) -> str:
        table = Table(title=f"{len(self.checks)} requests after {self.edits_so_far} edits")
        for name in ("prompt", "written at", "target tokens", "known", "nearest key"):
            table.add_column(name, overflow="fold", justify="right" if name == "nearest key" else "left")
        for check in self.checks:
            known = {None: "", True: "yes", False: "no"}[check.already_true]
            near = "" if check.similarity is None else f"{check.similarity:.2f}"
            table.add_row(
                check.text, f"{check.subject_token!r} ({check.subject_position})",
                "|".join(check.target_tokens) + (" (space added)" if check.space_added else ""), known, near,
            )  # fmt: skip
        lines = [as_text(table)]
        if self.free_directions:
            lines.append(f"free directions: {min(self.free_directions.values())} at the fullest of the edited weights")
        else:
            lines.append("keys and capacity weren't looked at: there are no second moments yet, see prepare()")
        if self.seconds is not None and self.memory is not None:
            lines.append(f"about {self.seconds:.0f} s and {self.memory / 2**30:.2f} GiB beyond the model")
        lines += [f"error: {error}" for error in self.errors]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])
