"""Problems found before any work: in the texts of the requests, and in how their keys lie to each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from hf_alphaedit.batches import requests_in_force
from hf_alphaedit.contexts import FIRST_WORDS, encode_requests
from hf_alphaedit.errors import RequestError
from hf_alphaedit.evaluation.scoring import score
from hf_alphaedit.history import History
from hf_alphaedit.models.encoding import BARE, EncodedRequest
from hf_alphaedit.outcomes import NEW_TOKENS
from hf_alphaedit.preflight_keys import SIMILAR, check_keys
from hf_alphaedit.preflight_report import PreflightReport, RequestCheck
from hf_alphaedit.records import Record, as_requests
from hf_alphaedit.requests import EditRequest


if TYPE_CHECKING:
    from hf_alphaedit.editor import AlphaEditor

# Targets of more tokens are rarely said whole: one vector has to carry all of them.
LONG_TARGET = 12


def preflight(
    editor: AlphaEditor, requests: Iterable[Record | EditRequest | Mapping[str, Any]], *, similarity: float = SIMILAR
) -> PreflightReport:
    """Look for everything that could go wrong with `requests`; nothing is changed.

    Costs the encoding of the texts, one forward pass of the prompts for what the model says now and, if the second
    moments are there, one that ends at the last edited layer for the keys. Texts that can't be used are listed in the
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
    known = editor.config.context_templates if editor.history.contexts is None else editor.history.contexts
    # Those that are still to be drawn are counted with their length; see `_too_long`.
    contexts = known if known is not None else (BARE,) * (len(FIRST_WORDS) * editor.config.contexts_per_word)
    errors, warnings, checks = [], [], []
    for index, request in enumerate(requests):
        try:
            (encoded,) = encode_requests(editor.tokenizer, [request], contexts, editor.config)
        except RequestError as error:
            errors.append(f"request {index}: {error}")
            continue
        errors += _too_long(editor, index, request, encoded, sampled=known is None)
        if len(encoded.target) > LONG_TARGET:
            warnings.append(
                f"request {index}: the target {_shortened(request.target_new)!r} has {len(encoded.target)} tokens; "
                f"more than {LONG_TARGET} are rarely learnt whole, give the object alone"
            )
        if len(request.other_prompts) > len(contexts):
            warnings.append(
                f"request {index} has {len(request.other_prompts)} other prompts, of which {len(contexts)} are used, "
                "one in each context; with a larger contexts_per_word there are more contexts"
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
        related = by_relation.setdefault(_relation_key(request, index), index)
        firsts = {prompt: by_prompt.setdefault(_prompt_key(request, prompt), index) for prompt in request.prompts}
        others = {first: prompt for prompt, first in firsts.items() if first != index}
        differing = [first for first in others if not _same_target(requests[first], request)]
        if differing:
            contradictions += [
                f"requests {first} and {index} want {requests[first].target_new!r} and {request.target_new!r} for "
                f"{request.filled(others[first])!r}; keep one of them"
                for first in differing
            ]
        elif firsts[request.prompt] != index:
            repetitions.append(f"request {index} repeats request {firsts[request.prompt]}: {request.text!r}")
        elif related != index and not _same_target(requests[related], request):
            repetitions.append(
                f"requests {related} and {index} give {request.subject!r} two objects of relation {request.relation}: "
                f"{requests[related].target_new!r} and {request.target_new!r}"
            )
    return contradictions, repetitions


def _against(history: History, requests: Sequence[EditRequest]) -> list[str]:
    """Earlier edits of the same relation in other words: the history protects them, so the new one is held back.

    One of the same prompt is not protected from the edit that takes its place.
    """
    warnings = []
    earlier = requests_in_force(history.batches, requests)
    by_relation = {_relation_key(request, number): number for number, request in enumerate(earlier)}
    for index, request in enumerate(requests):
        number = by_relation.get(_relation_key(request, -1))
        if number is not None and not _same_target(earlier[number], request):
            warnings.append(
                f"request {index} wants {request.target_new!r}, and an earlier edit wrote "
                f"{earlier[number].target_new!r} for {earlier[number].text!r}, which is protected; remove that first"
            )
    return warnings


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()


def _same_target(first: EditRequest, second: EditRequest) -> bool:
    return _normal(first.target_new) == _normal(second.target_new)


def _prompt_key(request: EditRequest, prompt: str) -> tuple[str, ...]:
    return _normal(prompt), _normal(request.subject)


def _relation_key(request: EditRequest, index: int) -> tuple[str, ...]:
    """Subject and relation; without a relation, a key that no other request has."""
    return (_normal(request.subject), request.relation or f"unknown {index}")


def with_known_facts(report: PreflightReport, exact: Sequence[bool]) -> PreflightReport:
    """The report with what the model says already; `exact[i]`: it predicts the new target token by token."""
    checks = tuple(replace(check, already_true=bool(known)) for check, known in zip(report.checks, exact, strict=True))
    known = [index for index, check in enumerate(checks) if check.already_true]
    note = f"the model says the new target already for request(s) {known}" if known else None
    return replace(report, checks=checks, warnings=(*report.warnings, *([note] if note else [])))


def _shortened(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
