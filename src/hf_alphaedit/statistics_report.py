"""What the second moments say about each layer, and whether the text was enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table

from hf_alphaedit.algorithm.moments import energy_inside, subspace_overlap
from hf_alphaedit.algorithm.nullspace import Spectrum
from hf_alphaedit.report import as_text
from hf_alphaedit.statistics import SecondMoments
from hf_alphaedit.statistics_files import read_moments


ENERGY_SHARES = (0.5, 0.9, 0.99)
ROWS_SHOWN = 32  # of the table in the text; a mixture of experts has hundreds
EIGENVALUE_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class SiteStatistics:
    """The spectrum of the keys at one site.

    Attributes:
        site: module path; for a mixture of experts, that of one expert's weight.
        dimension: d.
        null_rank: directions that may be edited freely under the configured rule.
        energy_directions: share of the energy (as text) -> how many of the largest directions hold it.
        eigenvalues: quantile (as text) -> eigenvalue of C.
        null_energy: share of the corpus energy that lies in the null space.
        held_out_energy: the same share for text that the null space was not computed from: mean over the two halves
            of the corpus, each against the null space of the other. Close to `null_energy` of a half once there is
            enough text. None if the corpus is a single sequence, or convergence was not asked for.
        overlap: mean squared cosine between the subspaces that the two halves protect; 1 is perfect agreement.
        chance_overlap: what unrelated subspaces of these sizes would have.
    """

    site: str
    dimension: int
    null_rank: int
    energy_directions: dict[str, int]
    eigenvalues: dict[str, float]
    null_energy: float
    held_out_energy: float | None = None
    overlap: float | None = None
    chance_overlap: float | None = None


@dataclass(frozen=True)
class StatisticsReport:
    """What `prepare` did and found.

    Attributes:
        corpus: identity of the text.
        tokens: keys per site; in a mixture of experts, one for each expert that a token goes to.
        seconds: time spent.
        from_cache: whether nothing had to be computed.
        sites: one entry per edited weight, or expert.
        left_out: experts that saw too few tokens to be edited -> how many.
    """

    corpus: str
    tokens: int
    seconds: float
    from_cache: bool
    sites: tuple[SiteStatistics, ...]
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def warnings(self) -> list[str]:
        """What may spoil the edits, in words."""
        found = []
        for entry in self.sites:
            if entry.null_rank == 0:
                found.append(f"{entry.site}: everything is protected, so no edit is possible; raise the threshold")
            if entry.null_rank == entry.dimension:
                found.append(f"{entry.site}: nothing is protected; lower the threshold")
            if self.tokens < entry.dimension:
                found.append(
                    f"{entry.site}: {self.tokens} tokens can't span {entry.dimension} dimensions; read at least ten "
                    "tokens per dimension"
                )
        if self.left_out:
            found.append(
                f"{len(self.left_out)} experts saw fewer tokens than their keys have entries and are not edited; read "
                f"more text to have them all: {', '.join(self.left_out)}"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "sites": [asdict(entry) for entry in self.sites], "warnings": self.warnings}

    def __str__(self) -> str:
        origin = "from the cache" if self.from_cache else f"computed in {self.seconds:.1f} s"
        table = Table()
        for name in ("site", "free directions", "hold 50/90/99 %", "free energy", "held out", "halves agree (chance)"):
            table.add_column(name, justify="left" if name == "site" else "right", overflow="fold")
        for entry in self.sites[:ROWS_SHOWN]:
            table.add_row(
                entry.site,
                f"{entry.null_rank} of {entry.dimension}",
                " / ".join(str(count) for count in entry.energy_directions.values()),
                f"{entry.null_energy:.1%}",
                "" if entry.held_out_energy is None else f"{entry.held_out_energy:.1%}",
                "" if entry.overlap is None else f"{entry.overlap:.2f} ({entry.chance_overlap:.2f})",
            )
        head = f"second moments over {self.tokens:,} tokens of {self.corpus}, {origin}"
        more = [f"... and {len(self.sites) - ROWS_SHOWN} more"] if len(self.sites) > ROWS_SHOWN else []
        return "\n".join([head, as_text(table), *more, *(f"warning: {text}" for text in self.warnings)])


def report_statistics(
    statistics: SecondMoments,
    spectra: Mapping[str, Spectrum],
    null_rank: Callable[[Spectrum], int],
    *,
    convergence: bool = True,
) -> StatisticsReport:
    """Describe `statistics` under a rule for the null space.

    Args:
        statistics: from `collect_second_moments`.
        spectra: site name -> spectrum of `statistics.moments[site name]`.
        null_rank: the configured rule, e.g. `lambda spectrum: spectrum.null_rank_by_energy(0.3)`.
        convergence: compare the two halves of the corpus as well; costs two eigen-decompositions per site.

    Raises:
        StatisticsError: a cache file can't be read any more.
    """
    sites = []
    for name, spectrum in spectra.items():
        rank, energies = null_rank(spectrum), spectrum.eigenvalues  # (d,) ascending
        cumulative = energies.flip(0).cumsum(0) / energies.sum()  # (d,) from the largest direction on
        quantiles = torch.quantile(energies, torch.tensor(EIGENVALUE_QUANTILES).to(energies))
        sites.append(
            SiteStatistics(
                site=name,
                dimension=energies.numel(),
                null_rank=rank,
                energy_directions={f"{share:g}": int((cumulative < share).sum()) + 1 for share in ENERGY_SHARES},
                eigenvalues={
                    f"{q:g}": float(value) for q, value in zip(EIGENVALUE_QUANTILES, quantiles.tolist(), strict=True)
                },
                null_energy=float(energies[:rank].sum() / energies.sum()),
                **(_convergence(statistics, name, null_rank, energies.device) if convergence else {}),
            )
        )
    return StatisticsReport(
        statistics.corpus, statistics.tokens, statistics.seconds, statistics.from_cache, tuple(sites),
        {name: count for name, count in statistics.counts.items() if name not in statistics.moments},
    )  # fmt: skip


def _convergence(
    statistics: SecondMoments, name: str, null_rank: Callable[[Spectrum], int], device: torch.device
) -> dict[str, float]:
    halves = read_moments(statistics.files[name])[0] if name in statistics.files else []
    if not halves or any(half.count == 0 for half in halves):
        return {}
    even, odd = (half.mean().to(device) for half in halves)
    even_spectrum, odd_spectrum = Spectrum.of(even), Spectrum.of(odd)
    even_rank, odd_rank = null_rank(even_spectrum), null_rank(odd_spectrum)
    held_out = energy_inside(odd, even_spectrum, even_rank) + energy_inside(even, odd_spectrum, odd_rank)
    return {
        "held_out_energy": held_out / 2,
        "overlap": subspace_overlap(even_spectrum, odd_spectrum, even_rank, odd_rank),
        # of a p₁- and a p₂-dimensional random subspace of d dimensions: max(p₁, p₂) / d
        "chance_overlap": 1 - min(even_rank, odd_rank) / even.shape[0],
    }
