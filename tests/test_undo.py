"""Edits taken back: batches bit for bit, single edits by solving or editing again."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file
from synthetic import random_batches, random_editor, same_weights, weights_of
from tiny import tiny_model, tiny_tokenizer, training_text

from hf_alphaedit import undo as undo_module
from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.editor import AlphaEditor
from hf_alphaedit.errors import EditingError, StateError
from hf_alphaedit.requests import EditRequest
from hf_alphaedit.undo import remove, undo, undo_all


REQUESTS = [
    EditRequest("The capital of {} is", "France", "Rome"),
    EditRequest("The capital of {} is", "Japan", "Lima"),
    EditRequest("{} is known for", "Marie Curie", "music"),
    EditRequest("{} is known for", "Isaac Newton", "painting"),
]


def file_digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob("model*.safetensors")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_each_undo_gives_the_weights_from_before(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    editor = random_editor(name, dtype=dtype)
    editor.model.save_pretrained(tmp_path / "base")
    states = [weights_of(editor)]
    for batch in random_batches(editor, (2, 1, 3, 1, 2), scale=0.1):
        editor.write_batches([*editor.history.batches, batch])
        states.append(weights_of(editor))
    assert not any(same_weights(one, other) for one, other in zip(states, states[1:], strict=False))

    editor.save_pretrained(tmp_path / "edited")
    reloaded = AlphaEditor.from_pretrained(tmp_path / "edited")
    assert same_weights(weights_of(reloaded), states[5])
    for each in (editor, reloaded):
        undo(each)
        assert same_weights(weights_of(each), states[4])
        undo(each, batches=3)
        assert same_weights(weights_of(each), states[1])
        assert len(each.history.batches) == 1
    undo_all(editor)
    undo(reloaded)
    for each, directory in ((editor, tmp_path / "one"), (reloaded, tmp_path / "two")):
        each.model.save_pretrained(directory)
        assert file_digests(directory) == file_digests(tmp_path / "base")


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_undo_where_the_weights_are_offloaded(place: str, tmp_path: Path) -> None:
    editor = random_editor("llama", dtype=torch.bfloat16)
    batches = random_batches(editor, (2, 2), scale=0.1)
    tokens = torch.arange(5)[None]
    base = editor.model(tokens).logits
    editor.write_batches(batches)
    edited = editor.model(tokens).logits
    undo_all(editor)

    model = editor.model
    _ = cpu_offload(model) if place == "cpu" else disk_offload(model, tmp_path)
    editor = AlphaEditor(model, editor.tokenizer, editor.config)
    editor.write_batches(batches)
    assert torch.equal(model(tokens).logits, edited)
    undo(editor, batches=2)
    assert torch.equal(model(tokens).logits, base)


@pytest.mark.parametrize("batches", [0, -1, 3])
def test_undo_of_what_was_not_done(batches: int) -> None:
    editor = random_editor("llama", (1, 1))
    before = weights_of(editor)
    with pytest.raises(StateError, match="there are 2"):
        undo(editor, batches)
    assert same_weights(weights_of(editor), before)


@pytest.fixture(scope="module")
def prepared() -> AlphaEditor:
    """An editor with statistics; tests that use it take their edits back."""
    config = AlphaEditConfig(
        layers=(1, 2), value_steps=3, tokens_per_dimension=4, sequence_length=32, context_templates=("So: {}",)
    )
    editor = AlphaEditor(tiny_model("llama"), tiny_tokenizer(), config)
    editor.prepare(training_text())
    return editor


@pytest.fixture
def editor(prepared: AlphaEditor):
    yield prepared
    undo_all(prepared)
    prepared.history.contexts = None


def test_saved_edits_go_on_and_are_undone_in_a_new_process(editor: AlphaEditor, tmp_path: Path) -> None:
    editor.model.save_pretrained(tmp_path / "base")
    editor.apply_edits(REQUESTS[:2])
    editor.save_pretrained(tmp_path / "first", include_requests=False)
    report = editor.apply_edits(REQUESTS[2:])
    editor.model.save_pretrained(tmp_path / "second")
    program = """
import json, sys
from pathlib import Path
from hf_alphaedit import AlphaEditor

folder = Path(sys.argv[1])
editor = AlphaEditor.from_pretrained(folder / "first")
editor.prepare(json.loads(sys.argv[2]))
report = editor.apply_edits(json.loads(sys.argv[3]))
report.to_json(folder / "report.json")
editor.model.save_pretrained(folder / "continued")
editor.undo_all()
editor.model.save_pretrained(folder / "undone")
"""
    texts, requests = training_text(), [request.to_dict() for request in REQUESTS[2:]]
    arguments = [sys.executable, "-c", program, str(tmp_path), json.dumps(texts), json.dumps(requests)]
    subprocess.run(arguments, check=True)

    assert file_digests(tmp_path / "undone") == file_digests(tmp_path / "base")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("second", "continued"))
    for name in one:
        assert (one[name] - other[name]).norm() <= 1e-6 * one[name].norm(), name
    reloaded = json.loads((tmp_path / "report.json").read_text())
    for part in ("outcomes", "sites"):
        for here, there in zip(report.to_dict()[part], reloaded[part], strict=True):
            assert here.keys() == there.keys()
            for name, value in here.items():
                close = pytest.approx(value, rel=1e-3, abs=1e-6) if isinstance(value, float) else value
                assert there[name] == close, (part, name)


def published_update(
    new: torch.Tensor, past: torch.Tensor, residual: torch.Tensor, root: torch.Tensor
) -> torch.Tensor:
    """Δᵀ = F^½ (I + G Gᵀ)⁻¹ G_new Rᵀ, dense, in float64; all keys are filtered ones, one per row."""
    keys = torch.cat([past, new]).double()
    system = torch.eye(keys.shape[1], dtype=torch.float64) + keys.T @ keys
    return (root.double() @ torch.linalg.inv(system) @ new.double().T @ residual.double()).T


def test_removing_solves_the_rest_from_the_stored_keys_and_residuals(editor: AlphaEditor) -> None:
    editor.apply_edits(REQUESTS[:1])
    editor.apply_edits(REQUESTS[1:3])
    editor.apply_edits(REQUESTS[3:])
    old = list(editor.history.batches)
    remove(editor, REQUESTS[2])

    assert editor.history.requests == [REQUESTS[0], REQUESTS[1], REQUESTS[3]]
    new = editor.history.batches
    assert new[0] is old[0]
    for site in editor.sites():
        name = site.name
        root = editor.filters()[name].root(torch.eye(64))
        first, second, third = (batch.keys[name] for batch in old)
        expected = old[0].updates[name].dense()
        expected += published_update(second[:1], first, old[1].updates[name].outputs[:1], root)
        expected += published_update(third, torch.cat([first, second[:1]]), old[2].updates[name].outputs, root)
        assert torch.allclose(editor.history.delta(name).double(), expected, rtol=1e-4, atol=1e-7)
        assert torch.equal(site.read(), editor.history.weight(name))


@pytest.mark.parametrize("which", [0, 1, -1])
def test_removing_one_of_a_batch_at_one_layer_is_as_if_it_had_not_been_asked(which: int) -> None:
    # At a single layer nothing is measured after the first write, so solving again is exact, if the stored keys are
    # the very columns that were solved for.
    config = AlphaEditConfig(
        layers=(2,),
        value_steps=3,
        tokens_per_dimension=4,
        sequence_length=32,
        context_templates=("So: {}",),
        context_keys="mean",
        forward_dtype="model",  # in bfloat16 the order of a product's sums, which the batch's size decides, shows
    )
    editor = AlphaEditor(tiny_model("llama"), tiny_tokenizer(), config)
    editor.prepare(training_text())
    name = editor.sites()[0].name
    wanted = [request for index, request in enumerate(REQUESTS[:3]) if index != which % 3]
    editor.apply_edits(wanted)
    expected = editor.history.delta(name)
    undo_all(editor)
    editor.apply_edits(REQUESTS[:3])
    assert not torch.allclose(editor.history.delta(name), expected, rtol=1e-2)
    remove(editor, which)
    assert editor.history.requests == wanted
    assert (editor.history.delta(name) - expected).norm() < 1e-4 * expected.norm()


def test_removing_with_replay_is_as_if_it_had_not_been_asked(editor: AlphaEditor) -> None:
    editor.apply_edits(REQUESTS[1:2])
    editor.apply_edits(REQUESTS[2:])
    expected = weights_of(editor)
    undo_all(editor)
    editor.apply_edits(REQUESTS[:2])
    editor.apply_edits(REQUESTS[2:])
    remove(editor, 0, replay=True)
    assert editor.history.requests == REQUESTS[1:]
    assert [len(batch) for batch in editor.history.batches] == [1, 2]
    assert same_weights(weights_of(editor), expected)


@pytest.mark.parametrize("replay", [False, True])
def test_removing_the_only_edit_gives_the_base(editor: AlphaEditor, replay: bool) -> None:
    base = weights_of(editor)
    editor.apply_edits(REQUESTS[:1])
    remove(editor, 0, replay=replay)
    assert same_weights(weights_of(editor), base)
    assert len(editor.history) == 0


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (4, "no edit 4: 4 edits"),
        (-5, "no edit -5"),
        (EditRequest("{} is", "nobody", "x"), "not among the 4 edits"),
        (REQUESTS[0], r"edited 2 times; give one of the indices \[0, 2\]"),
    ],
)
def test_what_can_not_be_found_is_not_removed(which: EditRequest | int, message: str) -> None:
    editor = random_editor("llama", (2, 2))
    twice = random_batches(editor, (2, 2))
    for batch in twice:
        object.__setattr__(batch, "requests", tuple(REQUESTS[:2]))
    editor.write_batches(twice)
    before = weights_of(editor)
    with pytest.raises(StateError, match=message):
        remove(editor, which)
    assert same_weights(weights_of(editor), before)


def test_withheld_requests_are_removed_by_index_only(editor: AlphaEditor, tmp_path: Path) -> None:
    editor.apply_edits(REQUESTS[:2])
    editor.save_pretrained(tmp_path, include_requests=False)
    reloaded = AlphaEditor.from_pretrained(tmp_path)
    reloaded.prepare(training_text())
    with pytest.raises(StateError, match="withheld: give the index"):
        remove(reloaded, REQUESTS[0])
    with pytest.raises(StateError, match="can't be replayed"):
        remove(reloaded, 0, replay=True)
    remove(reloaded, 0)
    remove(editor, 0)
    assert len(reloaded.history) == 1
    assert same_weights(weights_of(reloaded), weights_of(editor))


def test_nothing_is_solved_again_with_other_settings_or_without_keys(editor: AlphaEditor) -> None:
    editor.apply_edits(REQUESTS[:2])
    before, config = weights_of(editor), editor.config
    try:
        editor.reconfigure(config.replace(l2=2.0))
        with pytest.raises(StateError, match=r"\['l2'\].*replay=True"):
            remove(editor, 0)
    finally:
        editor.reconfigure(config)
    object.__setattr__(editor.history.batches[0], "keys", {})
    with pytest.raises(StateError, match="no key for each.*replay=True"):
        remove(editor, 0)
    assert same_weights(weights_of(editor), before)


def test_a_replay_that_fails_leaves_everything_as_it_was(editor: AlphaEditor, monkeypatch: pytest.MonkeyPatch) -> None:
    editor.apply_edits(REQUESTS[:2])
    editor.apply_edits(REQUESTS[2:])
    before, batches = weights_of(editor), list(editor.history.batches)
    apply = editor.apply_edits
    monkeypatch.setattr(
        editor,
        "apply_edits",
        lambda requests, **options: _fail() if len(requests) == 2 else apply(requests, **options),
    )

    def _fail() -> None:
        raise EditingError("not finite")

    with pytest.raises(EditingError, match="not finite"):
        remove(editor, 0, replay=True)
    assert same_weights(weights_of(editor), before)
    assert editor.history.batches == batches


def test_removal_keeps_requests_outcomes_and_rows_together() -> None:
    batch = random_batches(random_editor("llama"), (3,))[0]
    shorter = undo_module.without_row(batch, 1)
    assert shorter is not None
    assert shorter.requests == (batch.requests[0], batch.requests[2])
    assert shorter.outcomes == (batch.outcomes[0], batch.outcomes[2])
    for site, keys in batch.keys.items():
        assert torch.equal(shorter.keys[site], keys[[0, 2]])
        assert torch.equal(shorter.updates[site].outputs, batch.updates[site].outputs[[0, 2]])
