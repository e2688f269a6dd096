"""Spectrum, threshold rules and filters against the dense formulas in float64."""

from typing import Any

import pytest
import torch

from hf_alphaedit.algorithm.nullspace import SpectralFilter, Spectrum, hard_filter, ridge_filter, soft_filter


DIMENSION = 24
L2 = 3.0


def second_moment(rank: int = DIMENSION, seed: int = 0) -> torch.Tensor:
    """C (d, d) float32 of `rank`, with eigenvalues over several orders of magnitude, as real keys have."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(DIMENSION, DIMENSION, generator=generator, dtype=torch.float64))
    eigenvalues = torch.zeros(DIMENSION, dtype=torch.float64)
    eigenvalues[:rank] = torch.logspace(1, -4, rank, dtype=torch.float64)
    return ((basis * eigenvalues) @ basis.T).float()


def dense(filter_: SpectralFilter) -> torch.Tensor:
    """F^½ as a matrix (d, d) float64: what `root` does to the unit vectors."""
    return filter_.root(torch.eye(DIMENSION, dtype=torch.float64))


def published_projector(matrix: torch.Tensor, threshold: float) -> torch.Tensor:
    """P as the published procedure builds it: singular vectors whose singular value is below the threshold."""
    left, singular, _ = torch.linalg.svd(matrix.double())
    null = left[:, singular < threshold]
    return null @ null.T


def test_spectrum_is_the_decomposition_in_ascending_order() -> None:
    matrix = second_moment()
    spectrum = Spectrum.of(matrix)
    assert spectrum.eigenvalues.dtype == spectrum.eigenvectors.dtype == torch.float64
    assert (spectrum.eigenvalues.diff() >= 0).all()
    rebuilt = (spectrum.eigenvectors * spectrum.eigenvalues) @ spectrum.eigenvectors.T
    torch.testing.assert_close(rebuilt, matrix.double(), rtol=0, atol=1e-6)


def test_eigenvalues_of_a_singular_moment_are_not_negative() -> None:
    spectrum = Spectrum.of(second_moment(rank=5))
    assert (spectrum.eigenvalues >= 0).all()
    assert (spectrum.eigenvalues[: DIMENSION - 5] < 1e-6).all()


def test_ranks_of_a_known_spectrum() -> None:
    spectrum = Spectrum.of(torch.diag(torch.tensor([4.0, 1.0, 2.0, 3.0])))
    assert [spectrum.null_rank_by_threshold(value) for value in (0.5, 1.0, 1.5, 4.0, 9.0)] == [0, 0, 1, 3, 4]
    assert [spectrum.null_rank_by_energy(share) for share in (0.05, 0.1, 0.29, 0.31, 0.999)] == [0, 1, 1, 2, 3]


def test_energy_rule_takes_as_many_directions_as_the_share_allows() -> None:
    spectrum = Spectrum.of(second_moment())
    for share in (0.001, 0.03, 0.3, 0.9):
        rank = spectrum.null_rank_by_energy(share)
        total = spectrum.eigenvalues.sum()
        assert spectrum.eigenvalues[:rank].sum() <= share * total < spectrum.eigenvalues[: rank + 1].sum()


def test_energy_rule_does_not_let_massive_activations_open_the_whole_space() -> None:
    values = torch.arange(1.0, 301.0)
    shares = (0.05, 0.3, 0.999)
    plain = [Spectrum.of(torch.diag(values)).null_rank_by_energy(share) for share in shares]
    values[-3:] *= 1e6  # the strongest one in every hundred
    massive = [Spectrum.of(torch.diag(values)).null_rank_by_energy(share) for share in shares]
    assert massive == plain
    assert massive == sorted(massive)
    assert massive[-1] < 297


def test_energy_rule_does_not_depend_on_the_scale_of_the_keys() -> None:
    matrix = second_moment()
    ranks = {Spectrum.of(matrix * scale).null_rank_by_energy(0.1) for scale in (1e-6, 1.0, 1e6)}
    assert len(ranks) == 1


@pytest.mark.parametrize("threshold", [1e-3, 2e-2, 1.0])
def test_hard_filter_is_the_published_projector(threshold: float) -> None:
    matrix = second_moment()
    spectrum = Spectrum.of(matrix)
    rank = spectrum.null_rank_by_threshold(threshold)
    projector = dense(hard_filter(spectrum, rank, L2)) * L2**0.5
    torch.testing.assert_close(projector, published_projector(matrix, threshold), rtol=0, atol=1e-6)
    torch.testing.assert_close(projector, projector.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(projector @ projector, projector, rtol=0, atol=1e-6)
    assert projector.trace().item() == pytest.approx(rank, abs=1e-5)
    protected = spectrum.eigenvectors[:, rank:]
    assert (projector @ protected).norm() < 1e-5


@pytest.mark.parametrize("rank", [0, 1, DIMENSION // 2, DIMENSION // 2 + 1, DIMENSION - 1, DIMENSION])
def test_the_thinner_side_is_stored(rank: int) -> None:
    spectrum = Spectrum.of(second_moment())
    filter_ = hard_filter(spectrum, rank, L2)
    assert filter_.basis.shape == (DIMENSION, min(rank, DIMENSION - rank))
    assert filter_.null_rank == rank
    null = spectrum.eigenvectors[:, :rank]
    torch.testing.assert_close(dense(filter_), null @ null.T / L2**0.5, rtol=0, atol=1e-6)


def test_soft_filter_is_the_inverse_of_the_constraint() -> None:
    matrix = second_moment()
    root = dense(soft_filter(Spectrum.of(matrix), 20.0, L2))
    expected = torch.linalg.inv(20.0 * matrix.double() + L2 * torch.eye(DIMENSION, dtype=torch.float64))
    torch.testing.assert_close(root @ root, expected, rtol=0, atol=1e-6)


def test_soft_filter_inside_the_hard_one_is_zero_on_what_is_protected() -> None:
    matrix = second_moment()
    spectrum = Spectrum.of(matrix)
    rank = spectrum.null_rank_by_energy(0.3)
    root = dense(soft_filter(spectrum, 20.0, L2, rank))
    assert (root @ spectrum.eigenvectors[:, rank:]).norm() < 1e-5
    null = spectrum.eigenvectors[:, :rank]
    expected = (null / (20.0 * spectrum.eigenvalues[:rank] + L2)) @ null.T
    torch.testing.assert_close(root @ root, expected, rtol=0, atol=1e-6)


def test_soft_filter_does_not_store_directions_without_energy() -> None:
    spectrum = Spectrum.of(second_moment(rank=5))
    filter_ = soft_filter(spectrum, 1.0, L2)
    assert filter_.basis.shape[1] == 5
    assert filter_.null_rank == DIMENSION


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_soft_filter_inside_the_hard_one_stores_the_thinner_side(share: float) -> None:
    spectrum = Spectrum.of(second_moment(rank=5))
    rank = spectrum.null_rank_by_energy(share)
    root = dense(soft_filter(spectrum, 1.0, L2, rank))
    null = spectrum.eigenvectors[:, :rank]
    expected = (null / (spectrum.eigenvalues[:rank] + L2)) @ null.T
    torch.testing.assert_close(root @ root, expected, rtol=0, atol=1e-6)


def test_ridge_filter_protects_nothing() -> None:
    filter_ = ridge_filter(DIMENSION, L2)
    torch.testing.assert_close(dense(filter_) * L2**0.5, torch.eye(DIMENSION, dtype=torch.float64))
    assert filter_.basis.numel() == 0
    assert filter_.null_rank == DIMENSION


@pytest.mark.parametrize("build", [lambda s: hard_filter(s, 9, L2), lambda s: soft_filter(s, 5.0, L2)])
def test_filtered_keys_have_the_wider_of_float32_and_their_dtype(build: Any) -> None:
    filter_ = build(Spectrum.of(second_moment()))
    keys = torch.randn(7, DIMENSION, generator=torch.Generator().manual_seed(1))
    expected = keys.double() @ dense(filter_).T
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        filtered = filter_.root(keys.to(dtype))
        assert (filtered.dtype, filtered.shape) == (wanted, keys.shape)
        torch.testing.assert_close(filtered.double(), expected, rtol=0, atol=0.05 if dtype.itemsize == 2 else 1e-5)


def test_moving_a_filter_keeps_it() -> None:
    filter_ = hard_filter(Spectrum.of(second_moment()), 9, L2)
    moved = filter_.to(torch.device("cpu"))
    assert torch.equal(moved.basis, filter_.basis)
    assert (moved.tail, moved.null_rank) == (filter_.tail, filter_.null_rank)
