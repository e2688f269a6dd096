"""Requests that a tiny random model can be made to obey, and an editor whose settings do it in a second."""

from typing import Any

from tiny import tiny_model, tiny_tokenizer, training_text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_alphaedit import AlphaEditConfig, AlphaEditor, EditRequest


# The subject ends the prompt and the targets are one token each: the edited vector itself is what predicts them.
REQUESTS = [
    EditRequest("The capital of {}", "France", "music", "Paris", "capital"),
    EditRequest("We saw {}", "Italy", "city", "Rome", "seen"),
    EditRequest("Who is {}", "Ada Lovelace", "people", "mathematics", "is"),
]
CONFIG = AlphaEditConfig(
    layers=(2, 3), energy_share=0.9, l2=0.01, clamp_factor=4.0, value_steps=15, kl_factor=0.0, weight_decay=0.0,
    context_templates=("I said. {}",), cache_targets=False,
)  # fmt: skip
CORPUS = training_text() * 20
TOKENS = 2000


def tiny_editor(
    model: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None, **settings: Any
) -> AlphaEditor:
    """An editor with its second moments collected (once, then from the cache)."""
    editor = AlphaEditor(model or tiny_model("llama"), tokenizer or tiny_tokenizer(), CONFIG.replace(**settings))
    editor.prepare(CORPUS, num_tokens=TOKENS)
    return editor
