"""Second moment of the keys -> its spectrum -> the filter that protects what the model knows.

AlphaEdit projects every update on the (approximate) null space of C = E[k kᵀ] (paper, section 3.2, equations 9-11).
Projection, MEMIT's soft constraint and plain ridge regression are one solve with three filters f of the same spectrum,
F = U diag(f(s)) Uᵀ: hard f = 1/λ on the null space and 0 elsewhere, soft f = 1/(α s + λ), none f = 1/λ.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """Eigen-decomposition of one second moment.

    Attributes:
        eigenvalues: (d,) float64, ascending, clipped at zero.
        eigenvectors: (d, d) float64, one per column, in the same order.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor

    @classmethod
    def of(cls, second_moment: Tensor) -> "Spectrum":
        """Decompose a symmetric (d, d) matrix in float64 with `torch.linalg.eigh`."""
        eigenvalues, eigenvectors = torch.linalg.eigh(second_moment.double())
        return cls(eigenvalues.clamp_min_(0), eigenvectors)

    def null_rank_by_energy(self, share: float) -> int:
        """How many of the smallest directions together hold at most `share` of the energy (the sum of eigenvalues).

        The strongest direction in every hundred isn't counted, and never free. In many models a few tokens have
        massive activations: one direction can hold nearly all energy, and a share of that would leave all others
        unprotected.
        """
        massive = len(self.eigenvalues) // 100
        cumulative = self.eigenvalues[: len(self.eigenvalues) - massive].cumsum(0)  # (d - massive,)
        return int((cumulative <= share * cumulative[-1]).sum())

    def null_rank_by_threshold(self, threshold: float) -> int:
        """How many directions have an eigenvalue below `threshold` (the published rule)."""
        return int((self.eigenvalues < threshold).sum())


@dataclass(frozen=True)
class SpectralFilter:
    """The symmetric root F^½ of a filter, stored on the smaller side of the spectrum.

    F^½ = tail · I + basis · diag(gains - tail) · basisᵀ

    Attributes:
        basis: (d, r) float32, orthonormal columns; the directions on which the gain differs from `tail`.
        gains: (r,) float32, √f on these directions.
        tail: √f on all other directions.
        null_rank: number of directions that may be edited freely (d for a filter without a hard threshold).
    """

    basis: Tensor
    gains: Tensor
    tail: float
    null_rank: int

    def root(self, keys: Tensor) -> Tensor:
        """F^½ k for every row of `keys` (n, d), in the wider of float32 and the keys' dtype, on the keys' device."""
        dtype = torch.promote_types(keys.dtype, torch.float32)
        basis, gains = self.basis.to(keys.device, dtype), self.gains.to(keys.device, dtype)
        keys = keys.to(dtype)  # (n, d)
        return self.tail * keys + ((keys @ basis) * (gains - self.tail)) @ basis.T  # (n, d)

    def to(self, device: torch.device) -> "SpectralFilter":
        """The same filter on another device."""
        return SpectralFilter(self.basis.to(device), self.gains.to(device), self.tail, self.null_rank)


def hard_filter(spectrum: Spectrum, null_rank: int, l2: float) -> SpectralFilter:
    """AlphaEdit: F = P/λ, P the projector on the smallest directions (paper, equations 9-11).

    Args:
        spectrum: of the second moment (d, d).
        null_rank: how many of the smallest directions may be edited.
        l2: λ, positive.
    """
    dimension = spectrum.eigenvalues.numel()
    gain = l2**-0.5
    if null_rank <= dimension - null_rank:
        basis, gains, tail = spectrum.eigenvectors[:, :null_rank], torch.full((null_rank,), gain), 0.0
    else:  # P = I - U⊥ U⊥ᵀ: the protected side is the thin one
        basis, gains, tail = spectrum.eigenvectors[:, null_rank:], torch.zeros(dimension - null_rank), gain
    return SpectralFilter(basis.float().contiguous(), gains.float(), tail, null_rank)


def soft_filter(spectrum: Spectrum, soft_weight: float, l2: float, null_rank: int | None = None) -> SpectralFilter:
    """MEMIT's constraint, F = (α C + λ I)⁻¹.

    Directions on which α s is below rounding beside λ get the common gain 1/√λ, so they need not be stored.

    Args:
        spectrum: of the second moment (d, d).
        soft_weight: α, positive.
        l2: λ, positive.
        null_rank: with a number, only so many of the smallest directions may be edited, as in `hard_filter`.
    """
    dimension = spectrum.eigenvalues.numel()
    gains = (soft_weight * spectrum.eigenvalues + l2).rsqrt()  # (d,)
    tail = l2**-0.5
    if null_rank is not None:
        gains[null_rank:] = 0
    stored = (gains - tail).abs() > 1e-7 * tail  # (d,)
    return SpectralFilter(
        spectrum.eigenvectors[:, stored].float().contiguous(),
        gains[stored].float(),
        tail,
        dimension if null_rank is None else null_rank,
    )


def ridge_filter(dimension: int, l2: float) -> SpectralFilter:
    """No protection of the corpus: F = I/λ.

    Args:
        dimension: d, length of a key.
        l2: λ, positive.
    """
    return SpectralFilter(torch.zeros(dimension, 0), torch.zeros(0), l2**-0.5, dimension)


@dataclass(frozen=True)
class BlockFilter:
    """A filter of keys that are made of blocks with spectra of their own, F^½ = diag(F_1^½, ..., F_E^½).

    Attributes:
        blocks: one filter for each block, in order; None lets nothing through, so that the block is never edited.
        dimension: d, length of a block.
    """

    blocks: tuple[SpectralFilter | None, ...]
    dimension: int

    @property
    def null_rank(self) -> int:
        """Number of directions that may be edited freely, over all blocks."""
        return sum(block.null_rank for block in self.blocks if block is not None)

    def root(self, keys: Tensor) -> Tensor:
        """F^½ k for keys (..., E d), as `SpectralFilter.root`."""
        apart = keys.unflatten(-1, (len(self.blocks), self.dimension))  # (..., E, d)
        result = torch.zeros_like(apart, dtype=torch.promote_types(keys.dtype, torch.float32))
        used = apart.flatten(0, -3).ne(0).any(-1).any(0).tolist()  # (E,), most tokens go to a few experts
        for index, block in enumerate(self.blocks):
            if block is not None and used[index]:
                result[..., index, :] = block.root(apart[..., index, :])
        return result.flatten(-2)

    def to(self, device: torch.device) -> "BlockFilter":
        """The same filter on another device."""
        return BlockFilter(tuple(None if one is None else one.to(device) for one in self.blocks), self.dimension)


KeyFilter = SpectralFilter | BlockFilter
