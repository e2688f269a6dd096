"""Context templates: short beginnings that stand before the prompt, so that a key doesn't depend on its position."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_alphaedit.config import AlphaEditConfig
from hf_alphaedit.models.encoding import EncodedRequest, encode_request
from hf_alphaedit.models.hooks import inference_state
from hf_alphaedit.requests import EditRequest


FIRST_WORDS = ("The", "Therefore", "Because", "I", "You")
TOP_K = 5


def sample_contexts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    per_word: int = 1,
    keep_special_tokens: bool = False,
    seed: int = 0,
) -> tuple[str, ...]:
    """Continuations of each of five first words, drawn by the model from its five likeliest tokens, plus '. {}'.

    The global random state, the model's modes and its `generation_config` are as before on return. Source: MEMIT's and
    AlphaEdit's code, which has no seed; here the same seed gives the same texts.

    Args:
        model: the unedited model.
        tokenizer: its tokenizer; not changed.
        length: tokens of each context, first word and BOS included, as published; at least one follows the word.
        per_word: continuations of each word; published: one. More of them begin with those that fewer would be.
        keep_special_tokens: keep the text of special tokens, as published.
        seed: decides the draws.

    Returns:
        Five texts for each of `per_word`, which end in '. {}' and have no other braces.
    """
    settings = GenerationConfig(
        do_sample=True, top_k=TOP_K, top_p=1.0, temperature=1.0, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )  # fmt: skip
    device = model.get_input_embeddings().weight.device
    device = model.device if device.type == "meta" else device
    contexts = []
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices), torch.no_grad(), inference_state(model), _generating_with(model, settings):
        torch.manual_seed(seed)
        for word in FIRST_WORDS * per_word:
            encoded = tokenizer(word, return_tensors="pt").to(device)
            # A word that fills the length already still gets one token.
            settings.max_length = settings.min_length = max(length, encoded["input_ids"].shape[1] + 1)
            token_ids = model.generate(encoded["input_ids"], attention_mask=encoded["attention_mask"])
            text = tokenizer.decode(token_ids[0], skip_special_tokens=not keep_special_tokens)
            contexts.append(template_of(text))
    return tuple(contexts)


@contextmanager
def _generating_with(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Let `generate` follow `settings` alone: it would take whatever they leave open from the model's own."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own


def contexts_for(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: AlphaEditConfig, seed: int
) -> tuple[str, ...]:
    """The context templates of the settings, or sampled ones where they name none.

    Args:
        model: the unedited model.
        tokenizer: its tokenizer.
        config: the settings; `context_templates`, an empty tuple included, is taken as it is.
        seed: see `sample_contexts`.
    """
    if config.context_templates is not None:
        return config.context_templates
    return sample_contexts(
        model, tokenizer, length=config.context_length, per_word=config.contexts_per_word,
        keep_special_tokens=config.context_special_tokens, seed=seed,
    )  # fmt: skip


def encode_requests(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    config: AlphaEditConfig,
) -> list[EncodedRequest]:
    """The rows of each request that the settings ask for; see `encode_request`.

    Raises:
        RequestError: a target has no tokens, or the tokenizer drops a subject.
    """
    mentions = config.context_keys == "with_subject"
    return [
        encode_request(
            tokenizer, request, contexts, gaps=config.context_gaps, asides=config.context_asides, mentions=mentions
        )
        for request in requests
    ]


def template_of(text: str) -> str:
    """`text` and '. {}': normalised (NFKD), and without blank lines, braces and end-of-text marks."""
    text = unicodedata.normalize("NFKD", text).replace("\n\n", " ").replace("<|endoftext|>", "")
    return text.replace("{", " ").replace("}", " ") + ". {}"
