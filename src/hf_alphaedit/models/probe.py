"""What a block does with its down-projection's output, found by running it: structure alone doesn't tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_alphaedit.errors import UnsupportedModelError
from hf_alphaedit.models.experts import ExpertsSite, Routing, mixed_output, on_routing
from hf_alphaedit.models.hooks import inference_state, on_input, on_output, stop_after


if TYPE_CHECKING:
    from hf_alphaedit.models.architecture import Architecture

LENGTH, FIRST_TOKEN = 8, 100  # the probing text: ids that are ordinary tokens in every vocabulary of some size
CHANGED = [LENGTH // 2, LENGTH - 1]  # positions
# Largest share of a change that may be rounding. A norm in between leaves a share of one half and more.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
LOW_PRECISION_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Additivity:
    """How a change δ of a down-projection's output shows in its block's output.

    Attributes:
        scale: the c for which c δ comes closest to the change of the block's output.
        error: ‖change - c δ‖ / ‖change‖.
        additive: whether that error is rounding; then the block adds c times the output to the residual stream.
        experts_per_token: into how many blocks of its key a token goes; see `models.experts`.
    """

    scale: float
    error: float
    additive: bool
    experts_per_token: int = 1


@torch.no_grad()
def probe_additivity(architecture: Architecture, layers: Sequence[int]) -> dict[int, Additivity]:
    """Change the output of each layer's down-projection and compare what its block makes of it.

    One forward pass up to the last of these layers: row 0 of the batch is left alone, row i + 1 is changed in layer
    `layers[i]`, at two positions, since a gate may let through a share of its own at each. The last row ends in
    another token, which earlier positions must not notice. The model and the random state are as before.

    Raises:
        UnsupportedModelError: a down-projection doesn't run when its block does, the blocks' outputs are no hidden
            states of shape (batch, positions, hidden size), positions depend on later tokens, or a mixture of experts
            returns something else than the sum of its experts' down-projections by their shares.
    """
    model, rows = architecture.model, len(layers) + 2
    vocabulary = model.get_input_embeddings().num_embeddings
    token_ids = ((torch.arange(LENGTH) + FIRST_TOKEN) % vocabulary).expand(rows, -1)  # (B, T)
    token_ids = token_ids.contiguous().to(architecture.input_device)
    token_ids[-1, -1] = token_ids[0, 0]
    generator = torch.Generator().manual_seed(0)
    entered: dict[int, Tensor] = {}
    added: dict[int, Tensor] = {}
    changes: dict[int, Tensor] = {}
    seen_ahead: dict[int, float] = {}
    routed: dict[int, Routing] = {}
    unlike: dict[int, float] = {}

    def add(output: Tensor, row: int, layer: int) -> Tensor:
        by_row = output.reshape(rows, LENGTH, -1).clone()  # some families flatten (B, T, h) around the feed-forward
        if by_row.shape[-1] != architecture.hidden_size:
            raise UnsupportedModelError(
                f"{architecture.site(layer).name} has {by_row.shape[-1]} outputs where the residual stream has "
                f"{architecture.hidden_size}; set target_module to a matrix that writes to the residual stream"
            )
        before = by_row[row, CHANGED].clone()  # (2, h)
        if layer in routed:
            mixed = mixed_output(architecture.site(layer).module, routed[layer])  # (2, h)
            unlike[layer] = float((before.to(mixed.dtype) - mixed).norm() / mixed.norm())
        direction = torch.randn(before.shape, generator=generator).to(output.device)
        # As large as the residual stream, so that rounding there doesn't hide it.
        size = torch.maximum(entered[layer].to(output.device), before.float().norm(dim=-1, keepdim=True))  # (2, 1)
        by_row[row, CHANGED] += (direction / direction.norm(dim=-1, keepdim=True) * size).to(output.dtype)
        added[layer] = (by_row[row, CHANGED].float() - before.float()).flatten().cpu()
        return by_row.view_as(output)

    def compare(output: Tensor, row: int, layer: int) -> None:
        _require_hidden_states(output, rows, architecture, layer)
        early = output[[0, -1], 0].float()  # (2, h)
        seen_ahead[layer] = float((early[1] - early[0]).norm() / early[0].norm())
        changes[layer] = (output[row, CHANGED].float() - output[0, CHANGED].float()).flatten().cpu()

    with ExitStack() as stack:
        stack.enter_context(inference_state(model))
        for row, layer in enumerate(layers, start=1):
            site, module, block = architecture.site(layer), architecture.site(layer).module, architecture.blocks[layer]
            keep_norm = _keep_norm(entered, rows, architecture, layer)
            stack.enter_context(on_input(block, keep_norm))
            if isinstance(site, ExpertsSite):
                stack.enter_context(on_routing(module, _keep_routing(routed, rows, row, layer)))
            stack.enter_context(on_output(module, lambda out, row=row, layer=layer: add(out, row, layer)))
            stack.enter_context(on_output(block, lambda out, row=row, layer=layer: compare(out, row, layer)))
        with stop_after(architecture.blocks[layers[-1]]):
            model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids), use_cache=False)

    found = {}
    for layer in layers:
        name = architecture.site(layer).name
        if layer not in added:
            raise UnsupportedModelError(
                f"{name} doesn't run when block {layer} of {type(model).__name__} does (it is fused, skipped or one "
                "of several experts), so an edit of it might have no effect; set target_module to a module that runs"
            )
        dtype = architecture.site(layer).weight.dtype
        tolerance = TOLERANCE.get(dtype, LOW_PRECISION_TOLERANCE)
        if seen_ahead[layer] >= tolerance:  # not so for NaN, which damaged weights give and editing reports
            raise UnsupportedModelError(
                f"in block {layer} of {type(model).__name__} a token's hidden state depends on later tokens; only "
                "causal decoders can be edited (an encoder needs is_decoder=True in its config)"
            )
        if unlike.get(layer, 0.0) >= tolerance:
            raise UnsupportedModelError(
                f"what {name} makes of its keys is not what the experts return (relative difference "
                f"{unlike[layer]:.1e}); set target_module to a shared or dense matrix"
            )
        delta, change = added[layer], changes[layer]
        scale = float(change @ delta / (delta @ delta))
        error = float((change - scale * delta).norm() / change.norm().clamp_min(1e-30))
        experts_per_token = routed[layer].experts.shape[1] if layer in routed else 1
        found[layer] = Additivity(scale, error, error < tolerance, experts_per_token)
    return found


def _keep_routing(routed: dict[int, Routing], rows: int, row: int, layer: int) -> Callable[[Routing], None]:
    def at_changed(values: Tensor) -> Tensor:
        return values.reshape(rows, LENGTH, -1)[row, CHANGED]  # (2, x)

    return lambda routing: routed.__setitem__(layer, routing.map(at_changed))


def _keep_norm(
    entered: dict[int, Tensor], rows: int, architecture: Architecture, layer: int
) -> Callable[[Tensor], None]:
    def keep(hidden: Tensor) -> None:
        _require_hidden_states(hidden, rows, architecture, layer)
        entered[layer] = hidden[0, CHANGED].detach().float().norm(dim=-1, keepdim=True)  # (2, 1)

    return keep


def _require_hidden_states(hidden: Tensor, rows: int, architecture: Architecture, layer: int) -> None:
    wanted = (rows, LENGTH, architecture.hidden_size)
    if hidden.shape != wanted:
        raise UnsupportedModelError(
            f"block {layer} of {type(architecture.model).__name__} has hidden states of shape {tuple(hidden.shape)}; "
            f"{wanted}, (batch, positions, hidden size), is needed"
        )
