"""One `apply_edits` call: check, edit batch after batch, measure, and keep the result or roll it back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from huggingface_hub.utils import tqdm

from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.contexts import contexts_for
from hf_alphaedit.editing import EditedBatch, Stopwatch, edit_batch
from hf_alphaedit.errors import ConfigError, EditingError, GateError
from hf_alphaedit.evaluation.scoring import score
from hf_alphaedit.gate import Gate
from hf_alphaedit.models.encoding import EncodedRequest
from hf_alphaedit.models.hooks import inference_state
from hf_alphaedit.outcomes import measure, report_of
from hf_alphaedit.preflight import check_texts, with_known_facts
from hf_alphaedit.preflight_keys import check_keys
from hf_alphaedit.records import Record, as_record, as_requests
from hf_alphaedit.report import EditReport
from hf_alphaedit.requests import EditRequest
from hf_alphaedit.target_cache import cached_targets
from hf_alphaedit.targets import Targets, compute_targets


if TYPE_CHECKING:
    from hf_alphaedit.editor import AlphaEditor


def apply_edits(
    editor: AlphaEditor,
    requests: Iterable[Record | EditRequest | Mapping[str, Any]],
    *,
    batch_size: int | None = None,
    seed: int = 0,
    preflight: bool = True,
    gate: Gate | None = None,
    retry: int = 0,
    drop_failed: bool = False,
) -> EditReport:
    """See `AlphaEditor.apply_edits`."""
    if not (batch_size is None or batch_size >= 1):
        raise ConfigError(f"batch_size={batch_size} must be at least 1, or None for one batch")
    if retry < 0:
        raise ConfigError(f"retry={retry} must be zero or more")
    sources = requests if isinstance(requests, (str, bytes, EditRequest, Mapping)) else list(requests)
    wanted = as_requests(sources)
    records = [as_record(source) for source in sources]
    if gate is not None:
        gate.check(records)
    checks = check_texts(editor, wanted) if preflight else None
    if checks is not None:
        checks.raise_errors()
    watch = Stopwatch()
    with watch.measuring("projector"):
        editor.filters()
    earlier = list(editor.history.batches)
    edited: list[EditedBatch] = []
    kept: list[int] = []
    with editor.all_or_nothing(), inference_state(editor.model):
        with watch.measuring("report"):
            before = measure(editor.model, editor.tokenizer, wanted)
        with watch.measuring("contexts"):
            if editor.history.contexts is None:  # the first batch fixes them for all
                editor.history.contexts = contexts_for(editor.model, editor.tokenizer, editor.config, seed)
        if checks is not None:
            with watch.measuring("preflight"):
                checks = check_keys(editor, wanted, with_known_facts(checks, [one.argmax for one in before]))
        reference = None
        if gate is not None:
            with watch.measuring("gate"):
                reference = gate.reference(editor)
        size = batch_size or len(wanted)
        starts = range(0, len(wanted), size)
        for start in tqdm(starts, desc="batches", name="hf_alphaedit", disable=len(starts) == 1):
            batch, predicted = _edit(editor, wanted[start : start + size], retry, drop_failed, watch)
            if batch is not None:
                editor.history.batches.append(batch.batch)
                edited.append(batch)
            kept += [start + index for index in predicted]
        if not edited:
            raise EditingError(
                f"none of the {len(wanted)} requests is predicted after {retry} retries, so drop_failed leaves "
                "nothing; raise value_steps or clamp_factor"
            )
        with watch.measuring("report"):
            after = measure(editor.model, editor.tokenizer, wanted)
            report = report_of(
                editor, [wanted[i] for i in kept], [before[i] for i in kept], [after[i] for i in kept], edited,
                earlier, watch.seconds,
            )  # fmt: skip
        editor.history.record_outcomes([asdict(outcome) for outcome in report.outcomes])
        gone = [index for index in range(len(wanted)) if index not in set(kept)]
        report = replace(
            report,
            seconds=dict(watch.seconds),
            warnings=checks.warnings if checks is not None else (),
            dropped=tuple({**wanted[i].to_dict(), "before": before[i].text, "after": after[i].text} for i in gone),
        )
        if gate is not None:
            with watch.measuring("gate"):
                evaluation, missed = gate.measure(editor, [records[i] for i in kept], reference)
            metrics = {name: asdict(estimate) for name, estimate in evaluation.metrics.items()}
            report = replace(report, evaluation=metrics, seconds=dict(watch.seconds))
            if missed:
                raise GateError(f"{'; '.join(missed)}. The edits were taken back", report)
    return report


def _edit(
    editor: AlphaEditor, requests: Sequence[EditRequest], retry: int, drop_failed: bool, watch: Stopwatch
) -> tuple[EditedBatch | None, list[int]]:
    """Edit one batch, try again for the requests that aren't predicted afterwards, and drop those if asked to.

    A retry takes the batch back and solves it again with targets that were searched for with twice the steps and down
    to a tenth of the loss, for the failing requests alone.

    Returns:
        The batch, None if nothing is left of it, and the places of the requests in it.
    """
    everyone = list(range(len(requests)))
    effort = [0] * len(requests)  # retries that each request has behind it
    batch = _solve(editor, requests, watch)
    failed = _failing(editor, requests) if retry or drop_failed else []
    for _ in range(retry):
        if not failed:
            break
        for index in failed:
            effort[index] += 1
        editor.write_weights()
        search = _Search(editor, effort, failed, batch.targets)
        batch = _solve(editor, requests, watch, search)
        failed = _failing(editor, requests)
    if not (failed and drop_failed):
        return batch, everyone
    kept = [index for index in everyone if index not in failed]
    editor.write_weights()
    if not kept:
        return None, []
    search = _Search(editor, [effort[index] for index in kept], [], _rows(batch.targets, kept))
    return _solve(editor, [requests[index] for index in kept], watch, search), kept


def _solve(
    editor: AlphaEditor, requests: Sequence[EditRequest], watch: Stopwatch, search: _Search | None = None
) -> EditedBatch:
    return edit_batch(
        editor.architecture, editor.tokenizer, requests, editor.history.contexts or (), editor.filters(),
        editor.history, editor.config, watch, search or partial(cached_targets, editor),
    )  # fmt: skip


def _failing(editor: AlphaEditor, requests: Sequence[EditRequest]) -> list[int]:
    pairs = [(request.text, request.target_new) for request in requests]
    return [i for i, result in enumerate(score(editor.model, editor.tokenizer, pairs)) if not result.exact]


class _Search:
    """A target search with an effort of its own for each request, which keeps the targets that are known already."""

    def __init__(self, editor: AlphaEditor, effort: Sequence[int], wanted: Sequence[int], known: Targets) -> None:
        self.editor, self.effort, self.known = editor, effort, known
        # Where each layer has targets of its own, those of the upper layers depend on what is written below.
        self.wanted = list(wanted) if editor.architecture.additive else list(range(len(effort)))

    def __call__(self, encoded: Sequence[EncodedRequest], layer: int) -> Targets:
        result = _rows(self.known, range(len(encoded)))
        for effort in sorted({self.effort[index] for index in self.wanted}):
            places = [index for index in self.wanted if self.effort[index] == effort]
            config = harder(self.editor.config, effort)
            found = compute_targets(self.editor.architecture, [encoded[index] for index in places], layer, config)
            for name, values in vars(result).items():
                values[places] = getattr(found, name)
        return result


def harder(config: AlphaEditConfig, retries: int) -> AlphaEditConfig:
    """The settings of a search after so many failures: twice the steps and a tenth of the final loss each time."""
    if retries == 0:
        return config
    return config.replace(
        value_steps=config.value_steps * 2**retries, stop_loss=config.stop_loss / 10**retries, stop_at_argmax=False
    )


def _rows(targets: Targets, rows: Sequence[int]) -> Targets:
    """A copy of these rows."""
    return Targets(**{name: values[list(rows)] for name, values in vars(targets).items()})
