"""The gate measures and takes back; failing requests are tried again or dropped."""

import pytest
from editable import CORPUS, REQUESTS, tiny_editor
from test_editor import equal, state_of, weights_of

from hf_alphaedit import EditRequest, Record
from hf_alphaedit.applying import harder
from hf_alphaedit.errors import ConfigError, EditingError, GateError
from hf_alphaedit.evaluation import evaluate, make_reference
from hf_alphaedit.gate import Gate


NEIGHBORS = (("The capital of Peru", "writing"), ("We saw Lima", "world"))
RECORDS = [Record(request, neighborhood=NEIGHBORS) for request in REQUESTS]
# The embeddings of a random model are small: this target is never likely enough with a clamp so tight.
HOPELESS = EditRequest("{} is a place that many people who live there know for", "Oslo", "painting", "physics")


def test_a_gate_that_is_passed_keeps_the_edit_and_reports_what_it_measured() -> None:
    editor, plain = tiny_editor(), tiny_editor()
    gate = Gate(min_efficacy=100, min_specificity=0, max_perplexity_ratio=5, texts=CORPUS[:60], num_tokens=600)
    reference = make_reference(editor.model, editor.tokenizer, CORPUS[:60], num_tokens=600)
    report = editor.apply_edits(RECORDS, gate=gate)
    plain.apply_edits(REQUESTS)
    assert equal(weights_of(editor.model), weights_of(plain.model))  # measuring changes nothing
    direct = evaluate(editor.model, editor.tokenizer, RECORDS, metrics=("efficacy", "specificity"), held_out=reference)
    assert {name: found["value"] for name, found in report.evaluation.items()} == pytest.approx(
        {name: found.value for name, found in direct.metrics.items()}
    )
    assert "efficacy_accuracy: 100.00" in str(report)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (Gate(min_efficacy=100), "efficacy_accuracy is .* and min_efficacy is 100"),
        (Gate(min_specificity=100), "specificity_success is .* and min_specificity is 100"),
        (Gate(max_perplexity_ratio=0.5, texts=CORPUS[:60], num_tokens=600), "perplexity_ratio is .* is 0.5"),
    ],
)
def test_a_gate_that_is_not_passed_takes_everything_back(gate: Gate, message: str) -> None:
    editor = tiny_editor(value_steps=2, clamp_factor=0.1)
    editor.apply_edits(REQUESTS[:1])
    before = state_of(editor)
    with pytest.raises(GateError, match=message) as error:
        editor.apply_edits(RECORDS[1:], gate=gate)
    assert state_of(editor) == before
    assert len(error.value.report.outcomes) == 2
    assert error.value.report.evaluation


def test_perplexity_is_compared_with_the_unedited_model() -> None:
    editor = tiny_editor()
    texts = CORPUS[:60]
    base = make_reference(editor.model, editor.tokenizer, texts, num_tokens=600)
    editor.apply_edits(REQUESTS[:1])
    edited = weights_of(editor.model)
    gate = Gate(max_perplexity_ratio=9, texts=texts, num_tokens=600)
    reference = gate.reference(editor)
    assert reference.losses.tolist() == base.losses.tolist()
    assert equal(weights_of(editor.model), edited)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "asks for nothing"),
        ({"min_efficacy": 0.95}, "write 95 for 95 %"),
        ({"min_specificity": 101}, "percentage"),
        ({"max_perplexity_ratio": 1.1}, "needs texts"),
        ({"max_perplexity_ratio": -1, "texts": ["a"]}, "positive"),
        ({"max_perplexity_ratio": float("nan"), "texts": ["a"]}, "positive"),
    ],
)
def test_a_gate_that_makes_no_sense(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Gate(**options)


def test_a_gate_that_cannot_be_measured_stops_before_any_work() -> None:
    editor = tiny_editor()
    with pytest.raises(ConfigError, match="neighbours"):
        editor.apply_edits(REQUESTS, gate=Gate(min_specificity=50))


def test_retries_search_longer_for_what_failed() -> None:
    slow = {"value_steps": 2, "learning_rate": 0.2}
    editor, other = tiny_editor(**slow), tiny_editor(**slow)
    first = editor.apply_edits(REQUESTS)
    assert first.success_rate < 1
    second = other.apply_edits(REQUESTS, retry=4)
    assert second.success_rate == 1
    for before, after in zip(first.outcomes, second.outcomes, strict=True):
        assert after.steps > before.steps or before.argmax_after
    assert len(other.history.batches) == 1  # the failed attempts are gone
    other.undo()
    assert equal(weights_of(other.model), weights_of(tiny_editor().model))


def test_harder_settings() -> None:
    config = tiny_editor().config
    assert harder(config, 0) == config
    assert harder(config, 2).value_steps == 4 * config.value_steps
    assert harder(config, 2).stop_loss == pytest.approx(config.stop_loss / 100)


def test_what_fails_is_dropped_and_listed() -> None:
    editor, other = tiny_editor(), tiny_editor()
    report = editor.apply_edits([REQUESTS[0], HOPELESS, REQUESTS[1]], drop_failed=True)
    other.apply_edits(REQUESTS[:2])
    assert [outcome.prompt for outcome in report.outcomes] == [request.text for request in REQUESTS[:2]]
    assert [(dropped["subject"], dropped["target_new"]) for dropped in report.dropped] == [("Oslo", "painting")]
    assert report.success_rate == 1
    assert editor.history.requests == REQUESTS[:2]
    for site in editor.sites():  # as if it had never been asked for, but for rounding
        first, second = editor.history.delta(site.name), other.history.delta(site.name)
        assert float((first - second).norm() / second.norm()) < 1e-3
    assert "dropped: " in str(report)


def test_nothing_left_is_an_error_and_leaves_nothing() -> None:
    editor = tiny_editor()
    before = state_of(editor)
    with pytest.raises(EditingError, match="none of the 1 requests"):
        editor.apply_edits([HOPELESS], drop_failed=True)
    assert state_of(editor) == before
