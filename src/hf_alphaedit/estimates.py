"""Rough estimates of the time and memory that an edit will take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import nn

from hf_alphaedit.chunks import LARGEST_CHUNK, suffix_length
from hf_alphaedit.models.encoding import EncodedRequest
from hf_alphaedit.target_rows import rows_per_step


if TYPE_CHECKING:
    from hf_alphaedit.editor import AlphaEditor

# Hidden-state-sized tensors that one decoder block keeps for the backward pass, its feed-forward part aside.
STATES_PER_BLOCK = 12
# Tensors as wide as the feed-forward part's inner layer: gate, activation, product.
INNER_STATES_PER_BLOCK = 3


def parameters_of(modules: Iterable[nn.Module]) -> int:
    """Number of parameters, wherever they are stored."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def editing_seconds(editor: AlphaEditor, encoded: Sequence[EncodedRequest], tokens_per_second: float) -> float:
    """Seconds for one batch, given how fast tokens went through the blocks up to the first edited layer.

    Multiplications per parameter and token decide: one forward and one backward pass from the last edited layer on
    for each step of the target search, and for each edited layer a pass over contexts and prompt.
    """
    layers, blocks = [site.layer for site in editor.sites()], editor.architecture.blocks
    rate = tokens_per_second * parameters_of(blocks[: layers[0] + 1])  # parameter-tokens in a second
    above = parameters_of(blocks[editor.architecture.resume_block(layers[-1]) :])
    head = parameters_of([editor.architecture.head])
    tokens = positions = passes = 0
    for request in encoded:
        suffixes = [len(row.token_ids) - row.subject for row in request.rows]
        rows = rows_per_step(request, editor.config)  # '<subject> is a' is one of them
        tokens += sum(suffixes) / len(suffixes) * (rows - 1) + 1
        positions += (rows - 1) * len(request.target) + 1
        passes += sum(row.subject + 1 for row in request.rows)
    step = 2 * (above * tokens + head * positions)  # a backward pass without weight gradients costs a forward pass
    walk = passes * parameters_of(blocks[: layers[-1] + 1]) + passes * len(layers) * parameters_of(
        blocks[layers[0] : layers[-1] + 1]
    )
    return (editor.config.value_steps * step + walk) / rate


def editing_memory(editor: AlphaEditor, encoded: Sequence[EncodedRequest]) -> int:
    """Bytes beyond the loaded model: activations of the largest chunk, filters, second moments and base weights."""
    architecture, sites = editor.architecture, editor.sites()
    inner = max(site.dimension * architecture.probed[site.layer].experts_per_token for site in sites)
    rows = rows_per_step(encoded[0], editor.config)
    everything = rows * sum(suffix_length(request) for request in encoded)
    tokens = min(LARGEST_CHUNK, everything)
    positions = tokens / everything * sum((rows - 1) * len(request.target) + 1 for request in encoded)
    blocks = len(architecture.blocks) - architecture.resume_block(sites[-1].layer)
    per_token = STATES_PER_BLOCK * architecture.hidden_size + INNER_STATES_PER_BLOCK * inner
    vocabulary = editor.model.config.get_text_config(decoder=True).vocab_size
    activations = 4 * (tokens * blocks * per_token + 3 * positions * vocabulary)
    filters = sum(4 * 2 * len(site.blocks) * site.dimension**2 for site in sites)
    weights = sum(4 * 2 * site.shape[0] * site.shape[1] for site in sites)
    return int(activations + filters + weights)
