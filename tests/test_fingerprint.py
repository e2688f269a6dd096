"""Names of weights and tokenizers: equal for the same, different for anything else."""

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_alphaedit.models.fingerprint import model_fingerprint, tokenizer_fingerprint, weight_digest


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "gptj", "mixtral"])
def test_the_same_after_saving_and_loading(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    assert model_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == model_fingerprint(model)
    assert model_fingerprint(tiny_model(name)) == model_fingerprint(model)


@pytest.mark.parametrize(
    "offload", [cpu_offload, lambda model, path=None: disk_offload(model, path)], ids=["cpu", "disk"]
)
def test_the_same_wherever_the_weights_live(offload, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    resident = model_fingerprint(model)
    offload(model, *([tmp_path] if offload is not cpu_offload else []))
    assert next(model.parameters()).device.type == "meta"
    assert model_fingerprint(model) == resident


def test_settings_that_change_no_hidden_state_do_not_count() -> None:
    model = tiny_model("llama")
    before = model_fingerprint(model)
    model.config.use_cache = False
    model.config.pad_token_id = 2
    model.config.name_or_path = "elsewhere"
    model.train().requires_grad_(False)
    assert model_fingerprint(model) == before


@pytest.mark.parametrize(
    "other",
    [
        lambda: tiny_model("llama", seed=1),
        lambda: tiny_model("llama").bfloat16(),
        lambda: tiny_model("llama", rms_norm_eps=1e-4),
        lambda: tiny_model("llama", hidden_act="gelu"),
        lambda: tiny_model("llama", num_hidden_layers=4),
        lambda: tiny_model("mistral"),
    ],
    ids=["weights", "dtype", "epsilon", "activation", "depth", "architecture"],
)
def test_different_for_another_model(other) -> None:
    assert model_fingerprint(other()) != model_fingerprint(tiny_model("llama"))


def test_an_edit_of_rank_one_anywhere_is_seen() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    base = model_fingerprint(model)
    for name, parameter in model.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(1e-3)
            assert model_fingerprint(model) != base, name
            parameter.copy_(before)
    assert model_fingerprint(model) == base


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_base_weights_stand_in_for_edited_ones(name: str) -> None:
    # Square, so that only the module's type can tell how a weight is stored.
    sizes = {"n_inner": 32} if name == "gpt2" else {"intermediate_size": 32}
    model = tiny_model(name, **sizes)
    before = model_fingerprint(model)
    path = "transformer.h.1.mlp.c_proj" if name == "gpt2" else "model.layers.1.mlp.down_proj"
    weight = model.get_submodule(path).weight
    base = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(2)
    assert model_fingerprint(model) != before
    as_rows = base.T if name == "gpt2" else base
    assert model_fingerprint(model, {path: as_rows}) == before
    assert model_fingerprint(model, {path: as_rows.T}) != before


def test_tokenizers() -> None:
    one = tiny_tokenizer()
    fingerprint = tokenizer_fingerprint(one)
    one(["padded", "to the same length"], padding=True, truncation=True, max_length=4)  # leaves its mark on the object
    one.padding_side = "left"
    assert tokenizer_fingerprint(one) == fingerprint
    others = [tiny_tokenizer("metaspace"), tiny_tokenizer(bos=True), tiny_tokenizer("metaspace", bos=True)]
    assert len({fingerprint, *map(tokenizer_fingerprint, others)}) == 4
    one.add_tokens(["Darrieux"])
    assert tokenizer_fingerprint(one) != fingerprint


def test_the_same_tokenizer_after_saving_and_loading(tmp_path: Path) -> None:
    for kind in ("byte_level", "metaspace"):
        tokenizer = tiny_tokenizer(kind, bos=True)
        tokenizer.save_pretrained(tmp_path / kind)
        loaded = AutoTokenizer.from_pretrained(tmp_path / kind)
        assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)


def test_digest_of_a_weight_sees_every_bit_dtype_and_shape() -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    other = weight.clone()
    other.view(torch.int32)[2, 3] ^= 1
    digests = [weight, other, weight.T, weight.reshape(4, 3), weight.double(), weight.bfloat16(), torch.zeros(3, 4),
               -torch.zeros(3, 4)]  # fmt: skip
    assert len({weight_digest(value) for value in digests}) == len(digests)
    assert weight_digest(weight.T.contiguous().T) == weight_digest(weight)  # how it lies in memory doesn't matter
