"""What the published procedure reads: settings, context templates, token rows, and tensors from inside the model.

Part of the baseline (see `reference.py`); it shares nothing with the library.
"""

import unicodedata
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


SENTENCES_PER_PASS = 128
Row = tuple[list[int], int]  # token ids, index of the subject's last token


@dataclass(frozen=True)
class Settings:
    """Published settings, those for Llama-3-8B. `v_num_grad_steps` counts forwards; updates are one fewer."""

    layers: tuple[int, ...] = (4, 5, 6, 7, 8)
    v_num_grad_steps: int = 25
    v_lr: float = 0.1
    v_loss_layer: int | None = None  # None: the last block
    v_weight_decay: float = 0.5
    clamp_norm_factor: float = 0.75
    kl_factor: float = 0.0625
    stop_loss: float = 0.05
    l2: float = 10.0
    block: str = "model.layers.{}"
    down_projection: str = "model.layers.{}.mlp.down_proj"
    final_norm: str = "model.norm"
    head: str = "lm_head"


def generate_contexts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, length: int = 10, top_k: int = 5, seed: int = 0
) -> list[list[str]]:
    """Context templates: the bare one, and five sampled continuations of `length` tokens in all, seed word included.

    As published, special tokens stay in the text (except GPT-2's end of text). Sampling uses its own generator.
    """
    generator = torch.Generator().manual_seed(seed)
    contexts = []
    for start in ("The", "Therefore", "Because", "I", "You"):
        ids = tokenizer(start)["input_ids"]
        while len(ids) < length:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[
                    0, -1
                ]  # (V,)
            probabilities, candidates = logits.float().softmax(-1).cpu().topk(top_k)  # (top_k,)
            ids.append(int(candidates[torch.multinomial(probabilities, 1, generator=generator)]))
        text = (
            unicodedata.normalize("NFKD", str(tokenizer.decode(ids))).replace("\n\n", " ").replace("<|endoftext|>", "")
        )
        contexts.append(text.replace("{", " ").replace("}", " ") + ". {}")
    return [["{}"], contexts]


def encode_row(tokenizer: PreTrainedTokenizerBase, context: str, prompt: str, subject: str) -> Row:
    """Token ids of context(prompt(subject)) and the index of the token that holds the subject's last character."""
    before_prompt, after_prompt = context.split("{}")
    before_subject, after_subject = prompt.split("{}")
    text = before_prompt + before_subject + subject + after_subject + after_prompt
    last_character = len(before_prompt) + len(before_subject) + len(subject) - 1
    encoding = tokenizer(text, return_offsets_mapping=True)
    # A character split over several byte tokens belongs to all of them; the last one completes it.
    holders = [i for i, (start, end) in enumerate(encoding["offset_mapping"]) if start <= last_character < end]
    if not holders:
        raise ValueError(
            f"No token holds the last character of the subject {subject!r} in {text!r}; trim the subject."
        )
    return list(encoding["input_ids"]), holders[-1]


def encode_target(tokenizer: PreTrainedTokenizerBase, target: str) -> list[int]:
    """Target ids without special tokens; one space is put before the target if it starts with none (as published)."""
    if not target:
        raise ValueError("target_new is empty; give the text that the model shall say.")
    return list(tokenizer(target if target[0] == " " else f" {target}", add_special_tokens=False)["input_ids"])


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Rows of ids to `input_ids` and `attention_mask`, both (rows, longest). Pads are masked, so their id is 0."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


class _Stop(Exception):
    """Ends a forward pass behind the hooked module."""


def tensor_of(output: Tensor | tuple) -> Tensor:
    """The hidden states (rows, tokens, h) of a block, which returns them alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def hook(module: nn.Module, function: Callable) -> Generator[None, None, None]:
    """A forward hook on `module` for the length of the block."""
    handle = module.register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def run_and_capture(
    model: PreTrainedModel, name: str, batch: Mapping[str, Tensor], *, inputs: bool, stop_early: bool = False
) -> Tensor:
    """Input or output (rows, tokens, width) of the module called `name` in one forward pass over `batch`."""
    captured: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple, output: Tensor | tuple) -> None:
        captured.append(arguments[0] if inputs else tensor_of(output))
        if stop_early:
            raise _Stop

    with hook(model.get_submodule(name), keep), suppress(_Stop):
        model(**batch, use_cache=False)
    return captured[0]


def at_subjects(model: PreTrainedModel, name: str, rows: Sequence[Row], *, inputs: bool) -> Tensor:
    """Input or output (rows, width) of a module at each row's subject token, whole model, 128 sentences a pass."""
    parts = []
    for start in range(0, len(rows), SENTENCES_PER_PASS):
        ids, subjects = zip(*rows[start : start + SENTENCES_PER_PASS], strict=True)
        captured = run_and_capture(model, name, pad_right(ids, model.device), inputs=inputs)
        parts.append(captured[torch.arange(len(ids)), torch.tensor(subjects)].float())
    return torch.cat(parts)
