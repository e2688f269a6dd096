"""`apply_edits` end to end on tiny models: all or nothing, the same twice, and every odd input handled."""

import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from editable import CONFIG, CORPUS, REQUESTS, TOKENS, tiny_editor
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_alphaedit import AlphaEditor, EditRequest
from hf_alphaedit.errors import AlphaEditError, ConfigError, RequestError, StateError, StatisticsError
from hf_alphaedit.evaluation.scoring import score
from hf_alphaedit.models.weights import EditSite


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def state_of(editor: AlphaEditor) -> dict[str, Any]:
    """Everything that a failed call must leave as it was; tensors as bytes, so that == compares them."""
    model = editor.model
    return {
        "weights": {name: value.numpy().tobytes() for name, value in weights_of(model).items()},
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "forwards": [name for name, module in model.named_modules() if "forward" in vars(module)],
        "training": [module.training for module in model.modules()],
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": str(numpy.random.get_state()),
        "python": random.getstate(),
        "batches": [id(batch) for batch in editor.history.batches],
        "contexts": editor.history.contexts,
        "base": sorted(editor.history.base_weights),
    }


class Faults:
    """Raises in the model's own code from the `start`-th run of any of its blocks on; counts them without a start."""

    def __init__(
        self, model: PreTrainedModel, error: Callable[[], BaseException], start: float = float("inf")
    ) -> None:
        self.count, self.error, self.start = 0, error, start
        for layer in model.model.layers:
            layer.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.count += 1
        if self.count >= self.start:
            raise self.error()


def edited_before() -> AlphaEditor:
    """An editor with one edit and sampled contexts."""
    editor = tiny_editor(value_steps=3, context_templates=None, context_length=12)
    editor.apply_edits(REQUESTS[:1])
    return editor


@cache
def block_runs() -> int:
    """How often a block runs while two more requests are edited one by one."""
    editor = edited_before()
    counting = Faults(editor.model, ValueError)
    editor.apply_edits(REQUESTS[1:], batch_size=1)
    return counting.count


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.8, 0.97, 1.0])
@pytest.mark.parametrize(
    "error",
    [
        lambda: ValueError("broken"),
        KeyboardInterrupt,
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB"),
    ],
    ids=["exception", "interrupt", "memory"],
)
def test_a_failed_call_leaves_everything_as_it_was(error: Callable[[], BaseException], share: float) -> None:
    editor = edited_before()
    editor.model.train()
    for parameter in list(editor.model.parameters())[::2]:
        parameter.requires_grad_(False)
    faults = Faults(editor.model, error, max(1, round(share * block_runs())))
    before = state_of(editor)
    with pytest.raises(type(error())):
        editor.apply_edits(REQUESTS[1:], batch_size=1)
    assert faults.count >= faults.start
    assert state_of(editor) == before


def test_a_failed_first_call_leaves_no_trace() -> None:
    editor = tiny_editor(value_steps=2, context_templates=None, context_length=12)
    before = state_of(editor)
    calls = Faults(editor.model, KeyboardInterrupt, 100)
    with pytest.raises(KeyboardInterrupt):
        editor.apply_edits(REQUESTS)
    assert calls.count == 100
    hooks = state_of(editor)
    assert hooks.pop("hooks") != before.pop("hooks")  # the fault's own hooks are still there
    assert hooks == before
    assert before["base"] == []
    assert before["contexts"] is None


@pytest.mark.parametrize("failing_write", [1, 2, 3])
def test_a_failed_write_is_taken_back(failing_write: int, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tiny_editor(value_steps=2)
    before, write, calls = state_of(editor), EditSite.write, []

    def failing(site: EditSite, value: Tensor) -> None:
        calls.append(site.name)
        if len(calls) == failing_write:
            write(site, torch.full_like(value, float("nan")))  # half done
            raise OSError("no space left on device")
        write(site, value)

    monkeypatch.setattr(EditSite, "write", failing)
    with pytest.raises(OSError, match="no space left"):
        editor.apply_edits(REQUESTS[:2], batch_size=1)
    assert state_of(editor) == before


def test_an_edit_is_the_same_twice_and_can_be_undone() -> None:
    editor, other = tiny_editor(), tiny_editor()
    before = weights_of(editor.model)
    report = editor.apply_edits(REQUESTS, seed=3)
    torch.manual_seed(99)  # the global state decides nothing
    other.apply_edits(REQUESTS, seed=3)
    edited = weights_of(editor.model)
    assert equal(edited, weights_of(other.model))
    assert [name for name in edited if not torch.equal(edited[name], before[name])] == [
        f"model.layers.{layer}.mlp.down_proj.weight" for layer in (2, 3)
    ]
    assert report.success_rate == 1
    assert [outcome.prompt for outcome in report.outcomes] == [request.text for request in REQUESTS]
    assert all(outcome.p_new_after > outcome.p_new_before for outcome in report.outcomes)
    editor.undo()
    assert equal(weights_of(editor.model), before)


def test_sampled_contexts_follow_the_seed() -> None:
    editors = [tiny_editor(value_steps=2, context_templates=None, context_length=12) for _ in range(3)]
    for editor, seed in zip(editors, (0, 0, 1), strict=True):
        editor.apply_edits(REQUESTS[:1], seed=seed)
    assert editors[0].history.contexts == editors[1].history.contexts != editors[2].history.contexts
    assert equal(weights_of(editors[0].model), weights_of(editors[1].model))
    assert not equal(weights_of(editors[0].model), weights_of(editors[2].model))


def test_other_prompts_are_learnt_and_kept(tmp_path: Path) -> None:
    request, other = EditRequest("The capital of {} is", "France", "music"), "People who saw {} in the city know"
    likelihood = {}
    for prompts in ((), (other,)):
        editor = tiny_editor(context_templates=["{}"])
        editor.apply_edits([replace(request, other_prompts=prompts)])
        (result,) = score(editor.model, editor.tokenizer, [(other.format("France"), "music")])
        likelihood[prompts] = sum(result.log_probabilities)
    assert likelihood[(other,)] > likelihood[()] + 0.2
    editor.save_pretrained(tmp_path)
    assert AlphaEditor.from_pretrained(tmp_path).history.batches[0].requests[0].other_prompts == (other,)


def test_batches_are_separate_calls() -> None:
    editor, other = tiny_editor(), tiny_editor()
    editor.apply_edits(REQUESTS, batch_size=2)
    other.apply_edits(REQUESTS[:2])
    other.apply_edits(REQUESTS[2:])
    assert [len(batch) for batch in editor.history.batches] == [2, 1]
    assert equal(weights_of(editor.model), weights_of(other.model))


def test_order_within_a_batch_changes_nothing_but_rounding() -> None:
    editor, other = tiny_editor(), tiny_editor()
    report = editor.apply_edits(REQUESTS)
    turned = other.apply_edits(REQUESTS[::-1])
    assert [outcome.prompt for outcome in turned.outcomes] == [outcome.prompt for outcome in report.outcomes][::-1]
    for site in editor.sites():
        first, second = editor.history.delta(site.name), other.history.delta(site.name)
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4 * float(first.abs().max()))


def test_duplicates_count_once_in_effect() -> None:
    editor, other = tiny_editor(l2=1e-4), tiny_editor(l2=1e-4)
    editor.apply_edits(REQUESTS)
    report = other.apply_edits([*REQUESTS, REQUESTS[0]])
    assert len(report.outcomes) == 4
    assert any("request 3 repeats request 0" in warning for warning in report.warnings)
    for site in editor.sites():
        first, second = editor.history.delta(site.name), other.history.delta(site.name)
        assert float((first - second).norm() / first.norm()) < 0.05


def test_statistics_are_those_of_the_unedited_model() -> None:
    editor = tiny_editor()
    before = {name: moment.clone() for name, moment in editor.second_moments().items()}
    editor.apply_edits(REQUESTS)
    edited = weights_of(editor.model)
    again = editor.prepare(CORPUS, num_tokens=TOKENS, force=True)
    assert not again.from_cache
    assert equal(editor.second_moments(), before)
    assert equal(weights_of(editor.model), edited)
    with editor.unedited():
        assert equal(weights_of(editor.model), weights_of(tiny_model("llama")))
    assert equal(weights_of(editor.model), edited)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "there are no requests"),
        (REQUESTS[0], "pass a list"),
        ({"prompt": "{} is", "subject": "a", "target_new": "b"}, "pass a list"),
        ([{"prompt": "{} is", "subject": "", "target_new": "b"}], "request 0.*empty"),
        ([{"prompt": "{} is", "subject": "a", "target_new": "  "}], "request 0.*empty"),
        ([REQUESTS[0], {"prompt": "It is", "subject": "Rome", "target_new": "b"}], "request 1.*Rome"),
        ([{"prompt": "Rome is Rome", "subject": "Rome", "target_new": "b"}], "2 times"),
        ([{"prompt": "{} and {}", "subject": "Rome", "target_new": "b"}], "2 placeholders"),
        ([REQUESTS[0], EditRequest("The capital of {}", "France", "world")], "requests 0 and 1 want"),
        ([EditRequest("The capital of {}", "France", "very long " * 80)], "128 positions"),
    ],
)
def test_requests_that_cannot_be_used_stop_before_any_work(requests: Any, message: str) -> None:
    editor = AlphaEditor(tiny_model("llama"), tiny_tokenizer(), {"layers": [2, 3]})
    calls = Faults(editor.model, ValueError)
    with pytest.raises(RequestError, match=message):
        editor.apply_edits(requests)
    assert calls.count == 0
    assert not editor.is_prepared


@pytest.mark.parametrize(("option", "value"), [("batch_size", 0), ("batch_size", -1), ("retry", -1)])
def test_options_out_of_range(option: str, value: int) -> None:
    editor = AlphaEditor(tiny_model("llama"), tiny_tokenizer(), {"layers": [2]})
    with pytest.raises(ConfigError, match=option):
        editor.apply_edits(REQUESTS, **{option: value})


@pytest.mark.parametrize(
    "request_",
    [
        EditRequest("Set {braces} {0}: {}", "{France}", "{music}"),
        EditRequest("{}的首都是", "法国", "伦敦"),
        EditRequest("🎉 {} lives in", "👩‍🚀 Ada", "🗼"),
        EditRequest("The capital of {} is ", "France", "Rome"),
        EditRequest("The capital of{}", " France", " Rome"),
        EditRequest("{} and France like", "France", "music"),
        EditRequest("{}", "Rome", "music\nand a second line"),
        EditRequest("{} is known for", "Marie Curie", "a long list of things that many people read " * 2),
    ],
    ids=["braces", "chinese", "emoji", "space after", "space inside", "subject twice", "newline", "long target"],
)
@pytest.mark.parametrize(
    ("kind", "bos"), [("byte_level", False), ("metaspace", True)], ids=["plain", "metaspace, bos"]
)
def test_odd_texts_are_edited_where_they_say(request_: EditRequest, kind: Any, bos: bool) -> None:
    editor = tiny_editor(tokenizer=tiny_tokenizer(kind, bos=bos), value_steps=2, clamp_factor=1.0)
    report = editor.apply_edits([request_])
    assert report.outcomes[0].prompt == request_.text
    assert report.sites[0].relative_norm > 0
    assert report.outcomes[0].missing < 0.9


@pytest.mark.parametrize("pad", [False, True])
def test_padding_settings_of_the_tokenizer_decide_nothing(pad: bool) -> None:
    editor = tiny_editor()
    other = tiny_editor(tokenizer=tiny_tokenizer(pad=pad, padding_side="left"))
    editor.apply_edits(REQUESTS)
    other.apply_edits(REQUESTS)
    assert other.tokenizer.padding_side == "left"
    assert equal(weights_of(editor.model), weights_of(other.model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["model.layers.1.mlp.up_proj.weight", "model.layers.4.mlp.up_proj.weight"])
def test_weights_that_are_not_finite(value: float, place: str) -> None:
    model = tiny_model("llama")
    model.get_parameter(place).data[3, 3] = value
    before = weights_of(model)
    editor = AlphaEditor(model, tiny_tokenizer(), CONFIG)

    def edit() -> None:
        editor.prepare(CORPUS, num_tokens=TOKENS)
        editor.apply_edits(REQUESTS)

    with pytest.raises(AlphaEditError, match="finite"):
        edit()
    assert [name for name, now in weights_of(model).items() if not torch.equal(before[name], now)] in ([], [place])
    assert not editor.history.batches


def test_edits_of_another_base_model_are_refused() -> None:
    editor = tiny_editor(value_steps=2)
    editor.apply_edits(REQUESTS[:1])
    with pytest.raises(StateError, match="another base model"):
        AlphaEditor(tiny_model("llama", seed=1), tiny_tokenizer(), editor.config, history=editor.history)


def test_later_edits_use_the_text_of_the_earlier_ones(tmp_path: Path) -> None:
    editor = tiny_editor()
    editor.apply_edits(REQUESTS[:1])
    moments = {name: moment.clone() for name, moment in editor.second_moments().items()}
    editor.save_pretrained(tmp_path)
    again = AlphaEditor.from_pretrained(tmp_path)
    again.second_moment_directory = editor.second_moment_directory
    assert again.config.corpus == editor.config.corpus
    assert equal(again.second_moments(), moments)

    elsewhere = AlphaEditor.from_pretrained(tmp_path)
    elsewhere.second_moment_directory = tmp_path / "empty"
    with pytest.raises(StatisticsError, match=re.escape(str(editor.config.corpus))):
        elsewhere.apply_edits(REQUESTS[1:])


def test_settings_survive_undoing_everything(tmp_path: Path) -> None:
    editor = tiny_editor(l2=0.02)
    editor.apply_edits(REQUESTS[:1])
    editor.undo_all()
    editor.save_pretrained(tmp_path)
    assert AlphaEditor.from_pretrained(tmp_path).config.l2 == 0.02


def test_a_heavier_history_moves_earlier_keys_less() -> None:
    moved = []
    for weight in (1.0, 100.0):
        editor = tiny_editor(history_weight=weight, l2=1.0)
        editor.apply_edits(REQUESTS[:1])
        editor.apply_edits(REQUESTS[1:])
        earlier, later = editor.history.batches
        site = editor.sites()[0].name
        update = later.updates[site]
        moved.append((earlier.keys[site] @ update.inputs.T @ update.outputs).norm())  # Δ k / √λ: inputs lie in P
    assert moved[1] < 0.1 * moved[0]


def test_the_reports_time_is_that_of_both_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    editor, ticks = tiny_editor(), count()
    editor.filters()
    monkeypatch.setattr("hf_alphaedit.editing.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    seconds = editor.apply_edits(REQUESTS, preflight=False).seconds
    assert seconds["report"] == 2  # one tick passes inside a block: before and after the edit
    assert seconds["targets"] == 1
