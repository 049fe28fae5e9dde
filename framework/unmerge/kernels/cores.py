"""Adapters as small matrices in one orthonormal frame, exactly.

Every delta is `Q_B M_i Q_Aᵀ` with bases that all adapters share (methods, section 2). The embedding
is orthonormal: sums, inner products, singular values and singular-value thresholding of the cores
`M_i` are those of the deltas, at the size of the sum of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unmerge.adapter import Factors
from unmerge.errors import NonFiniteError
from unmerge.kernels.lowrank import (
    CoreBasis,
    ProductSvd,
    concatenate,
    orthonormal_core,
    svd_of_core,
)

STORED_PRECISION = 1e-7
"""Relative cut-off where a direction must mean something: float32 factors are no more exact."""


@dataclass(frozen=True, slots=True)
class CoreStack:
    """N deltas in one orthonormal frame: `Δ_i = Q_left @ cores[i] @ Q_rightᵀ`.

    Attributes:
        left: Basis of the output side, `k_left = min(d_out, R)` columns, R = Σ r_i.
        right: Basis of the input side, `k_right = min(d_in, R)` columns.
        cores: `(N, k_left, k_right)` float64, scalings included.
    """

    left: CoreBasis
    right: CoreBasis
    cores: torch.Tensor

    def svd(self, core: torch.Tensor, rank: int) -> ProductSvd:
        """Return the best rank-`rank` approximation of the delta with this core, in SVD form.

        Raises:
            NonFiniteError: The core is not finite.
        """
        return svd_of_core(self.left, core, self.right, rank)

    def factors(self, core: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(A, B)` of the numerical rank of `core` whose product is the delta it stands for.

        In SVD form with signs fixed and singular values shared out evenly; a zero core gives one
        zero direction. What is cut off is rounding: see `numerical_rank`.
        """
        svd = self.svd(core, min(core.shape))
        return compact(svd, numerical_rank(svd.spectrum)).factors("balanced")


def core_stack(factors: Sequence[Factors]) -> CoreStack:
    """Return the deltas `scaling_i · B_i A_i` in one orthonormal frame, exactly.

    Args:
        factors: One per adapter, of one `(d_out, d_in)`, of any ranks; at least one.

    Raises:
        NonFiniteError: A delta is not finite.

    Numerics: float64 Householder QR of all B side by side and of all Aᵀ side by side; where R
        reaches a dimension that side keeps its own coordinates and nothing is computed. Linear and
        spectral rules may use this frame; entries of the cores mean nothing by themselves (they
        change with the gauge and with the order of the adapters). O((d_out + d_in) R²).
    Source: methods, section 2.
    """
    A, B = concatenate(factors, [1.0] * len(factors))
    left, right = orthonormal_core(B), orthonormal_core(A.T)
    cores = left.core.new_empty(len(factors), left.core.shape[0], right.core.shape[0])
    start = 0
    for n, f in enumerate(factors):
        stop = start + f.rank
        torch.matmul(left.core[:, start:stop], right.core[:, start:stop].T, out=cores[n])
        start = stop
    if not bool(torch.isfinite(cores).all()):
        raise NonFiniteError("a delta is not finite; check factors and scalings")
    return CoreStack(left=left, right=right, cores=cores)


def numerical_rank(spectrum: torch.Tensor, cutoff: float | None = None) -> int:
    """Return how many singular values exceed `cutoff` times the largest; 0 for a zero matrix.

    Args:
        spectrum: `(k,)`, descending.
        cutoff: Relative; unless given, k times the spacing of the dtype: rounding alone is cut.
    """
    if spectrum.numel() == 0:
        return 0
    if cutoff is None:
        cutoff = spectrum.numel() * torch.finfo(spectrum.dtype).eps
    # Not >=: an all-zero matrix must give rank 0.
    return int((spectrum > cutoff * spectrum[0]).sum())


def compact(svd: ProductSvd, rank: int) -> ProductSvd:
    """Return the leading `rank` directions of a decomposition; at least one, so that A and B exist.

    Args:
        svd: Any decomposition with at least one direction.
        rank: Directions kept, ≥ 0.
    """
    kept = max(rank, 1)
    return ProductSvd(U=svd.U[:, :kept], S=svd.S[:kept], Vh=svd.Vh[:kept], spectrum=svd.spectrum)
