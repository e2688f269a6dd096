"""Portability and locality in KnowEdit's groups.

- portability: how well the model answers questions whose answers follow from the edit. A question's value is the token
  accuracy of its answer under teacher forcing; of several aliases the best counts (the first `ALIASES` are tried).
- locality: the same for questions whose answers must stay, against the data set's own answer. The unedited model
  doesn't know all of them, so compare with its value.
- locality_agreement: share of the argmax tokens at the places of that answer that equal the unedited model's, whatever
  it said; 100 before any edit. This is what EasyEdit calls locality. It needs the unedited model's report.

A record's value is the mean over its questions, in one group or in all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_alphaedit.evaluation.scoring import Pair, Score
from hf_alphaedit.records import Question, Record


NAMES = ("portability", "locality")
ALIASES = 4


def groups(record: Record, name: str) -> Mapping[str, tuple[Question, ...]]:
    return record.portability if name == "portability" else record.locality


def pairs(record: Record, name: str) -> list[Pair]:
    """Every (prompt, answer) that `measure` looks up."""
    questions = [question for group in groups(record, name).values() for question in group]
    return [(prompt, answer) for prompt, answers in questions for answer in answers[:ALIASES]]


def measure(
    record: Record, name: str, scores: Mapping[Pair, Score], before: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """The record's mean over all questions and over each group, in [0, 1].

    Args:
        record: the record.
        name: "portability" or "locality".
        scores: of every pair that `pairs` gives.
        before: the `predictions` that the unedited model's report has for this record.
    """
    by_group = {
        group: [
            max(scores[prompt, answer].token_accuracy for answer in answers[:ALIASES]) for prompt, answers in asked
        ]
        for group, asked in groups(record, name).items()
        if asked
    }
    if not by_group:
        return {}
    values = [value for group in by_group.values() for value in group]
    result = {name: sum(values) / len(values)}
    if name == "locality" and before is not None:
        result["locality_agreement"] = _agreement(predictions(record, scores), before)
    return {
        **result,
        **{f"{name}_{group}": sum(group_values) / len(group_values) for group, group_values in by_group.items()},
    }


def predictions(record: Record, scores: Mapping[Pair, Score]) -> dict[str, list[list[int]]]:
    """The argmax tokens at the places of each locality question's first answer, by group."""
    return {
        group: [list(scores[prompt, answers[0]].predictions) for prompt, answers in asked]
        for group, asked in record.locality.items()
    }


def _agreement(after: Mapping[str, list[list[int]]], before: Mapping[str, list[list[int]]]) -> float:
    if {group: list(map(len, asked)) for group, asked in after.items()} != {
        group: list(map(len, asked)) for group, asked in before.items()
    }:
        raise ValueError("the report given as `before` was made from other records; evaluate both on the same ones")
    shares = [
        sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)
        for group, asked in after.items()
        for ours, theirs in zip(asked, before[group], strict=True)
    ]
    return sum(shares) / len(shares)
