"""The published AlphaEdit procedure, written plainly: the baseline of the benchmarks and an oracle of the slow tests.

Source: AlphaEdit (Fang et al., ICLR 2025, arXiv 2410.02355) with the details of its released code: one request at a
time, full sequences through the whole model with the logits of every token, one corpus pass per layer, SVD, dense
d x d solve, everything in fp32. It shares nothing with the library, so that agreement between the two means something.

Three differences from the released code. Token ids are concatenated where it joins text and tokenises again; the
subject's last token comes from character offsets (the same token wherever its own rule is valid). Its forward stops
behind the hooked module while it collects second moments, here that is `stop_early=True`; the default is the whole
model. A comparison should name the one it used.

Symbols: h hidden size, d input width of the down-projection, n requests, V vocabulary. A request is a mapping with
`prompt` (one "{}"), `subject` and `target_new` (a string). The model is in fp32 and in eval mode.
"""

import argparse
import json
import sys
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from reference_inputs import (
    Settings,
    at_subjects,
    encode_row,
    encode_target,
    generate_contexts,
    pad_right,
    run_and_capture,
)
from reference_target import compute_target
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D


__all__ = [
    "Record",
    "Settings",
    "apply_edits",
    "compute_keys",
    "compute_target",
    "current_values",
    "encode_row",
    "encode_target",
    "generate_contexts",
    "projector",
    "second_moment",
    "solve_dense",
]


@dataclass
class Record:
    """What `apply_edits` computed, per layer where there is one tensor for each."""

    targets: Tensor  # (n, h)
    target_steps: list[list[dict[str, float]]]  # per request, per forward: loss, nll, kl, decay
    keys: dict[int, Tensor] = field(default_factory=dict)  # (d, n)
    residuals: dict[int, Tensor] = field(default_factory=dict)  # (h, n), already divided by the layers left
    deltas: dict[int, Tensor] = field(default_factory=dict)  # shape of the weight
    past_grams: dict[int, Tensor] = field(default_factory=dict)  # (d, d), earlier grams plus this batch's K K^T
    seconds: dict[str, float] = field(default_factory=dict)  # targets, keys, values, solve, write, past keys


def second_moment(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Iterable[str] | Tensor,
    layer: int,
    down_projection: str = Settings.down_projection,
    *,
    batch_tokens: int = 4096,
    stop_early: bool = False,
) -> Tensor:
    """Uncentred E[k k^T] (d, d) in fp32 of one layer's down-projection inputs, over all tokens but pads.

    `corpus` is texts (cut at the model's maximum length) or token blocks (N, T), for sides that share their tokens.
    Rows are sorted by length and batched up to `batch_tokens` padded tokens (the release takes three times the
    model's maximum length, which only changes memory).
    """
    if isinstance(corpus, Tensor):
        rows = corpus.tolist()
    else:
        limit = model.config.max_position_embeddings
        rows = [tokenizer(text, truncation=True, max_length=limit)["input_ids"] for text in corpus]
    batches: list[list[list[int]]] = [[]]
    for row in sorted(filter(len, rows), key=len):
        if batches[-1] and (len(batches[-1]) + 1) * len(row) > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    total, count = torch.zeros(()), 0
    for rows_of_batch in batches:
        batch = pad_right(rows_of_batch, model.device)
        name = down_projection.format(layer)
        captured = run_and_capture(model, name, batch, inputs=True, stop_early=stop_early)  # (rows, tokens, d)
        keys = captured[batch["attention_mask"].bool()].float()  # (t, d)
        total = total.to(keys.device) + keys.T @ keys  # (d, d)
        count += len(keys)
    return total / count


def projector(moment: Tensor, threshold: float | None = None, energy_share: float | None = None) -> Tensor:
    """P (d, d) on the eigen-directions of `moment` with little energy, by SVD in the moment's dtype.

    Kept are the eigenvalues below `threshold` (published: 2e-2), or those that together hold at most `energy_share`
    of the energy, smallest first, the largest eigenvalue in every hundred apart. Exactly one rule is given.
    """
    if (threshold is None) == (energy_share is None):
        raise ValueError(f"Give either threshold or energy_share, not {threshold=} and {energy_share=}.")
    directions, values, _ = torch.linalg.svd(moment)  # (d, d), (d,) descending
    if threshold is not None:
        kept = values < threshold
    else:
        massive = len(values) // 100
        counted = values[massive:]
        kept = torch.zeros_like(values, dtype=torch.bool)
        kept[massive:] = counted.flip(0).cumsum(0).flip(0) <= energy_share * counted.sum()
    return directions[:, kept] @ directions[:, kept].T


def compute_keys(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Mapping[str, str]],
    layer: int,
    contexts: Sequence[Sequence[str]],
    settings: Settings,
) -> Tensor:
    """K (d, n): down-projection inputs at the subject, the mean over each context group, then over the groups."""
    flat = [context for group in contexts for context in group]
    rows = [encode_row(tokenizer, context, r["prompt"], r["subject"]) for r in requests for context in flat]
    captured = at_subjects(model, settings.down_projection.format(layer), rows, inputs=True)  # (n * contexts, d)
    per_request = captured.view(len(requests), len(flat), -1)  # (n, contexts, d)
    groups = per_request.split([len(group) for group in contexts], dim=1)
    return torch.stack([group.mean(1) for group in groups]).mean(0).T  # (d, n)


def current_values(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Mapping[str, str]],
    layer: int,
    settings: Settings,
) -> Tensor:
    """H (h, n): the output of block `layer` at the subject of the bare prompt, on the weights as they are."""
    rows = [encode_row(tokenizer, "{}", request["prompt"], request["subject"]) for request in requests]
    return at_subjects(model, settings.block.format(layer), rows, inputs=False).T  # (h, n)


def solve_dense(projection: Tensor, keys: Tensor, past_gram: Tensor, residual: Tensor, l2: float) -> Tensor:
    """X (d, h) of (P (K K^T + C) + l2 I) X = P K R^T by LU, in the dtype of the inputs.

    Shapes: projection (d, d), keys (d, n), past_gram (d, d), residual (h, n).
    """
    identity = torch.eye(len(projection), dtype=projection.dtype, device=projection.device)
    return torch.linalg.solve(projection @ (keys @ keys.T + past_gram) + l2 * identity, projection @ keys @ residual.T)


def apply_edits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Mapping[str, str]],
    contexts: Sequence[Sequence[str]],
    projectors: Mapping[int, Tensor],
    settings: Settings,
    *,
    past_grams: Mapping[int, Tensor] | None = None,
    targets: Tensor | None = None,
    second_key_pass: bool = True,
) -> Record:
    """Edits one batch of requests. Changes the down-projection weights of `settings.layers` in place, with no undo.

    `projectors` holds P (d, d) per layer, `past_grams` the summed K K^T of earlier batches (none: zero). `targets`
    (n, h) skips the optimisation. The keys added to the grams are computed again after all writes, as published;
    they equal the first ones, which `second_key_pass=False` takes.
    """
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(phase: str) -> Generator[None, None, None]:
        start = time.perf_counter()
        yield
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start

    layers = sorted(settings.layers)
    steps: list[list[dict[str, float]]] = []
    if targets is None:
        with timed("targets"):
            found = [compute_target(model, tokenizer, r, layers[-1], contexts, settings) for r in requests]
        targets, steps = torch.stack([target for target, _ in found]), [step for _, step in found]
    record = Record(targets, steps, seconds=seconds)
    for index, layer in enumerate(layers):
        with timed("keys"):
            keys = compute_keys(model, tokenizer, requests, layer, contexts, settings)  # (d, n)
        with timed("values"):
            values = current_values(model, tokenizer, requests, layers[-1], settings)  # (h, n)
        residual = (targets.T - values) / (len(layers) - index)  # (h, n)
        past = past_grams[layer] if past_grams else torch.zeros_like(projectors[layer])  # (d, d)
        with timed("solve"):
            solution = solve_dense(projectors[layer], keys, past, residual, settings.l2)  # (d, h)
        name = settings.down_projection.format(layer)
        delta = (
            solution if isinstance(model.get_submodule(name), Conv1D) else solution.T
        )  # Conv1D (d, h), Linear (h, d)
        with timed("write"), torch.no_grad():
            model.get_parameter(f"{name}.weight").add_(delta)
        record.keys[layer], record.residuals[layer], record.deltas[layer] = keys, residual, delta
        record.past_grams[layer] = past
    for layer in layers:
        with timed("past keys"):
            keys = record.keys[layer]
            if second_key_pass:
                keys = compute_keys(model, tokenizer, requests, layer, contexts, settings)
            record.past_grams[layer] = record.past_grams[layer] + keys @ keys.T  # (d, d)
    return record


def main() -> None:
    """Edits CounterFact records on SmolLM2-135M-Instruct one batch at a time and prints the seconds of each phase."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with counterfact.json and wikipedia.jsonl")
    parser.add_argument("--edits", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16384, help="corpus tokens for the second moments")
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 6, 7, 8, 9])
    parser.add_argument("--learning-rate", type=float, default=0.5)
    parser.add_argument("--energy-share", type=float, default=0.3)
    parser.add_argument(
        "--stop-early", action="store_true", help="end the statistics' forward behind the hooked layer"
    )
    options = parser.parse_args()

    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    settings = Settings(layers=tuple(options.layers), v_lr=options.learning_rate)
    records = json.loads((options.data / "counterfact.json").read_text("utf-8"))[: options.edits]
    rewrites = [record["requested_rewrite"] for record in records]
    requests = [{**rewrite, "target_new": rewrite["target_new"]["str"]} for rewrite in rewrites]
    tokens: list[int] = []
    with open(options.data / "wikipedia.jsonl", encoding="utf-8") as lines:
        for line in lines:
            tokens += tokenizer(json.loads(line)["text"])["input_ids"]
            if len(tokens) >= options.tokens:
                break
    blocks = torch.tensor(tokens[: len(tokens) // 512 * 512]).view(-1, 512)[: options.tokens // 512]  # (N, 512)

    projectors, statistics, decompositions = {}, 0.0, 0.0
    for layer in settings.layers:
        start = time.perf_counter()
        moment = second_moment(model, tokenizer, blocks, layer, stop_early=options.stop_early)
        middle = time.perf_counter()
        projectors[layer] = projector(moment, energy_share=options.energy_share)
        statistics += middle - start
        decompositions += time.perf_counter() - middle
        print(f"layer {layer}: P keeps {projectors[layer].trace():.0f} of {len(moment)} directions")
    record = apply_edits(model, tokenizer, requests, generate_contexts(model, tokenizer), projectors, settings)
    print(f"statistics: {statistics:.1f} s for {blocks.numel()} tokens, projector: {decompositions:.1f} s")
    for phase, seconds in record.seconds.items():
        print(f"{phase}: {seconds:.2f} s, {seconds / len(requests):.2f} s per edit")
    for request, steps in zip(requests, record.target_steps, strict=True):
        prompt = request["prompt"].replace("{}", request["subject"])
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            said = tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax())
        print(f"{prompt} -> {said!r} (wanted {request['target_new']!r}), loss {steps[0]['loss']:.2f} to ", end="")
        print(f"{steps[-1]['loss']:.3f} in {len(steps)} forwards")


if __name__ == "__main__":
    main()
