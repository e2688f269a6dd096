"""The batched search against `torch.optim.Adam`, one request at a time, on losses whose minimum is known."""

import pytest
import torch
from torch import Tensor

from hf_alphaedit.algorithm.objective import TargetLoss
from hf_alphaedit.algorithm.optimize import DeltaSearch, search_delta


HIDDEN = 6
SETTINGS = {"learning_rate": 0.3, "betas": (0.7, 0.9), "clamp_factor": 0.75, "stop_loss": 0.0}


class Bowls:
    """Request i has the loss Σ cᵢ (delta - minimumᵢ)²; keeps what it was asked."""

    def __init__(self, count: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.minimum = torch.randn(count, HIDDEN, generator=generator)
        self.curvature = torch.rand(count, HIDDEN, generator=generator) + 0.2
        self.norm = torch.rand(count, generator=generator) + 0.5
        self.argmax = torch.zeros(count, dtype=torch.bool)
        self.asked: list[tuple[Tensor, Tensor]] = []

    def __call__(self, delta: Tensor, active: Tensor) -> TargetLoss:
        self.asked.append((delta.detach().clone(), active.clone()))
        total = (self.curvature[active] * (delta - self.minimum[active]).square()).sum(-1)
        zero = torch.zeros_like(total).detach()
        return TargetLoss(total, total.detach() / 2, zero, zero, self.argmax[active])

    def search(self, **changes: object) -> DeltaSearch:
        options = {"steps": 12, **SETTINGS, **changes}
        return search_delta(self, self.norm, HIDDEN, **options)


def adam(bowls: Bowls, index: int, steps: int, clamp_factor: float) -> list[Tensor]:
    """The published loop for one request: every delta that is looked at."""
    delta = torch.zeros(HIDDEN, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=SETTINGS["learning_rate"], betas=SETTINGS["betas"])
    looked_at = []
    for step in range(steps):
        looked_at.append(delta.detach().clone())
        loss = (bowls.curvature[index] * (delta - bowls.minimum[index]).square()).sum()
        if step == steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        largest = clamp_factor * bowls.norm[index]
        if delta.norm() > largest:
            with torch.no_grad():
                delta.mul_(largest / delta.norm())
    return looked_at


@pytest.mark.parametrize("clamp_factor", [0.4, 1e9], ids=["clamped", "free"])
def test_each_step_is_adams(clamp_factor: float) -> None:
    bowls = Bowls(1)
    result = bowls.search(clamp_factor=clamp_factor)
    expected = adam(bowls, 0, 12, clamp_factor)
    assert len(bowls.asked) == len(expected) == 12
    for (delta, _), wanted in zip(bowls.asked, expected, strict=True):
        torch.testing.assert_close(delta[0], wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(result.delta, bowls.asked[-1][0])
    assert result.steps.tolist() == [11]
    reached = [norm >= 0.999 * clamp_factor * bowls.norm[0] for norm in map(torch.linalg.norm, expected)]
    assert any(reached) == (clamp_factor < 1)


def test_one_forward_pass_makes_no_update() -> None:
    bowls = Bowls(3)
    result = bowls.search(steps=1)
    assert result.delta.count_nonzero() == 0
    assert result.steps.tolist() == [0, 0, 0]
    assert len(bowls.asked) == 1
    assert torch.isfinite(result.losses).all()


@pytest.mark.parametrize("clamp_factor", [1e-3, 0.3])
def test_the_clamp_is_kept_at_every_step(clamp_factor: float) -> None:
    bowls = Bowls(8)
    result = bowls.search(clamp_factor=clamp_factor, steps=20)
    limit = clamp_factor * bowls.norm
    for delta, active in bowls.asked:
        assert (delta.norm(dim=-1) <= limit[active] * (1 + 1e-6)).all()
    torch.testing.assert_close(result.delta.norm(dim=-1), limit)  # the minima lie outside


def test_a_batch_is_one_request_at_a_time() -> None:
    bowls = Bowls(7)
    stop = 0.5  # some get there, at different steps
    together = bowls.search(stop_loss=stop, steps=25, clamp_factor=4.0)
    assert len(set(together.steps.tolist())) > 3
    for index in range(7):
        alone = Bowls(7)
        for name in ("minimum", "curvature", "norm", "argmax"):
            setattr(alone, name, getattr(alone, name)[index : index + 1])
        result = alone.search(stop_loss=stop, steps=25, clamp_factor=4.0)
        torch.testing.assert_close(result.delta[0], together.delta[index], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(result.losses[:, 0], together.losses[:, index], equal_nan=True)
        for name in ("steps", "likelihood", "argmax"):
            torch.testing.assert_close(getattr(result, name)[0], getattr(together, name)[index])


def test_a_finished_request_is_left_alone() -> None:
    bowls = Bowls(3)
    bowls.minimum[1] = 0.05  # near the start: done after the first look
    bowls.curvature[1] = 1.0
    result = bowls.search(stop_loss=0.1, steps=6)
    assert result.steps.tolist() == [5, 0, 5]
    assert result.delta[1].count_nonzero() == 0
    assert [active.tolist() for _, active in bowls.asked] == [[0, 1, 2]] + [[0, 2]] * 5
    assert result.losses[0].isfinite().all()
    assert result.losses[1:, 1].isnan().all()
    assert result.losses[:, [0, 2]].isfinite().all()
    assert result.likelihood[1] == result.losses[0, 1] / 2


def test_the_search_ends_when_all_are_finished() -> None:
    bowls = Bowls(2)
    steps: list[tuple[int, int]] = []
    result = bowls.search(stop_loss=1e9, on_step=lambda *seen: steps.append(seen))
    assert steps == [(0, 2)]
    assert result.steps.tolist() == [0, 0]


def test_stopping_at_the_argmax_is_a_choice() -> None:
    bowls = Bowls(3)
    bowls.argmax[2] = True
    assert bowls.search(steps=4).steps.tolist() == [3, 3, 3]
    result = bowls.search(steps=4, stop_at_argmax=True)
    assert result.steps.tolist() == [3, 3, 0]
    assert result.argmax.tolist() == [False, False, True]


def test_steps_are_told() -> None:
    bowls = Bowls(3)
    bowls.minimum[0] = 0.0
    steps: list[tuple[int, int]] = []
    bowls.search(stop_loss=1e-3, steps=4, on_step=lambda *seen: steps.append(seen))
    assert steps == [(0, 3), (1, 2), (2, 2), (3, 2)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_request(value: float) -> None:
    bowls = Bowls(4)
    bowls.minimum[0] = 0.0  # finished and gone when it happens: indices are those of the caller

    def broken(delta: Tensor, active: Tensor) -> TargetLoss:
        loss = bowls(delta, active)
        if len(bowls.asked) == 3:
            loss.total.data[active == 2] = value
        return loss

    with pytest.raises(FloatingPointError, match=r"requests \[2\] is not finite at step 2"):
        search_delta(broken, bowls.norm, HIDDEN, steps=9, **{**SETTINGS, "stop_loss": 1e-3})


def test_the_callers_graph_and_flags_are_left_alone() -> None:
    bowls = Bowls(2)
    bowls.curvature.requires_grad_()  # stands for a model's parameter
    result = bowls.search(steps=3)
    assert bowls.curvature.grad is None
    assert not result.delta.requires_grad
    assert result.delta.dtype == torch.float32
