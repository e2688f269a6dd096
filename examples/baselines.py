"""The same facts written in four ways, one table: what to prefer when.

    python examples/baselines.py --model smollm2 --records 32

- recommended: this library's default settings;
- paper: AlphaEdit as published (absolute threshold, L2 = 10);
- memit: no projection, a soft constraint by the second moments and the history (MEMIT's update);
- finetune: plain fine-tuning of one late down-projection on the prompts, in mini-batches, until every target is
  learnt (after LocFT).

All start from the same unedited weights, which are put back bit for bit in between, and share the same second moments.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from example_data import add_arguments, load_data, load_editor, rows_of, write_figures
from rich.table import Table
from torch import Tensor

from hf_alphaedit import AlphaEditConfig, AlphaEditor, EditRequest
from hf_alphaedit.evaluation import evaluate
from hf_alphaedit.models.encoding import TokenRow, encode_request
from hf_alphaedit.models.hooks import inference_state
from hf_alphaedit.report import as_text


METHODS = ("recommended", "paper", "memit", "finetune")
METRICS = (
    "efficacy_success", "efficacy_accuracy", "generalization_success", "generalization_accuracy",
    "specificity_success", "generation_success", "perplexity_ratio", "kl",
)  # fmt: skip


def settings_of(method: str, config: AlphaEditConfig) -> AlphaEditConfig:
    """The settings of a method that edits by the closed-form update."""
    config = config.replace(cache_targets=False)  # a search that another method has made would cost this one nothing
    if method == "paper":
        return config.paper()
    if method == "memit":  # a soft weight and a ridge that did well on SmolLM2 (docs/results.md)
        return config.replace(projection="soft", soft_weight=1000.0, l2=1.0, use_history=True, history_weight=1.0)
    return config


def finetune(
    editor: AlphaEditor, requests: Sequence[EditRequest], *, layer: int, learning_rate: float, batch_size: int,
    epochs: int, stop_loss: float, seed: int,
) -> None:  # fmt: skip
    """Train the down-projection of `layer` in place on 'prompt target' until the mean loss is below `stop_loss`."""
    model, weight = editor.model, editor.architecture.site(layer).module.weight
    encoded = [encode_request(editor.tokenizer, request) for request in requests]
    generator = torch.Generator().manual_seed(seed)
    with inference_state(model):
        weight.requires_grad_(True)
        optimizer = torch.optim.AdamW([weight], lr=learning_rate, weight_decay=0.0)
        for _ in range(epochs):
            losses = []
            order = torch.randperm(len(encoded), generator=generator).tolist()
            for start in range(0, len(order), batch_size):
                chosen = [encoded[index] for index in order[start : start + batch_size]]
                optimizer.zero_grad()
                loss = target_loss(editor, [(one.rows[0], one.target) for one in chosen])
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            if sum(losses) / len(losses) < stop_loss:
                break
        weight.grad = None


def target_loss(editor: AlphaEditor, pairs: Sequence[tuple[TokenRow, tuple[int, ...]]]) -> Tensor:
    """Mean negative log-likelihood of the target tokens after their prompts."""
    device, length = editor.architecture.input_device, max(len(row.token_ids) for row, _ in pairs)
    token_ids = torch.zeros(len(pairs), length, dtype=torch.long)  # (B, S), padded on the right
    attention_mask = torch.zeros_like(token_ids)
    places, columns, labels = [], [], []
    for index, (row, target) in enumerate(pairs):
        token_ids[index, : len(row.token_ids)] = torch.tensor(row.token_ids)
        attention_mask[index, : len(row.token_ids)] = 1
        places += [index] * len(target)
        columns += range(row.first_prediction, row.first_prediction + len(target))
        labels += target
    logits = editor.model(input_ids=token_ids.to(device), attention_mask=attention_mask.to(device)).logits
    return torch.nn.functional.cross_entropy(logits[places, columns].float(), torch.tensor(labels).to(logits.device))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--finetune-layer", type=int, help="default: at three quarters of the depth")
    parser.add_argument("--finetune-learning-rate", type=float, default=5e-4)
    parser.add_argument("--finetune-batch-size", type=int, default=16)
    parser.add_argument("--finetune-epochs", type=int, default=40)
    options = parser.parse_args(arguments)

    editor = load_editor(options)
    data = load_data(options, editor)
    editor.prepare(data.corpus)
    config = editor.config
    requests = [record.request for record in data.records]

    def measured(before=None):
        return evaluate(
            editor.model, editor.tokenizer, data.records, held_out=data.held_out, before=before, seed=options.seed
        )

    def closed_form(method: str) -> None:
        editor.reconfigure(settings_of(method, config))
        editor.apply_edits(requests, batch_size=options.batch_size, seed=options.seed)

    def fine_tuned() -> None:
        depth = len(editor.architecture.blocks)
        finetune(
            editor, requests, layer=layer_of(options.finetune_layer, depth), seed=options.seed, stop_loss=0.05,
            learning_rate=options.finetune_learning_rate, batch_size=options.finetune_batch_size,
            epochs=options.finetune_epochs,
        )  # fmt: skip

    before = measured()
    reports, seconds = [before], [0.0]
    for method in options.methods:
        start = time.perf_counter()
        edit: Callable[[], None] = fine_tuned if method == "finetune" else lambda name=method: closed_form(name)
        tuned = editor.architecture.site(layer_of(options.finetune_layer, len(editor.architecture.blocks)))
        original = tuned.read()
        edit()
        seconds.append(time.perf_counter() - start)
        reports.append(measured(before))
        editor.undo_all()
        if method == "finetune":
            tuned.write(original)
        print(f"{method}: {seconds[-1]:.0f} s", flush=True)

    table = Table(title=f"{len(requests)} facts of {data.source}, {options.model}")
    for name in ("metric", "before", *options.methods):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for row in rows_of(reports, METRICS):
        table.add_row(*row)
    table.add_row("seconds", *(f"{spent:.0f}" for spent in seconds))
    print(as_text(table, width=150))
    write_figures(
        options.output,
        {
            "model": options.model, "source": data.source, "config": config.to_dict(),
            "methods": {
                name: {"seconds": spent, "report": report.to_dict()}
                for name, spent, report in zip(["before", *options.methods], seconds, reports, strict=True)
            },
        },
    )  # fmt: skip


def layer_of(chosen: int | None, depth: int) -> int:
    """The layer to fine-tune: the given one, or that at three quarters of the depth."""
    return 3 * depth // 4 if chosen is None else chosen


if __name__ == "__main__":
    main()
