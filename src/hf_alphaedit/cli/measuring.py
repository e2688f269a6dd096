"""Commands that measure a model and change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_alphaedit.cli.app import show
from hf_alphaedit.cli.loading import loads_model
from hf_alphaedit.errors import ConfigError


if TYPE_CHECKING:
    from hf_alphaedit.cli.loading import Load


@loads_model
def check(
    load: Load, *, json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False
) -> None:
    """Say what would be edited in a model and why, and what statistics and edits will cost; nothing is changed."""
    show(load().check(), json)


@loads_model
def evaluate(
    load: Load,
    records: Annotated[
        Path, typer.Argument(help="Records in a .json, .jsonl or .csv file: flat, CounterFact, zsRE or KnowEdit.")
    ],
    *,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="What to measure; repeatable. Default: everything but fluency and consistency."),
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="Text (.txt or .jsonl) for perplexity and KL against the unedited model.")
    ] = None,
    corpus: Annotated[Path | None, typer.Option(help="Texts for the references of 'consistency'.")] = None,
    unedited: Annotated[
        bool, typer.Option("--unedited", help="Also measure the unedited model, which the edits are taken back for.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many records.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Also ask through the chat template.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the metrics into this image file.")] = None,
    seed: Annotated[int, typer.Option(help="Of the intervals and the sampled texts.")] = 0,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON, every record included, instead of a table.")
    ] = False,
) -> None:
    """Measure a model, edited or not, on records: what it says, what it says in other words, what it kept."""
    from hf_alphaedit.corpus import texts_of
    from hf_alphaedit.evaluation.damage import make_reference
    from hf_alphaedit.evaluation.protocol import DEFAULT_METRICS, METRICS
    from hf_alphaedit.records import read_records

    if unknown := sorted(set(metric or ()) - set(METRICS)):
        raise ConfigError(f"--metric {unknown[0]!r} isn't known; there are {', '.join(METRICS)}")
    if "consistency" in (metric or ()) and corpus is None:
        raise ConfigError("--metric consistency takes its references from texts; give --corpus FILE")
    items = read_records(records)[:limit]
    editor = load()
    options: dict[str, Any] = {"metrics": metric or DEFAULT_METRICS, "chat": chat, "seed": seed}
    if corpus is not None:
        options["corpus"] = list(texts_of(corpus)[0])
    reference = before = None
    with editor.unedited():
        if held_out is not None:
            reference = make_reference(editor.model, editor.tokenizer, texts_of(held_out)[0])
        if unedited:
            before = editor.evaluate(items, held_out=reference, **options)
    after = editor.evaluate(items, held_out=reference, before=before, **options)
    if plot is not None:
        after.plot(plot, before=before)
    if before is not None and not json:
        typer.echo(f"unedited\n{before}\n\nwith {len(editor.history)} edits")
    show(after, json)


@loads_model
def trace(
    load: Load,
    facts: Annotated[
        Path,
        typer.Argument(help="Facts (.json, .jsonl, .csv) with `prompt`, `subject` and `attribute`, or records."),
    ],
    *,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many facts.")] = None,
    place: Annotated[
        list[str] | None,
        typer.Option(help="Trace only here; 'subject, last' is enough to choose layers, and much faster. Repeatable."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Noise draws for each fact.")] = 3,
    length: Annotated[int, typer.Option(min=1, help="Number of layers to suggest.")] = 5,
    plot: Annotated[Path | None, typer.Option(help="Draw the heat map into this image file.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Find the layers that recall facts, by causal tracing. Facts that the model doesn't know are left out."""
    from hf_alphaedit.record_files import read_file
    from hf_alphaedit.trace_report import PLACES

    if unknown := sorted(set(place or ()) - set(PLACES)):
        raise typer.BadParameter(f"unknown places {unknown}; there are {list(PLACES)}", param_hint="--place")
    items = [item for _, item in read_file(facts)][:limit]
    report = load().trace(items, places=place or PLACES, samples=samples, layers_to_suggest=length, seed=seed)
    if plot is not None:
        report.plot(plot)
    show(report, json)


@loads_model
def tune(
    load: Load,
    directory: Annotated[Path, typer.Argument(help="For the log of trials and the settings that are found.")],
    records: Annotated[
        Path | None, typer.Argument(help="Records with paraphrases and neighbours; default: the library's own facts.")
    ] = None,
    *,
    minutes: Annotated[float, typer.Option(min=0, help="No trial begins after so long. Call again to go on.")] = 60,
    held_out: Annotated[Path | None, typer.Option(help="Text (.txt or .jsonl) for perplexity.")] = None,
    corpus: Annotated[str | None, typer.Option(help="Text for the statistics, as in `stats`.")] = None,
    seed: Annotated[int, typer.Option(help="Of the contexts and the sampled texts.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Search good settings for a model by measurement. DIRECTORY/tuned.json is what --config takes."""
    from hf_alphaedit.records import read_records

    items = None if records is None else read_records(records)
    report = load().tune(directory, items, texts=held_out, corpus=corpus, minutes=minutes, seed=seed)
    show(report, json)
