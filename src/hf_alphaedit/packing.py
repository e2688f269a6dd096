"""Texts become sequences of tokens of one length, so that no position of a forward pass is padding."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_alphaedit.errors import StatisticsError


TEXTS_PER_CALL = 64  # texts given to the tokenizer at once

Document = str | Sequence[int]  # a text, or one that is token ids already


def pack(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, num_tokens: int, sequence_length: int
) -> Tensor:
    """Token ids (n,) int32, n <= `num_tokens`, that `split(sequence_length)` cuts into the sequences to run.

    Documents are joined by the end-of-text token, and each sequence begins with the special tokens that the tokenizer
    puts before a text (BOS), so that the model sees what it was trained on. No sequence is padded.

    Raises:
        StatisticsError: the documents have no token at all.
    """
    prefix = leading_special_tokens(tokenizer)
    if len(prefix) >= sequence_length:
        raise StatisticsError(f"sequence_length={sequence_length} has no room after the special tokens {prefix}")
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    packed = array("i")  # 4 bytes a token: corpora of the published size have tens of millions
    for document in _tokenised(documents, tokenizer):
        if not document:
            continue
        for token in (*document, *separator):
            if len(packed) % sequence_length == 0:
                packed.extend(prefix)
            packed.append(token)
        if len(packed) >= num_tokens:
            break
    if not packed:
        raise StatisticsError("the corpus has no text; give one with at least a few thousand tokens")
    return torch.tensor(packed[:num_tokens], dtype=torch.int32)


def _tokenised(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[Sequence[int]]:
    iterator = iter(documents)
    while chunk := list(islice(iterator, TEXTS_PER_CALL)):
        texts = [document for document in chunk if isinstance(document, str)]
        # verbose=False: a text longer than the model's context is no mistake here
        encoded = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
        for document in chunk:
            yield next(encoded) if isinstance(document, str) else document


def within_context(model: PreTrainedModel, length: int) -> int:
    """`length`, or the longest sequence that the model takes if that is less."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(length, context) if context and context > 0 else length


def leading_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts before every text, usually BOS or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    return []
