"""Causal tracing against plain patched passes: whole sequences, one token, layer and noise draw at a time."""

import copy
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_alphaedit.errors import RequestError
from hf_alphaedit.models.architecture import resolve_architecture
from hf_alphaedit.models.hooks import hidden_of, like_output
from hf_alphaedit.requests import EditRequest
from hf_alphaedit.trace_report import PLACES, TraceReport
from hf_alphaedit.tracing import trace


FACTS = [
    {"prompt": "The capital of France is", "subject": "France", "attribute": "Paris"},
    {"prompt": "Marie Curie is known for", "subject": "Marie Curie", "attribute": "physics"},
    {"prompt": "She saw Ada Lovelace", "subject": "Ada Lovelace", "attribute": "again"},
]
# (block, attention, feed-forward) by model type
PATHS = {
    "llama": ("model.layers.{}", "self_attn", "mlp"),
    "gpt2": ("transformer.h.{}", "attn", "mlp"),
    "gptj": ("transformer.h.{}", "attn", "mlp"),
    "gemma2": ("model.layers.{}", "self_attn", "mlp"),
    "opt": ("model.decoder.layers.{}", "self_attn", "fc2"),
}
LAYERS = {"gpt2": "n_layer", "gptj": "n_layer"}


def knowing_model(name: str, tokenizer: PreTrainedTokenizerBase, **overrides: Any) -> PreTrainedModel:
    """A random model whose head was turned so that it says the answers of `FACTS`."""
    model = tiny_model(name, tie_word_embeddings=False, **overrides)
    head = model.get_output_embeddings()
    final: list[Tensor] = []
    handle = head.register_forward_hook(lambda _, inputs, __: final.append(inputs[0][0, -1]))
    answers = []
    with torch.no_grad():
        for fact in FACTS:
            ids = tokenizer(fact["prompt"])["input_ids"]
            model(torch.tensor([ids]))
            answers.append(tokenizer(f"{fact['prompt']} {fact['attribute']}")["input_ids"][len(ids)])
        handle.remove()
        for token, state in zip(answers, final, strict=True):
            head.weight[token] = 8 * state / state.norm() ** 2
    return model


class PlainRuns:
    """One fact, one row at a time through the whole model. `noise` (subject tokens, h) is one draw."""

    def __init__(self, model: PreTrainedModel, ids: list[int], answer: int, subject: range) -> None:
        self.model, self.ids, self.answer, self.subject = model, ids, answer, subject
        self.clean_outputs: dict[nn.Module, Tensor] = {}
        with ExitStack() as stack:
            for module in model.modules():
                stack.callback(module.register_forward_hook(self._keep).remove)
            self.clean = self.probability()

    def _keep(self, module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, (Tensor, tuple)):
            self.clean_outputs[module] = hidden_of(output).detach().clone()

    def probability(self) -> float:
        with torch.no_grad():
            logits = self.model(torch.tensor([self.ids]), use_cache=False).logits
        return float(logits[0, -1].double().softmax(-1)[self.answer])

    def corrupted(self, noise: Tensor, modules: list[nn.Module] = (), token: int = 0) -> float:  # ty: ignore
        def corrupt(_: nn.Module, __: Any, embedded: Tensor) -> Tensor:
            embedded = embedded.clone()
            embedded[0, self.subject.start : self.subject.stop] += noise
            return embedded

        def restore(module: nn.Module, _: Any, output: Any) -> Any:
            hidden = hidden_of(output).clone()
            hidden.view(1, len(self.ids), -1)[0, token] = self.clean_outputs[module].view(1, len(self.ids), -1)[
                0, token
            ]
            return like_output(hidden, output)

        with ExitStack() as stack:
            stack.callback(self.model.get_input_embeddings().register_forward_hook(corrupt).remove)
            for module in modules:
                stack.callback(module.register_forward_hook(restore).remove)
            return self.probability()


@pytest.mark.parametrize("name", list(PATHS))
def test_effects_equal_plain_patching(name: str):
    tokenizer = tiny_tokenizer(bos=True)
    model = knowing_model(name, tokenizer, **{LAYERS.get(name, "num_hidden_layers"): 3})
    report = trace(resolve_architecture(model), tokenizer, FACTS, samples=2, window=2, seed=5, noise=2.0)
    assert report.known == len(FACTS)

    blocks, attention, feed_forward = PATHS[name]
    layers = range(model.config.num_hidden_layers)
    expected = {kind: torch.zeros(len(PLACES), len(layers)) for kind in ("hidden", "mlp", "attention")}
    counts = torch.zeros(len(PLACES))
    rows = []
    for fact in FACTS:
        encoded = tokenizer(fact["prompt"], return_offsets_mapping=True)
        start = fact["prompt"].index(fact["subject"])
        end = start + len(fact["subject"])
        inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > start]
        answer = tokenizer(f"{fact['prompt']} {fact['attribute']}")["input_ids"][len(encoded["input_ids"])]
        rows.append((encoded["input_ids"], range(inside[0], inside[-1] + 1), answer))
    embedded = model.get_input_embeddings()(torch.tensor([ids[i] for ids, inside, _ in rows for i in inside]))
    clean_sum = corrupted_sum = 0.0
    for index, (ids, subject, answer) in enumerate(rows):
        generator = torch.Generator().manual_seed(5 + index)
        width = embedded.shape[-1]
        noise = 2.0 * embedded.std().detach() * torch.randn(2, len(subject), width, generator=generator)
        plain = PlainRuns(model, ids, answer, subject)
        corrupted = sum(plain.corrupted(draw) for draw in noise) / 2
        for token in range(subject.start, len(ids)):
            if token in subject:
                place = 2 if token == subject.stop - 1 else 0 if token == subject.start else 1
            else:
                place = 5 if token == len(ids) - 1 else 3 if token == subject.stop else 4
            counts[place] += 1
            for layer in layers:
                around = [other for other in (layer - 1, layer) if other >= 0]  # a window of two
                for kind, paths in {
                    "hidden": [blocks.format(layer)],
                    "mlp": [f"{blocks.format(other)}.{feed_forward}" for other in around],
                    "attention": [f"{blocks.format(other)}.{attention}" for other in around],
                }.items():
                    modules = [model.get_submodule(path) for path in paths]
                    restored = sum(plain.corrupted(draw, modules, token) for draw in noise) / 2
                    expected[kind][place, layer] += restored - corrupted
        clean_sum += plain.clean
        corrupted_sum += corrupted
    assert report.clean == pytest.approx(clean_sum / len(rows), rel=1e-4)
    assert report.corrupted == pytest.approx(corrupted_sum / len(rows), rel=1e-3)
    for kind, effect in expected.items():
        found = torch.tensor(report.effects[kind])
        torch.testing.assert_close(found, effect / counts.clamp_min(1)[:, None], atol=2e-6, rtol=1e-3)
    assert max(map(max, report.effects["hidden"])) > 1e-4


@pytest.fixture
def setting() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = tiny_tokenizer(bos=True)
    return knowing_model("llama", tokenizer), tokenizer


def test_the_last_state_of_all_restores_everything(setting):
    model, tokenizer = setting
    report = trace(resolve_architecture(model), tokenizer, FACTS[:2], kinds=["hidden"])
    last = [by_layer[-1] for by_layer in report.effects["hidden"]]
    assert last[PLACES.index("prompt, last")] == pytest.approx(report.clean - report.corrupted, rel=1e-3)
    others = [
        value for place, value in zip(PLACES, last, strict=True) if place not in ("prompt, last", "subject, last")
    ]
    assert others == pytest.approx([0] * len(others), abs=1e-7)


def test_batches_and_places_do_not_matter_and_the_model_is_left_alone(setting):
    model, tokenizer = setting
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state, model = torch.get_rng_state(), model.train()
    architecture = resolve_architecture(model)
    report = trace(architecture, tokenizer, FACTS, seed=1)
    small = trace(architecture, tokenizer, FACTS, seed=1, batch_size=2)
    one = trace(architecture, tokenizer, FACTS, seed=1, kinds=["mlp"], places=["subject, last"])
    other = trace(architecture, tokenizer, FACTS, seed=2)
    torch.testing.assert_close(torch.tensor(small.effects["mlp"]), torch.tensor(report.effects["mlp"]))
    assert one.at_subject("mlp") == pytest.approx(report.at_subject("mlp"), abs=1e-7)
    assert one.suggested_layers == report.suggested_layers
    assert other.corrupted != report.corrupted
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


def test_only_known_facts_are_traced(setting):
    model, tokenizer = setting
    unknown = {**FACTS[0], "attribute": "Ottawa"}
    request = EditRequest("The capital of {} is", "France", "Rome", "Paris")
    architecture = resolve_architecture(model)
    report = trace(architecture, tokenizer, [request, unknown], kinds=["mlp"])
    assert (report.known, report.given) == (1, 2)
    assert report.effects == trace(architecture, tokenizer, FACTS[:1], kinds=["mlp"]).effects
    with pytest.raises(RequestError, match="knows none of the 1 facts"):
        trace(architecture, tokenizer, [unknown])


def test_wrong_calls_are_refused(setting):
    model, tokenizer = setting
    architecture = resolve_architecture(model)
    with pytest.raises(ValueError, match=r"unknown kinds \['head'\]"):
        trace(architecture, tokenizer, FACTS, kinds=["head"])
    with pytest.raises(ValueError, match=r"unknown places \['end'\]"):
        trace(architecture, tokenizer, FACTS, places=["end"])
    with pytest.raises(RequestError, match="has no attribute"):
        trace(architecture, tokenizer, [EditRequest("{} is", "Rome", "x")])


def report_with(effect: list[float], **others: list[float]) -> TraceReport:
    at_subject = {"mlp": effect, **others}
    rows = {
        kind: [values if place == "subject, last" else [0.0] * len(values) for place in PLACES]
        for kind, values in at_subject.items()
    }
    return TraceReport(rows, 3, 4, 0.5, 0.1, {"layers_to_suggest": 3})


def test_suggested_layers():
    assert report_with([0, 1, 3, 2, 2.5, 0.5, 0]).suggested_layers == (2, 3, 4)
    assert report_with([5, 0, 0, 2, 2, 2]).suggested_layers == (3, 4, 5)
    assert report_with([1, 2]).suggested_layers == (0, 1)
    assert report_with([0, 1, 3, 2], hidden=[9, 9, 9, 0]).suggested_layers == (1, 2, 3)


def test_report_round_trip_table_and_plot(tmp_path: Path):
    report = report_with([0.01, 0.02, 0.2, 0.1], hidden=[0.3, 0.2, 0.1, 0.0])
    report.to_json(tmp_path / "trace.json")
    values = json.loads((tmp_path / "trace.json").read_text("utf-8"))
    assert values["suggested_layers"] == [1, 2, 3]
    assert TraceReport.from_dict(copy.deepcopy(values)) == report
    lines = str(report).splitlines()
    assert "3 of 4 facts" in lines[0]
    assert [line.endswith("*") for line in lines[-4:]] == [False, True, True, True]
    assert lines[-2].split()[:3] == ["2", "20.00", "10.00"]
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "trace.png")
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
