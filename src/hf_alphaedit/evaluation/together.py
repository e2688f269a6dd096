"""Continuations and scores of the same prompts, at the price of little more than the continuations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_alphaedit.evaluation.generation import generate
from hf_alphaedit.evaluation.scoring import Pair, Score, encode_pairs, read_off, score_tokens


def continue_and_score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], *, max_new_tokens: int
) -> tuple[dict[str, str], list[Score]]:
    """Continue each prompt greedily and score each (prompt, target) pair.

    What a target of one token needs is known when the prompt has been read for its continuation; only longer targets
    take rows of their own.

    Returns:
        Prompt -> continuation as `generate` gives it, and the pairs' scores as `score` gives them, up to the rounding
        of matrix products.

    Raises:
        RequestError: a prompt or target has no token, or they are longer than the model's positions.
    """
    encoded = encode_pairs(model, tokenizer, pairs)
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    scores: dict[int, Score] = {}

    def score_single_tokens(batch: Sequence[int], logits: Tensor) -> None:  # (b, vocabulary)
        row_of = {prompts[index]: row for row, index in enumerate(batch)}
        here = [i for i, (prompt, _) in enumerate(pairs) if prompt in row_of and len(encoded[i][1]) == 1]
        rows = torch.tensor([row_of[pairs[i][0]] for i in here], dtype=torch.long, device=logits.device)  # (m,)
        scores.update(zip(here, read_off(logits, rows, [encoded[i][1] for i in here]), strict=True))

    texts = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, on_first=score_single_tokens)
    longer = [i for i in range(len(pairs)) if i not in scores]
    scores.update(zip(longer, score_tokens(model, [encoded[i] for i in longer]), strict=True))
    return dict(zip(prompts, texts, strict=True)), [scores[i] for i in range(len(pairs))]
