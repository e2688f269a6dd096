"""The library and the published procedure in turn, in one process, on the same model, requests and text.

    python benchmarks/bench.py                                       everything, and the large solve and the scaling
    python benchmarks/bench.py --requests 4 --mode paper --only      a short run
    python benchmarks/bench.py --phases statistics projector --only  parts of it

Both sides get the same tokens, the same context templates, the same rule for the projector and the same settings. The
reference does what the paper's first code release does (see `reference.py`). In `paper` mode the library does the same
mathematics in the model's dtype; in `recommended` mode it runs with the settings it ships.

With `--reference-requests k`, the reference searches k targets only; the output says what that means. The exit status
is 1 if the two sides disagree, never because of time.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from comparison import METRICS, MODES, PHASES, Comparison
from huggingface_hub.utils import disable_progress_bars
from measuring import environment
from results import OUTPUT, Goal, plot_phases, save, show_goals, show_table
from workload import load_model, load_workload

from hf_alphaedit import AlphaEditConfig
from hf_alphaedit.presets import config_for


AGREEMENT = {"moments (float32)": 1e-6, "moments (bfloat16 products)": 1e-3, "targets": 1e-4, "null ranks": 1e-3}
LAYERS = (5, 6, 7, 8, 9)
FASTER = {"statistics": 5, "apply (paper)": 6, "apply (recommended)": 15}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--reference-requests", type=int, help="targets that the reference searches (default: all)")
    parser.add_argument(
        "--layers", type=int, nargs="+", help="to edit (default: 5 to 9, five as in most published settings)"
    )
    parser.add_argument("--tokens", type=int, default=16384, help="corpus tokens for the second moments")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--no-metrics", action="store_true", help="don't evaluate the edited models")
    parser.add_argument("--only", action="store_true", help="leave out the large solve (solve.py) and scaling.py")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the results")
    return parser.parse_args(arguments)


def rows_of(comparison: Comparison) -> list[dict[str, Any]]:
    """One row for each phase of the library, with the reference's own beside it, which has no modes."""
    rows = []
    ours, theirs = comparison.library, comparison.reference
    for phase, seconds in sorted(ours.seconds.items(), key=lambda item: item[0].endswith("(recommended)")):
        plain = phase if phase in theirs.seconds else phase.split(" (")[0]
        expected = theirs.seconds.get(plain)
        rows.append({
            "phase": phase, "reference": expected, "library": seconds,
            "ratio": expected / seconds if expected and seconds else None,
            "reference_peak": theirs.peak.get(plain), "library_peak": ours.peak.get(phase),
        })  # fmt: skip
    return rows


def goals_of(comparison: Comparison) -> list[Goal]:
    """What was measured of what is to be reached."""
    ratios = {row["phase"]: row["ratio"] for row in rows_of(comparison)}
    goals = [
        Goal(f"{phase}, times faster", ratios[phase], wanted) for phase, wanted in FASTER.items() if ratios.get(phase)
    ]
    goals += [
        Goal(f"{name}, relative difference", comparison.agreement[name], limit, at_least=False)
        for name, limit in AGREEMENT.items()
        if name in comparison.agreement
    ]
    goals += [
        Goal(f"targets ({mode}), share of the matrix products' rate", found["share"], 0.5)
        for mode, found in comparison.share.items()
    ]
    references = [found for side, found in comparison.evaluated.items() if side.startswith("reference")]
    ours = comparison.evaluated.get("library (recommended)", {})
    for name in (f"{metric}_success" for metric in METRICS):
        if name in ours and references:  # against the better one of the two projectors
            lost = max(found[name] for found in references) - ours[name]
            goals.append(Goal(f"{name} (recommended), points below", lost, 1, at_least=False))
    return goals


def show(comparison: Comparison) -> None:
    """Print what was measured."""
    print("\n".join(comparison.notes), "\n")
    rows = [
        (row["phase"], row["reference"], row["library"], row["ratio"],
         *[None if row[side] is None else row[side] // 2**20 for side in ("reference_peak", "library_peak")])
        for row in rows_of(comparison)
    ]  # fmt: skip
    columns = ("phase", "reference, s", "library, s", "ratio", "reference, MiB", "library, MiB")
    show_table("Time, and the largest memory of the process meanwhile", columns, rows)
    if comparison.evaluated:
        names = [f"{metric}_{kind}" for kind in ("success", "accuracy") for metric in METRICS]
        rows = [(side, *[found.get(name) for name in names]) for side, found in comparison.evaluated.items()]
        show_table(
            "Metrics, % (the reference once with the projector and ridge of each mode)",
            ("model", *[name.replace("_", " ") for name in names]),
            rows,
        )
    rows = [
        (mode, found["dtype"], found["rate"] / 1e9, found["achieved"] / 1e9, 100 * found["share"])
        for mode, found in comparison.share.items()
    ]
    if rows:
        columns = ("mode", "dtype", "matrix products, GFLOP/s", "targets, useful GFLOP/s", "share, %")
        show_table("Target search beside this machine's matrix products (operations.py has the count)", columns, rows)
    if "deltas" in comparison.agreement:
        print(f"deltas in paper mode: relative difference {comparison.agreement['deltas']:.1e}\n")


def main(arguments: list[str] | None = None, loaded: Any = None, config: AlphaEditConfig | None = None) -> int:
    """Run, print, store; 1 if the two sides disagree. `loaded` is (model, tokenizer), SmolLM2 if not given."""
    options = parse(arguments)
    disable_progress_bars("hf_alphaedit")
    torch.manual_seed(0)
    before = environment()
    model, tokenizer = loaded or load_model()
    sequence_length = min(512, model.config.max_position_embeddings)
    layers = options.layers or (LAYERS if config is None else None)
    config = config_for(model, config)
    config = config.replace(layers=layers) if layers else config
    workload = load_workload(model, tokenizer, options.requests, options.tokens, sequence_length)
    comparison = Comparison(
        model, tokenizer, workload, config, phases=options.phases, modes=options.mode,
        searched=options.reference_requests, metrics=not options.no_metrics,
    )  # fmt: skip
    comparison.run()
    show(comparison)
    goals = goals_of(comparison)
    show_goals(goals)
    rows = rows_of(comparison)
    command = ["python benchmarks/bench.py", *(sys.argv[1:] if arguments is None else arguments)]
    result = {
        "command": " ".join(command), "environment": before, "notes": comparison.notes, "phases": rows,
        "agreement": comparison.agreement, "metrics": comparison.evaluated, "target_search": comparison.share,
    }  # fmt: skip
    path = save("bench", options.output, result, goals)
    sides = {side: {row["phase"]: row[side] for row in rows if row[side]} for side in ("reference", "library")}
    plot_phases(path.with_suffix(".png"), comparison.notes[0], sides)
    print(f"stored in {path} and {path.with_suffix('.png').name}\n")
    wrong = any(not goal.met for goal in goals if goal.name.split(",")[0] in AGREEMENT)
    if not options.only:
        import scaling
        import solve

        output = ["--output", str(options.output)]
        wrong |= bool(solve.main(output)) | bool(scaling.main(output, (model, tokenizer)))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
