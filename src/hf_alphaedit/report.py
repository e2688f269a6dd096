"""What an editing call did: printed as a table, or as plain JSON types."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Outcome:
    """One request, before and after.

    Attributes:
        prompt: with the subject in place.
        target_new, target_true: the objects; `target_true` is None where it isn't known.
        before, after: what the model writes after the prompt, greedily.
        p_new_before, p_new_after: probability of the whole new target after the prompt, 0 to 1.
        p_true_before, p_true_after: the same of the old one; None where it isn't known.
        argmax_after: whether every token of the new target is the most likely one.
        steps: updates the target search made.
        missing: share of the wanted change that the edited weights don't reach at the last layer.
    """

    prompt: str
    target_new: str
    target_true: str | None
    before: str
    after: str
    p_new_before: float
    p_new_after: float
    p_true_before: float | None
    p_true_after: float | None
    argmax_after: bool
    steps: int
    missing: float


@dataclass(frozen=True)
class SiteChange:
    """What one weight went through in this call.

    Attributes:
        site: module path.
        relative_norm: ‖Δ‖ / ‖W‖ of this call's delta against the unedited weight (Frobenius).
        rank: number of edits in the delta.
        corpus_energy: mean ‖Δk‖² over the corpus, relative to mean ‖Wk‖²: what leaks into other knowledge.
        null_rank, dimension: directions the filter leaves free, of how many.
        kept_energy: mean share of the edit keys' energy that the filter lets through.
        rounding: share of the delta's norm that rounding to the weight's dtype lost.
    """

    site: str
    relative_norm: float
    rank: int
    corpus_energy: float
    null_rank: int
    dimension: int
    kept_energy: float
    rounding: float


@dataclass(frozen=True)
class EditReport:
    """Result of `AlphaEditor.apply_edits`; `str()` gives a table.

    Attributes:
        outcomes: one per request, in order.
        sites: one per edited weight.
        seconds: time per phase.
        peak_memory: largest resident memory of the process (CPU) or allocated memory (other devices), in bytes.
        warnings: what the preflight check found.
        evaluation: result of the gate's evaluation, if one was asked for: metric -> value, low, high, count.
        dropped: requests that were left out because they weren't predicted, with what the model says before and after.
    """

    outcomes: tuple[Outcome, ...]
    sites: tuple[SiteChange, ...]
    seconds: Mapping[str, float]
    peak_memory: int
    warnings: tuple[str, ...] = ()
    evaluation: Mapping[str, Any] | None = None
    dropped: tuple[Mapping[str, Any], ...] = ()

    @property
    def success_rate(self) -> float:
        """Share of requests whose new target is, token by token, what the model predicts."""
        return sum(outcome.argmax_after for outcome in self.outcomes) / len(self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text.

        Args:
            path: file to write it to as well.
        """
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def __str__(self) -> str:
        table = Table(title=f"{len(self.outcomes)} edits, {100 * self.success_rate:.0f} % predicted token by token")
        for name in ("prompt", "before", "after", "P(new)", "P(old)"):
            table.add_column(name, overflow="fold", justify="right" if name.startswith("P(") else "left")
        for outcome in self.outcomes:
            table.add_row(
                outcome.prompt, _line(outcome.before), _line(outcome.after),
                _change(outcome.p_new_before, outcome.p_new_after),
                _change(outcome.p_true_before, outcome.p_true_after),
            )  # fmt: skip
        sites = Table(title="weights")
        for name in ("site", "‖Δ‖/‖W‖", "corpus energy", "free directions", "key kept", "rounding"):
            sites.add_column(name, justify="left" if name == "site" else "right")
        for site in self.sites:
            sites.add_row(
                site.site, f"{site.relative_norm:.4f}", f"{site.corpus_energy:.2e}",
                f"{site.null_rank} of {site.dimension}", f"{site.kept_energy:.2f}", f"{site.rounding:.1e}",
            )  # fmt: skip
        times = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in self.seconds.items())
        lines = [as_text(table), as_text(sites), f"{times}; peak memory {self.peak_memory / 2**30:.2f} GiB"]
        for name, found in (self.evaluation or {}).items():
            lines.append(f"{name}: {found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]")
        if missed := sum(not outcome.argmax_after for outcome in self.outcomes):
            lines.append(f"{missed} of {len(self.outcomes)} are not predicted; `repair` makes such edits again")
        lines += [f"dropped: {one['prompt']} ({one['subject']}) -> {one['target_new']}" for one in self.dropped]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def as_text(table: Table, width: int = 118) -> str:
    """A rich table as plain text, at most `width` characters wide."""
    console = Console(file=io.StringIO(), width=width, color_system=None, markup=False, emoji=False)
    console.print(table, markup=False)
    return console.file.getvalue().rstrip()  # ty: ignore[missing-attribute]


def _line(text: str, limit: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _change(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{before:.3f} → {after:.3f}"
