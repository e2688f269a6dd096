"""How the time per edit depends on the number of edits at once, and on the number of edits already made.

    python benchmarks/scaling.py           1, 10 and 100 edits; up to 2,000 earlier ones
    python benchmarks/scaling.py --long    1,000 edits as well

The earlier edits are synthetic: random keys of the usual size, and outputs of zero, so that the model stays what it
is while the solve and the weights have as much to do as after real ones.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import disable_progress_bars
from measuring import Stopwatch, environment
from results import OUTPUT, plot_lines, save, show_table
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from workload import load_model, load_records, load_texts

from hf_alphaedit import AlphaEditConfig, AlphaEditor
from hf_alphaedit.algorithm.update import LowRankUpdate
from hf_alphaedit.batches import Batch
from hf_alphaedit.presets import config_for


PHASES = ("targets", "keys", "solve", "write")
BATCH = 100


def ready_editor(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: AlphaEditConfig | None, tokens: int
) -> AlphaEditor:
    """An editor with its filters built, so that edits alone are timed."""
    settings = config_for(model, config).replace(cache_targets=False)
    editor = AlphaEditor(model, tokenizer, settings)
    with tempfile.TemporaryDirectory() as directory:
        editor.second_moment_directory = Path(directory)
        editor.prepare(load_texts(model, tokenizer, tokens)[0], num_tokens=tokens)
    editor.filters()
    return editor


def pretend_edits(editor: AlphaEditor, count: int, seed: int = 0) -> None:
    """Put `count` earlier edits into the history that change nothing, in batches of at most 100."""
    generator = torch.Generator().manual_seed(seed)
    editor.history.remember_base(editor.sites())
    for start in range(0, count, BATCH):
        size = min(BATCH, count - start)
        keys, updates = {}, {}
        for site in editor.sites():
            height, width = site.read().shape
            random = torch.randn(size, width, generator=generator)  # (n, d)
            keys[site.name] = editor.filters()[site.name].root(random)
            updates[site.name] = LowRankUpdate(keys[site.name] / width, torch.zeros(size, height))
        editor.history.batches.append(Batch((), keys, updates, editor.config.to_dict(), withheld=size))


def measure(editor: AlphaEditor, requests: Sequence[Any], earlier: int) -> dict[str, Any]:
    """Seconds of one batch after `earlier` edits, phase by phase; the editor is as before."""
    watch = Stopwatch()
    pretend_edits(editor, earlier)
    try:
        with watch.measuring("whole"):
            report = editor.apply_edits(requests)
    finally:
        editor.undo_all()
    seconds = {phase: report.seconds[phase] for phase in PHASES}
    whole = watch.seconds["whole"]
    return {"edits": len(requests), "earlier": earlier, "whole": whole, "per_edit": whole / len(requests), **seconds}


def show(title: str, found: Sequence[dict[str, Any]]) -> None:
    rows = [
        (str(one["edits"]), str(one["earlier"]), one["per_edit"], *[one[phase] for phase in PHASES], one["whole"])
        for one in found
    ]
    show_table(title, ("edits", "earlier edits", "s per edit", *[f"{phase}, s" for phase in PHASES], "all, s"), rows)


def main(arguments: list[str] | None = None, loaded: Any = None, config: AlphaEditConfig | None = None) -> int:
    """Run, print, store. `loaded` is (model, tokenizer), SmolLM2 if not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--earlier", type=int, nargs="+", default=[0, 500, 1000, 2000])
    parser.add_argument("--batch", type=int, default=8, help="edits that are made after the earlier ones")
    parser.add_argument("--long", action="store_true", help="1,000 edits as well")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for scaling.json and the plots")
    options = parser.parse_args(arguments)
    disable_progress_bars("hf_alphaedit")

    counts = [*options.edits, 1000] if options.long else options.edits
    requests = [record.request for record in load_records(max(*counts, options.batch))[0]]
    editor = ready_editor(*(loaded or load_model()), config, options.tokens)
    measure(editor, requests[:1], 0)  # the first edit samples the contexts and warms up
    at_once = [measure(editor, requests[:count], 0) for count in counts]
    show("Time per edit by the number of edits in one batch", at_once)
    afterwards = [measure(editor, requests[: options.batch], count) for count in options.earlier]
    show("Time per edit by the number of edits already made", afterwards)

    command = ["python benchmarks/scaling.py", *(sys.argv[1:] if arguments is None else arguments)]
    result = {"command": " ".join(command), "environment": environment(), "batch": at_once, "history": afterwards}
    path = save("scaling", options.output, result)
    for name, key, found in (("batch", "edits", at_once), ("history", "earlier", afterwards)):
        lines = {"all": ([one[key] for one in found], [one["per_edit"] for one in found])}
        lines |= {p: ([one[key] for one in found], [one[p] / one["edits"] for one in found]) for p in PHASES}
        label = "edits in one batch" if name == "batch" else "edits already made"
        plot_lines(path.with_name(f"scaling_{name}.png"), "Time per edit", label, "seconds per edit", lines)
    print(f"stored in {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
