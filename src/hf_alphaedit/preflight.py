"""Problems found before any work: in the texts of the requests, and in how their keys lie to each other."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.contexts import encode_requests
from hf_alphaedit.editing import BatchWalk, over_contexts
from hf_alphaedit.errors import EditingError, RequestError
from hf_alphaedit.estimates import editing_memory, editing_seconds
from hf_alphaedit.evaluation.scoring import score
from hf_alphaedit.history import History
from hf_alphaedit.models.encoding import EncodedRequest
from hf_alphaedit.models.hooks import inference_state
from hf_alphaedit.outcomes import NEW_TOKENS
from hf_alphaedit.preflight_report import PreflightReport, RequestCheck
from hf_alphaedit.records import Record, as_requests
from hf_alphaedit.requests import EditRequest


if TYPE_CHECKING:
    from hf_alphaedit.editor import AlphaEditor

# Cosine of two filtered keys from which on an edit is likely to disturb the other one.
SIMILAR = 0.9
# Targets of more tokens are rarely said whole: one vector has to carry all of them.
LONG_TARGET = 12
# Share of the null space's directions that edits may use before it counts as filling up.
FULL = 0.5


def preflight(
    editor: AlphaEditor, requests: Iterable[Record | EditRequest | Mapping[str, Any]], *, similarity: float = SIMILAR
) -> PreflightReport:
    """Look for everything that could go wrong with `requests`; nothing is changed.

    Costs the encoding of the texts, one forward pass of the prompts for what the model says now and, if the second
    moments are there, one that ends at the first edited layer for the keys. Texts that can't be used are listed in the
    report's `errors`; only a list that isn't one raises.

    Args:
        editor: its model, settings and history count.
        requests: as for `apply_edits`.
        similarity: cosine of filtered keys from which on two edits are reported as likely to disturb each other.

    Raises:
        RequestError: `requests` is empty or no list.
        EditingError: the model's keys are not finite.
    """
    wanted, errors = _read(requests)
    report = check_texts(editor, wanted)
    report = replace(report, errors=(*errors, *report.errors))
    if report.errors:
        return report
    scores = score(editor.model, editor.tokenizer, [(request.text, request.target_new) for request in wanted])
    report = with_known_facts(report, [result.exact for result in scores])
    return check_keys(editor, wanted, report, similarity=similarity) if editor.is_prepared else report


def _read(requests: Iterable[Record | EditRequest | Mapping[str, Any]]) -> tuple[list[EditRequest], list[str]]:
    """The requests that can be read, and the messages of those that can't."""
    if isinstance(requests, (str, bytes, EditRequest, Mapping)) or not (items := list(requests)):
        return as_requests(requests), []  # raises, in its own words
    wanted, errors = [], []
    for index, item in enumerate(items):
        try:
            wanted += as_requests([item])
        except RequestError as error:
            errors.append(str(error).replace("request 0:", f"request {index}:", 1))
    return wanted, errors


def check_texts(editor: AlphaEditor, requests: Sequence[EditRequest]) -> PreflightReport:
    """What can be seen without running the model: tokens, lengths, duplicates and contradictions."""
    contexts = editor.history.contexts or editor.config.context_templates or ()
    errors, warnings, checks = [], [], []
    for index, request in enumerate(requests):
        try:
            (encoded,) = encode_requests(editor.tokenizer, [request], contexts, editor.config)
        except RequestError as error:
            errors.append(f"request {index}: {error}")
            continue
        errors += _too_long(editor, index, request, encoded, sampled=not contexts)
        if len(encoded.target) > LONG_TARGET:
            warnings.append(
                f"request {index}: the target {_shortened(request.target_new)!r} has {len(encoded.target)} tokens; "
                f"more than {LONG_TARGET} are rarely learnt whole, give the object alone"
            )
        checks.append(_check_of(editor.tokenizer, request, encoded))
    contradictions, repetitions = _within(requests)
    warnings += [*repetitions, *_against(editor.history, requests)]
    return PreflightReport(
        tuple(checks), tuple([*errors, *contradictions]), tuple(warnings), edits_so_far=len(editor.history)
    )


def _check_of(tokenizer: PreTrainedTokenizerBase, request: EditRequest, encoded: EncodedRequest) -> RequestCheck:
    bare = encoded.rows[0]
    return RequestCheck(
        text=request.text,
        subject_token=str(tokenizer.decode([bare.token_ids[bare.subject]])),
        subject_position=bare.subject,
        target_tokens=tuple(str(tokenizer.decode([token])) for token in encoded.target),
        space_added=request.target_text != request.target_new,
    )


def _too_long(
    editor: AlphaEditor, index: int, request: EditRequest, encoded: EncodedRequest, *, sampled: bool
) -> list[str]:
    limit = getattr(editor.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    bare = encoded.rows[0]
    prompt = bare.first_prediction + 1
    longest = max(len(row.token_ids) for row in encoded.rows) + 1  # the last target token counts too
    if sampled:  # contexts that are still to be drawn come in front, joined by '. '
        longest += editor.config.context_length + 2
    longest = max(longest, prompt + NEW_TOKENS)
    if limit is None or longest <= limit:
        return []
    return [
        f"request {index}: prompt, context and target take {longest} tokens and the model has {limit} positions; "
        f"shorten {_shortened(request.text)!r} or its target"
    ]


def _within(requests: Sequence[EditRequest]) -> tuple[list[str], list[str]]:
    """Contradictions (errors) and repetitions or doubtful pairs (warnings) in one list of requests."""
    contradictions, repetitions = [], []
    by_prompt: dict[tuple[str, ...], int] = {}
    by_relation: dict[tuple[str, ...], int] = {}
    for index, request in enumerate(requests):
        first = by_prompt.setdefault(_prompt_key(request), index)
        related = by_relation.setdefault(_relation_key(request, index), index)
        if first != index and _normal(requests[first].target_new) == _normal(request.target_new):
            repetitions.append(f"request {index} repeats request {first}: {request.text!r}")
        elif first != index:
            contradictions.append(
                f"requests {first} and {index} want {requests[first].target_new!r} and {request.target_new!r} for "
                f"{request.text!r}; keep one of them"
            )
        elif related != index and _normal(requests[related].target_new) != _normal(request.target_new):
            repetitions.append(
                f"requests {related} and {index} give {request.subject!r} two objects of relation {request.relation}: "
                f"{requests[related].target_new!r} and {request.target_new!r}"
            )
    return contradictions, repetitions


def _against(history: History, requests: Sequence[EditRequest]) -> list[str]:
    """Earlier edits of the same fact. The history protects them, so a new target for the same key is held back."""
    warnings = []
    earlier = history.requests
    by_prompt = {_prompt_key(request): number for number, request in enumerate(earlier)}
    by_relation = {_relation_key(request, number): number for number, request in enumerate(earlier)}
    for index, request in enumerate(requests):
        number = by_prompt.get(_prompt_key(request), by_relation.get(_relation_key(request, -1)))
        if number is None:
            continue
        if _normal(earlier[number].target_new) == _normal(request.target_new):
            warnings.append(f"request {index} repeats an earlier edit: {earlier[number].text!r}")
        else:
            warnings.append(
                f"request {index} wants {request.target_new!r}, and an earlier edit wrote "
                f"{earlier[number].target_new!r} for {earlier[number].text!r}, which is protected; remove that first"
            )
    return warnings


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()


def _prompt_key(request: EditRequest) -> tuple[str, ...]:
    return _normal(request.prompt), _normal(request.subject)


def _relation_key(request: EditRequest, index: int) -> tuple[str, ...]:
    """Subject and relation; without a relation, a key that no other request has."""
    return (_normal(request.subject), request.relation or f"unknown {index}")


def with_known_facts(report: PreflightReport, exact: Sequence[bool]) -> PreflightReport:
    """The report with what the model says already; `exact[i]`: it predicts the new target token by token."""
    checks = tuple(replace(check, already_true=bool(known)) for check, known in zip(report.checks, exact, strict=True))
    known = [index for index, check in enumerate(checks) if check.already_true]
    note = f"the model says the new target already for request(s) {known}" if known else None
    return replace(report, checks=checks, warnings=(*report.warnings, *([note] if note else [])))


def check_keys(
    editor: AlphaEditor,
    requests: Sequence[EditRequest],
    report: PreflightReport,
    *,
    similarity: float = SIMILAR,
) -> PreflightReport:
    """The report with how near the keys are to each other and to earlier ones, what room is left, and what it takes.

    Keys are those of the last edited layer, which takes the largest part of an edit; what the batch itself will change
    below is not in them yet. (In the lowest layers, keys say little more than which token ends the subject.) Compared
    are filtered keys, which the update is solved for: an update at one of them moves the other's value by their
    cosine, unless the solve takes both into account, at the price of a larger norm. Source: the keys' Gram matrix in
    the update (paper, equation 14).
    """
    history, config = editor.history, editor.config
    first, site = editor.sites()[0], editor.sites()[-1]
    contexts = history.contexts or config.context_templates or ()
    encoded = encode_requests(editor.tokenizer, requests, contexts, config)
    began = time.perf_counter()
    with inference_state(editor.model):
        walk = BatchWalk(editor.architecture, encoded, [first.layer, site.layer])
        walk.advance(first.layer, first.layer)
        seconds = time.perf_counter() - began
        keys = over_contexts(walk.advance(site.layer, site.layer)[0], walk.weights)  # (n, c, d) -> (n, d)
    if not torch.isfinite(keys).all():
        raise EditingError(f"the keys of {site.name} are not finite; the model's weights are damaged, load it again")
    filters = editor.filters()
    directions = _directions(filters[site.name].root(keys.cpu()))  # (n, d)
    past = history.past_keys(site.name)
    others = directions if past is None else torch.cat([directions, _directions(past)])  # (n + p, d)
    cosines = directions @ others.T  # (n, n + p)
    cosines.fill_diagonal_(-1)
    nearest = cosines.max(1)
    labels = [request.text for request in requests] + _labels(history, site.name)
    checks, warnings = [], list(report.warnings)
    for index, check in enumerate(report.checks):
        value, place = float(nearest.values[index]), int(nearest.indices[index])
        if len(labels) < 2:
            checks.append(check)
            continue
        checks.append(replace(check, similarity=value, nearest=labels[place]))
        mutual = place < len(requests) and int(nearest.indices[place]) == index
        if value >= similarity and not (mutual and place < index):  # a pair is named once
            what = f"request {place}" if place < len(requests) else "an earlier edit"
            warnings.append(
                f"request {index}, {check.text!r}: its key is nearly that of {what}, {labels[place]!r} (cosine "
                f"{value:.2f}); each may undo the other"
            )
    free = {name: spectral_filter.null_rank for name, spectral_filter in filters.items()}
    warnings += _filling_up(config, len(history) + len(requests), free)
    rows = [row for one in encoded for row in (*one.rows, *one.mentions)]
    rate = sum(len(row.until_subject().token_ids) for row in rows) / max(seconds, 1e-9)
    return replace(
        report,
        checks=tuple(checks),
        warnings=tuple(warnings),
        free_directions=free,
        seconds=editing_seconds(editor, encoded, rate),
        memory=editing_memory(editor, encoded),
    )


def _directions(filtered: Tensor) -> Tensor:
    """(n, d) rows of norm 1; zero rows stay zero."""
    return torch.nn.functional.normalize(filtered.float(), dim=-1)


def _labels(history: History, site_name: str) -> list[str]:
    """A name for every row of `history.past_keys(site_name)`."""
    return [
        label
        for batch in history.batches
        if site_name in batch.keys
        for label in [*(request.text for request in batch.requests), *["(text withheld)"] * batch.withheld]
    ]


def _filling_up(config: AlphaEditConfig, edits: int, free: Mapping[str, int]) -> list[str]:
    name = min(free, key=lambda site: free[site])
    if not config.use_history or edits <= FULL * free[name]:
        return []
    return [
        f"after this, {edits} edits share the {free[name]} free directions of {name}; expect earlier edits to fade, "
        "raise energy_share or start from a fresh model"
    ]


def _shortened(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
