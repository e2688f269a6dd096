"""Edits that the model no longer says are made again, in place of the earlier ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from editable import CONFIG, CORPUS, REQUESTS, TOKENS, tiny_editor
from synthetic import same_weights, weights_of

from hf_alphaedit.batches import count_facts, in_force, past_keys
from hf_alphaedit.card import card_section
from hf_alphaedit.editor import AlphaEditor
from hf_alphaedit.errors import ConfigError, StateError
from hf_alphaedit.requests import EditRequest


LOVELACE, FRANCE, ITALY = REQUESTS[2], REQUESTS[0], REQUESTS[1]
WEAK = {"value_steps": 1, "learning_rate": 1e-3}


def faded_editor(**settings: Any) -> AlphaEditor:
    """One edit of three that is made well, and two that a single small step doesn't make."""
    editor = tiny_editor(**settings)
    config = editor.config
    editor.apply_edits([LOVELACE])
    editor.reconfigure(config.replace(**WEAK))
    editor.apply_edits([FRANCE, ITALY])
    editor.reconfigure(config)
    return editor


def test_what_is_lost_is_edited_again_and_nothing_else() -> None:
    editor = faded_editor()
    assert editor.lost() == [FRANCE, ITALY]
    before = editor.history.batches[:]
    (report,) = editor.repair(rounds=3)
    assert [outcome.prompt for outcome in report.outcomes] == [FRANCE.text, ITALY.text]
    assert editor.lost() == []
    assert editor.history.batches[:2] == before
    assert editor.history.batches[2].requests == (FRANCE, ITALY)
    assert count_facts(editor.history.batches) == 3
    edited = weights_of(editor)
    assert editor.repair() == []
    assert same_weights(weights_of(editor), edited)


def test_the_report_says_what_is_left() -> None:
    editor = tiny_editor()
    assert "are not predicted" not in str(editor.apply_edits([LOVELACE]))
    editor.reconfigure(CONFIG.replace(**WEAK))
    assert "2 of 2 are not predicted; `repair` makes such edits again" in str(editor.apply_edits([FRANCE, ITALY]))


def test_rounds_end_although_something_is_left() -> None:
    editor = faded_editor()
    editor.reconfigure(CONFIG.replace(**WEAK))
    reports = editor.repair(rounds=2, batch_size=1)
    assert [len(report.outcomes) for report in reports] == [2, 2]
    assert len(editor.history.batches) == 2 + 4
    assert count_facts(editor.history.batches) == 3


def test_a_saved_model_is_repaired_after_loading(tmp_path: Path) -> None:
    editor = faded_editor()
    editor.save_pretrained(tmp_path)
    loaded = AlphaEditor.from_pretrained(tmp_path, config=editor.config)
    assert loaded.lost() == [FRANCE, ITALY]
    loaded.prepare(CORPUS, num_tokens=TOKENS)
    loaded.repair()
    editor.repair()
    assert same_weights(weights_of(loaded), weights_of(editor))


def test_bad_use_changes_nothing(tmp_path: Path) -> None:
    editor = faded_editor()
    with pytest.raises(ConfigError, match="rounds=0 must be at least 1"):
        editor.repair(rounds=0)
    editor.save_pretrained(tmp_path, include_requests=False)
    with pytest.raises(StateError, match="texts of 3 edits were withheld"):
        AlphaEditor.from_pretrained(tmp_path).repair()


def test_a_new_target_for_the_same_prompt_is_not_held_back() -> None:
    """With the old key protected a hundredfold, a hundredth of the new residual would be made."""
    editor = tiny_editor(history_weight=100.0)
    editor.apply_edits([FRANCE, LOVELACE])
    changed = replace(FRANCE, target_new="world")
    report = editor.apply_edits([changed])
    assert report.outcomes[0].argmax_after
    assert report.outcomes[0].missing < 0.2
    # The same key under another text: what stands before the subject decides it.
    held_back = editor.apply_edits([EditRequest("The capital of {} is", "France", "music")])
    assert held_back.outcomes[0].missing > 0.5
    assert [request.text for request in editor.lost()] == ["The capital of France is"]


def test_the_update_is_the_published_formula_without_the_key_it_replaces() -> None:
    """Δ = R K₁ᵀP (K_p K_pᵀP + K₁ K₁ᵀP + λI)⁻¹ in float64, with K_p from the edits in force alone."""
    editor = faded_editor(context_keys="mean")
    name, ridge = editor.sites()[0].name, editor.config.l2
    editor.repair()
    first, second, third = editor.history.batches
    # Filtered keys are P k / √λ, and all that follows lies in the range of P.
    new, past = third.keys[name].double() * ridge**0.5, first.keys[name].double() * ridge**0.5  # (2, d), (1, d)
    system = past.T @ past + new.T @ new + ridge * torch.eye(new.shape[1], dtype=torch.float64)
    expected = third.updates[name].outputs.double().T @ new @ torch.linalg.inv(system)  # (h, d)
    torch.testing.assert_close(third.updates[name].dense(), expected, rtol=1e-4, atol=1e-7)
    old = second.keys[name].double() * ridge**0.5
    held_back = third.updates[name].outputs.double().T @ new @ torch.linalg.inv(system + old.T @ old)
    assert not torch.allclose(third.updates[name].dense(), held_back, rtol=1e-2)


def test_taking_edits_out_after_a_repair() -> None:
    editor = faded_editor()
    states = [weights_of(editor)]
    editor.repair()
    editor.undo()
    assert same_weights(weights_of(editor), states[0])
    editor.repair()
    repaired = weights_of(editor)
    with pytest.raises(StateError, match=r"edited 2 times; give one of the indices \[1, 3\]"):
        editor.remove(FRANCE)
    editor.remove(3)  # the second edit of France: the first is in force again
    assert in_force(editor.history.batches) == [[0], [0], [0]]
    assert not same_weights(weights_of(editor), repaired)
    for site in editor.sites():
        assert past_keys(editor.history.batches, site.name).shape[0] == 3
    editor.remove(2)
    editor.remove(2)  # both of Italy
    editor.remove(1)
    assert editor.history.requests == [LOVELACE]


def test_places_in_force() -> None:
    editor = faded_editor()
    batches = editor.history.batches
    assert in_force(batches) == [[0], [0, 1]]
    assert in_force(batches, [ITALY, replace(LOVELACE, target_new="city")]) == [[], [0]]
    name = editor.sites()[0].name
    assert torch.equal(past_keys(batches, name, [LOVELACE]), batches[1].keys[name])
    assert past_keys(batches, name, [LOVELACE, FRANCE, ITALY]) is None
    withheld = replace(batches[1], requests=(), withheld=2)
    assert in_force([withheld], [FRANCE]) == [[0, 1]]
    merged = replace(batches[1], requests=(FRANCE, ITALY, FRANCE))  # as a pack has them that holds the summed change
    assert in_force([merged]) == [[1, 2]]


def test_the_card_has_each_fact_once() -> None:
    editor = faded_editor()
    editor.repair()
    text = card_section(editor, "edited")
    assert "3 facts" in text
    assert text.count("capital of France") == 1
