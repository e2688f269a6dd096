"""The edit pack: the stock base plus one small file is the edited model, or the file is refused."""

from pathlib import Path

import pytest
import torch
from damage import DAMAGES, Damage, with_batch_entry, with_entry, with_tensor
from synthetic import LAYERS, random_batches, random_editor, same_weights, weights_of
from tiny import tiny_model, tiny_tokenizer, training_text

from hf_alphaedit.algorithm.update import LowRankUpdate
from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.editor import AlphaEditor
from hf_alphaedit.errors import StateError
from hf_alphaedit.history import HISTORY_NAME
from hf_alphaedit.pack import PACK_NAME, load_edits, save_edits
from hf_alphaedit.requests import EditRequest


def stock_editor(name: str = "llama", dtype: torch.dtype = torch.float32, layers: tuple = LAYERS) -> AlphaEditor:
    return AlphaEditor(tiny_model(name).to(dtype), tiny_tokenizer(), AlphaEditConfig(layers=layers))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("sizes", [(2, 3), (30, 20)], ids=["factors", "dense"])
def test_pack_on_the_stock_base_is_the_edited_model_bit_for_bit(name: str, sizes: tuple, tmp_path: Path) -> None:
    editor = random_editor(name, sizes)
    report = save_edits(editor, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [PACK_NAME]
    assert report.form == ("factors" if sizes == (2, 3) else "dense")
    assert report.size == (tmp_path / PACK_NAME).stat().st_size
    assert ("smaller" in str(report)) == (report.form == "dense")

    stock = stock_editor(name)
    load_edits(stock, tmp_path)
    assert same_weights(weights_of(stock), weights_of(editor))
    assert stock.history.requests == editor.history.requests
    assert len(stock.history.batches) == (2 if report.form == "factors" else 1)
    for _ in stock.history.batches.copy():
        stock.undo()
    assert same_weights(weights_of(stock), weights_of(stock_editor(name)))


@pytest.mark.parametrize("sizes", [(2, 3), (60, 40)], ids=["factors", "dense"])
def test_pack_of_a_bfloat16_model_gives_the_same_bits_too(sizes: tuple, tmp_path: Path) -> None:
    editor = random_editor("llama", sizes, dtype=torch.bfloat16)
    report = save_edits(editor, tmp_path)
    assert (report.dtype, report.form) == ("bfloat16", "factors" if sizes == (2, 3) else "dense")
    stock = stock_editor(dtype=torch.bfloat16)
    load_edits(stock, tmp_path)
    assert same_weights(weights_of(stock), weights_of(editor))


def test_size_of_a_pack_of_factors(tmp_path: Path) -> None:
    editor = random_editor("llama", (4,), dtype=torch.bfloat16)
    without = save_edits(editor, tmp_path / "without")
    with_keys = save_edits(editor, tmp_path / "with", include_keys=True)
    factors = len(LAYERS) * 4 * (32 + 64) * 2  # bytes
    assert 0 < without.size - factors < 8_000  # what is left is text
    assert with_keys.size - without.size == pytest.approx(len(LAYERS) * 4 * 64 * 2, abs=600)


def test_a_pack_of_a_hundred_edits_of_llama_3_8b_is_about_18_megabytes(tmp_path: Path) -> None:
    editor = stock_editor(dtype=torch.bfloat16)
    history = editor.history
    batch = random_batches(editor, (1,))[0]
    layers = [f"model.layers.{layer}.mlp.down_proj" for layer in range(4, 9)]
    update = LowRankUpdate(torch.zeros(100, 14336), torch.zeros(100, 4096))
    requests = tuple(EditRequest("The mother tongue of {} is", f"Person {row}", "English") for row in range(100))
    object.__setattr__(batch, "updates", dict.fromkeys(layers, update))
    object.__setattr__(batch, "requests", requests)
    history.batches.append(batch)
    history.base_weights = dict.fromkeys(layers, torch.zeros(1, 1, dtype=torch.bfloat16))  # not written
    report = save_edits(editor, tmp_path)
    assert report.form == "factors"
    assert 18.0e6 < report.size < 18.6e6


def test_a_pack_without_requests_tells_nothing_but_their_number(tmp_path: Path) -> None:
    editor = random_editor("llama", (2,))
    report = save_edits(editor, tmp_path, include_requests=False)
    content = (tmp_path / PACK_NAME).read_bytes()
    for private in (b"Secret", b"Person", b"Answer", b"Seen"):
        assert private not in content
    assert "withheld" in str(report)
    stock = stock_editor()
    load_edits(stock, tmp_path)
    assert (len(stock.history), stock.history.requests) == (2, [])
    assert same_weights(weights_of(stock), weights_of(editor))


def test_a_loaded_pack_goes_on_top_of_other_edits_and_is_undone_apart(tmp_path: Path) -> None:
    editor = random_editor("llama", (2,))
    save_edits(editor, tmp_path)
    other = stock_editor()
    other.write_batches(random_batches(other, (3,), seed=5))
    before = weights_of(other)
    load_edits(other, tmp_path)
    name = other.sites()[0].name
    separate = editor.history.delta(name).double() + other.history.delta(name, other.history.batches[:1]).double()
    assert torch.allclose(other.history.delta(name).double(), separate, atol=1e-6)
    assert len(other.history) == 5
    other.undo()
    assert same_weights(weights_of(other), before)


def test_an_editor_without_edits_takes_over_settings_and_contexts(tmp_path: Path) -> None:
    editor = random_editor("llama", (2,))
    editor.history.contexts = ("So: {}",)
    save_edits(editor, tmp_path)
    stock = stock_editor(layers=(3, 4))
    load_edits(stock, tmp_path)
    assert stock.config.layers == LAYERS
    assert stock.history.contexts == ("So: {}",)
    assert same_weights(weights_of(stock), weights_of(editor))


def test_a_pack_with_keys_protects_its_edits_and_one_without_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def prepared() -> AlphaEditor:
        config = AlphaEditConfig(
            layers=LAYERS, value_steps=3, tokens_per_dimension=4, sequence_length=32, context_templates=("So: {}",)
        )
        editor = AlphaEditor(tiny_model("llama"), tiny_tokenizer(), config)
        editor.prepare(training_text())
        return editor

    first, second = (EditRequest("The capital of {} is", subject, "Rome") for subject in ("France", "Japan"))
    editor = prepared()
    editor.apply_edits([first])
    for name, keys in (("with", True), ("without", False)):
        save_edits(editor, tmp_path / name, include_keys=keys)
    editor.apply_edits([second])

    continued = prepared()
    load_edits(continued, tmp_path / "with")
    assert not caplog.records
    continued.apply_edits([second])
    assert same_weights(weights_of(continued), weights_of(editor))

    unprotected = prepared()
    load_edits(unprotected, tmp_path / "without")
    assert "no keys: later edits are not kept from changing its 1 edits" in caplog.text
    unprotected.apply_edits([second])
    name = editor.sites()[0].name
    key = editor.history.batches[0].keys[name].double()  # (1, d); the first edit's, filtered

    def disturbed(each: AlphaEditor) -> float:
        return float((each.history.batches[1].updates[name].dense() @ key.T).norm())

    assert disturbed(editor) < 0.9 * disturbed(unprotected)


PACK_DAMAGES = {
    **DAMAGES,
    "no batch": (with_entry("batches", []), "no batch|0/"),
    "no digests": (with_entry("base_digests", None), "base_digests"),
    "digest of another weight": (with_entry("base_digests", {}), "is not the weight"),
    "update of another site": (with_batch_entry("updates", ["elsewhere"]), "no inputs for elsewhere"),
    "dtype of another weight": (with_entry("base_dtypes", {}), "was made on None weights"),
    "wider": (with_tensor("/inputs", lambda tensor: torch.cat([tensor, tensor], 1)), "here it is"),
}


@pytest.mark.parametrize("damage", PACK_DAMAGES.values(), ids=PACK_DAMAGES.keys())
def test_a_damaged_pack_is_refused_and_the_model_untouched(tmp_path: Path, damage: tuple[Damage, str]) -> None:
    save_edits(random_editor("llama", (2, 1)), tmp_path)
    damaging, message = damage
    damaging(tmp_path / PACK_NAME)
    stock = stock_editor()
    before, config = weights_of(stock), stock.config
    with pytest.raises(StateError) as error:
        load_edits(stock, tmp_path)
    assert any(word in str(error.value) for word in message.split("|")), str(error.value)
    assert same_weights(weights_of(stock), before)
    assert (len(stock.history.batches), stock.config) == (0, config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AlphaEditor(tiny_model("llama", seed=1), tiny_tokenizer(), AlphaEditConfig(layers=LAYERS)),
         "is not the weight"),
        (lambda: stock_editor(dtype=torch.bfloat16), "dtype='float32'"),
        (lambda: AlphaEditor(tiny_model("llama"), tiny_tokenizer(bos=True), AlphaEditConfig(layers=LAYERS)),
         "another tokenizer"),
        (lambda: AlphaEditor(tiny_model("llama", intermediate_size=48), tiny_tokenizer(),
                             AlphaEditConfig(layers=LAYERS)), "here it is"),
        (lambda: stock_editor("gpt2"), "doesn't edit|doesn't exist"),
    ],
    ids=["weights", "dtype", "tokenizer", "shape", "architecture"],
)  # fmt: skip
def test_a_pack_of_another_model_is_refused(tmp_path: Path, make, message: str) -> None:
    save_edits(random_editor("llama", (2,)), tmp_path)
    other = make()
    before = weights_of(other)
    with pytest.raises((StateError, ValueError)) as error:
        load_edits(other, tmp_path)
    assert any(word in str(error.value) for word in message.split("|")), str(error.value)
    assert same_weights(weights_of(other), before)


def test_a_change_of_the_base_elsewhere_is_refused(tmp_path: Path) -> None:
    save_edits(random_editor("llama", (2,)), tmp_path)
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1.01)
    other = AlphaEditor(model, tiny_tokenizer(), AlphaEditConfig(layers=LAYERS))
    with pytest.raises(StateError, match="another base model"):
        load_edits(other, tmp_path)


def test_a_pack_for_other_layers_than_the_edits_made_is_refused(tmp_path: Path) -> None:
    save_edits(random_editor("llama", (2,)), tmp_path)
    other = stock_editor(layers=(3, 4))
    other.write_batches(random_batches(other, (1,)))
    before = weights_of(other)
    with pytest.raises(StateError, match="doesn't edit; undo its own edits first"):
        load_edits(other, tmp_path)
    assert same_weights(weights_of(other), before)


def test_what_is_no_pack_is_refused(tmp_path: Path) -> None:
    editor = stock_editor()
    with pytest.raises(StateError, match=f"holds no {PACK_NAME}"):
        load_edits(editor, tmp_path)
    editor.write_batches(random_batches(editor, (1,)))
    editor.history.save(tmp_path)
    (tmp_path / HISTORY_NAME).rename(tmp_path / PACK_NAME)
    with pytest.raises(StateError, match="holds 'hf_alphaedit.history', not 'hf_alphaedit.edits'"):
        load_edits(stock_editor(), tmp_path)
    with pytest.raises(StateError, match="no edits to save"):
        save_edits(stock_editor(), tmp_path)


def test_a_failing_write_takes_the_pack_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_edits(random_editor("llama", (2,)), tmp_path)
    stock = stock_editor(layers=(3, 4))
    before, config = weights_of(stock), stock.config
    write = type(stock.sites()[0]).write
    written = []

    def interrupted(site, value: torch.Tensor) -> None:
        write(site, value)
        written.append(site.name)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("hf_alphaedit.models.weights.EditSite.write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_edits(stock, tmp_path)
    monkeypatch.undo()
    assert len(written) > 2  # the second write failed, and what had been written was put back
    assert same_weights(weights_of(stock), before)
    assert (len(stock.history.batches), stock.config, stock.history.contexts) == (0, config, None)


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    save_edits(random_editor("llama", (1,)), tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())
