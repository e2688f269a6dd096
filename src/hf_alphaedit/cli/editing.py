"""Commands that change a model: statistics, edits, undo."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_alphaedit.cli.app import show
from hf_alphaedit.cli.keeping import Withhold, save
from hf_alphaedit.cli.loading import loads_model, parsed_value
from hf_alphaedit.errors import ConfigError, RequestError


if TYPE_CHECKING:
    from hf_alphaedit.cli.loading import Load
    from hf_alphaedit.editor import AlphaEditor
    from hf_alphaedit.gate import Gate
    from hf_alphaedit.records import Record

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Corpus = Annotated[
    str | None,
    typer.Option(
        help="Text for the statistics: a .txt or .jsonl file, a data set's id, or 'self' for text that the model "
        "samples; default: Wikipedia from the Hub, or 'self' where it can't be reached."
    ),
]
Tokens = Annotated[int | None, typer.Option(min=1, help="Tokens to read; default: as the settings say.")]
Out = Annotated[Path | None, typer.Option(help="Directory for the edited checkpoint.")]


@loads_model
def edit(
    load: Load,
    requests: Annotated[
        Path | None,
        typer.Argument(help="Facts in a .json, .jsonl or .csv file: flat, CounterFact, zsRE or KnowEdit records."),
    ] = None,
    *,
    prompt: Annotated[
        str | None, typer.Option(help="One fact instead of a file: text with {} for the subject.")
    ] = None,
    subject: Annotated[str | None, typer.Option(help="What that fact is about.")] = None,
    target: Annotated[str | None, typer.Option(help="What the model shall say next.")] = None,
    out: Out = None,
    pack: Annotated[Path | None, typer.Option(help="Directory for an edit pack: the edits without the model.")] = None,
    check_only: Annotated[bool, typer.Option("--check-only", help="Look for problems, edit nothing.")] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Facts in each solve; default: all at once.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the sampled context templates.")] = 0,
    corpus: Corpus = None,
    tokens: Tokens = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Keep nothing unless this is reached: min_efficacy=95, min_specificity=80 (in %), "
            "max_perplexity_ratio=1.05 with texts=FILE. Repeatable.",
        ),
    ] = None,
    retry: Annotated[int, typer.Option(min=0, help="Try facts that failed again, so many times.")] = 0,
    drop_failed: Annotated[bool, typer.Option("--drop-failed", help="Leave out facts that still fail.")] = False,
    withhold_requests: Withhold = False,
    report: Annotated[Path | None, typer.Option(help="Also write the report to this JSON file.")] = None,
    json: AsJson = False,
) -> None:
    """Change facts, and save a plain checkpoint (--out), a small pack of edits (--pack) or both."""
    records = _records(requests, prompt, subject, target)
    thresholds = _gate(gate or [])
    if not (out or pack or check_only):
        raise ConfigError("nothing would be kept; give --out DIRECTORY, --pack DIRECTORY or --check-only")
    editor = load()
    if check_only:
        found = editor.preflight(records)
        show(found, json)
        raise typer.Exit(1 if found.errors else 0)
    if out is not None:
        from hf_alphaedit.saving import require_checkpoint

        require_checkpoint(editor)  # now, rather than after the work
    _prepare(editor, corpus, tokens)
    result = editor.apply_edits(
        records, batch_size=batch_size, seed=seed, gate=thresholds, retry=retry, drop_failed=drop_failed
    )
    show(result, json)
    if report is not None:
        result.to_json(report)
    if out is not None:
        save(editor, out, include_requests=not withhold_requests)
    if pack is not None:
        typer.echo(str(editor.save_edits(pack, include_requests=not withhold_requests)), err=True)


@loads_model
def stats(
    load: Load,
    *,
    corpus: Corpus = None,
    tokens: Tokens = None,
    force: Annotated[bool, typer.Option("--force", help="Compute again, whatever is cached.")] = False,
    json: AsJson = False,
) -> None:
    """Collect the second moments that edits need, and show what they say. Done once for a model; cached."""
    show(load().prepare(corpus, num_tokens=tokens, force=force, convergence=True), json)


@loads_model
def undo(
    load: Load,
    *,
    out: Annotated[Path, typer.Option(help="Directory for the result; it may be the model's own.")],
    batches: Annotated[
        int | None, typer.Option(min=1, help="How many batches to take back; default: the last.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Take back all edits: the base model is left.")] = False,
    remove: Annotated[
        int | None, typer.Option(metavar="INDEX", help="Take out this one edit; `info` shows the indices.")
    ] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="With --remove: make all other edits again, for an exact result.")
    ] = False,
    corpus: Corpus = None,
    tokens: Tokens = None,
    withhold_requests: Withhold = False,
) -> None:
    """Take back the last edits bit for bit, or take out a single one."""
    if sum((batches is not None, everything, remove is not None)) > 1:
        raise ConfigError("give one of --batches, --all and --remove")
    if replay and remove is None:
        raise ConfigError("--replay belongs to --remove INDEX")
    editor = load()
    before = len(editor.history)
    if remove is not None:
        _prepare(editor, corpus, tokens)
        editor.remove(remove, replay=replay)
    elif everything:
        editor.undo_all()
    else:
        editor.undo(batches or 1)
    save(editor, out, include_requests=not withhold_requests)
    typer.echo(f"{before - len(editor.history)} of {before} edits taken back: {out}")


@loads_model
def repair(
    load: Load,
    *,
    out: Annotated[Path, typer.Option(help="Directory for the result; it may be the model's own.")],
    rounds: Annotated[int, typer.Option(min=1, help="Look for lost edits and make them again, so many times.")] = 1,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Facts in each solve; default: all at once.")] = None,
    corpus: Corpus = None,
    tokens: Tokens = None,
    withhold_requests: Withhold = False,
) -> None:
    """Make edits again that the model no longer says."""
    editor = load()
    _prepare(editor, corpus, tokens)
    reports = editor.repair(rounds=rounds, batch_size=batch_size)
    for report in reports:
        show(report, as_json=False)
    lost = len(reports[0].outcomes) if reports else 0
    save(editor, out, include_requests=not withhold_requests)
    typer.echo(f"{lost} edits were lost, {len(editor.lost())} are now: {out}")


def _prepare(editor: AlphaEditor, corpus: str | None, tokens: int | None) -> None:
    """Collect the statistics on the corpus that was asked for; without one, the editor does it when it needs them."""
    if corpus is not None or tokens is not None:
        editor.prepare(corpus, num_tokens=tokens)


def _records(file: Path | None, *fact: str | None) -> list[Record | dict[str, Any]]:
    if file is not None and not any(fact):
        from hf_alphaedit.records import read_records

        return list(read_records(file))
    if file is None and all(fact):
        return [dict(zip(("prompt", "subject", "target_new"), fact, strict=True))]
    raise RequestError("give either a file of facts, or --prompt, --subject and --target together")


def _gate(assignments: list[str]) -> Gate | None:
    if not assignments:
        return None
    from hf_alphaedit.gate import Gate

    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        numbers = ("min_efficacy", "min_specificity", "max_perplexity_ratio")
        value = parsed_value(text) if name in numbers else text
        right = isinstance(value, (int, float)) and math.isfinite(value) if name in numbers else name == "texts"
        if not (equals and right):
            raise ConfigError(f"--gate {assignment!r} must be {'=NUMBER, '.join(numbers)}=NUMBER or texts=FILE")
        values[name] = value
    return Gate(**values)
