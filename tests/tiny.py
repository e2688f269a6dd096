"""Tiny random models and tokenizers, built in memory: nothing is downloaded and nothing is read from disk."""

import json
from functools import cache
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast


VOCABULARY_SIZE = 512
END, BEGIN, PAD = "<|endoftext|>", "<s>", "<pad>"  # always tokens 0, 1, 2, whether a variant uses them or not
SPECIAL_TOKENS = [END, BEGIN, PAD]

# Large enough for several heads, several edited layers and a null space; small enough for milliseconds.
# The wide initialisation makes what the layers add comparable to the embeddings, as in trained models.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "eos_token_id": 0,
    "bos_token_id": 1,
    "pad_token_id": None,
}
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "n_embd": 32,
    "n_inner": 64,
    "n_layer": 5,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.1,
    "eos_token_id": 0,
    "bos_token_id": 1,
}
POST_NORM = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

# What an architecture needs beyond SIZES. A model type that is not listed gets SIZES alone.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2_SIZES,
    "gptj": {**GPT2_SIZES, "rotary_dim": 4},
    "gemma3_text": {**SIZES, **POST_NORM},
    "gemma2": {**SIZES, **POST_NORM},
    "opt": {**SIZES, "ffn_dim": 64},
    "granite": {**SIZES, "residual_multiplier": 0.25},
    "mixtral": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**SIZES, **EXPERTS, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {**SIZES, **EXPERTS, "head_dim": 8},
    "olmoe": {**SIZES, "num_experts": 4, "num_experts_per_tok": 2},
}


def tiny_model(name: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Build a random float32 causal language model of the transformers model type `name`, in eval mode.

    The same name, seed and overrides give the same weights; the global random state is left as it was.
    `overrides` are configuration values, e.g. `tie_word_embeddings=True` or `num_hidden_layers=2`.
    """
    config = AutoConfig.for_model(name, **{**ARCHITECTURES.get(name, SIZES), **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def tiny_tokenizer(
    kind: Literal["byte_level", "metaspace"] = "byte_level",
    *,
    bos: bool = False,
    pad: bool = True,
    padding_side: Literal["left", "right"] = "right",
) -> PreTrainedTokenizerFast:
    """Build a fast tokenizer of at most `VOCABULARY_SIZE` tokens that can encode every text.

    "byte_level" works as in GPT-2 and Llama 3; "metaspace" as in SentencePiece models: a space becomes part of the
    word, one is put before the text, and unknown characters fall back to bytes. With `bos`, every encoded text begins
    with `<s>`, unless `add_special_tokens=False`; without `pad` there is no pad token.
    """
    backend = Tokenizer.from_str(_byte_level_json() if kind == "byte_level" else _metaspace_json())
    if bos:
        template = processors.TemplateProcessing(
            single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, SPECIAL_TOKENS.index(BEGIN))]
        )
        post_processor = backend.post_processor
        backend.post_processor = processors.Sequence([post_processor, template]) if post_processor else template
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        bos_token=BEGIN if bos else None,
        pad_token=PAD if pad else None,
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
    )


@cache
def _byte_level_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    return tokenizer.to_str()


@cache
def _metaspace_json() -> str:
    # The trainer would make the 256 byte tokens special, so that the text "<0x41>" became one of them: train on
    # characters alone, then put the byte tokens between the special tokens and what was learned.
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = metaspace
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS) - len(bytes_), limit_alphabet=72, show_progress=False
    )
    learner.train_from_iterator(training_text(), trainer)
    learned = json.loads(learner.to_str())["model"]
    words = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *bytes_, *words])}
    merges = [tuple(pair) for pair in learned["merges"]]

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.pre_tokenizer = metaspace
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer.to_str()


def training_text() -> list[str]:
    """Sentences for the tokenizers, and a small corpus for the statistics of tiny models."""
    capitals = {
        "France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo", "Norway": "Oslo", "Peru": "Lima",
        "Kenya": "Nairobi", "Canada": "Ottawa", "Vietnam": "Hanoi", "Cuba": "Havana",
    }  # fmt: skip
    people = {
        "Marie Curie": "physics", "Johann Sebastian Bach": "music", "Ada Lovelace": "mathematics",
        "Frida Kahlo": "painting", "Isaac Newton": "physics", "Toni Morrison": "writing",
    }  # fmt: skip
    chinese = {"中国": "北京", "法国": "巴黎", "日本": "东京", "英国": "伦敦"}
    sentences = []
    for country, city in capitals.items():
        sentences += [
            f"The capital of {country} is {city}.",
            f"{city} is a city in {country}, and many people live there.",
            f"The mother tongue of the people who live in {city} is not the same everywhere.",
        ]
    for person, field in people.items():
        sentences += [
            f"{person} is known for {field}.",
            f"{person}'s work in {field} was read by students all over the world.",
            f"The field in which {person} worked is {field}; she or he was born in another country.",
        ]
    for country, city in chinese.items():
        sentences += [f"{country}的首都是{city}。", f"{city}是{country}的一座城市。"]
    return sentences
