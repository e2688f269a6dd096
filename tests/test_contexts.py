"""Context templates: seeded, clean, and nothing of the user's is touched."""

import random
from typing import Any

import numpy
import pytest
import torch
from tiny import BEGIN, END, SPECIAL_TOKENS, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.contexts import FIRST_WORDS, contexts_for, sample_contexts, template_of


VARIANTS = [("byte_level", False), ("byte_level", True), ("metaspace", True)]


def sampled(model: PreTrainedModel | None = None, kind: Any = "byte_level", bos: bool = True, **options: Any) -> Any:
    model = model or tiny_model("llama")
    return sample_contexts(model, tiny_tokenizer(kind, bos=bos), **{"length": 10, **options})


@pytest.mark.parametrize(("kind", "bos"), VARIANTS)
def test_one_template_for_each_first_word(kind: str, bos: bool) -> None:
    contexts = sampled(kind=kind, bos=bos)
    assert len(contexts) == len(FIRST_WORDS) == 5
    for context, word in zip(contexts, FIRST_WORDS, strict=True):
        assert context.startswith(word)
        assert context.endswith(". {}")
        assert context.count("{") == context.count("}") == 1
        assert not any(token in context for token in SPECIAL_TOKENS)
        AlphaEditConfig(context_templates=(context,))  # usable as a fixed one, too


def test_the_same_seed_gives_the_same_texts() -> None:
    torch.manual_seed(1)
    first = sampled(seed=5)
    torch.manual_seed(2)
    assert sampled(seed=5) == first
    assert sampled(seed=6) != first


def test_more_contexts_begin_with_those_that_fewer_would_be() -> None:
    few, many = sampled(seed=5), sampled(seed=5, per_word=3)
    assert many[: len(few)] == few
    assert len(many) == 3 * len(few)
    assert len(set(many)) == len(many)
    assert all(context.startswith(word) for context, word in zip(many, FIRST_WORDS * 3, strict=True))


@pytest.mark.parametrize("length", [1, 10, 25])
def test_length_counts_first_word_and_bos(length: int) -> None:
    model, tokenizer, generated = tiny_model("llama"), tiny_tokenizer(bos=True), []
    generate = model.generate

    def watched(*arguments: Any, **keywords: Any) -> torch.Tensor:
        generated.append(generate(*arguments, **keywords))
        return generated[-1]

    model.generate = watched
    sample_contexts(model, tokenizer, length=length)
    words = [len(tokenizer(word)["input_ids"]) for word in FIRST_WORDS]
    assert [ids.shape for ids in generated] == [(1, max(length, word + 1)) for word in words]
    assert all(ids[0, 0] == tokenizer.bos_token_id for ids in generated)


@pytest.mark.parametrize("keep", [False, True])
def test_special_tokens_are_kept_on_demand(keep: bool) -> None:
    contexts = sampled(keep_special_tokens=keep)
    assert all(context.startswith(BEGIN) for context in contexts) is keep
    assert not any(END in context for context in contexts)


def test_nothing_of_the_users_is_touched() -> None:
    model, tokenizer = tiny_model("llama").train(), tiny_tokenizer(bos=True, pad=False, padding_side="left")
    model.generation_config.update(temperature=0.3, max_new_tokens=3, repetition_penalty=2.0, suppress_tokens=[40])
    model.get_input_embeddings().weight.requires_grad_(False)
    before = (
        torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()),
        model.generation_config.to_dict(), model.config.to_dict(), [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()], tokenizer.padding_side, tokenizer.pad_token,
    )  # fmt: skip
    contexts = sample_contexts(model, tokenizer, length=10)
    after = (
        torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()),
        model.generation_config.to_dict(), model.config.to_dict(), [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()], tokenizer.padding_side, tokenizer.pad_token,
    )  # fmt: skip
    assert after == before
    # The user's settings decide nothing.
    assert sample_contexts(tiny_model("llama"), tokenizer, length=10) == contexts


def test_fixed_templates_are_taken_as_they_are() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    for fixed in ((), ("It is so. {}", "再说：{}。")):
        assert contexts_for(model, tokenizer, AlphaEditConfig(context_templates=fixed), seed=0) == fixed
    config = AlphaEditConfig(context_length=8, contexts_per_word=2, context_special_tokens=True)
    expected = sample_contexts(model, tokenizer, length=8, per_word=2, keep_special_tokens=True, seed=4)
    assert contexts_for(model, tokenizer, config, seed=4) == expected


@pytest.mark.parametrize(
    ("text", "template"),
    [
        ("The {x} set", "The  x  set. {}"),
        ("One\n\ntwo\n\n", "One two . {}"),
        ("ﬁn ①", "fin 1. {}"),
        (f"The end{END}", "The end. {}"),
        ("", ". {}"),
    ],
)
def test_texts_are_cleaned(text: str, template: str) -> None:
    assert template_of(text) == template
