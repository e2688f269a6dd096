"""The search behind `tuning.tune`: which settings to try next, and the log of what was tried."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.tuning_report import Trial


logger = logging.getLogger(__name__)

# One step along a ladder at a time, from the rung nearest to where the search stands. The order is that of the search:
# what decides most comes first, and what needs no new target search (l2, energy_share) is cheap.
LADDERS: dict[str, tuple[float, ...]] = {
    "learning_rate": (0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    "clamp_factor": (0.4, 0.5, 0.6, 0.75, 1.0, 1.5, 2.5, 4.0),
    "energy_share": (0.03, 0.1, 0.2, 0.3, 0.45, 0.6),
    "l2": (0.1, 1.0, 3.0, 5.0, 10.0, 20.0),
}


class TrialLog:
    """Trials on disk, one JSON line each; those made under other conditions are left alone."""

    def __init__(self, path: Path, context: str) -> None:
        self.path, self.context = path, context
        self.known: dict[str, Trial] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:  # the line that was being written when the run was killed
                continue
            if entry.pop("context") == context:
                self.known[digest(entry["settings"])] = Trial(**entry)

    def find(self, settings: Mapping[str, Any]) -> Trial | None:
        return self.known.get(digest(settings))

    def add(self, trial: Trial) -> None:
        self.known[digest(trial.settings)] = trial
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps({"context": self.context, **asdict(trial)}) + "\n")
            file.flush()
            os.fsync(file.fileno())


class OutOfTime(Exception):
    """Ends the search where it is."""


class Search:
    """Hill climbing along one setting after another."""

    def __init__(
        self,
        attempt: Callable[[Mapping[str, Any]], Trial],
        start: AlphaEditConfig,
        depth: int,
        log: TrialLog,
        deadline: float,
    ) -> None:
        """`attempt` makes one trial; `depth` is the model's number of layers; `deadline` is in monotonic seconds."""
        self.attempt, self.start, self.depth, self.log, self.deadline = attempt, start, depth, log, deadline
        self.trials: list[Trial] = []

    def run(self, starts: Sequence[Sequence[int]], ladders: Mapping[str, Sequence[float]]) -> bool:
        """Whether the search came to its end in time. At least one trial is always made."""
        try:
            best = max((self.score({"layers": list(start)}) for start in starts), key=lambda trial: trial.score)
            while True:
                before = best
                for name in ("layers", *ladders):
                    best = self._climb(best, name, ladders)
                if best.score <= before.score:
                    return True
        except OutOfTime:
            return False

    def score(self, settings: Mapping[str, Any]) -> Trial:
        trial = self.log.find(settings)
        if trial is None:
            if self.trials and time.monotonic() >= self.deadline:
                raise OutOfTime
            trial = self.attempt(settings)
            self.log.add(trial)
            logger.info("score %.2f with %s", trial.score, dict(settings))
        if trial not in self.trials:
            self.trials.append(trial)
        return trial

    def _climb(self, best: Trial, name: str, ladders: Mapping[str, Sequence[float]]) -> Trial:
        """Go on in each direction for as long as it gets better."""
        for direction in moves(name, self.depth, ladders):
            while True:
                current = best.settings.get(name, getattr(self.start, name))
                value = direction(current)
                if value is None:
                    break
                trial = self.score({**best.settings, name: value})
                if trial.score <= best.score:
                    break
                best = trial
        return best


def moves(name: str, depth: int, ladders: Mapping[str, Sequence[float]]) -> list[Callable[[Any], Any]]:
    """The directions in which a setting can go: from its value to the next one, or to None at the end."""
    if name != "layers":
        ladder = ladders[name]
        return [
            lambda value: next((rung for rung in ladder if rung > value), None),
            lambda value: next((rung for rung in reversed(ladder) if rung < value), None),
        ]
    step = max(1, depth // 15)

    def moved(shift: int, wider: int) -> Callable[[Sequence[int]], list[int] | None]:
        def move(layers: Sequence[int]) -> list[int] | None:
            first, last = layers[0] + shift, layers[-1] + shift + wider
            return list(range(first, last + 1)) if 0 <= first <= last < depth - 1 else None

        return move

    return [moved(step, 0), moved(-step, 0), moved(0, -2), moved(0, 2)]


def digest(value: Any) -> str:
    """Of any JSON value; what isn't one counts as its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]
