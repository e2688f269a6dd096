"""The outcome of causal tracing: average indirect effects, the layers they suggest, and the heat map."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


# Where a token stands, as the paper groups them. A subject of one token is "subject, last".
PLACES = ("subject, first", "subject", "subject, last", "after subject", "further", "prompt, last")
DEEPEST = "subject, last"


@dataclass(frozen=True)
class TraceReport:
    """Average indirect effects of restoring clean states in corrupted runs.

    Attributes:
        effects: kind of state -> place (see `PLACES`) -> layer: by how much restoring it raises the probability of the
            answer, averaged over tokens at that place, noise and facts.
        known: facts that the model knows; only these are traced.
        given: all facts.
        clean: mean probability of the answer in clean runs.
        corrupted: the same in corrupted runs; `clean - corrupted` is the total effect.
        settings: samples, noise, window, layers_to_suggest, seed.
    """

    effects: dict[str, list[list[float]]]
    known: int
    given: int
    clean: float
    corrupted: float
    settings: dict[str, Any] = field(default_factory=dict)

    def at_subject(self, kind: str) -> list[float]:
        """The average effect at the subject's last token, by layer: where AlphaEdit reads its keys."""
        return self.effects[kind][PLACES.index(DEEPEST)]

    @property
    def suggested_layers(self) -> tuple[int, ...]:
        """The consecutive layers with the largest summed effect at the subject's last token.

        The feed-forward states decide where they were traced, since these are what an edit changes.
        """
        effect = self.at_subject("mlp" if "mlp" in self.effects else next(iter(self.effects)))
        length = min(self.settings["layers_to_suggest"], len(effect))
        first = max(range(len(effect) - length + 1), key=lambda start: sum(effect[start : start + length]))
        return tuple(range(first, first + length))

    def __str__(self) -> str:
        layers = self.suggested_layers
        kinds = list(self.effects)
        lines = [
            f"{self.known} of {self.given} facts are known",
            f"probability of the answer: {self.clean:.3f} clean, {self.corrupted:.3f} corrupted",
            f"suggested layers: {layers[0]} to {layers[-1]}",
            "average indirect effect at the subject's last token, in points:",
            "layer  " + "  ".join(f"{kind:>9}" for kind in kinds),
        ]
        for layer in range(len(self.at_subject(kinds[0]))):
            values = "  ".join(f"{100 * self.at_subject(kind)[layer]:>9.2f}" for kind in kinds)
            lines.append(f"{layer:>5}  {values}{'  *' if layer in layers else ''}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the names of the places and the suggested layers are included."""
        return {**asdict(self), "places": list(PLACES), "suggested_layers": list(self.suggested_layers)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TraceReport:
        """The inverse of `to_dict`."""
        return cls(**{name: value for name, value in values.items() if name not in ("places", "suggested_layers")})

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, also written to `path` if that is given."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def plot(self, path: str | Path) -> None:
        """Draw one heat map per kind (places by layers) and, below, the effect at the subject by layer.

        Raises:
            ModuleNotFoundError: matplotlib is missing; it comes with the extra `plots`.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4 * len(self.effects) + 1, 5), layout="constrained")
        axes = figure.subplots(2, len(self.effects), squeeze=False, sharex=True)
        for column, (kind, effect) in enumerate(self.effects.items()):
            image = axes[0, column].imshow(effect, aspect="auto", cmap="Purples")
            axes[0, column].set_title(kind)
            axes[0, column].set_yticks(range(len(PLACES)), PLACES if column == 0 else [""] * len(PLACES))
            figure.colorbar(image, ax=axes[0, column], location="top", shrink=0.8)
            axes[1, column].plot(self.at_subject(kind))
            axes[1, column].axvspan(self.suggested_layers[0] - 0.5, self.suggested_layers[-1] + 0.5, alpha=0.15)
            axes[1, column].set_xlabel("layer")
        axes[1, 0].set_ylabel("effect at subject, last")
        figure.savefig(path, dpi=150)
