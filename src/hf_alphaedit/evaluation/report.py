"""Means with bootstrap intervals, and the report that holds them: table, JSON, plot."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


RESAMPLES = 1000
CONFIDENCE = 0.95
# Metrics in a unit of their own; all others are percentages (fluency and consistency: times 100, as published).
OWN_UNIT = ("perplexity", "perplexity_ratio", "kl")


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval.

    Attributes:
        value: the mean over `count` records (or texts).
        low, high: percentile bootstrap over the records; it says how much another sample of records of the same kind
            would differ, not how another data set would.
        count: records that the metric is defined for.
    """

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def estimate(
    values: Sequence[float], *, seed: int = 0, scale: float = 1.0, transform: Callable[[Tensor], Tensor] | None = None
) -> Estimate:
    """Mean of `values` with a bootstrap interval of 1000 resamples.

    `transform` (monotone, applied to means) and then `scale` act on the mean and on both ends of the interval. The
    same values and seed give the same interval; the global random state isn't touched.
    """
    if not len(values):
        raise ValueError("there are no values to estimate a mean from")
    data = torch.tensor(values, dtype=torch.float64)  # (n,)
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [data[torch.randint(len(data), data.shape, generator=generator)].mean() for _ in range(RESAMPLES)]
    )
    tail = (1 - CONFIDENCE) / 2
    ends = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    result = torch.stack([data.mean(), *ends])
    result = (result if transform is None else transform(result)) * scale
    return Estimate(*result.tolist(), count=len(data))


@dataclass(frozen=True)
class EvaluationReport:
    """What was measured.

    Attributes:
        metrics: name -> estimate. Percentages, except for those in `OWN_UNIT`.
        records: for each record, its case id, prompt, values and texts, in JSON types.
        settings: how it was measured: metrics, seed, counts, lengths.
    """

    metrics: dict[str, Estimate]
    records: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Estimate:
        if name not in self.metrics:
            raise KeyError(f"{name!r} wasn't measured; there are {sorted(self.metrics)}")
        return self.metrics[name]

    def __str__(self) -> str:
        width = max([len(name) for name in self.metrics], default=6)
        lines = [f"{'metric':<{width}}  {'mean':>9}  {'95 % interval':>20}  {'count':>6}"]
        for name, item in self.metrics.items():
            interval = f"{_short(item.low)} to {_short(item.high)}"
            lines.append(f"{name:<{width}}  {_short(item.value):>9}  {interval:>20}  {item.count:>6}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EvaluationReport:
        """The inverse of `to_dict`."""
        metrics = {name: Estimate(**item) for name, item in values["metrics"].items()}
        return cls(metrics, values["records"], values["settings"])

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, also written to `path` if that is given."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> EvaluationReport:
        """Read what `to_json` wrote, from a path or from the text itself."""
        text = (
            source if isinstance(source, str) and source.lstrip().startswith("{") else Path(source).read_text("utf-8")
        )
        return cls.from_dict(json.loads(text))

    def plot(self, path: str | Path, *, before: EvaluationReport | None = None) -> None:
        """Draw the percentages as bars with their intervals into an image file.

        Args:
            path: of the image; its suffix decides the format.
            before: another report, usually of the unedited model, drawn beside this one.

        Raises:
            ModuleNotFoundError: matplotlib is missing; it comes with the extra `plots`.
        """
        from matplotlib.figure import Figure

        names = [name for name in self.metrics if name not in OWN_UNIT]
        reports = [("before", before), ("after", self)] if before else [("", self)]
        figure = Figure(figsize=(7, 0.8 + 0.32 * max(1, len(names)) * len(reports)), layout="constrained")
        axes = figure.subplots()
        height = 0.8 / len(reports)
        for index, (label, report) in enumerate(reports):
            shown = [(place, report.metrics[name]) for place, name in enumerate(names) if name in report.metrics]
            values = [item.value for _, item in shown]
            spread = [
                [max(0.0, item.value - item.low) for _, item in shown],
                [max(0.0, item.high - item.value) for _, item in shown],
            ]
            places = [place + index * height for place, _ in shown]
            axes.barh(places, values, height=height * 0.9, xerr=spread, capsize=2, label=label)
        axes.set_yticks([place + height * (len(reports) - 1) / 2 for place in range(len(names))], names)
        axes.invert_yaxis()
        axes.set_xlabel("% (fluency, consistency: × 100), with 95 % intervals")
        if before:
            axes.legend()
        figure.savefig(path, dpi=150)


def _short(value: float) -> str:
    return f"{value:.2f}" if math.isinf(value) or abs(value) >= 1 or value == 0 else f"{value:.4f}"
