"""What was edited: weights as a function of the edits, and files that are right or refused."""

import hashlib
from pathlib import Path

import pytest
import torch
from damage import DAMAGES, Damage, with_batch_entry, with_tensor
from synthetic import random_batches, random_editor, same_weights, weights_of
from tiny import tiny_model, tiny_tokenizer

from hf_alphaedit import batches as batches_module
from hf_alphaedit.algorithm.update import LowRankUpdate
from hf_alphaedit.batches import dense_update
from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.editor import AlphaEditor
from hf_alphaedit.errors import StateError
from hf_alphaedit.history import HISTORY_NAME, History
from hf_alphaedit.models.fingerprint import model_fingerprint, tokenizer_fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_weight_is_the_base_plus_the_sum_of_products_rounded_once(name: str, dtype: torch.dtype) -> None:
    editor = random_editor(name, (2, 1, 3), dtype=dtype)
    for site in editor.sites():
        base = editor.history.base_weights[site.name]
        total = torch.zeros(base.shape, dtype=torch.float64)
        magnitude = base.double().abs()  # of everything that is summed: bounds the error of any order
        for batch in editor.history.batches:
            for given, listened in zip(batch.updates[site.name].outputs, batch.updates[site.name].inputs, strict=True):
                if dtype == torch.bfloat16:
                    given, listened = given.to(dtype), listened.to(dtype)
                total += torch.outer(given.double(), listened.double())
                magnitude += torch.outer(given.double(), listened.double()).abs()
        wide = base.double() + total
        assert site.read().dtype == dtype
        # Half a unit in the last place of the result, and what rounding the delta and summing in another order lose.
        bound = wide.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).tiny
        bound += (2**-50 if dtype == torch.float64 else 2**-23) * magnitude
        assert ((site.read().double() - wide).abs() <= bound).all()
        assert torch.allclose(editor.history.delta(site.name).double(), total, rtol=1e-6, atol=1e-9)


def test_chunks_of_any_size_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = random_editor("llama", (3, 2))
    name = editor.sites()[0].name
    whole = editor.history.weight(name)
    monkeypatch.setattr(batches_module, "CHUNK_ELEMENTS", 5 * 64)  # 5 of 32 rows: the last chunk is smaller
    assert torch.equal(editor.history.weight(name), whole)


def test_without_a_batch_the_weight_is_the_base_bit_for_bit() -> None:
    editor = random_editor("llama")
    site = editor.sites()[0]
    with torch.no_grad():
        site.module.weight[0, 0] = -0.0  # -0.0 + 0.0 is 0.0, which is another file
    editor.history.remember_base([site])
    editor.history.base_weights[site.name] = site.read()
    weight = editor.history.weight(site.name, [])
    assert weight[0, 0].signbit()
    weight.zero_()  # what is returned is the caller's
    assert editor.history.base_weights[site.name].any()


def test_length_requests_and_past_keys() -> None:
    editor = random_editor("llama", (2, 3))
    history, name = editor.history, editor.sites()[1].name
    assert len(history) == 5
    assert [request.subject for request in history.requests] == [
        "Person 0 0", "Person 0 1", "Person 0 0", "Person 0 1", "Person 0 2"
    ]  # fmt: skip
    keys = history.past_keys(name)
    assert keys is not None
    assert torch.equal(keys, torch.cat([batch.keys[name] for batch in history.batches]))
    assert history.past_keys("elsewhere") is None
    assert History("0" * 64, "0" * 64).factors(name) is None
    with pytest.raises(StateError, match="isn't kept"):
        history.weight("elsewhere")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_history_is_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    history = random_editor("gpt2", (2, 1), dtype=dtype).history
    history.contexts = ("{}", "It is. {}")
    history.base_model, history.base_revision = "gpt2", "abc"
    history.save(tmp_path)
    loaded = History.load(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [HISTORY_NAME]
    assert loaded.header() == history.header()
    assert loaded.requests == history.requests
    assert same_weights(loaded.base_weights, history.base_weights)
    for one, other in zip(loaded.batches, history.batches, strict=True):
        assert (one.settings, one.created, one.outcomes) == (other.settings, other.created, other.outcomes)
        assert same_weights(dict(one.keys), dict(other.keys))
        for name, update in other.updates.items():
            assert torch.equal(one.updates[name].inputs, update.inputs)
            assert torch.equal(one.updates[name].outputs, update.outputs)


def test_a_dense_update_is_exact_and_stored_once(tmp_path: Path) -> None:
    editor = random_editor("llama", (1,))
    site = editor.sites()[0]
    delta = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    update = dense_update(delta)
    assert torch.equal(update.dense().float(), delta)
    batch = random_batches(editor, (1,))[0]
    object.__setattr__(batch, "updates", {site.name: update})
    object.__setattr__(batch, "keys", {})
    editor.write_batches([batch])
    editor.history.save(tmp_path)
    assert torch.equal(History.load(tmp_path).factors(site.name).outputs, torch.eye(32))
    base = editor.history.base_weights[site.name]
    assert torch.equal(site.read(), base + delta)
    stored = sum(tensor.numel() for tensor in editor.history.base_weights.values()) * 4
    assert (tmp_path / HISTORY_NAME).stat().st_size < stored + delta.numel() * 4 + 12_000


def test_withheld_requests_leave_no_trace_and_edits_go_on(tmp_path: Path) -> None:
    editor = random_editor("llama", (2, 2))
    before = weights_of(editor)
    editor.save_pretrained(tmp_path, include_requests=False)
    for path in tmp_path.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for private in ("Secret", "Person", "Answer", "ünïcode", "\\u00fcn", "Old\\nanswer", "Seen"):
            assert private.encode() not in content, f"{private} in {path.name}"
    reloaded = AlphaEditor.from_pretrained(tmp_path)
    assert (len(reloaded.history), reloaded.history.requests) == (4, [])
    assert [batch.withheld for batch in reloaded.history.batches] == [2, 2]
    assert torch.equal(
        reloaded.history.past_keys(editor.sites()[0].name), editor.history.past_keys(editor.sites()[0].name)
    )
    reloaded.write_batches([*reloaded.history.batches, *random_batches(reloaded, (1,), seed=9)])
    reloaded.undo()
    assert same_weights(weights_of(reloaded), before)
    reloaded.history.save(tmp_path / "again")  # what was withheld stays withheld, and counted
    assert len(History.load(tmp_path / "again")) == 4


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    random_editor("llama", (1,)).history.save(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = random_editor("llama", (1,)).history
    history.save(tmp_path)
    before = (tmp_path / HISTORY_NAME).read_bytes()

    def full_disk(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half of")
        raise OSError("no space left on device")

    monkeypatch.setattr("hf_alphaedit.state.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        history.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [HISTORY_NAME]
    assert (tmp_path / HISTORY_NAME).read_bytes() == before


HISTORY_DAMAGES = {
    **DAMAGES,
    "keys of another width": (with_tensor("/keys", lambda tensor: tensor[:, 1:]), "keys"),
    "keys of no site": (with_batch_entry("keys", ["elsewhere"]), "no keys for elsewhere"),
    "update of another site": (with_batch_entry("updates", ["elsewhere"]), "no inputs for elsewhere"),
    "base a vector": (with_tensor("base/model.layers.1.mlp.down_proj", lambda tensor: tensor[0]), "no float matrix"),
    "base of another shape": (with_tensor("base/model.layers.1.mlp.down_proj", lambda tensor: tensor.T), "shape"),
}


@pytest.mark.parametrize("damage", HISTORY_DAMAGES.values(), ids=HISTORY_DAMAGES.keys())
def test_a_damaged_history_is_refused_with_the_reason(tmp_path: Path, damage: tuple[Damage, str]) -> None:
    random_editor("llama", (2, 1)).history.save(tmp_path)
    damaging, message = damage
    damaging(tmp_path / HISTORY_NAME)
    with pytest.raises(StateError) as error:
        History.load(tmp_path)
    assert any(word in str(error.value) for word in message.split("|")), str(error.value)
    assert HISTORY_NAME in str(error.value)  # the file at fault


def test_a_missing_history_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="doesn't exist"):
        History.load(tmp_path)
    (tmp_path / HISTORY_NAME).mkdir()
    with pytest.raises(StateError, match="doesn't exist"):
        History.load(tmp_path)


def continued(
    history: History, model: torch.nn.Module, tokenizer: object = None, layers: tuple = (1, 2)
) -> AlphaEditor:
    return AlphaEditor(model, tokenizer or tiny_tokenizer(), AlphaEditConfig(layers=layers), history=history)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda history: (history, tiny_model("llama", seed=1)), "another base model"),
        (lambda history: (history, tiny_model("llama", rope_parameters={"rope_theta": 5e4, "rope_type": "default"})),
         "another base model"),
        (lambda history: (history, tiny_model("llama").bfloat16()), "dtype='float32'"),
        (lambda history: (history, tiny_model("llama", intermediate_size=48)), r"\(32, 48\) here and was \(32, 64\)"),
        (lambda history: (history, tiny_model("llama"), tiny_tokenizer("metaspace")), "another tokenizer"),
        (lambda history: (history, tiny_model("llama"), tiny_tokenizer(bos=True)), "another tokenizer"),
        (lambda history: (history, tiny_model("llama"), None, (2, 3)), "layers"),
        (lambda history: (history, tiny_model("gpt2")), "layers"),
        (lambda history: (history, tiny_model("llama")), "changed afterwards"),  # the base, not the edited model
    ],
    ids=["weights", "config", "dtype", "shape", "tokenizer", "bos", "layers", "architecture", "edited weights"],
)  # fmt: skip
def test_a_history_of_something_else_is_refused(tmp_path: Path, change, message: str) -> None:
    random_editor("llama", (2,)).history.save(tmp_path)
    arguments = change(History.load(tmp_path))
    before = [parameter.clone() for parameter in arguments[1].parameters()]
    with pytest.raises(StateError, match=message):
        continued(*arguments)
    assert all(map(torch.equal, before, arguments[1].parameters()))


def test_the_history_of_the_very_model_is_taken(tmp_path: Path) -> None:
    editor = random_editor("llama", (2,))
    editor.history.save(tmp_path, sites=editor.sites())
    assert len(continued(History.load(tmp_path), editor.model).history) == 2


def test_loading_from_the_base_and_writing_gives_the_edited_weights(tmp_path: Path) -> None:
    editor = random_editor("gpt2", (2, 1))
    editor.history.save(tmp_path)
    history = History.load(tmp_path)
    for site in editor.sites():
        assert torch.equal(history.weight(site.name), site.read())


def test_outcomes_go_to_the_last_edits() -> None:
    history = random_editor("llama", (2, 2)).history
    history.record_outcomes([{"after": "b"}, {"after": "c"}, {"after": "d"}])
    assert [dict(outcome) for outcome in history.batches[1].outcomes] == [{"after": "c"}, {"after": "d"}]
    assert history.batches[0].outcomes == ({"after": "b"},)


def test_the_file_is_the_same_for_the_same_edits(tmp_path: Path) -> None:
    for name in ("one", "other"):
        random_editor("llama", (2,)).history.save(tmp_path / name)
    digests = {hashlib.sha256((tmp_path / name / HISTORY_NAME).read_bytes()).digest() for name in ("one", "other")}
    assert len(digests) == 1


def test_fingerprints_in_the_history_are_those_of_the_base() -> None:
    editor = random_editor("llama", (2,))
    assert editor.history.base_fingerprint == model_fingerprint(tiny_model("llama"))
    assert editor.history.tokenizer_fingerprint == tokenizer_fingerprint(tiny_tokenizer())


def test_low_rank_update_is_the_product_of_its_factors() -> None:
    update = LowRankUpdate(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0, 5.0]]))
    assert update.dense().tolist() == [[3, 6], [4, 8], [5, 10]]
