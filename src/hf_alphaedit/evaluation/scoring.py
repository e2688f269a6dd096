"""Teacher forcing: how probable a given continuation of a prompt is, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_alphaedit.errors import RequestError
from hf_alphaedit.evaluation.forward import batches, check_length, logits_at, padded
from hf_alphaedit.models.encoding import encode_target, encode_with_spans
from hf_alphaedit.models.hooks import inference_state
from hf_alphaedit.models.weights import input_device
from hf_alphaedit.requests import joined_target


Pair = tuple[str, str]  # (prompt, target)


@dataclass(frozen=True)
class Score:
    """What the model thinks of one target after one prompt.

    Attributes:
        log_probabilities: of each target token given the prompt and the target tokens before it; float32 log-softmax.
        predictions: the argmax at each of these places.
        tokens: the target's tokens.
    """

    log_probabilities: tuple[float, ...]
    predictions: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def log_probability(self) -> float:
        """Of the whole target: the sum over its tokens."""
        return math.fsum(self.log_probabilities)

    @property
    def loss(self) -> float:
        """Mean negative log-probability of a token."""
        return -self.log_probability / len(self.tokens)

    @property
    def correct(self) -> tuple[bool, ...]:
        """For each token, whether it is the argmax."""
        return tuple(a == b for a, b in zip(self.predictions, self.tokens, strict=True))

    @property
    def exact(self) -> bool:
        """Whether every token is the argmax."""
        return all(self.correct)

    @property
    def token_accuracy(self) -> float:
        """Share of the tokens that are the argmax."""
        return sum(self.correct) / len(self.tokens)


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], *, batch_size: int | None = None
) -> list[Score]:
    """Score each (prompt, target) pair.

    One space is put between them where the script wants one (`requests.joined_target`). The result depends neither on
    the batch size nor on the tokenizer's padding settings, up to the rounding of matrix products.

    Raises:
        RequestError: a prompt or target has no token, or they are longer than the model's positions.
    """
    return score_tokens(model, encode_pairs(model, tokenizer, pairs), batch_size=batch_size)


def encode_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]
) -> list[tuple[list[int], list[int]]]:
    """Token ids of each prompt (with the special tokens that go in front) and of the target as it follows."""
    prompts = {prompt: encode_with_spans(tokenizer, prompt)[0] for prompt, _ in pairs}
    result = []
    for prompt, target in pairs:
        if not prompts[prompt] or not target:
            raise RequestError(
                f"{(prompt, target)!r} has an empty {'target' if target == '' else 'prompt'}; give it text"
            )
        target_ids = encode_target(tokenizer, prompt, joined_target(prompt, target))
        check_length(model, len(prompts[prompt]) + len(target_ids), prompt + target)
        result.append((prompts[prompt], target_ids))
    return result


def score_tokens(
    model: PreTrainedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int | None = None
) -> list[Score]:
    """`score` for token ids.

    A row is a prompt with its target but for the last token, which is never an input. Rows that begin another row are
    read off that one: attention is causal. So two one-token targets of one prompt cost a single row.
    """
    if not pairs:
        return []
    inputs = [(*prompt, *target[:-1]) for prompt, target in pairs]
    rows, row_of = shared_rows(inputs)
    members: list[list[int]] = [[] for _ in rows]
    for index, row in enumerate(row_of):
        members[row].append(index)
    most = max(sum(len(pairs[index][1]) for index in row) for row in members)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    scores: list[Score | None] = [None] * len(pairs)
    with torch.no_grad(), inference_state(model), tqdm(total=len(rows), desc="Scoring", name="hf_alphaedit") as bar:
        for batch in batches([len(row) for row in rows], batch_size, most * vocabulary):
            found = _score_batch(
                model, [rows[row] for row in batch], [[pairs[i] for i in members[row]] for row in batch]
            )
            for index, result in zip((i for row in batch for i in members[row]), found, strict=True):
                scores[index] = result
            bar.update(len(batch))
    return [result for result in scores if result is not None]


def shared_rows(rows: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The rows that no other row begins with, and for each given row the index of the one that holds it.

    In sorted order, a row that begins any other row begins its successor.
    """
    kept: list[tuple[int, ...]] = []
    holder = [0] * len(rows)
    for index in sorted(range(len(rows)), key=rows.__getitem__, reverse=True):
        if not kept or kept[-1][: len(rows[index])] != rows[index]:
            kept.append(rows[index])
        holder[index] = len(kept) - 1
    return kept, holder


def _score_batch(
    model: PreTrainedModel,
    rows: Sequence[tuple[int, ...]],
    members: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]],
) -> list[Score]:
    device = input_device(model)
    wanted = []  # flat places of the tokens that predict
    length = max(map(len, rows))
    for row, pairs in enumerate(members):
        for prompt, target in pairs:
            start = row * length + len(prompt) - 1
            wanted += range(start, start + len(target))
    places, inverse = torch.tensor(wanted, device=device).unique(return_inverse=True)  # (n,), (all target tokens,)
    logits, _ = logits_at(model, places // length, places % length, **padded(rows, device), use_cache=False)  # (n, V)
    return read_off(logits, inverse.to(logits.device), [target for pairs in members for _, target in pairs])


def read_off(logits: Tensor, places: Tensor, targets: Sequence[Sequence[int]]) -> list[Score]:
    """The scores of some targets.

    Args:
        logits: (n, vocabulary) float32.
        places: (all target tokens,) rows of the logits that predict them, target after target.
        targets: their tokens.
    """
    tokens = torch.tensor([token for target in targets for token in target], dtype=torch.long, device=logits.device)
    picked = logits[places, tokens] - logits.logsumexp(-1)[places]  # (all target tokens,)
    values, predictions = picked.tolist(), logits.argmax(-1)[places].tolist()
    result, start = [], 0
    for target in targets:
        span = slice(start, start := start + len(target))
        result.append(Score(tuple(values[span]), tuple(predictions[span]), tuple(target)))
    return result
