"""What the preflight check finds, against requests made to be found."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from editable import REQUESTS, tiny_editor
from test_editor import equal, weights_of
from tiny import tiny_model, tiny_tokenizer

from hf_alphaedit import AlphaEditor, EditRequest
from hf_alphaedit.models.encoding import encode_prompt


def fresh() -> AlphaEditor:
    return AlphaEditor(tiny_model("llama"), tiny_tokenizer(bos=True), {"layers": [2, 3]})


def test_tokens_and_spaces() -> None:
    editor = fresh()
    requests = [
        EditRequest("The capital of {} is", "France", "music"),
        EditRequest("The capital of {} is ", "France now", " city"),
        EditRequest("{}的首都是", "法国", "伦敦"),
    ]
    report = editor.preflight(requests)
    assert [check.space_added for check in report.checks] == [True, False, False]
    for check, request in zip(report.checks, requests, strict=True):
        ids, place = encode_prompt(editor.tokenizer, request.prompt, request.subject)
        assert check.subject_position == place
        assert check.subject_token == editor.tokenizer.decode([ids[place]])
        assert "".join(check.target_tokens).strip() == request.target_new.strip() or request.subject == "法国"
    assert report.checks[0].subject_token.endswith("ce")
    assert not report.errors
    assert not report.free_directions
    assert "no second moments yet" in str(report)
    assert report.to_dict()["checks"][0]["text"] == "The capital of France is"


def test_a_fact_that_is_true_already() -> None:
    editor = tiny_editor()
    assert [check.already_true for check in editor.preflight(REQUESTS).checks] == [False] * 3
    assert editor.apply_edits(REQUESTS[:1]).success_rate == 1
    report = editor.preflight([REQUESTS[1], REQUESTS[0]])
    assert [check.already_true for check in report.checks] == [False, True]
    assert any("already for request(s) [1]" in warning for warning in report.warnings)


def test_all_unusable_requests_are_listed_at_once() -> None:
    long = EditRequest("{} " + "and so on " * 60, "Rome", "city")
    report = fresh().preflight([{"prompt": "It is", "subject": "Rome", "target_new": "x"}, REQUESTS[0], long])
    assert len(report.errors) == 2
    assert report.errors[0].startswith("request 0: prompt='It is'")
    assert "128 positions" in report.errors[1]
    (error,) = fresh().preflight([replace(REQUESTS[0], other_prompts=(long.prompt.strip(),))]).errors
    assert "128 positions" in error


@pytest.mark.parametrize(
    ("second", "error", "warning"),
    [
        (EditRequest("The capital of {}", "France", "music"), None, "request 1 repeats request 0"),
        (EditRequest("the  capital of {}", "FRANCE", " Music"), None, "request 1 repeats request 0"),
        (EditRequest("The capital of {}", "France", "city"), "want 'music' and 'city'", None),
        (EditRequest("Its seat, {},", "France", "city", relation="capital"), None, "two objects of relation capital"),
        (EditRequest("Its seat, {},", "France", "music", relation="capital"), None, None),
        (EditRequest("Its seat, {},", "France", "city", relation="seat"), None, None),
        (EditRequest("Its seat, {},", "France", "city"), None, None),
        (
            EditRequest("Its seat, {}", "France", "city", other_prompts=("The capital of {}",)),
            "want 'music' and 'city' for 'The capital of France'",
            None,
        ),
        (EditRequest("Its seat, {}", "France", "music", other_prompts=("The capital of {}",)), None, None),
    ],
)
def test_repetitions_and_contradictions(second: EditRequest, error: str | None, warning: str | None) -> None:
    editor = fresh()
    within = editor.preflight([REQUESTS[0], second])
    assert [error] == [error for text in within.errors if error in text] if error else not within.errors
    assert any(warning in text for text in within.warnings) if warning else not within.warnings


@pytest.mark.parametrize(
    ("settings", "used"),
    [({}, 5), ({"contexts_per_word": 2}, 10), ({"context_templates": ["So. {}"]}, 1), ({"context_templates": []}, 0)],
)
def test_other_prompts_without_a_context(settings: dict[str, Any], used: int) -> None:
    editor = AlphaEditor(tiny_model("llama"), tiny_tokenizer(), {"layers": [2, 3], **settings})
    prompts = [f"The {number} of {{}}" for number in range(used + 1)]
    fits, more = (replace(REQUESTS[place], other_prompts=prompts[place:]) for place in (1, 0))
    (warning,) = editor.preflight([fits, more]).warnings
    assert warning.startswith(f"request 1 has {used + 1} other prompts, of which {used} are used")


def test_earlier_edits_are_known() -> None:
    editor = tiny_editor(value_steps=2)
    editor.apply_edits(REQUESTS)
    for target in (REQUESTS[0].target_new, "world"):  # in the earlier one's place: nothing stands against it
        again = editor.preflight([replace(REQUESTS[0], target_new=target)])
        assert not any("earlier edit" in text for text in again.warnings)
        assert again.checks[0].nearest != REQUESTS[0].text
    changed = editor.preflight([EditRequest("So, the capital of {}", "France", "world", relation="capital")])
    assert any("earlier edit wrote 'music'" in text and "remove" in text for text in changed.warnings)
    assert changed.edits_so_far == 3
    twin = editor.preflight([EditRequest("The capital of {} is", "France", "world")])
    assert twin.checks[0].nearest == REQUESTS[0].text  # the same key
    assert twin.checks[0].similarity == pytest.approx(1, abs=1e-4)
    assert any("nearly that of an earlier edit" in text for text in twin.warnings)


def test_keys_are_compared_as_the_update_sees_them() -> None:
    editor = tiny_editor()
    twin = EditRequest("The capital of {}", "France", "music", relation="other")
    report = editor.preflight([*REQUESTS, twin])
    assert report.checks[0].similarity == pytest.approx(1, abs=1e-4)
    assert report.checks[0].nearest == REQUESTS[0].text
    assert sum("its key is nearly" in text for text in report.warnings) == 1  # a pair is named once
    # Against the filtered keys that an edit of this layer alone really stores.
    last = editor.sites()[-1]
    editor = tiny_editor(layers=(last.layer,))
    editor.apply_edits(REQUESTS)
    keys = torch.nn.functional.normalize(editor.history.past_keys(last.name), dim=-1)
    cosines = (keys @ keys.T).fill_diagonal_(-1).max(1).values
    found = [check.similarity for check in tiny_editor(layers=(1, last.layer)).preflight(REQUESTS).checks]
    torch.testing.assert_close(torch.tensor(found), cosines, rtol=1e-4, atol=1e-4)


def test_capacity() -> None:
    editor = tiny_editor(energy_share=0.02)
    free = editor.preflight(REQUESTS[:1])
    assert not any("free directions" in text for text in free.warnings)
    few = min(free.free_directions.values())
    assert free.free_directions == {name: found.null_rank for name, found in editor.filters().items()}
    requests = [EditRequest("We saw {}", f"Peru {number}", "city") for number in range(few // 2 + 1)]
    assert any(f"share the {few} free directions" in text for text in editor.preflight(requests).warnings)


def test_nothing_is_changed_and_estimates_grow_with_the_work() -> None:
    editor = tiny_editor()
    before = weights_of(editor.model)
    small, large = editor.preflight(REQUESTS[:1]), editor.preflight(REQUESTS * 20)
    assert equal(weights_of(editor.model), before)
    assert not editor.history.base_weights
    assert small.seconds > 0
    assert large.memory > small.memory > 0


def test_apply_edits_reports_warnings_unless_told_not_to() -> None:
    editor = tiny_editor(value_steps=2)
    contradiction = [REQUESTS[0], EditRequest("The capital of {}", "France", "city")]
    report = editor.apply_edits([REQUESTS[0], REQUESTS[0]])
    assert any("repeats" in warning for warning in report.warnings)
    assert "warning: " in str(report)
    editor.undo_all()
    assert editor.apply_edits(contradiction, preflight=False).warnings == ()


@pytest.mark.parametrize("contexts", [("The river runs. {}", "They said so. {}"), ()])
def test_massive_activations_at_a_subject_are_named(contexts: tuple[str, ...]) -> None:
    editor = tiny_editor(context_templates=contexts)
    requests = [EditRequest("{} plays", "Ada", "music"), *REQUESTS]
    assert not any("massive" in text for text in editor.preflight(requests).warnings)
    token_ids, place = encode_prompt(editor.tokenizer, "{} plays", "Ada")
    with torch.no_grad():  # as some models treat a text's first token
        editor.model.get_input_embeddings().weight[token_ids[place]] *= 1000
    (warning,) = (text for text in editor.preflight(requests).warnings if "massive" in text)
    assert warning.startswith("request 0, 'Ada plays': at the subject's last token the hidden state is ")
