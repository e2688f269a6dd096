"""The closed-form update against the published formulas, written plainly in float64, keys and residuals as columns."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_alphaedit.algorithm.nullspace import SpectralFilter, Spectrum, hard_filter, ridge_filter, soft_filter
from hf_alphaedit.algorithm.update import LowRankUpdate, solve_update, spread_residual


DIMENSION, HIDDEN, NULL_RANK = 16, 7, 11
L2, SOFT_WEIGHT = 2.5, 40.0
EXACT = 1e-10
# New and past keys: dual and primal on either side of m = d, with and without a history.
SIZES = [(1, 0), (3, 0), (3, 5), (8, 8), (9, 8), (5, 30), (40, 0)]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def second_moment() -> Tensor:
    """C (d, d) float64 with eigenvalues over four orders of magnitude."""
    basis, _ = torch.linalg.qr(random(DIMENSION, DIMENSION, seed=0))
    return (basis * torch.logspace(-3, 1, DIMENSION, dtype=torch.float64)) @ basis.T


def projector() -> Tensor:
    """P (d, d) float64 on the `NULL_RANK` smallest directions of C, by singular vectors as published."""
    left, _, _ = torch.linalg.svd(second_moment())
    null = left[:, DIMENSION - NULL_RANK :]
    return null @ null.T


def problem(new: int, past: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """K₁ (d, n), K_p (d, p) or None, R (h, n)."""
    earlier = random(DIMENSION, past, seed=2) if past else None
    return random(DIMENSION, new, seed=1), earlier, random(HIDDEN, new, seed=3)


def published(new: Tensor, past: Tensor | None, residual: Tensor, projection: Tensor, l2: float = L2) -> Tensor:
    """Δ = R K₁ᵀ P (K_p K_pᵀ P + K₁ K₁ᵀ P + λ I)⁻¹, the paper's equation 14."""
    gram = new @ new.T if past is None else new @ new.T + past @ past.T
    inverse = torch.linalg.inv(gram @ projection + l2 * torch.eye(len(new), dtype=torch.float64))
    return residual @ new.T @ projection @ inverse


def constrained(new: Tensor, residual: Tensor, moment: Tensor, weight: float = SOFT_WEIGHT, l2: float = L2) -> Tensor:
    """Δ = R Kᵀ (α C + λ I + K Kᵀ)⁻¹, MEMIT's update with a ridge."""
    return residual @ new.T @ torch.linalg.inv(weight * moment + l2 * torch.eye(len(new)).double() + new @ new.T)


def solved(new: Tensor, past: Tensor | None, residual: Tensor, root: Callable[[Tensor], Tensor]) -> LowRankUpdate:
    """The library's update; it takes rows, and filtered keys."""
    return solve_update(root(new.T), None if past is None else root(past.T), residual.T, root)


def projecting(projection: Tensor, l2: float = L2) -> Callable[[Tensor], Tensor]:
    """k -> F^½ k for F = P/λ, in float64 (P is its own root)."""
    return lambda keys: keys @ projection / l2**0.5


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(("new", "past"), SIZES)
def test_update_is_the_published_one(new: int, past: int) -> None:
    keys, earlier, residual = problem(new, past)
    update = solved(keys, earlier, residual, projecting(projector()))
    assert update.inputs.shape == (new, DIMENSION)
    assert update.outputs.shape == (new, HIDDEN)
    assert relative(update.dense(), published(keys, earlier, residual, projector())) < EXACT


@pytest.mark.parametrize(("new", "past"), [(5, 11), (1, 15), (9, 7)])
def test_dual_and_primal_forms_agree(new: int, past: int) -> None:
    # One more past key that is zero changes nothing, but with it the edits outnumber the dimension.
    keys, earlier, residual = problem(new, past)
    padded = torch.cat([earlier, torch.zeros(DIMENSION, 1, dtype=torch.float64)], 1)
    root = projecting(projector())
    dual, primal = solved(keys, earlier, residual, root), solved(keys, padded, residual, root)
    assert new + past <= DIMENSION < new + padded.shape[1]
    assert relative(primal.dense(), dual.dense()) < EXACT


@pytest.mark.parametrize(("new", "past"), SIZES)
def test_update_stays_in_the_null_space(new: int, past: int) -> None:
    keys, earlier, residual = problem(new, past)
    delta = solved(keys, earlier, residual, projecting(projector())).dense()  # (h, d)
    assert relative(delta @ projector(), delta) < EXACT
    protected = (torch.eye(DIMENSION, dtype=torch.float64) - projector()) @ random(DIMENSION, 4, seed=9)
    assert (delta @ protected).norm() < EXACT * delta.norm() * protected.norm()


def test_a_large_ridge_leaves_nothing() -> None:
    keys, earlier, residual = problem(3, 5)
    delta = solved(keys, earlier, residual, projecting(projector(), l2=1e12)).dense()
    assert relative(1e12 * delta, residual @ keys.T @ projector()) < 1e-9  # so delta falls as 1/λ
    assert delta.norm() < 1e-9 * residual.norm()


def test_no_free_direction_leaves_nothing() -> None:
    keys, earlier, residual = problem(3, 5)
    nothing = torch.zeros(DIMENSION, DIMENSION, dtype=torch.float64)
    assert solved(keys, earlier, residual, projecting(nothing)).dense().count_nonzero() == 0


@pytest.mark.parametrize("new", [3, 16, 40])
def test_without_projector_and_history_it_is_ridge_regression(new: int) -> None:
    keys, _, residual = problem(new, 0)
    system = torch.cat([keys, L2**0.5 * torch.eye(DIMENSION, dtype=torch.float64)], 1).T  # (n + d, d)
    wanted = torch.cat([residual, torch.zeros(HIDDEN, DIMENSION, dtype=torch.float64)], 1).T  # (n + d, h)
    regression = torch.linalg.lstsq(system, wanted).solution.T  # (h, d)
    root = ridge_filter(DIMENSION, L2).root
    assert relative(solved(keys, None, residual, root).dense(), regression) < EXACT


def test_history_protects_past_keys() -> None:
    keys, earlier, residual = problem(3, 5)
    root = projecting(projector(), l2=1e-9)
    kept = solved(keys, earlier, residual, root).dense()
    free = solved(keys, None, residual, root).dense()
    for delta in (kept, free):
        assert relative(delta @ keys, residual) < 1e-6
    assert (kept @ earlier).norm() < 1e-6 * residual.norm()
    assert (free @ earlier).norm() > 0.1 * residual.norm()


def test_soft_filter_is_the_constrained_solve() -> None:
    keys, _, residual = problem(3, 0)
    moment = second_moment()
    values, vectors = torch.linalg.eigh(moment)
    exact_root = (vectors * (SOFT_WEIGHT * values + L2).rsqrt()) @ vectors.T
    expected = constrained(keys, residual, moment)
    assert relative(solved(keys, None, residual, lambda rows: rows @ exact_root).dense(), expected) < EXACT
    stored = soft_filter(Spectrum.of(moment), SOFT_WEIGHT, L2)  # its basis is kept in float32
    assert relative(solved(keys, None, residual, stored.root).dense(), expected) < 1e-5


def test_soft_filter_with_history() -> None:
    keys, earlier, residual = problem(3, 5)
    moment = second_moment()
    expected = constrained(keys, residual, moment + earlier @ earlier.T / SOFT_WEIGHT)
    stored = soft_filter(Spectrum.of(moment), SOFT_WEIGHT, L2)
    assert relative(solved(keys, earlier, residual, stored.root).dense(), expected) < 1e-5


def test_soft_inside_hard_is_the_constrained_solve_on_the_null_space() -> None:
    keys, earlier, residual = problem(3, 5)
    moment = second_moment()
    _, vectors = torch.linalg.eigh(moment)
    null = vectors[:, :NULL_RANK]  # (d, r)
    inside = constrained(null.T @ keys, residual, null.T @ (moment + earlier @ earlier.T / SOFT_WEIGHT) @ null)
    stored = soft_filter(Spectrum.of(moment), SOFT_WEIGHT, L2, NULL_RANK)
    delta = solved(keys, earlier, residual, stored.root).dense()
    assert relative(delta, inside @ null.T) < 1e-5
    assert relative(delta @ projector(), delta) < 1e-6


@pytest.mark.parametrize("null_rank", [3, 11])  # stored on the null side, and on the protected side
def test_hard_filter_gives_the_published_update(null_rank: int) -> None:
    keys, earlier, residual = problem(3, 5)
    spectrum = Spectrum.of(second_moment())
    null = spectrum.eigenvectors[:, :null_rank]
    spectral_filter = hard_filter(spectrum, null_rank, L2)
    assert spectral_filter.basis.shape[1] == min(null_rank, DIMENSION - null_rank)
    expected = published(keys, earlier, residual, null @ null.T)
    assert relative(solved(keys, earlier, residual, spectral_filter.root).dense(), expected) < 1e-5


@pytest.mark.parametrize(("new", "past"), [(2, 3), (3, 40)])  # dual, primal
@pytest.mark.parametrize("weights", [None, (0.5, 0.3, 0.2)], ids=["equal", "weighted"])
@pytest.mark.parametrize("past_weight", [1.0, 10.0])
def test_keys_in_several_contexts_are_a_weighted_least_squares_problem(
    new: int, past: int, weights: tuple[float, ...] | None, past_weight: float
) -> None:
    keys, earlier, residual = (
        random(new, 3, DIMENSION, seed=7),
        random(past, DIMENSION, seed=2),
        random(new, 4, seed=3),
    )
    shares = torch.tensor(weights or (1 / 3,) * 3, dtype=torch.float64)
    # min over Δ in the null space of Σ wᵢ ‖Δ kᵢ - r‖² + β Σ ‖Δ k_past‖² + λ ‖Δ‖²: one equation per key
    left, _, _ = torch.linalg.svd(second_moment())
    null = left[:, DIMENSION - NULL_RANK :]
    roots = shares.sqrt().repeat(new)[:, None]
    equations = torch.cat([roots * keys.flatten(0, 1), past_weight**0.5 * earlier]) @ null
    equations = torch.cat([equations, L2**0.5 * torch.eye(NULL_RANK, dtype=torch.float64)])
    wanted = torch.zeros(len(equations), 4, dtype=torch.float64)
    wanted[: 3 * new] = roots * residual.repeat_interleave(3, 0)
    expected = (null @ torch.linalg.lstsq(equations, wanted).solution).T  # (h, d)
    root = projecting(projector())
    update = solve_update(root(keys), root(earlier), residual, root, None if weights is None else shares, past_weight)
    assert update.inputs.shape == (new, DIMENSION)
    assert relative(update.dense(), expected) < EXACT


@pytest.mark.parametrize("new", [3, 40])
def test_one_context_is_the_plain_update(new: int) -> None:
    keys, earlier, residual = problem(new, 5)
    root = projecting(projector())
    alone = solve_update(root(keys.T)[:, None], root(earlier.T), residual.T, root, torch.ones(1))
    assert relative(alone.dense(), solved(keys, earlier, residual, root).dense()) < EXACT


@pytest.mark.parametrize(("new", "past"), [(3, 5), (5, 30)])
def test_dtype_of_the_factors(new: int, past: int) -> None:
    keys, earlier, residual = problem(new, past)
    spectral_filter: SpectralFilter = hard_filter(Spectrum.of(second_moment()), NULL_RANK, L2)
    wide = solved(keys, earlier, residual, spectral_filter.root)
    narrow = solved(keys.float(), earlier.float(), residual.float(), spectral_filter.root)
    assert wide.inputs.dtype == wide.outputs.dtype == wide.dense().dtype == torch.float64
    assert narrow.inputs.dtype == narrow.outputs.dtype == torch.float32
    # Rounding of the keys alone: the system isn't solved in float32, whose error would grow with its condition.
    assert relative(narrow.dense(), wide.dense()) < 1e-5


def test_inputs_are_not_changed() -> None:
    keys, earlier, residual = problem(3, 5)
    copies = [tensor.clone() for tensor in (keys, earlier, residual)]
    solved(keys, earlier, residual, lambda rows: rows)
    assert all(torch.equal(one, other) for one, other in zip((keys, earlier, residual), copies, strict=True))


def test_residual_is_spread_over_the_layers_left() -> None:
    # Layers that add exactly what they are asked for reach the target together, in equal parts.
    start, target = random(4, HIDDEN, seed=5), random(4, HIDDEN, seed=6)
    current, parts = start.clone(), []
    for layers_left in (3, 2, 1):
        parts.append(spread_residual(target, current, layers_left))
        current += parts[-1]
    torch.testing.assert_close(current, target)
    for part in parts:
        torch.testing.assert_close(part, (target - start) / 3)


@pytest.mark.parametrize(("edits", "contexts", "past"), [(1, 2, 0), (2, 3, 4), (4, 6, 0), (3, 6, 20)])
def test_separate_contexts_are_the_weighted_least_squares_update(edits: int, contexts: int, past: int) -> None:
    """Each context's key is a weighted column with the edit's residual: rank one per edit, the published solution."""
    keys = random(edits, contexts, DIMENSION, seed=5)
    residual, weights = random(edits, HIDDEN, seed=6), torch.tensor([0.5, *[0.5 / (contexts - 1)] * (contexts - 1)])
    earlier = random(DIMENSION, past, seed=7) if past else None
    root = projecting(projector())
    update = solve_update(root(keys), None if earlier is None else root(earlier.T), residual, root, weights)
    assert update.inputs.shape == (edits, DIMENSION)

    scale = weights.double().sqrt()[:, None]
    columns = (keys * scale).flatten(0, 1).T  # (d, n c)
    repeated = (residual[:, None] * scale).flatten(0, 1).T  # (h, n c)
    assert relative(update.dense(), published(columns, earlier, repeated, projector())) < 1e-7  # float32 weights


def test_equal_contexts_are_as_good_as_one() -> None:
    keys, residual = random(3, DIMENSION, seed=1), random(3, HIDDEN, seed=3)
    root = projecting(projector())
    several = solve_update(root(keys)[:, None].expand(-1, 4, -1), None, residual, root)
    assert relative(several.dense(), solve_update(root(keys), None, residual, root).dense()) < EXACT
