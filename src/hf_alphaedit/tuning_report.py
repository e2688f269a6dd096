"""What the search for settings tried and found: table, JSON, and a preset file with the evidence inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.report import as_text


OBJECTIVE = (
    "harmonic mean of efficacy (accuracy), generalization (mean of success and accuracy) and the share of the "
    "specificity before the edit that is left, in %, divided by the perplexity ratio where that is above 1"
)


def objective(after: Mapping[str, float], before: Mapping[str, float]) -> float:
    """One number for what an edit reached; see `OBJECTIVE`. 0 if any of the three parts is."""
    specificity = "specificity_success" if "specificity_success" in after else "specificity_accuracy"
    generalization = [after[name] for name in after if name in ("generalization_success", "generalization_accuracy")]
    parts = [after["efficacy_accuracy"], sum(generalization) / len(generalization)]
    if before[specificity] > 0:
        parts.append(100 * min(1.0, after[specificity] / before[specificity]))
    if not all(part > 0 for part in parts):  # a NaN is worth nothing
        return 0.0
    return len(parts) / sum(1 / part for part in parts) / max(1.0, after.get("perplexity_ratio", 1.0))


@dataclass(frozen=True)
class Trial:
    """One set of settings, tried and undone.

    Attributes:
        settings: what differs from the start's settings.
        score: the objective; 0 for a trial that failed.
        metrics: values of the evaluation after the edit.
        seconds: time it took.
        error: why it failed; None if it didn't.
    """

    settings: Mapping[str, Any]
    score: float
    metrics: Mapping[str, float]
    seconds: float
    error: str | None = None


@dataclass(frozen=True)
class TuningReport:
    """Result of `tune`; `str()` gives a table, best trial first.

    Attributes:
        config: the best settings.
        trials: all trials in the order they were made, those of earlier runs included.
        before: the evaluation of the unedited model.
        finished: whether no neighbouring settings are better; False if the time ran out first.
        conditions: facts, seed, model and whatever else the figures depend on.
    """

    config: AlphaEditConfig
    trials: tuple[Trial, ...]
    before: Mapping[str, float]
    finished: bool
    conditions: Mapping[str, Any]

    @property
    def best(self) -> Trial:
        """The trial with the highest score; of equal ones the first."""
        return max(self.trials, key=lambda trial: trial.score)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "config": self.config.to_dict(), "objective": OBJECTIVE}

    def save_preset(self, path: str | Path, model_config: Any) -> Path:
        """Write the settings as a preset file that `config=` takes, with the evidence inside.

        Args:
            path: of the JSON file.
            model_config: the model's transformers config, whose shape the preset will be recognised by.
        """
        text_config = model_config.get_text_config(decoder=True)
        names = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")
        defaults, settings = AlphaEditConfig().to_dict(), self.config.to_dict()
        best = self.best
        document = {
            "status": "tuned",
            "source": f"hf-alphaedit tune: score {best.score:.1f} after {len(self.trials)} trials",
            "models": [model_config.name_or_path] if model_config.name_or_path else [],
            "shape": {name: getattr(text_config, name) for name in names if hasattr(text_config, name)},
            "settings": {
                name: value for name, value in settings.items() if value != defaults[name] and name != "source"
            },
            "evidence": {
                "objective": OBJECTIVE,
                "before": dict(self.before),
                "after": dict(best.metrics),
                "start": dict(self.trials[0].metrics),
                "score": best.score,
                "start_score": self.trials[0].score,
                "trials": len(self.trials),
                "finished": self.finished,
                **self.conditions,
            },
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    def __str__(self) -> str:
        table = Table(title=f"{len(self.trials)} trials, {'finished' if self.finished else 'out of time'}")
        metrics = ("efficacy_accuracy", "generalization_success", "generalization_accuracy", "specificity_success")
        for name in ("settings", "score", *metrics, "perplexity_ratio"):
            table.add_column(name.replace("_", " "), justify="left" if name == "settings" else "right")
        before = ["" if name not in self.before else f"{self.before[name]:.1f}" for name in metrics]
        table.add_row("before any edit", "", *before, "")
        for trial in sorted(self.trials, key=lambda trial: -trial.score):
            settings = ", ".join(f"{name} {value}" for name, value in trial.settings.items()) or "start"
            row = ["" if name not in trial.metrics else f"{trial.metrics[name]:.1f}" for name in metrics]
            ratio = trial.metrics.get("perplexity_ratio")
            table.add_row(trial.error or settings, f"{trial.score:.2f}", *row, "" if ratio is None else f"{ratio:.3f}")
        return as_text(table)
