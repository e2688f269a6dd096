"""The builders that other tests rest on."""

import itertools

import pytest
import torch
from tiny import ARCHITECTURES, BEGIN, VOCABULARY_SIZE, tiny_model, tiny_tokenizer


TEXTS = ["The capital of France is", "中国的首都是上海 🙂🇨🇳", "Zürich’s  \n two, <0x41>", "a"]
VARIANTS = list(itertools.product(["byte_level", "metaspace"], [False, True]))


@pytest.mark.parametrize(("kind", "bos"), VARIANTS)
@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_gives_every_text_back(kind: str, bos: bool, text: str) -> None:
    tokenizer = tiny_tokenizer(kind, bos=bos)
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == text
    assert encoded["offset_mapping"][-1][1] == len(text)
    assert all(token < VOCABULARY_SIZE for token in encoded["input_ids"])
    begins = [token == tokenizer.bos_token_id for token in encoded["input_ids"]]
    assert begins == [bos] + [False] * (len(begins) - 1)


@pytest.mark.parametrize(("kind", "bos"), VARIANTS)
def test_targets_get_no_bos(kind: str, bos: bool) -> None:
    tokens = tiny_tokenizer(kind, bos=bos).tokenize(" Rome", add_special_tokens=False)
    assert tokens
    assert BEGIN not in tokens


def test_padding_side_and_missing_pad_token() -> None:
    texts = ["Paris", "The capital of France"]
    batch = tiny_tokenizer(padding_side="left")(texts, padding=True)
    assert batch["attention_mask"][0][0] == 0
    assert batch["attention_mask"][0][-1] == 1
    assert tiny_tokenizer(pad=False).pad_token is None
    with pytest.raises(ValueError, match="pad"):
        tiny_tokenizer(pad=False)(texts, padding=True)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi", *ARCHITECTURES])
def test_model_is_a_function_of_its_seed(name: str) -> None:
    state = torch.get_rng_state()
    first, again, other = (
        torch.cat([parameter.flatten() for parameter in tiny_model(name, seed=seed).parameters()])
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_model_predicts_from_what_it_reads(tokenizer) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config.num_hidden_layers == 2
    with torch.no_grad():
        paris, rome = (model(**tokenizer(text, return_tensors="pt")).logits[0, -1] for text in ("Paris", "Rome"))
    assert (paris - rome).abs().max() > 0.1
