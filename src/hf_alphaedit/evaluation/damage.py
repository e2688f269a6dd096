"""What an edit did to everything else: perplexity and KL on held-out text, last words, multiple choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_alphaedit.errors import RequestError
from hf_alphaedit.evaluation.forward import logits_at
from hf_alphaedit.evaluation.scoring import score
from hf_alphaedit.models.encoding import encode_with_spans
from hf_alphaedit.models.hooks import inference_state, on_input
from hf_alphaedit.models.weights import input_device


WINDOW = 512
NUM_TOKENS = 8192
STRIDE = 4


@dataclass(frozen=True, eq=False)
class Reference:
    """The unedited model on held-out text, kept so that an edited model can be compared with it.

    A next-token distribution is kept as the input of the head that gives it, which no edit changes: a thousandth of
    the size, and exact.

    Attributes:
        windows: (w, t) token ids.
        losses: (w,) mean negative log-probability of the tokens of each window, float64.
        hidden: (w, ceil((t - 1) / stride), h) inputs of the head at every `stride`-th position, model dtype, CPU.
        stride: distance of these positions.
    """

    windows: Tensor
    losses: Tensor
    hidden: Tensor
    stride: int


def pack(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    num_tokens: int = NUM_TOKENS,
    window: int = WINDOW,
) -> Tensor:
    """(w, window) token ids: the texts one after another, cut into windows; each begins as every text does (BOS).

    A window is never longer than the model's positions.

    Raises:
        RequestError: the texts don't fill one window.
    """
    if isinstance(texts, str):
        texts = [texts]
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    window = min(window, limit or window)
    start = [token for token, (begin, end) in zip(*encode_with_spans(tokenizer, "a"), strict=True) if begin == end]
    stream: list[int] = []
    fresh, wanted = window - len(start), max(1, num_tokens // window)
    for text in texts:
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(stream) >= wanted * fresh:
            break
    count = min(wanted, len(stream) // fresh)
    if count < 1:
        raise RequestError(
            f"the held-out texts have {len(stream)} tokens, fewer than one window of {fresh}; give more"
        )
    return torch.tensor([[*start, *stream[index * fresh : (index + 1) * fresh]] for index in range(count)])


def make_reference(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    num_tokens: int = NUM_TOKENS,
    window: int = WINDOW,
    stride: int = STRIDE,
) -> Reference:
    """Measure the unedited model on `texts`; pass the result to `evaluate` after an edit.

    KL is compared at every `stride`-th position, perplexity at all of them.
    """
    windows = pack(model, tokenizer, texts, num_tokens=num_tokens, window=window)
    head = model.get_output_embeddings()
    hidden: list[Tensor] = []

    def keep(states: Tensor) -> None:  # (1, t, h); this hook comes first and sees all positions
        hidden.append(states.detach()[0, :-1][::stride].to("cpu", copy=True))

    with on_input(head, keep):
        losses, _ = held_out_losses(model, windows)
    return Reference(windows, losses, torch.stack(hidden), stride)


def held_out_losses(
    model: PreTrainedModel, windows: Tensor, reference: Reference | None = None
) -> tuple[Tensor, Tensor | None]:
    """Mean loss (w,) of each window, float64, and with a reference the mean KL(unedited || model) (w,) in nats."""
    losses, divergences = [], []
    device = input_device(model)
    with torch.no_grad(), inference_state(model):
        for index, window in enumerate(tqdm(windows, desc="Held-out text", name="hf_alphaedit")):
            count = len(window) - 1  # the last token predicts nothing that is known
            positions = torch.arange(count, device=device)
            stored = None if reference is None else reference.hidden[index]
            logits, _ = logits_at(
                model, torch.zeros_like(positions), positions, extra=stored,
                input_ids=window[None].to(device), use_cache=False,
            )  # fmt: skip
            log_probabilities = logits.log_softmax(-1)  # (t - 1 + stored, V)
            next_tokens = window[1:].to(logits.device)
            losses.append(-log_probabilities[:count].gather(-1, next_tokens[:, None]).double().mean().cpu())
            if reference is not None:
                ours, theirs = log_probabilities[:count][:: reference.stride], log_probabilities[count:]
                divergences.append((theirs.exp() * (theirs - ours)).sum(-1).double().mean().cpu())
    return torch.stack(losses), torch.stack(divergences) if divergences else None


def last_word_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, batch_size: int | None = None
) -> list[bool]:
    """For each text, whether its last word is what the model says next (LAMBADA): all its tokens are the argmax."""
    pairs = []
    for text in texts:
        before, _, word = text.strip().rpartition(" ")
        if not before:
            raise RequestError(f"{text!r} has no last word after a space; LAMBADA texts are passages")
        pairs.append((before, word))
    return [result.exact for result in score(model, tokenizer, pairs, batch_size=batch_size)]


def multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Mapping[str, Any]],
    *,
    batch_size: int | None = None,
) -> tuple[list[bool], list[bool]]:
    """Accuracy of each question `{"query", "choices", "gold"}` by log-probability, and by that per character.

    "Answer:" on a line of its own follows the query, as in lm-eval's arc_easy and piqa; the second figure is its
    `acc_norm`.
    """
    pairs, spans = [], []
    for number, question in enumerate(questions):
        missing = [name for name in ("query", "choices", "gold") if name not in question]
        if missing:
            raise RequestError(f"question {number} lacks {missing}; it has {sorted(question)}")
        query = question["query"] if question["query"].endswith("Answer:") else f"{question['query']}\nAnswer:"
        spans.append(range(len(pairs), len(pairs) + len(question["choices"])))
        pairs += [(query, choice) for choice in question["choices"]]
    results = score(model, tokenizer, pairs, batch_size=batch_size)
    plain, normalised = [], []
    for span, question in zip(spans, questions, strict=True):
        sums = [results[index].log_probability for index in span]
        lengths = [len(choice) for choice in question["choices"]]
        per_character = [total / length for total, length in zip(sums, lengths, strict=True)]
        plain.append(sums.index(max(sums)) == question["gold"])
        normalised.append(per_character.index(max(per_character)) == question["gold"])
    return plain, normalised
