"""Rough estimates of the time and memory that an edit will take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate.utils import get_max_memory
from torch import nn

from hf_alphaedit.chunks import CPU_CHUNK, step_tokens
from hf_alphaedit.models.architecture import Architecture
from hf_alphaedit.models.encoding import EncodedRequest
from hf_alphaedit.target_rows import rows_per_step


if TYPE_CHECKING:
    from hf_alphaedit.editor import AlphaEditor

# Hidden-state-sized tensors that one decoder block keeps for the backward pass, its feed-forward part aside.
STATES_PER_BLOCK = 12
# Tensors as wide as the feed-forward part's inner layer: gate, activation, product.
INNER_STATES_PER_BLOCK = 3
# On an accelerator, a chunk of the target search is planned to take this share of what is free; more tokens than the
# larger of the two numbers bring nothing, and with fewer than the smaller one the products are slow anyway.
PLANNED_SHARE = 0.5
CHUNK_RANGE = (128, 16384)


def parameters_of(modules: Iterable[nn.Module]) -> int:
    """Number of parameters, wherever they are stored."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def editing_seconds(editor: AlphaEditor, encoded: Sequence[EncodedRequest], tokens_per_second: float) -> float:
    """Seconds for one batch, given how fast tokens went through the blocks up to the last edited layer.

    Multiplications per parameter and token decide: one forward and one backward pass from the last edited layer on
    for each step of the target search, and the walk over the edited layers, in which prompts run to the last of them
    each time, and contexts from one to the next.
    """
    layers, blocks = [site.layer for site in editor.sites()], editor.architecture.blocks
    edited = parameters_of(blocks[layers[0] : layers[-1] + 1])
    below = parameters_of(blocks[: layers[0]])
    rate = tokens_per_second * (below + edited)  # parameter-tokens in a second
    above = parameters_of(blocks[editor.architecture.resume_block(layers[-1]) :])
    head = parameters_of([editor.architecture.head])
    tokens = positions = prompts = contexts = 0
    for request in encoded:
        rows = rows_per_step(request, editor.config)
        tokens += step_tokens(request, rows)
        positions += (rows - 1) * len(request.target) + 1
        prompts += request.rows[0].subject + 1
        contexts += sum(row.subject + 1 for row in (*request.key_rows, *request.mentions))
    step = 2 * (above * tokens + head * positions)  # a backward pass without weight gradients costs a forward pass
    walk = (prompts + contexts) * below + (prompts * (len(layers) + 1) / 2 + contexts * 2) * edited
    return (editor.config.value_steps * step + walk) / rate


def chunk_tokens(architecture: Architecture, layer: int) -> int:
    """How many tokens of the target search at `layer` run side by side: a constant on CPUs, else what memory holds."""
    device = architecture.input_device
    if device.type == "cpu":
        return CPU_CHUNK
    free = get_max_memory()[torch.accelerator.current_device_index() if device.index is None else device.index]
    smallest, largest = CHUNK_RANGE
    return max(smallest, min(largest, int(PLANNED_SHARE * free) // _bytes_per_token(architecture, layer)))


def _bytes_per_token(architecture: Architecture, layer: int, predictions: float = 1.0) -> int:
    """Activations of one token of the target search in float32; `predictions` is how often a token predicts one."""
    inner = max(architecture.site(one).dimension * seen.experts_per_token for one, seen in architecture.probed.items())
    blocks = len(architecture.blocks) - architecture.resume_block(layer)
    states = STATES_PER_BLOCK * architecture.hidden_size + INNER_STATES_PER_BLOCK * inner
    vocabulary = architecture.model.config.get_text_config(decoder=True).vocab_size
    return int(4 * (blocks * states + 3 * predictions * vocabulary))


def editing_memory(editor: AlphaEditor, encoded: Sequence[EncodedRequest]) -> int:
    """Bytes beyond the loaded model: activations of the largest chunk, filters, second moments and base weights."""
    architecture, sites = editor.architecture, editor.sites()
    layer, rows = sites[-1].layer, rows_per_step(encoded[0], editor.config)
    everything = sum(step_tokens(request, rows) for request in encoded)
    predictions = sum((rows - 1) * len(request.target) + 1 for request in encoded) / everything
    tokens = min(chunk_tokens(architecture, layer), everything)
    activations = tokens * _bytes_per_token(architecture, layer, predictions)
    filters = sum(4 * 2 * len(site.blocks) * site.dimension**2 for site in sites)
    weights = sum(4 * 2 * site.shape[0] * site.shape[1] for site in sites)
    return int(activations + filters + weights)
