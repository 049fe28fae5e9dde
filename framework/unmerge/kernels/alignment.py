"""One orthonormal basis for the columns of several matrices, fixed down to its signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unmerge.errors import NonFiniteError
from unmerge.kernels.lowrank import column_signs, orthonormal_core


@dataclass(frozen=True, slots=True)
class SharedBasis:
    """The left singular vectors of matrices side by side, and each matrix in that basis.

    Attributes:
        U: `(d, k)`, orthonormal columns by falling singular value; in each the entry of largest
            magnitude is positive.
        blocks: Per matrix `(d, r_n)`, `Uᵀ X_n` of shape `(k, r_n)`.
        S: `(k,)` the singular values, descending.
    """

    U: torch.Tensor
    blocks: tuple[torch.Tensor, ...]
    S: torch.Tensor


def shared_basis(matrices: Sequence[torch.Tensor], cutoff: float) -> SharedBasis:
    """Return the left singular basis of `[X_1 … X_N]`.

    Args:
        matrices: X_n, `(d, r_n)` each.
        cutoff: Directions whose singular value is at most this fraction of the largest are left
            out; at least one is kept.

    Returns:
        Float64 tensors. Right multiplication of an X_n by an orthogonal matrix changes neither U
        nor S and is undone in no block: what is built of blocks must be too. Exactly repeated
        singular values leave their vectors open.

    Raises:
        NonFiniteError: A matrix is not finite.

    Numerics: float64 QR, then the SVD of a core of size min(d, R) × R. O(d R² + R³).
    """
    stacked = torch.cat([matrix.to(torch.float64) for matrix in matrices], dim=1)
    basis = orthonormal_core(stacked)
    if not bool(torch.isfinite(basis.core).all()):
        raise NonFiniteError("the factors side by side are not finite; check the scalings")
    U, S, Wh = torch.linalg.svd(basis.core, full_matrices=False)
    kept = max(int((cutoff * S[0] < S).sum()), 1)
    wide = basis.apply(U[:, :kept])
    signs = column_signs(wide)
    blocks = (signs * S[:kept])[:, None] * Wh[:kept]
    return SharedBasis(
        U=wide * signs,
        blocks=tuple(blocks.split([matrix.shape[1] for matrix in matrices], dim=1)),
        S=S[:kept],
    )
