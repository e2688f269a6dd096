"""How the benchmarks show and keep what they measured: tables on the terminal, JSON and a plot in a folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


OUTPUT = Path(__file__).parent / "output"


@dataclass(frozen=True)
class Goal:
    """One figure and what it should be; `at_least` tells from which side."""

    name: str
    value: float
    goal: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under columns; the first column is text, the others are figures."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*[figure(value) for value in row])
    Console(width=None if Console().is_terminal else 120).print(table)


def show_goals(goals: Sequence[Goal]) -> None:
    """Print every goal with its figure."""
    rows = [
        (
            goal.name,
            goal.value,
            f"{'≥' if goal.at_least else '≤'} {figure(goal.goal)}",
            "met" if goal.met else "missed",
        )
        for goal in goals
    ]
    show_table("Goals", ("figure", "measured", "goal", ""), rows)


def figure(value: Any) -> str:
    """A number with three digits or so; None as nothing."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if value != 0 and (abs(value) < 1e-2 or abs(value) >= 1e5):
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def save(name: str, folder: Path, result: Mapping[str, Any], goals: Sequence[Goal] = ()) -> Path:
    """Write `<folder>/<name>.json` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    document = {**result, "goals": [{**asdict(goal), "met": goal.met} for goal in goals]}
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def plot_phases(path: Path, title: str, sides: Mapping[str, Mapping[str, float]]) -> None:
    """Seconds of every phase, one bar for each side, on a logarithmic axis."""
    figure_, axes = _axes()
    phases = list(dict.fromkeys(phase for seconds in sides.values() for phase in seconds))
    height = 0.8 / len(sides)
    for index, (side, seconds) in enumerate(sides.items()):
        places = [place + (index - (len(sides) - 1) / 2) * height for place in range(len(phases))]
        bars = axes.barh(places, [seconds.get(phase, 0.0) for phase in phases], height, label=side)
        axes.bar_label(bars, [f"{seconds[phase]:.2g}" if phase in seconds else "" for phase in phases], padding=2)
    axes.set_yticks(range(len(phases)), phases)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="seconds", title=title)
    axes.legend()
    figure_.savefig(path, dpi=120)


def plot_lines(
    path: Path, title: str, x_label: str, y_label: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> None:
    """One line for each name, both axes from zero."""
    figure_, axes = _axes()
    for name, (x, y) in lines.items():
        axes.plot(x, y, marker="o", label=name)
    axes.set(title=title, xlabel=x_label, ylabel=y_label, xlim=(0, None), ylim=(0, None))
    axes.legend()
    figure_.savefig(path, dpi=120)


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    figure_ = Figure(figsize=(8, 5), layout="constrained")
    return figure_, figure_.add_subplot()
