"""Measure requests before and after an edit, and put the report together."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_alphaedit.batches import Batch
from hf_alphaedit.editing import EditedBatch
from hf_alphaedit.evaluation.together import continue_and_score
from hf_alphaedit.filters import corpus_energy
from hf_alphaedit.report import EditReport, Outcome, SiteChange
from hf_alphaedit.requests import EditRequest


if TYPE_CHECKING:
    from hf_alphaedit.editor import AlphaEditor

NEW_TOKENS = 8


@dataclass(frozen=True)
class Measured:
    """What the model makes of one request.

    Attributes:
        text: its own greedy continuation of the prompt.
        p_new: probability of the whole new target after the prompt, 0 to 1.
        p_true: the same of the old target; None where it isn't known.
        argmax: whether every token of the new target is the most likely one.
    """

    text: str
    p_new: float
    p_true: float | None
    argmax: bool


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest]
) -> list[Measured]:
    """Continue each prompt greedily and score both targets after it.

    Args:
        model: edited or not; not changed.
        tokenizer: its tokenizer.
        requests: n requests; the old target is scored where it is known.

    Returns:
        One `Measured` for each request, in order.
    """
    pairs = [(request.text, request.target_new) for request in requests]
    known = [index for index, request in enumerate(requests) if request.target_true]
    pairs += [(requests[index].text, requests[index].target_true or "") for index in known]
    texts, scores = continue_and_score(model, tokenizer, pairs, max_new_tokens=NEW_TOKENS)
    old = {index: math.exp(scores[len(requests) + place].log_probability) for place, index in enumerate(known)}
    return [
        Measured(texts[request.text], math.exp(scores[index].log_probability), old.get(index), scores[index].exact)
        for index, request in enumerate(requests)
    ]


def report_of(
    editor: AlphaEditor,
    requests: Sequence[EditRequest],
    before: Sequence[Measured],
    after: Sequence[Measured],
    edited: Sequence[EditedBatch],
    earlier: Sequence[Batch],
    seconds: Mapping[str, float],
) -> EditReport:
    """The report of one `apply_edits` call.

    Args:
        editor: with the edited weights and the batches in its history.
        requests: n requests, in the order of the batches.
        before: n measurements on the weights before the call.
        after: n measurements on the edited weights.
        edited: the batches of this call.
        earlier: the batches that were there before it.
        seconds: time per phase.
    """
    steps = torch.cat([batch.targets.steps for batch in edited]).tolist()
    missing = torch.cat([batch.missing for batch in edited]).tolist()
    outcomes = tuple(
        Outcome(
            prompt=request.text,
            target_new=request.target_new,
            target_true=request.target_true,
            before=old.text,
            after=new.text,
            p_new_before=old.p_new,
            p_new_after=new.p_new,
            p_true_before=old.p_true,
            p_true_after=new.p_true,
            argmax_after=new.argmax,
            steps=steps[index],
            missing=missing[index],
        )
        for index, (request, old, new) in enumerate(zip(requests, before, after, strict=True))
    )
    return EditReport(outcomes, tuple(_site_changes(editor, edited, earlier)), dict(seconds), peak_memory())


def _site_changes(editor: AlphaEditor, edited: Sequence[EditedBatch], earlier: Sequence[Batch]) -> list[SiteChange]:
    changes = []
    moments, filters = editor.second_moments(), editor.filters()
    for site in editor.sites():
        name = site.name
        base = editor.history.base_weights[name].float()  # (h, d)
        delta = editor.history.delta(name, [batch.batch for batch in edited])  # (h, d)
        before = editor.history.weight(name, earlier).float()
        realised = editor.history.weight(name).float() - before
        kept = torch.cat([batch.kept_energy[name] for batch in edited])
        changes.append(
            SiteChange(
                site=name,
                relative_norm=float(delta.norm() / base.norm()),
                rank=sum(len(batch.batch.updates[name].inputs) for batch in edited),
                corpus_energy=corpus_energy(delta, site, moments) / corpus_energy(base, site, moments),
                null_rank=filters[name].null_rank,
                dimension=base.shape[1],
                kept_energy=float(kept.mean()),
                rounding=float((realised - delta).norm() / delta.norm()),
            )
        )
    return changes


def peak_memory() -> int:
    """Largest memory use so far, in bytes: allocated on the accelerator if there is one, else resident."""
    if torch.accelerator.is_available():
        return int(torch.accelerator.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in kilobytes except on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
