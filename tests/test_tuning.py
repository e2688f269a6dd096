"""The search for settings: what it counts, that trials leave no trace, that it resumes, and what it writes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from editable import CONFIG, CORPUS, TOKENS
from test_editor import equal, weights_of
from tiny import tiny_model, tiny_tokenizer

from hf_alphaedit import AlphaEditConfig, AlphaEditor, EditRequest, Record
from hf_alphaedit.errors import RequestError, StateError
from hf_alphaedit.presets import config_for
from hf_alphaedit.tuning_facts import RELATIONS, tuning_facts
from hf_alphaedit.tuning_report import Trial, objective
from hf_alphaedit.tuning_search import Search, TrialLog


FACTS = [
    Record(
        EditRequest("The capital of {}", subject, target, "world"),
        paraphrases=(f"Tell me of {subject}",),
        neighborhood=(("The capital of Peru", "writing"),),
    )
    for subject, target in {"France": "music", "Italy": "city"}.items()
]
LADDERS = {"clamp_factor": (1.0, 4.0), "l2": (0.01, 1.0)}


def editor_to_tune() -> AlphaEditor:
    # Two tokens for each of the 64 dimensions are enough here.
    settings = CONFIG.replace(value_steps=4, tokens_per_dimension=TOKENS // 64)
    return AlphaEditor(tiny_model("llama"), tiny_tokenizer(), settings)


def run(editor: AlphaEditor, directory: Path, **options: Any) -> Any:
    options = {"texts": CORPUS[:60], "corpus": CORPUS, "windows": [(2, 3)], "ladders": LADDERS, **options}
    return editor.tune(directory, FACTS, **options)


def test_objective_by_hand() -> None:
    before = {"specificity_success": 80.0}
    after = {
        "efficacy_accuracy": 100.0, "generalization_success": 60.0, "generalization_accuracy": 40.0,
        "specificity_success": 40.0, "perplexity_ratio": 1.25,
    }  # fmt: skip
    assert objective(after, before) == pytest.approx(3 / (1 / 100 + 1 / 50 + 1 / 50) / 1.25)
    assert objective({**after, "perplexity_ratio": 0.5}, before) == pytest.approx(60)
    assert objective({**after, "specificity_success": 90.0, "perplexity_ratio": 1.0}, before) == pytest.approx(75)
    assert objective({**after, "efficacy_accuracy": 0.0}, before) == 0
    assert objective({**after, "efficacy_accuracy": float("nan")}, before) == 0


def test_own_facts() -> None:
    facts = tuning_facts(48)
    assert len({fact.request.subject for fact in facts}) == 48
    assert [fact.request.relation for fact in facts[:5]] == [*RELATIONS, next(iter(RELATIONS))]
    for fact in facts:
        request = fact.request
        assert request.target_new != request.target_true == RELATIONS[request.relation][2][request.subject]
        assert all(request.subject in text for text in fact.paraphrases)
        assert len(fact.neighborhood) == 3
        assert all(request.subject not in text and answer != request.target_new for text, answer in fact.neighborhood)
    with pytest.raises(ValueError, match="count=49"):
        tuning_facts(49)


def valley(best: Mapping[str, Any], made: list[Mapping[str, Any]]) -> Any:
    """A function of the settings with one maximum, which counts its calls."""

    def attempt(settings: Mapping[str, Any]) -> Trial:
        made.append(settings)
        middle = sum(settings["layers"]) / len(settings["layers"])
        values = {"clamp_factor": 1.0, "l2": 1.0, **settings}
        far = abs(middle - best["middle"]) + sum(abs(values[name] - best[name]) for name in ("clamp_factor", "l2"))
        return Trial(dict(settings), 100 - far, {}, 0.0)

    return attempt


@pytest.mark.parametrize(
    "best", [{"middle": 9, "clamp_factor": 4.0, "l2": 0.1}, {"middle": 2, "clamp_factor": 0.5, "l2": 10.0}]
)
def test_the_search_finds_the_top_and_resumes(best: dict[str, Any], tmp_path: Path) -> None:
    ladders = {"clamp_factor": (0.5, 1.0, 2.0, 4.0), "l2": (0.1, 1.0, 10.0)}
    start = AlphaEditConfig(layers=(4, 5, 6), clamp_factor=1.0, l2=1.0)
    made: list[Mapping[str, Any]] = []
    search = Search(valley(best, made), start, 15, TrialLog(tmp_path / "log", "a"), float("inf"))
    assert search.run([(4, 5, 6), (6, 7, 8)], ladders)
    top = max(search.trials, key=lambda trial: trial.score)
    assert top.score == 100
    assert {name: top.settings[name] for name in ladders} == {name: best[name] for name in ladders}
    assert len(made) == len(search.trials) == len({json.dumps(trial.settings) for trial in search.trials})

    lines = (tmp_path / "log").read_text().splitlines(keepends=True)
    (tmp_path / "log").write_text("".join(lines[:3]) + lines[3][:20])  # killed while the fourth was written
    again: list[Mapping[str, Any]] = []
    resumed = Search(valley(best, again), start, 15, TrialLog(tmp_path / "log", "a"), float("inf"))
    assert resumed.run([(4, 5, 6), (6, 7, 8)], ladders)
    assert resumed.trials == search.trials
    assert again == made[3:]

    other: list[Mapping[str, Any]] = []
    Search(valley(best, other), start, 15, TrialLog(tmp_path / "log", "b"), float("inf")).run([(4, 5, 6)], ladders)
    assert other[0] == {"layers": [4, 5, 6]}  # made under other conditions: nothing of the log counts


def test_a_search_without_time_makes_one_trial(tmp_path: Path) -> None:
    made: list[Mapping[str, Any]] = []
    attempt = valley({"middle": 9, "clamp_factor": 4.0, "l2": 0.1}, made)
    search = Search(attempt, AlphaEditConfig(layers=(1,)), 15, TrialLog(tmp_path / "log", "a"), 0.0)
    assert not search.run([(4, 5), (6, 7)], {"l2": (0.1, 1.0)})
    assert len(made) == 1


def test_tuning_leaves_no_trace_and_writes_a_preset(tmp_path: Path) -> None:
    editor = editor_to_tune()
    before, config = weights_of(editor.model), editor.config
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    report = run(editor, tmp_path)
    assert equal(weights_of(editor.model), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert editor.config == config
    assert len(editor.history) == 0
    assert not editor.history.base_weights
    assert report.finished
    assert report.trials[0].settings == {"layers": [2, 3]}
    assert {"clamp_factor", "l2"} <= {name for trial in report.trials for name in trial.settings}

    document = json.loads((tmp_path / "tuned.json").read_text())
    assert document["evidence"]["score"] == report.best.score >= document["evidence"]["start_score"]
    assert document["shape"]["hidden_size"] == 32
    chosen = config_for(editor.model, tmp_path / "tuned.json")
    assert chosen.replace(source="") == report.config.replace(source="")
    assert "score" in str(report)

    again = run(editor_to_tune(), tmp_path)
    assert again.trials == report.trials  # the log's own, seconds included: nothing was tried again


def test_a_trial_is_what_an_editor_with_these_settings_does(tmp_path: Path) -> None:
    editor = editor_to_tune()
    trial = run(editor, tmp_path, ladders={}, minutes=0).trials[0]
    editor.prepare(CORPUS)
    editor.apply_edits(FACTS)
    found = editor_metrics(editor)
    for name, value in found.items():
        assert trial.metrics[name] == pytest.approx(value), name


def editor_metrics(editor: AlphaEditor) -> dict[str, float]:
    from hf_alphaedit.evaluation import evaluate

    metrics = ("efficacy", "generalization", "specificity")
    report = evaluate(editor.model, editor.tokenizer, FACTS, metrics=metrics)
    return {name: estimate.value for name, estimate in report.metrics.items()}


def test_what_cannot_be_tuned(tmp_path: Path) -> None:
    editor = editor_to_tune()
    with pytest.raises(RequestError, match="neighborhood"):
        editor.tune(tmp_path, [Record(FACTS[0].request)])
    editor.prepare(CORPUS)
    editor.apply_edits(FACTS[:1])
    with pytest.raises(StateError, match="1 edits"):
        run(editor, tmp_path)
