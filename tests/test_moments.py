"""Streaming second moments against the plain float64 formula."""

import pytest
import torch

from hf_alphaedit.algorithm.moments import SecondMoment, energy_inside, subspace_overlap
from hf_alphaedit.algorithm.nullspace import Spectrum


def random_keys(count: int, dimension: int, seed: int = 0) -> torch.Tensor:
    """Keys with a mean, correlations and very unequal scales, like those of a real layer."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=generator) * torch.logspace(1, -2, dimension)
    return torch.randn(count, dimension, generator=generator) @ mixing.T / dimension**0.5 + 0.1


def plain_mean(keys: torch.Tensor) -> torch.Tensor:
    keys = keys.double()
    return keys.T @ keys / keys.shape[0]


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dimension", [1, 3, 8, 61, 64])
def test_mean_is_the_plain_formula_and_symmetric(dimension: int) -> None:
    keys = random_keys(500, dimension)
    moment = SecondMoment(dimension)
    moment.update(keys)
    mean = moment.mean()
    assert relative_error(mean, plain_mean(keys)) < 1e-6
    assert torch.equal(mean, mean.T)
    assert (mean.dtype, moment.count) == (torch.float32, 500)


def test_chunks_and_merges_give_the_sum_of_all() -> None:
    keys = random_keys(5000, 48)
    whole, first, second = SecondMoment(48), SecondMoment(48), SecondMoment(48)
    whole.update(keys)
    for chunk in keys[:3100].split(7):
        first.update(chunk)
    second.update(keys[3100:])
    first.merge(second)
    assert first.count == whole.count == 5000
    assert relative_error(first.mean(), whole.mean().double()) < 1e-6
    assert relative_error(first.mean(), plain_mean(keys)) < 1e-6


def test_the_sum_stays_exact_where_float32_would_drop_small_terms() -> None:
    moment = SecondMoment(2)
    moment.update(torch.tensor([[4096.0, 0.0]]))  # adds 2²⁴: the next float32 is 2 away
    for _ in range(64):
        moment.update(torch.tensor([[1.0, 1.0]]))
    assert moment.packed[0].item() == 2**24 + 64
    assert moment.mean()[1, 1].item() == pytest.approx(64 / 65)


def test_bfloat16_products_are_within_the_stated_error() -> None:
    keys = random_keys(20_000, 96)
    moment = SecondMoment(96, product_dtype=torch.bfloat16)
    moment.update(keys)
    error = relative_error(moment.mean(), plain_mean(keys))
    assert 1e-6 < error < 1e-3  # really bfloat16, and good enough
    scale = plain_mean(keys).diagonal().sqrt()
    entries = (moment.mean().double() - plain_mean(keys)).abs() / (scale[:, None] * scale[None, :])
    assert entries.max() < 2**-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keys_are_multiplied_without_further_rounding(dtype: torch.dtype) -> None:
    keys = random_keys(3000, 32).to(dtype)
    moment = SecondMoment(32)
    moment.update(keys)
    assert relative_error(moment.mean(), plain_mean(keys)) < 1e-6


def test_from_mean_is_the_inverse_of_mean() -> None:
    mean = plain_mean(random_keys(100, 20)).float()
    mean = (mean + mean.T) / 2
    moment = SecondMoment.from_mean(mean, 100)
    assert torch.equal(moment.mean(), mean)
    extra = random_keys(50, 20, seed=1)
    moment.update(extra)
    assert relative_error(moment.mean(), plain_mean(torch.cat([random_keys(100, 20), extra]))) < 1e-6


def test_the_upper_part_alone_is_stored() -> None:
    assert SecondMoment(1024).packed.numel() == 1024**2 * 9 // 16


def test_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one key"):
        SecondMoment(4).mean()


def test_overlap_of_known_subspaces() -> None:
    spectrum = Spectrum.of(torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    swapped = Spectrum.of(torch.diag(torch.tensor([1.0, 4.0, 2.0, 3.0])))
    assert subspace_overlap(spectrum, spectrum, 2, 2) == pytest.approx(1)
    assert subspace_overlap(spectrum, swapped, 2, 2) == pytest.approx(0.5)  # axes {2, 3} against {1, 3}
    assert subspace_overlap(spectrum, swapped, 2, 3) == pytest.approx(0.0)  # axes {2, 3} against {1}
    assert subspace_overlap(spectrum, swapped, 4, 4) == 1
    assert subspace_overlap(spectrum, swapped, 4, 3) == 0


def test_energy_inside_the_null_space_of_another_moment() -> None:
    spectrum = Spectrum.of(torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    other = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    assert energy_inside(other, spectrum, 2) == pytest.approx(0.7)
    assert energy_inside(other, spectrum, 4) == pytest.approx(1.0)
