"""Edit facts of CounterFact (or of any file of records) in a model, and measure it before and after.

    python examples/counterfact.py --model smollm2 --records 32
    python examples/counterfact.py --model Qwen/Qwen2.5-0.5B-Instruct --records 100 --data counterfact.json --paper

Prints a table with 95 % intervals: efficacy, generalization and specificity (success and accuracy), what greedy
decoding really says, and perplexity and KL on held-out text where there is one.
"""

import argparse
import time
from collections.abc import Sequence

from example_data import add_arguments, load_data, load_editor, rows_of, write_figures
from rich.table import Table

from hf_alphaedit.report import as_text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--paper", action="store_true", help="the published settings instead of the recommended ones")
    parser.add_argument(
        "--repair", type=int, default=0, metavar="ROUNDS", help="then edit what the model doesn't say again"
    )
    parser.add_argument("--save", help="write the edited model to this directory")
    options = parser.parse_args(arguments)

    from hf_alphaedit.evaluation import evaluate  # after parsing, so that --help is quick

    editor = load_editor(options)
    if options.paper:
        editor.reconfigure(editor.config.paper())
    data = load_data(options, editor)
    before = evaluate(
        editor.model, editor.tokenizer, data.records, held_out=data.held_out, lambada=data.lambada, seed=options.seed
    )
    editor.prepare(data.corpus)
    start = time.perf_counter()
    edits = editor.apply_edits(data.records, batch_size=options.batch_size, seed=options.seed)
    repairs = editor.repair(rounds=options.repair, batch_size=options.batch_size) if options.repair else []
    seconds = time.perf_counter() - start
    after = evaluate(
        editor.model, editor.tokenizer, data.records, held_out=data.held_out, lambada=data.lambada, before=before,
        seed=options.seed,
    )  # fmt: skip

    mode = "paper" if options.paper else "recommended"
    table = Table(title=f"{len(data.records)} facts of {data.source}, {options.model}, {mode} mode, {seconds:.0f} s")
    for name in ("metric", "before", "after"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for row in rows_of([before, after], list(after.metrics)):
        table.add_row(*row)
    print(as_text(table))
    for site in edits.sites:
        print(f"{site.site}: ‖Δ‖/‖W‖ {site.relative_norm:.4f}, {site.null_rank} of {site.dimension} directions free")
    print(", ".join(f"{phase} {spent:.1f} s" for phase, spent in edits.seconds.items()))
    for number, report in enumerate(repairs, start=1):
        print(f"repair {number}: {len(report.outcomes)} facts edited again, {sum(report.seconds.values()):.0f} s")
    for warning in edits.warnings:
        print(f"warning: {warning}")
    write_figures(
        options.output,
        {
            "model": options.model, "source": data.source, "config": editor.config.to_dict(), "seconds": seconds,
            "before": before.to_dict(), "after": after.to_dict(), "edits": edits.to_dict(),
            "repairs": [report.to_dict() for report in repairs],
        },
    )  # fmt: skip
    if options.save:
        editor.save_pretrained(options.save)


if __name__ == "__main__":
    main()
