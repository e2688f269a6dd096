"""The closed-form update of one weight (paper, section 3.3, equation 14), as factors.

With G = F^½ K (filtered keys, see `nullspace`) of all edits so far and R the residual of the new ones,

    Δᵀ = F^½ G (Gᵀ G + I)⁻¹ E Rᵀ        E selects the new columns.

For the hard filter F = P/λ this is the published Δ = R K₁ᵀP (K_p K_pᵀ P + K₁ K₁ᵀ P + λ I)⁻¹, because the solution of
that system lies in the range of P. The push-through identity G (Gᵀ G + I)⁻¹ = (G Gᵀ + I)⁻¹ G gives a system of the
size of the edits (dual) or of the keys (primal); both have the same solution.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRankUpdate:
    """Δ (h, d) = outputsᵀ · inputs, exactly of rank n at most.

    Attributes:
        inputs: (n, d) float32 (float64 from float64 keys), what each edit listens to.
        outputs: (n, h), the same dtype, what each edit adds: its residual.
    """

    inputs: Tensor
    outputs: Tensor

    def dense(self) -> Tensor:
        """Δ as (h, d) float64."""
        return self.outputs.double().T @ self.inputs.double()


def solve_update(
    new_keys: Tensor,
    past_keys: Tensor | None,
    residual: Tensor,
    root: Callable[[Tensor], Tensor],
    weights: Tensor | None = None,
    past_weight: float = 1.0,
) -> LowRankUpdate:
    """Solve for the update that adds `residual` at the new keys and nothing at the past ones.

    An edit may have several keys, one per context, that shall all get the same residual. Each is then a column of its
    own, weighted by the root of its weight, and since the columns share the residual, the edit still adds rank one.

    Args:
        new_keys: (n, d) filtered keys F^½ k of this batch, or (n, c, d) in c contexts.
        past_keys: (p, d) filtered keys of earlier batches, or None.
        residual: (n, h) what the weight's output still lacks at each key.
        root: the function k -> F^½ k on rows, `SpectralFilter.root`.
        weights: (c,) weights of the contexts, with sum 1; None for equal ones.
        past_weight: how much a change at a past key counts beside one at a new key; published: 1. A ridge λ weakens
            the protection of past keys along with the edit itself, so a large λ wants more than 1.

    Returns:
        The factors of Δ in the wider of float32 and the new keys' dtype; the system itself is solved in float64 with
        `torch.linalg.solve`.
    """
    dtype = torch.promote_types(new_keys.dtype, torch.float32)
    new_keys = (new_keys if new_keys.dim() == 3 else new_keys[:, None]).double()  # (n, c, d)
    edits, contexts, dimension = new_keys.shape
    roots = new_keys.new_full((contexts,), 1 / contexts) if weights is None else weights
    roots = roots.to(new_keys).sqrt()  # (c,)
    columns = (new_keys * roots[:, None]).flatten(0, 1)  # (n c, d)
    keys = columns if past_keys is None else torch.cat([past_weight**0.5 * past_keys.double(), columns])  # (m, d)
    count = len(keys)
    if count <= dimension:  # dual: m x m
        system = keys @ keys.T  # (m, m)
        system.diagonal().add_(1.0)
        selector = torch.zeros(count, edits, dtype=system.dtype, device=system.device)  # (m, n)
        selector[count - edits * contexts :] = torch.block_diag(*[roots[:, None]] * edits)
        inputs = torch.linalg.solve(system, selector).T @ keys  # (n, d)
    else:  # primal: d x d
        system = keys.T @ keys  # (d, d)
        system.diagonal().add_(1.0)
        wanted = (columns.unflatten(0, (edits, contexts)) * roots[:, None]).sum(1)  # (n, d)
        inputs = torch.linalg.solve(system, wanted.T).T  # (n, d)
    return LowRankUpdate(root(inputs).to(dtype), residual.to(dtype))


def spread_residual(targets: Tensor, current: Tensor, layers_left: int) -> Tensor:
    """R = (Z - H) / layers_left (n, h): what this layer takes on; the last one takes all that remains.

    Source: MEMIT's spread over layers, which AlphaEdit keeps.

    Args:
        targets: (n, h) the values Z that make the model say the new targets.
        current: (n, h) the values H that the model has now, with the layers below edited already.
        layers_left: layers that share what is missing, this one included.
    """
    return (targets - current) / layers_left
