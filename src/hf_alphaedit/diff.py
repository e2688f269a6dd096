"""What the edits changed in each weight, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor

from hf_alphaedit.algorithm.update import LowRankUpdate
from hf_alphaedit.filters import corpus_energy
from hf_alphaedit.lora import singular_factors
from hf_alphaedit.report import as_text


if TYPE_CHECKING:
    from hf_alphaedit.editor import AlphaEditor
    from hf_alphaedit.history import History
    from hf_alphaedit.models.weights import EditSite


@dataclass(frozen=True)
class SiteDiff:
    """The change of one weight.

    Attributes:
        site: module path.
        edits: number of edits that changed it.
        rank: of the change, counted as singular values above rounding.
        delta_norm: ‖Δ‖ in the Frobenius norm.
        relative_norm: ‖Δ‖ / ‖W₀‖.
        corpus_energy: E‖Δk‖² / E‖W₀k‖² over the keys k of the corpus: the share of what this weight says about
            ordinary text that the edits touch (the leak); None without second moments.
        rounding: ‖(W - W₀) - Δ‖ / ‖Δ‖, what rounding the edited weight to the model's dtype lost.
    """

    site: str
    edits: int
    rank: int
    delta_norm: float
    relative_norm: float
    corpus_energy: float | None
    rounding: float


@dataclass(frozen=True)
class DiffReport:
    """The change of every edited weight; see `SiteDiff`."""

    sites: tuple[SiteDiff, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"sites": [asdict(site) for site in self.sites]}

    def __str__(self) -> str:
        if not self.sites:
            return "no edits: every weight is the base model's"
        table = Table(title=f"change of {len(self.sites)} weights")
        for name in ("weight", "edits", "rank", "‖Δ‖/‖W‖", "corpus energy", "rounding"):
            table.add_column(name, justify="left" if name == "weight" else "right")
        for site in self.sites:
            energy = "" if site.corpus_energy is None else f"{site.corpus_energy:.2e}"
            table.add_row(
                site.site, str(site.edits), str(site.rank), f"{site.relative_norm:.4f}", energy, f"{site.rounding:.1e}"
            )
        return as_text(table)


def diff(editor: AlphaEditor, second_moments: Mapping[str, Tensor] | None = None) -> DiffReport:
    """Measure what the edits changed in each weight. Nothing is changed.

    Args:
        editor: with its history.
        second_moments: what `AlphaEditor.second_moments` gives, for the leak.
    """
    moments = second_moments or {}
    reports = []
    for site in editor.sites():
        update = editor.history.factors(site.name)
        if update is not None:
            reports.append(_site_diff(editor.history, site, update, moments))
    return DiffReport(tuple(reports))


def _site_diff(history: History, site: EditSite, update: LowRankUpdate, moments: Mapping[str, Tensor]) -> SiteDiff:
    _, values, _ = singular_factors(update)
    base = history.base_weights[site.name].double()  # (h, d)
    delta = history.delta(site.name).double()  # (h, d)
    norm, known = delta.norm(), any(name in moments for name in site.blocks)
    lost = site.read().cpu().double() - base - delta  # (h, d)
    return SiteDiff(
        site=site.name,
        edits=sum(len(batch) for batch in history.batches if site.name in batch.updates),
        # The factors are float32, so singular values below its rounding are noise.
        rank=int((values > values.amax() * torch.finfo(torch.float32).eps).sum()),
        delta_norm=float(norm),
        relative_norm=float(norm / base.norm()),
        corpus_energy=corpus_energy(delta, site, moments) / corpus_energy(base, site, moments) if known else None,
        rounding=float(lost.norm() / norm) if norm > 0 else 0.0,
    )
