"""Search of the target values: Adam on one delta per request, all requests side by side (paper, equation 3).

Requests don't see each other: Adam works coordinate by coordinate and the loss is a sum, so a batch gives what one
request at a time gives, up to the order of floating-point sums.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_alphaedit.algorithm.objective import TargetLoss


ADAM_EPSILON = 1e-8


@dataclass(frozen=True)
class DeltaSearch:
    """Result of the search.

    Attributes:
        delta: (n, h) float32, to be added to each request's value.
        losses: (steps, n) float32, total loss at each forward pass; NaN once a request is finished.
        steps: (n,) int64, updates made for each request.
        likelihood: (n,) float32, the last negative log-likelihood seen, in nats per token.
        argmax: (n,) bool, whether the whole target was the argmax in every row at the last look.
    """

    delta: Tensor
    losses: Tensor
    steps: Tensor
    likelihood: Tensor
    argmax: Tensor


def search_delta(
    evaluate: Callable[[Tensor, Tensor], TargetLoss],
    initial_norm: Tensor,
    hidden_size: int,
    *,
    steps: int,
    learning_rate: float,
    betas: tuple[float, float],
    clamp_factor: float,
    stop_loss: float,
    stop_at_argmax: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> DeltaSearch:
    """Minimise `evaluate` over one delta per request.

    Args:
        evaluate: (delta (m, h), active (m,)) -> loss of these requests; `active` holds their indices, so that the
            callee can drop the rows of finished ones.
        initial_norm: (n,) float32, norm of the vectors that the deltas are added to.
        hidden_size: h, length of those vectors.
        steps: forward passes; the last makes no update, so there are `steps - 1` updates at most, as published.
        learning_rate: Adam's.
        betas: Adam's decay of the average gradient and of the average squared gradient.
        clamp_factor: a delta's norm stays at or below this many times its `initial_norm`.
        stop_loss: a request is finished once its total loss is below this.
        stop_at_argmax: a request is also finished once its whole target is the argmax in every row.
        on_step: called with (step, number of requests still active) after each forward pass.

    Raises:
        FloatingPointError: a loss is NaN or infinite; the message gives the requests' indices.
    """
    count, device = initial_norm.numel(), initial_norm.device
    delta = torch.zeros(count, hidden_size, device=device)  # (n, h)
    first_moment, second_moment = torch.zeros_like(delta), torch.zeros_like(delta)  # (n, h)
    losses = torch.full((steps, count), float("nan"), device=device)
    updates = torch.zeros(count, dtype=torch.int64, device=device)
    likelihood = torch.full((count,), float("nan"), device=device)
    argmax = torch.zeros(count, dtype=torch.bool, device=device)
    active = torch.arange(count, device=device)

    for step in range(steps):
        candidate = delta[active].requires_grad_()  # (m, h)
        loss = evaluate(candidate, active)
        total = loss.total.detach()
        if not torch.isfinite(total).all():
            bad = active[~torch.isfinite(total)].tolist()
            raise FloatingPointError(f"the loss of requests {bad} is not finite at step {step}")
        losses[step, active], likelihood[active], argmax[active] = total, loss.likelihood, loss.argmax
        if on_step is not None:
            on_step(step, len(active))
        finished = total < stop_loss  # (m,)
        if stop_at_argmax:
            finished |= loss.argmax
        if step == steps - 1 or bool(finished.all()):
            break
        (gradient,) = torch.autograd.grad(loss.total.sum(), candidate)  # (m, h)
        gradient, active = gradient[~finished], active[~finished]

        first_moment[active] = betas[0] * first_moment[active] + (1 - betas[0]) * gradient
        second_moment[active] = betas[1] * second_moment[active] + (1 - betas[1]) * gradient.square()
        mean = first_moment[active] / (1 - betas[0] ** (step + 1))
        scale = (second_moment[active] / (1 - betas[1] ** (step + 1))).sqrt() + ADAM_EPSILON
        moved = delta[active] - learning_rate * mean / scale  # (m, h)

        limit = clamp_factor * initial_norm[active]  # (m,)
        norm = moved.norm(dim=-1)
        delta[active] = moved * (limit / norm).clamp(max=1.0)[:, None]
        updates[active] += 1
    return DeltaSearch(delta, losses, updates, likelihood, argmax)
