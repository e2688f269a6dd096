"""The LoRA adapter is the edits: checked with peft itself, and with the names that llama.cpp's converter looks for."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from synthetic import random_batches, random_editor
from tiny import tiny_model, tiny_tokenizer

from hf_alphaedit.algorithm.update import LowRankUpdate
from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.diff import diff
from hf_alphaedit.editor import AlphaEditor
from hf_alphaedit.errors import ConfigError, StateError, UnsupportedModelError
from hf_alphaedit.lora import ADAPTER_CONFIG_NAME, ADAPTER_NAME, VLLM_RANKS, export_lora, singular_factors
from hf_alphaedit.models.weights import EditSite


# peft asks transformers for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = torch.tensor([[5, 17, 301, 44, 8, 99], [1, 2, 3, 4, 5, 6]])
MODELS = ["llama", "gpt2", "gemma3_text", "gptj"]


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / ADAPTER_NAME)


def config_of(directory: Path) -> dict:
    return json.loads((directory / ADAPTER_CONFIG_NAME).read_text())


def uneven_editor(name: str) -> AlphaEditor:
    """Its second site has one edit less than the first."""
    editor = random_editor(name)
    batches = random_batches(editor, (2, 1), scale=0.1)
    first = editor.sites()[0].name
    object.__setattr__(batches[1], "updates", {first: batches[1].updates[first]})
    editor.write_batches(batches)
    return editor


@pytest.mark.parametrize("make", [lambda name: random_editor(name, (2, 3), scale=0.1), uneven_editor],
                         ids=["even", "uneven"])  # fmt: skip
@pytest.mark.parametrize("name", MODELS)
def test_peft_gives_the_logits_of_the_edited_model(name: str, make, tmp_path: Path) -> None:
    editor = make(name)
    report = export_lora(editor, tmp_path)
    with torch.no_grad():
        edited, base = editor.model(TOKENS).logits, tiny_model(name)(TOKENS).logits
        assert (edited - base).abs().max() > 1e-2  # or equality below would say nothing
        wrapped = PeftModel.from_pretrained(tiny_model(name), tmp_path).eval()
        assert (wrapped(TOKENS).logits - edited).abs().max() < 1e-5
        merged = wrapped.merge_and_unload()
        assert (merged(TOKENS).logits - edited).abs().max() < 1e-5
    assert type(merged) is type(editor.model)
    assert set(report.truncation.values()) == {0.0}
    assert "exact" in str(report)
    for site in editor.sites():
        assert (merged.get_submodule(site.name).weight - site.module.weight).abs().max() < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_the_factors_are_written_as_they_are(name: str, tmp_path: Path) -> None:
    editor = uneven_editor(name)
    report = export_lora(editor, tmp_path)
    first, second = (site.name for site in editor.sites())
    tensors, config = adapter(tmp_path), config_of(tmp_path)
    for site, rank in ((first, 3), (second, 2)):
        factors = editor.history.factors(site)
        assert torch.equal(tensors[f"base_model.model.{site}.lora_A.weight"], factors.inputs)
        assert torch.equal(tensors[f"base_model.model.{site}.lora_B.weight"], factors.outputs.T)
        assert factors.inputs.shape == (rank, 64)
    assert len(tensors) == 4
    assert (config["r"], config["lora_alpha"]) == (3, 3)
    assert config["rank_pattern"] == config["alpha_pattern"] == {second: 2}
    assert config["target_modules"] == [first, second]
    assert config["fan_in_fan_out"] == (name == "gpt2")
    assert report.ranks == {first: 3, second: 2}
    assert report.size == (tmp_path / ADAPTER_NAME).stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == [ADAPTER_CONFIG_NAME, ADAPTER_NAME]
    # peft knows every entry, so none is ignored, and understands them as they are meant.
    assert set(config) <= set(LoraConfig().to_dict())
    assert LoraConfig.from_pretrained(str(tmp_path)).rank_pattern == {second: 2}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_more_edits_than_dimensions_are_still_exact(name: str, tmp_path: Path) -> None:
    editor = random_editor(name, (40, 10), scale=0.01)
    report = export_lora(editor, tmp_path)
    assert set(report.ranks.values()) == {32}  # h
    assert set(report.truncation.values()) == {0.0}
    with torch.no_grad():
        wrapped = PeftModel.from_pretrained(tiny_model(name), tmp_path).eval()
        assert (wrapped(TOKENS).logits - editor.model(TOKENS).logits).abs().max() < 1e-5


def test_a_bfloat16_model_gives_the_adapter_that_was_applied(tmp_path: Path) -> None:
    editor = random_editor("llama", (2,), dtype=torch.bfloat16)
    export_lora(editor, tmp_path)
    for site in editor.sites():
        pair = [adapter(tmp_path)[f"base_model.model.{site.name}.lora_{side}.weight"] for side in "BA"]
        delta = (pair[0].double() @ pair[1].double()).float()
        base = editor.history.base_weights[site.name]
        assert torch.equal((base.float() + delta).bfloat16(), site.read())


@pytest.mark.parametrize("sizes", [(3, 2), (40, 10)])
def test_truncation_is_the_best_possible_and_its_error_is_reported(sizes: tuple, tmp_path: Path) -> None:
    editor = random_editor("gpt2", sizes)
    report = export_lora(editor, tmp_path, max_rank=2)
    tensors = adapter(tmp_path)
    for site in editor.sites():
        delta = editor.history.factors(site.name).dense()
        pair = [tensors[f"base_model.model.{site.name}.lora_{side}.weight"].double() for side in "BA"]
        values = torch.linalg.svdvals(delta)
        best = float(values[2:].norm() / values.norm())  # Eckart and Young
        assert report.truncation[site.name] == pytest.approx(best, rel=1e-9)
        assert float((delta - pair[0] @ pair[1]).norm() / delta.norm()) == pytest.approx(best, rel=1e-5)
        assert report.ranks[site.name] == 2
        assert pair[0].norm() == pytest.approx(float(pair[1].norm()), rel=1e-5)
    assert f"{report.truncation[site.name]:.2%} of the delta cut off" in str(report)
    assert report.to_dict()["truncation"] == report.truncation


def test_a_maximum_rank_that_is_enough_changes_nothing(tmp_path: Path) -> None:
    editor = random_editor("llama", (3,))
    export_lora(editor, tmp_path / "one")
    export_lora(editor, tmp_path / "other", max_rank=3)
    assert all(map(torch.equal, adapter(tmp_path / "one").values(), adapter(tmp_path / "other").values()))


def test_ranks_of_serving_engines(tmp_path: Path) -> None:
    editor = uneven_editor("llama")
    report = export_lora(editor, tmp_path, allowed_ranks=VLLM_RANKS)
    config = config_of(tmp_path)
    # One rank and one alpha for all sites: a reader that ignores the patterns gets the same scale.
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 8, {})
    assert set(report.ranks.values()) == {8}
    assert {tensor.shape for tensor in adapter(tmp_path).values()} == {(8, 64), (32, 8)}
    with torch.no_grad():
        wrapped = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
        assert (wrapped(TOKENS).logits - editor.model(TOKENS).logits).abs().max() < 1e-5
    with pytest.raises(ConfigError, match="rank 3, and none of the allowed ranks .1, 2. is enough; pass max_rank=2"):
        export_lora(editor, tmp_path, allowed_ranks=(2, 1))
    assert set(export_lora(editor, tmp_path, max_rank=2, allowed_ranks=(2, 1)).ranks.values()) == {2}


def test_what_can_not_be_exported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StateError, match="no edits to export"):
        export_lora(random_editor("llama"), tmp_path)
    editor = random_editor("llama", (1,))
    with pytest.raises(ConfigError, match="max_rank=0"):
        export_lora(editor, tmp_path, max_rank=0)
    sites = [EditSite(site.name, site.layer, torch.nn.Bilinear(1, 1, 1)) for site in editor.sites()]
    monkeypatch.setattr(editor, "sites", lambda: sites)
    with pytest.raises(UnsupportedModelError, match="mlp.down_proj is a Bilinear; .* use save_edits"):
        export_lora(editor, tmp_path)
    assert not list(tmp_path.iterdir())


def test_singular_factors_without_forming_the_delta() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (3, 50):
        update = LowRankUpdate(
            torch.randn(count, 20, generator=generator), torch.randn(count, 12, generator=generator)
        )
        u, s, vt = singular_factors(update)
        assert torch.allclose((u * s) @ vt, update.dense())
        assert torch.allclose(s, torch.linalg.svdvals(update.dense())[: len(s)])


def llama_cpp_base_name(name: str) -> str:
    """The weight that llama.cpp's LoRA converter takes an adapter's tensor to belong to."""
    name = name.removeprefix("base_model.model.")
    for suffix in (".lora_A.weight", ".lora_B.weight"):
        if name.endswith(suffix):
            return name.removesuffix(suffix) + ".weight"
    raise AssertionError(f"{name} is neither lora_A nor lora_B: the converter stops")


@pytest.mark.parametrize(
    ("name", "architecture"), [("llama", gguf.MODEL_ARCH.LLAMA), ("gemma3_text", gguf.MODEL_ARCH.GEMMA3)]
)
def test_names_shapes_and_scale_are_those_that_llama_cpp_expects(name: str, architecture, tmp_path: Path) -> None:
    editor = uneven_editor(name)
    export_lora(editor, tmp_path / "adapter", allowed_ranks=VLLM_RANKS)
    config = config_of(tmp_path / "adapter")
    names = gguf.get_tensor_name_map(architecture, 5)
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for key, tensor in adapter(tmp_path / "adapter").items():
        weight = names.get_name(llama_cpp_base_name(key), try_suffixes=(".weight",))
        assert weight is not None, f"llama.cpp knows no {key}"
        side = "lora_a" if ".lora_A." in key else "lora_b"
        writer.add_tensor(
            f"{weight}.weight.{side}" if not weight.endswith(".weight") else f"{weight}.{side}", tensor.numpy()
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    alpha = float(reader.get_field(gguf.Keys.Adapter.LORA_ALPHA).contents())
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert set(tensors) == {f"blk.{layer}.ffn_down.weight.lora_{side}" for layer in (1, 2) for side in "ab"}
    for site in editor.sites():
        a, b = (tensors[f"blk.{site.layer}.ffn_down.weight.lora_{side}"] for side in "ab")
        scale = alpha / b.shape[1]  # what llama.cpp multiplies with: one alpha, each tensor's own rank
        assert torch.allclose(scale * b @ a, editor.history.delta(site.name), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diff_measures_each_weight(dtype: torch.dtype) -> None:
    editor = random_editor("gpt2", (2, 1), dtype=dtype)
    moment = torch.randn(200, 64, generator=torch.Generator().manual_seed(2))
    keys = moment.double()
    moments = {site.name: moment.T @ moment / 200 for site in editor.sites()[:1]}
    report = diff(editor, moments)
    for site, measured in zip(editor.sites(), report.sites, strict=True):
        base = editor.history.base_weights[site.name].double()
        delta = editor.history.factors(site.name).dense()
        assert (measured.site, measured.edits, measured.rank) == (site.name, 3, 3)
        assert measured.delta_norm == pytest.approx(float(delta.norm()), rel=1e-6)
        assert measured.relative_norm == pytest.approx(float(delta.norm() / base.norm()), rel=1e-6)
        lost = float((site.read().double() - base - delta).norm() / delta.norm())
        assert measured.rounding == pytest.approx(lost, rel=1e-2, abs=1e-7)
        assert (measured.rounding > 1e-3) == (dtype == torch.bfloat16)
    first = editor.sites()[0].name
    delta, base = editor.history.factors(first).dense(), editor.history.base_weights[first].double()
    leak = float((keys @ delta.T).square().sum() / (keys @ base.T).square().sum())
    assert report.sites[0].corpus_energy == pytest.approx(leak, rel=1e-4)
    assert report.sites[1].corpus_energy is None
    assert "corpus energy" in str(report)
    assert first in str(report)
    assert json.dumps(report.to_dict())


def test_diff_without_edits_says_so() -> None:
    editor = AlphaEditor(tiny_model("llama"), tiny_tokenizer(), AlphaEditConfig(layers=(1,)))
    assert str(diff(editor)) == "no edits: every weight is the base model's"
    assert diff(editor).sites == ()


@pytest.mark.slow
def test_peft_gives_the_logits_of_smollm2_with_32_real_edits(smollm2, data_directory: Path, tmp_path: Path) -> None:
    from peft import get_peft_model_state_dict

    from hf_alphaedit.records import read_records

    model, tokenizer = smollm2
    records = read_records(data_directory / "counterfact.json")[:32]
    with (data_directory / "wikipedia.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    editor = AlphaEditor(model, tokenizer)
    editor.prepare(texts, num_tokens=8_000)
    try:
        editor.apply_edits([record.request for record in records])
        export_lora(editor, tmp_path)
        prompts = [record.request.text for record in records[:8]]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="right")
        with torch.no_grad():
            edited = model(**batch).logits
    finally:
        editor.undo_all()
    with torch.no_grad():
        wrapped = PeftModel.from_pretrained(model, tmp_path).eval()
        try:
            assert (wrapped(**batch).logits - edited).abs().max() < 1e-5 * edited.abs().max()
            assert {len(value) for key, value in get_peft_model_state_dict(wrapped).items() if "lora_A" in key} == {32}
        finally:
            wrapped.unload()
