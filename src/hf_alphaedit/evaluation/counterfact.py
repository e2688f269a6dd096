"""Efficacy, generalization and specificity under teacher forcing, as CounterFact and zsRE define them.

All are means over a record's prompts, then over records. With loss(t) the mean negative log-probability of a token of
target t:

- success (CounterFact; ROME, MEMIT): loss(new) < loss(true) on the prompt (efficacy) and its paraphrases
  (generalization), loss(true) < loss(new) on the neighbours (specificity). Lenient: the model may still say neither.
- accuracy (strict): every token of the expected target is the argmax.
- token accuracy (zsRE; MEND, MEMIT): share of the expected target's tokens that are the argmax, over all tokens of a
  record's prompts together; each token is predicted from the true tokens before it.

Success needs the old object (`target_true`); token accuracy is given for the records without one, as published. The
published zsRE numbers of Llama models have two artefacts that are not repeated here: a space too many before later
tokens, and a beginning-of-text token that is counted as a token of the neighbour's answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hf_alphaedit.evaluation.scoring import Pair, Score
from hf_alphaedit.records import Record


NAMES = ("efficacy", "generalization", "specificity")


@dataclass(frozen=True)
class Probe:
    """One prompt, the target that should follow it, and the one that should be less probable, where there is one."""

    prompt: str
    expected: str
    other: str | None

    def pairs(self) -> list[Pair]:
        return [(self.prompt, target) for target in (self.expected, self.other) if target is not None]


def probes(record: Record, name: str) -> list[Probe]:
    """What `name`, one of `NAMES`, asks about this record. Neighbours without an answer are left out."""
    request = record.request
    if name == "efficacy":
        return [Probe(request.text, request.target_new, request.target_true)]
    if name == "generalization":
        return [Probe(prompt, request.target_new, request.target_true) for prompt in record.paraphrases]
    other = None if request.target_true is None else request.target_new
    return [Probe(prompt, answer, other) for prompt, answer in record.neighborhood if answer is not None]


def measure(record: Record, name: str, scores: Mapping[Pair, Score]) -> dict[str, float]:
    """The record's success, accuracy and token accuracy for `name`, as far as they are defined, in [0, 1]."""
    asked = probes(record, name)
    if not asked:
        return {}
    expected = [scores[probe.prompt, probe.expected] for probe in asked]
    result = {f"{name}_accuracy": _mean([score.exact for score in expected])}
    others = [(score, probe) for score, probe in zip(expected, asked, strict=True) if probe.other is not None]
    if others:
        won = [
            score.loss < scores[probe.prompt, probe.other].loss for score, probe in others if probe.other is not None
        ]
        result = {f"{name}_success": _mean(won), **result}
    else:
        result[f"{name}_token_accuracy"] = _mean([correct for score in expected for correct in score.correct])
    return result


def _mean(values: list[bool]) -> float:
    return sum(values) / len(values)
