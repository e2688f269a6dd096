"""What the model really writes: greedy or seeded top-k continuations of many prompts at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_alphaedit.errors import RequestError
from hf_alphaedit.evaluation.forward import batches, check_length, logits_at, padded
from hf_alphaedit.models.encoding import encode_with_spans
from hf_alphaedit.models.hooks import inference_state
from hf_alphaedit.models.weights import input_device


NEW_TOKENS = 24


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = NEW_TOKENS,
    max_tokens: int | None = None,
    top_k: int = 1,
    seed: int = 0,
    chat: bool = False,
    batch_size: int | None = None,
    on_first: Callable[[list[int], Tensor], None] | None = None,
) -> list[str]:
    """Continue each prompt; returns the continuations alone.

    The decoding is this function's own: the model's `generation_config` (penalties, temperature, ...) is neither used
    nor changed, except that its end-of-text tokens end a continuation. A continuation doesn't depend on what else is
    in the batch, up to the rounding of matrix products.

    Args:
        model: a causal language model; its weights and settings stay as they are.
        tokenizer: its padding settings are neither used nor changed.
        prompts: texts to continue.
        max_new_tokens: tokens of each continuation at most.
        max_tokens: tokens of prompt and continuation together, where given.
        top_k: draw from this many most probable tokens; 1 is greedy.
        seed: of the draws; each prompt has draws of its own, by its index. The global random state isn't touched.
        chat: let each prompt be the user's message in the chat template, and return the reply.
        batch_size: prompts at once; None lets their length decide.
        on_first: called once for each batch with the prompts' indices and the logits (b, vocabulary), float32, of the
            token that follows each.

    Raises:
        RequestError: a prompt is empty or too long for the model's positions, or there is no chat template.
    """
    if not prompts:
        return []
    texts = [as_chat(tokenizer, prompt) for prompt in prompts] if chat else list(prompts)
    rows, limits = [], []
    for text in texts:
        # a chat template writes its special tokens into the text
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] if chat else encode_with_spans(tokenizer, text)[0]
        if not ids:
            raise RequestError(f"the prompt {text!r} has no token; give it some text")
        rows.append(list(ids))
        limits.append(max_new_tokens if max_tokens is None else min(max_new_tokens, max_tokens - len(ids)))
        check_length(model, len(ids) + limits[-1], text)
    draws = torch.stack([_draws(seed, index, max_new_tokens) for index in range(len(rows))])  # (prompts, new)
    ends = end_tokens(model, tokenizer)
    result = [""] * len(rows)
    with torch.no_grad(), inference_state(model), tqdm(total=len(rows), desc="Generating", name="hf_alphaedit") as bar:
        for batch in batches([len(row) + max_new_tokens for row in rows], batch_size):
            chosen = [rows[index] for index in batch]
            new = _continue(
                model, chosen, [limits[index] for index in batch], ends, draws[batch], top_k,
                partial(on_first, batch) if on_first else None,
            )  # fmt: skip
            for index, prompt, continuation in zip(batch, chosen, new, strict=True):
                result[index] = _decoded(tokenizer, prompt, continuation)
            bar.update(len(batch))
    return result


def as_chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt as the user's message, up to where the assistant's reply begins.

    A question is asked as it is; an unfinished sentence is put as one to complete.
    """
    if not tokenizer.chat_template:
        raise RequestError(f"chat=True needs a chat template, and {type(tokenizer).__name__} has none; set chat=False")
    message = prompt if prompt.rstrip().endswith(("?", "？")) else f"Complete this sentence: {prompt}"
    messages = [{"role": "user", "content": message}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that the model's generation settings, its config or its tokenizer call the end of a text."""
    configured = [model.config.get_text_config(decoder=True).eos_token_id, tokenizer.eos_token_id]
    if model.generation_config is not None:
        configured.append(model.generation_config.eos_token_id)
    return frozenset(
        token for item in configured if item is not None for token in (item if isinstance(item, list) else [item])
    )


def _draws(seed: int, index: int, count: int) -> Tensor:
    """(count,) uniform numbers that depend on the seed and the prompt's index, not on the batch."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + index))


def _continue(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    limits: Sequence[int],
    ends: frozenset[int],
    draws: Tensor,
    top_k: int,
    on_first: Callable[[Tensor], None] | None,
) -> list[list[int]]:
    """Token by token, prompts padded on the left so that every row's next token is in the last column."""
    device = input_device(model)
    inputs = padded(rows, device, side="left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]  # (b, t) each
    takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters
    everyone = torch.arange(len(rows), device=device)
    new: list[list[int]] = [[] for _ in rows]
    open_rows = {index for index, limit in enumerate(limits) if limit > 0}
    cache, fresh = None, ids.shape[1]  # how many of the last columns the model hasn't seen
    for step in range(max(limits)):
        if not open_rows:
            break
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -fresh:]  # learned positions would be silently wrong
        logits, output = logits_at(
            model, everyone, torch.full_like(everyone, fresh - 1), input_ids=ids[:, -fresh:], attention_mask=mask,
            past_key_values=cache, use_cache=True, **({"position_ids": positions} if takes_positions else {}),
        )  # fmt: skip
        if on_first and step == 0:
            on_first(logits)
        tokens = _pick(logits, draws[:, step], top_k)  # (b,)
        for index, token in enumerate(tokens.tolist()):
            if index in open_rows:
                if token not in ends:
                    new[index].append(token)
                if token in ends or len(new[index]) == limits[index]:
                    open_rows.discard(index)
        ids = torch.cat([ids, tokens.to(device)[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        cache = output.get("past_key_values")
        fresh = ids.shape[1] if cache is None else 1  # a model without a cache reads everything again
    return new


def _pick(logits: Tensor, draws: Tensor, top_k: int) -> Tensor:
    """(b,) tokens from logits (b, V): the argmax, or the draw's place in the distribution over the top k."""
    if top_k == 1:
        return logits.argmax(-1)
    values, tokens = logits.topk(min(top_k, logits.shape[-1]))  # (b, k)
    reached = values.softmax(-1).cumsum(-1)
    place = torch.searchsorted(reached, draws.to(reached)[:, None].contiguous()).clamp_max(tokens.shape[-1] - 1)
    return tokens.gather(-1, place)[:, 0]


def _decoded(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The new tokens as text, with the space that joins them to the prompt; a character cut in half is dropped."""

    def decoded(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    before, whole = decoded(list(prompt)), decoded([*prompt, *new])
    text = whole[len(before) :] if whole.startswith(before) else decoded(list(new))
    return text.rstrip("\N{REPLACEMENT CHARACTER}")
