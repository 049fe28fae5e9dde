"""One orthonormal basis for the columns of several matrices, fixed down to its signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unmerge.errors import NonFiniteError
from unmerge.kernels.lowrank import column_signs, orthonormal_core

# What rounding leaves of a zero, relative to the largest singular value: some hundred float64 ulps.
_NOISE = 2.0**-44


@dataclass(frozen=True, slots=True)
class SharedBasis:
    """The left singular vectors of matrices side by side, and each matrix in that basis.

    Attributes:
        U: `(d, k)`, orthonormal columns by falling singular value; in each the entry of largest
            magnitude is positive.
        S: `(k,)` the singular values, descending.
        blocks: Per matrix `(d, r_n)`, `Uᵀ X_n` of shape `(k, r_n)`; a row that is zero but for
            rounding is zero.
    """

    U: torch.Tensor
    S: torch.Tensor
    blocks: tuple[torch.Tensor, ...]


def shared_basis(matrices: Sequence[torch.Tensor], cutoff: float) -> SharedBasis:
    """Return the left singular basis of `[X_1 … X_N]`.

    Args:
        matrices: X_n, `(d, r_n)` each, of which any r_n may be 0.
        cutoff: Directions whose singular value is at most this fraction of the largest are left
            out; at least one is kept.

    Returns:
        Float64 tensors. U and S do not change where an X_n is multiplied from the right by an
        orthogonal matrix; its block is multiplied with it. Exactly repeated singular values leave
        their vectors open.

    Raises:
        NonFiniteError: A matrix is not finite.

    Numerics: float64 QR, then the SVD of a core of size min(d, R) × R. A matrix's part of a
        direction counts as 0 below 2⁻⁴⁴ of the largest singular value. O(d R² + R³).
    """
    stacked = torch.cat([matrix.to(torch.float64) for matrix in matrices], dim=1)
    if stacked.shape[1] == 0:
        stacked = stacked.new_zeros(stacked.shape[0], 1)
    basis = orthonormal_core(stacked)
    if not bool(torch.isfinite(basis.core).all()):
        raise NonFiniteError("the factors side by side are not finite; check the scalings")
    U, S, _ = torch.linalg.svd(basis.core, full_matrices=False)
    kept = max(int((cutoff * S[0] < S).sum()), 1)
    wide = basis.apply(U[:, :kept])
    signs = column_signs(wide)
    # Uᵀ X_n and not a part of S Vᵀ: exactly zero for a zero matrix.
    aligned = (U[:, :kept] * signs).T @ basis.core
    widths = [matrix.shape[1] for matrix in matrices]
    blocks = aligned[:, : sum(widths)].split(widths, dim=1)
    return SharedBasis(
        U=wide * signs, S=S[:kept], blocks=tuple(_without_noise(b, float(S[0])) for b in blocks)
    )


def _without_noise(block: torch.Tensor, largest: float) -> torch.Tensor:
    """Return the block with its rows set to 0 that are 0 but for rounding.

    A matrix that has nothing of a direction must not have a vote there.
    """
    norms = torch.linalg.vector_norm(block, dim=1, keepdim=True)
    return torch.where(norms > _NOISE * largest, block, 0.0)
