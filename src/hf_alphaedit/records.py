"""Evaluation records: an edit request with the prompts that judge it, read from the shapes and files people have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_alphaedit.errors import RequestError
from hf_alphaedit.record_files import read_file
from hf_alphaedit.requests import PLACEHOLDER, EditRequest, written_without_spaces


# (prompt, the answers that count as right)
Question = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Record:
    """One fact and everything that is asked about it. Only `request` is needed; the rest may be empty.

    Attributes:
        request: the edit itself.
        paraphrases: the prompt in other words, subject included; the new target should follow.
        neighborhood: prompts about other subjects, each with its right answer where known; nothing should change.
        generation_prompts: beginnings of longer texts about the subject.
        attribute_prompts: prompts about subjects of which the new target is really true.
        portability: by group, questions whose answers follow from the edit.
        locality: by group, questions whose answers must stay.
    """

    request: EditRequest
    paraphrases: tuple[str, ...] = ()
    neighborhood: tuple[tuple[str, str | None], ...] = ()
    generation_prompts: tuple[str, ...] = ()
    attribute_prompts: tuple[str, ...] = ()
    portability: dict[str, tuple[Question, ...]] = field(default_factory=dict)
    locality: dict[str, tuple[Question, ...]] = field(default_factory=dict)


def read_records(source: str | Path | Iterable[Record | EditRequest | Mapping[str, Any]]) -> list[Record]:
    """Records from a `.json`, `.jsonl` or `.csv` file, or from anything that yields records.

    A JSON file holds a list (or one record), a JSONL file one record on each line, a CSV file one in each row with
    the field names in the first row; empty cells count as absent and a cell that begins with `[` as a JSON list.

    Raises:
        RequestError: the file's suffix or content can't be read, or one record can't be used; the message says which.
    """
    if isinstance(source, (str, Path)):
        return _records(read_file(Path(source)), f"{source}: record")
    if isinstance(source, (bytes, Record, EditRequest, Mapping)):
        raise RequestError(f"records is one {type(source).__name__}; pass a list of records or a file name")
    return _records(enumerate(source), "record")


def as_record(source: Record | EditRequest | Mapping[str, Any]) -> Record:
    """One record from any of the shapes people have, told apart by its keys.

    - flat: `prompt`, `subject`, `target_new`, and optionally `target_true` (or `ground_truth`), `relation`, `case_id`,
      `other_prompts`, `paraphrases` (`rephrase`), `neighborhood` and the other fields of `Record`. A prompt has one
      `{}`, or the subject itself exactly once as a whole word;
    - KnowEdit: the same with `portability` and `locality` groups of `{"prompt", "ground_truth"}`;
    - CounterFact: `requested_rewrite` with nested targets, `paraphrase_prompts`, `neighborhood_prompts`, ...;
    - zsRE: `src`, `answers`, `rephrase`, `loc`, `loc_ans`, `subject`. The first answer is the new target, and the
      unrelated question `loc` gets its question mark, as in MEMIT's evaluation.

    Raises:
        RequestError: a needed field is missing, of the wrong type or empty, or the subject's place can't be told.
    """
    if isinstance(source, Record):
        return source
    if isinstance(source, EditRequest):
        return Record(source)
    if not isinstance(source, Mapping):
        raise RequestError(
            f"{source!r} is a {type(source).__name__}; a record is a mapping, an EditRequest or a Record"
        )
    if "requested_rewrite" in source:
        return _from_counterfact(source)
    if "src" in source:
        return _from_zsre(source)
    return _from_flat(source)


def as_requests(requests: Iterable[Record | EditRequest | Mapping[str, Any]]) -> list[EditRequest]:
    """Requests in any accepted shape as a list of `EditRequest`.

    Accepted are `EditRequest`, the flat mapping with its field names, CounterFact's nested targets and whole
    CounterFact, zsRE and KnowEdit records (see `as_record`).

    Raises:
        RequestError: the list is empty, or one element can't be used; the message gives its index.
    """
    if isinstance(requests, (str, bytes, EditRequest, Mapping)):
        raise RequestError(f"requests is one {type(requests).__name__}; pass a list of requests")
    result = []
    for index, request in enumerate(requests):
        try:
            result.append(request if isinstance(request, EditRequest) else as_record(request).request)
        except RequestError as error:
            raise RequestError(f"request {index}: {error}") from error
    if not result:
        raise RequestError("there are no requests; pass at least one")
    return result


def word_positions(text: str, word: str) -> list[int]:
    """Where `word` stands in `text` as a whole word: not as a part of a longer one, in scripts that separate words."""
    positions, start = [], text.find(word)
    while start >= 0 and word:
        end = start + len(word)
        if not (_joined(text[start - 1 : start], word[0]) or _joined(word[-1], text[end : end + 1])):
            positions.append(start)
        start = text.find(word, start + 1)
    return positions


def _joined(left: str, right: str) -> bool:
    """Whether two characters that meet (or nothing, at the text's ends) belong to one word."""
    return (
        left.isalnum() and right.isalnum() and not written_without_spaces(left) and not written_without_spaces(right)
    )


def _from_flat(source: Mapping[str, Any]) -> Record:
    subject = _text(source, "subject")
    target_true = _first(source, "target_true", "ground_truth")
    return Record(
        EditRequest(
            prompt=_with_placeholder(_text(source, "prompt"), subject),
            subject=subject,
            target_new=_target(source.get("target_new"), "target_new", source),
            target_true=None if target_true is None else _target(target_true, "target_true", source),
            relation=_first(source, "relation", "relation_id"),
            case_id=_first(source, "case_id", "example_id", "known_id"),
            other_prompts=tuple(_with_placeholder(text, subject) for text in _texts(source, "other_prompts")),
        ),
        paraphrases=_texts(source, "paraphrases", "paraphrase_prompts", "rephrase", "rephrase_prompt"),
        neighborhood=_neighborhood(_first(source, "neighborhood", "neighborhood_prompts") or (), None),
        generation_prompts=_texts(source, "generation_prompts"),
        attribute_prompts=_texts(source, "attribute_prompts"),
        portability=_groups(source, "portability"),
        locality=_groups(source, "locality"),
    )


def _from_counterfact(source: Mapping[str, Any]) -> Record:
    rewrite = source["requested_rewrite"]
    if not isinstance(rewrite, Mapping):
        raise RequestError(f"requested_rewrite={rewrite!r} is a {type(rewrite).__name__}; a mapping is needed")
    record = _from_flat({**source, **rewrite})
    # In CounterFact the neighbours share the edited fact's old object: it is their right answer.
    neighborhood = _neighborhood(source.get("neighborhood_prompts", ()), record.request.target_true)
    return replace(record, neighborhood=neighborhood)


def _from_zsre(source: Mapping[str, Any]) -> Record:
    answers = _texts(source, "answers")
    if not answers:
        raise RequestError(f"answers is missing or empty in the zsRE record with src={source['src']!r}")
    neighborhood = ()
    if source.get("loc"):
        neighborhood = ((_text(source, "loc").removesuffix("?") + "?", _text(source, "loc_ans")),)
    subject = _text(source, "subject")
    request = EditRequest(
        prompt=_with_placeholder(_text(source, "src"), subject),
        subject=subject,
        target_new=answers[0],
        case_id=_first(source, "case_id", "example_id"),
    )
    return Record(request, paraphrases=_texts(source, "rephrase"), neighborhood=neighborhood)


def _with_placeholder(prompt: str, subject: str) -> str:
    if PLACEHOLDER in prompt:
        return prompt  # EditRequest refuses more than one
    positions = word_positions(prompt, subject)
    if len(positions) != 1:
        found = f"{len(positions)} times" if positions else "not at all (as a whole word)"
        raise RequestError(
            f"prompt={prompt!r} contains the subject {subject!r} {found}; write {PLACEHOLDER} where the subject stands"
        )
    return prompt[: positions[0]] + PLACEHOLDER + prompt[positions[0] + len(subject) :]


def _first(source: Mapping[str, Any], *names: str) -> Any:
    return next((source[name] for name in names if source.get(name) is not None), None)


def _text(source: Mapping[str, Any], name: str) -> str:
    value = source.get(name)
    if value is None:
        raise RequestError(f"{name} is missing; the record has the fields {sorted(map(str, source))}")
    return _checked_text(value, name)


def _checked_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name}={value!r} is a {type(value).__name__}; a text is needed")
    if not value.strip():
        raise RequestError(f"{name}={value!r} is empty")
    return value


def _texts(source: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    """The first of the named fields that is there, as texts; one text alone counts as a list of one."""
    name = next((name for name in names if source.get(name) is not None), None)
    if name is None:
        return ()
    values = [source[name]] if isinstance(source[name], str) else source[name]
    if not isinstance(values, (list, tuple)):
        raise RequestError(f"{name}={values!r} is a {type(values).__name__}; a text or a list of texts is needed")
    return tuple(_checked_text(value, name) for value in values)


def _target(value: Any, name: str, source: Mapping[str, Any]) -> str:
    """A target given as a text, as CounterFact's `{"str": text}` or as a list of aliases, whose first counts."""
    if isinstance(value, Mapping):
        value = value.get("str")
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return _text({**source, name: value}, name)


def _neighborhood(values: Any, answer: str | None) -> tuple[tuple[str, str | None], ...]:
    """Neighbours given as prompts (all with `answer`), as (prompt, answer) pairs or as mappings with these keys."""
    if not isinstance(values, (list, tuple)):
        raise RequestError(f"neighborhood={values!r} is a {type(values).__name__}; a list of prompts is needed")
    result = []
    for value in values:
        if isinstance(value, Mapping):
            value = (value.get("prompt"), _first(value, "answer", "target", "ground_truth"))
        prompt, own = value if isinstance(value, (list, tuple)) and len(value) == 2 else (value, answer)
        own = None if own is None else _checked_text(own, "the neighborhood prompt's answer")
        result.append((_checked_text(prompt, "a neighborhood prompt"), own))
    return tuple(result)


def _groups(source: Mapping[str, Any], name: str) -> dict[str, tuple[Question, ...]]:
    """KnowEdit's groups of questions. Questions without any answer can't be judged and are left out."""
    groups = source.get(name) or {}
    if not isinstance(groups, Mapping):
        raise RequestError(f"{name}={groups!r} is a {type(groups).__name__}; a mapping of groups is needed")
    result: dict[str, tuple[Question, ...]] = {}
    for group, questions in groups.items():
        pairs = []
        for question in questions or ():
            if isinstance(question, Mapping):
                question = (question.get("prompt"), question.get("ground_truth"))
            if not isinstance(question, (list, tuple)) or len(question) != 2:
                raise RequestError(
                    f"{name} group {group!r} holds {question!r}; each item needs a prompt and ground_truth"
                )
            pairs.append((_checked_text(question[0], f"{name} prompt"), tuple(dict.fromkeys(_flattened(question[1])))))
        result[str(group)] = tuple(pair for pair in pairs if pair[1])
    return result


def _flattened(value: Any) -> list[str]:
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _flattened(item)]
    return [value] if isinstance(value, str) and value.strip() else []


def _records(numbered: Iterable[tuple[int, Any]], label: str) -> list[Record]:
    result = []
    for number, item in numbered:
        try:
            result.append(as_record(item))
        except RequestError as error:
            raise RequestError(f"{label} {number}: {error}") from error
    if not result:
        raise RequestError(f"there is no {label}; give at least one")
    return result
