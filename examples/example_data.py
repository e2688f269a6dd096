"""Model, facts and texts for the examples: from the Hub or from packages, from files or from the library itself."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma3 import gemma3_checkpoint
from smollm2 import smollm2_checkpoint

from hf_alphaedit import AlphaEditor, Record, read_records
from hf_alphaedit.corpus import texts_of
from hf_alphaedit.evaluation import Reference, make_reference
from hf_alphaedit.tuning_facts import tuning_facts


DATA_VARIABLE = "HF_ALPHAEDIT_DATA"
PACKAGED = {"smollm2": smollm2_checkpoint, "gemma3": gemma3_checkpoint}


@dataclass(frozen=True)
class ExampleData:
    """What one run works on.

    Attributes:
        records: the facts, each with its evaluation prompts.
        source: where the facts come from.
        corpus: for the second moments, as `AlphaEditor.prepare` takes it.
        held_out: the unedited model on held-out text; None if there is none.
        lambada: passages whose last word is to be said; None if there are none.
    """

    records: list[Record]
    source: str
    corpus: str | Path | None
    held_out: Reference | None
    lambada: list[str] | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that the examples share."""
    parser.add_argument("--model", default="smollm2", help="smollm2, gemma3 (both from pip), a Hub id or a directory")
    parser.add_argument("--records", type=int, default=32, help="how many facts to edit")
    parser.add_argument(
        "--other-prompts",
        type=int,
        default=0,
        metavar="N",
        help="tell each request up to N prompts that records of the same relation have, none that it is judged by",
    )
    parser.add_argument("--skip", type=int, default=0, help="leave out this many records at the beginning")
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get(DATA_VARIABLE),
        help="a file of records, or a folder with counterfact.json, wikipedia.jsonl (second moments), "
        f"wikitext2_test.txt (perplexity), lambada.jsonl; default ${DATA_VARIABLE}, else 48 facts of the library",
    )
    parser.add_argument("--corpus", help="text for the second moments: a file, a data set of the Hub, or 'self'")
    parser.add_argument("--texts", type=Path, help="held-out text for the perplexity, a .txt file")
    parser.add_argument("--batch-size", type=int, help="edits per batch; default all at once")
    parser.add_argument("--config", help="a preset's name or a file of settings; default by the model's shape")
    parser.add_argument("--dtype", default="float32", help="dtype of the model")
    parser.add_argument("--device", default=None, help="device_map of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write all figures to this JSON file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting, e.g. projection=soft"
    )


def load_editor(arguments: argparse.Namespace) -> AlphaEditor:
    """The editor for `--model`, with the settings of `--config` or its preset, and the changes of `--set`."""
    name = str(PACKAGED[arguments.model]()) if arguments.model in PACKAGED else arguments.model
    editor = AlphaEditor.from_pretrained(
        name, dtype=arguments.dtype, device_map=arguments.device, config=arguments.config
    )
    changes = {}
    for assignment in arguments.set:
        setting, _, value = assignment.partition("=")
        changes[setting] = _json_or_text(value)
    editor.reconfigure(editor.config.replace(**changes))
    return editor


def load_data(arguments: argparse.Namespace, editor: AlphaEditor) -> ExampleData:
    """Facts and texts; the perplexity's reference is measured here, so call it before any edit."""
    last = arguments.skip + arguments.records
    folder = arguments.data if arguments.data and arguments.data.is_dir() else None
    if arguments.data is None:
        records, source = tuning_facts(min(last, 48))[arguments.skip :], "the library's own facts"
    else:
        path = folder / "counterfact.json" if folder else arguments.data
        everything, source = read_records(path), path.name
        records = with_other_prompts(everything[arguments.skip : last], everything, arguments.other_prompts)
    if len(records) < arguments.records:
        raise SystemExit(f"{source} has {len(records)} records after the first {arguments.skip}; take fewer")
    corpus = arguments.corpus or _inside(folder, "wikipedia.jsonl")
    texts = arguments.texts or _inside(folder, "wikitext2_test.txt")
    held_out = None
    if texts is not None:
        held_out = make_reference(editor.model, editor.tokenizer, [texts.read_text("utf-8")])
    passages = _inside(folder, "lambada.jsonl")
    lambada = None if passages is None else list(texts_of(passages)[0])
    return ExampleData(records, source, corpus, held_out, lambada)


def with_other_prompts(records: Sequence[Record], everything: Sequence[Record], count: int) -> list[Record]:
    """The records, each with up to `count` prompts that `everything` has for its relation, as a user might write them.

    Prompts that its own paraphrases contain are left out: it is judged by wordings that the search has not seen.
    """
    by_relation: dict[str | None, dict[str, None]] = {None: {}}  # prompts in their order, each once
    for record in everything:
        if record.request.relation:
            by_relation.setdefault(record.request.relation, {})[record.request.prompt] = None
    result = []
    for record in records:
        request = record.request
        unseen = [
            prompt
            for prompt in by_relation[request.relation or None]
            if prompt != request.prompt and not any(request.filled(prompt) in text for text in record.paraphrases)
        ]
        result.append(replace(record, request=replace(request, other_prompts=tuple(unseen[:count]))))
    return result


def write_figures(path: Path | None, figures: dict[str, Any]) -> None:
    """The figures as JSON, if a path was given."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def rows_of(reports: Sequence[Any], names: Sequence[str]) -> list[list[str]]:
    """For each metric its name and, for each report, value and interval."""
    return [
        [name, *(str(report.metrics[name]) if name in report.metrics else "" for report in reports)]
        for name in names
        if any(name in report.metrics for report in reports)
    ]


def _inside(folder: Path | None, name: str) -> Path | None:
    return folder / name if folder and (folder / name).exists() else None


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
