"""Exact algebra on sums of low-rank updates, without a `d_out × d_in` matrix.

Every delta is `Q_B M Q_Aᵀ` with orthonormal `Q_B`, `Q_A` and a small core `M` (methods, section
2). Cores are float64 whatever the input: on one CPU core this costs milliseconds at 4096².
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from unmerge.adapter import Factors
from unmerge.errors import NonFiniteError

Split = Literal["A", "B", "balanced"]

# Rows of a delta are always computed in this grid, so that a row's bits depend neither on the
# height of the block it is asked for in nor on the memory budget.
TILE_ROWS = 64


@dataclass(frozen=True, slots=True)
class CoreBasis:
    """An orthonormal basis of the columns of a tall matrix, kept as Householder reflectors.

    Attributes:
        core: `(k, R)` with `X = Q @ core`, k = min(d, R).
        reflectors: `(d, R)` Householder vectors of Q, or `None` where Q is the identity.
        tau: `(k,)` their scalar factors, or `None`.
    """

    core: torch.Tensor
    reflectors: torch.Tensor | None
    tau: torch.Tensor | None

    def apply(self, small: torch.Tensor) -> torch.Tensor:
        """Return `Q @ small` for `small (k, m)`, as `(d, m)`, without forming Q."""
        if self.reflectors is None or self.tau is None:
            return small
        rows, columns = self.reflectors.shape[0], small.shape[1]
        padded = small.new_zeros(rows, columns)
        padded[: small.shape[0]] = small
        return torch.ormqr(self.reflectors, self.tau, padded)


def orthonormal_core(matrix: torch.Tensor) -> CoreBasis:
    """Return an orthonormal basis of the columns of `matrix (d, R)` and its core.

    Numerics: float64 Householder QR, stable for any column scaling and any rank; where R ≥ d the
    basis is the identity and nothing is computed. O(d R²).
    """
    wide = matrix.to(torch.float64)
    if wide.shape[1] >= wide.shape[0]:
        return CoreBasis(core=wide, reflectors=None, tau=None)
    reflectors, tau = torch.geqrf(wide)
    return CoreBasis(core=torch.triu(reflectors[: wide.shape[1]]), reflectors=reflectors, tau=tau)


@dataclass(frozen=True, slots=True)
class ProductSvd:
    """The leading part of the singular value decomposition of a product `B @ A`.

    Attributes:
        U: `(d_out, k)`, orthonormal columns; in each the entry of largest magnitude is positive.
        S: `(k,)`, descending.
        Vh: `(k, d_in)`, orthonormal rows.
        spectrum: All min(d_out, d_in, R) singular values, descending.
    """

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor
    spectrum: torch.Tensor

    def factors(self, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(A, B)` with `B @ A = U S Vh` and S on the side that `split` names."""
        if split == "A":
            return self.S[:, None] * self.Vh, self.U
        if split == "B":
            return self.Vh, self.U * self.S
        root = self.S.sqrt()
        return root[:, None] * self.Vh, self.U * root

    @property
    def relative_error(self) -> float:
        """Frobenius norm of what is cut off, relative to that of the product (0 for a zero one)."""
        total = torch.linalg.vector_norm(self.spectrum)
        if total == 0:
            return 0.0
        return float(torch.linalg.vector_norm(self.spectrum[self.S.shape[0] :]) / total)


def svd_of_product(B: torch.Tensor, A: torch.Tensor, rank: int) -> ProductSvd:
    """Return the best rank-`rank` approximation of `B @ A` in SVD form, exactly.

    Args:
        B: `(d_out, R)`.
        A: `(R, d_in)`.
        rank: Rank kept, ≥ 1; more than min(d_out, d_in, R) keeps that many.

    Returns:
        Float64 tensors on the inputs' device.

    Raises:
        NonFiniteError: The product is not finite.

    Numerics: float64 throughout: QR of both sides, then the SVD of a core of size
        min(d_out, R) × min(d_in, R). Agrees with the SVD of the dense product to the rounding
        of float64. O((d_out + d_in) R² + R³); no `d_out × d_in` matrix unless R exceeds both.
    Source: "LoRA Merging with SVD" (ICML 2025 R2-FM workshop), section 3.4, in factor space.
    """
    left, right = orthonormal_core(B), orthonormal_core(A.T)
    return svd_of_core(left, left.core @ right.core.T, right, rank)


def svd_of_core(left: CoreBasis, core: torch.Tensor, right: CoreBasis, rank: int) -> ProductSvd:
    """Return the best rank-`rank` approximation of `Q_left @ core @ Q_rightᵀ` in SVD form.

    Args:
        left: Basis of the output side, with `k_left` columns.
        core: `(k_left, k_right)`, float64.
        right: Basis of the input side, with `k_right` columns.
        rank: Rank kept, ≥ 1; more than min(k_left, k_right) keeps that many.

    Raises:
        NonFiniteError: The core is not finite.
    """
    if not bool(torch.isfinite(core).all()):
        raise NonFiniteError("the sum of the deltas is not finite; check weights and scalings")
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    kept = min(rank, S.shape[0])
    U_full = left.apply(U[:, :kept])
    Vh_full = right.apply(Vh[:kept].T).T
    signs = column_signs(U_full)
    return ProductSvd(
        U=U_full * signs, S=S[:kept], Vh=(signs[:, None] * Vh_full).contiguous(), spectrum=S
    )


def column_signs(matrix: torch.Tensor) -> torch.Tensor:
    """Return ±1 per column: the sign of its entry of largest magnitude (+1 for a zero column)."""
    if matrix.shape[0] == 0 or matrix.shape[1] == 0:
        return matrix.new_ones(matrix.shape[1])
    peaks = matrix.gather(0, matrix.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(peaks < 0, -1.0, 1.0).to(matrix.dtype)


def concatenate(
    factors: Sequence[Factors], coefficients: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(A, B)` of rank Σ r_i whose product is exactly `Σ c_i · scaling_i · B_i A_i`.

    Args:
        factors: One per adapter, on one device, of one `(d_out, d_in)`.
        coefficients: One factor per adapter, applied to B together with the scaling.

    Numerics: `c_i · scaling_i` is one float64 number; float32 factors are multiplied in float64
        and returned so, to be rounded once by whoever stores them. A power of two, which is exact,
        is moved from one factor to the other so that both have entries of one size: a small
        coefficient must not push one of them below what float16 can express. O((d_out + d_in) R).
    """
    first, total = factors[0], sum(f.rank for f in factors)
    A = first.A.new_empty(total, first.d_in, dtype=torch.float64)
    # Written as its transpose: the column-major layout that LAPACK wants, and contiguous writes.
    B = first.B.new_empty(total, first.d_out, dtype=torch.float64).T
    start = 0
    for f, coefficient in zip(factors, coefficients, strict=True):
        stop = start + f.rank
        scale = coefficient * f.scaling
        shift = (_exponent(f.B) + math.frexp(scale)[1] - _exponent(f.A)) // 2
        torch.mul(f.A.to(torch.float64), math.ldexp(1.0, shift), out=A[start:stop])
        torch.mul(f.B.to(torch.float64), math.ldexp(scale, -shift), out=B[:, start:stop])
        start = stop
    return A, B


def _exponent(matrix: torch.Tensor) -> int:
    """Return e with 2^(e−1) ≤ max |entry| < 2^e, or 0 for a matrix without any."""
    return math.frexp(float(matrix.abs().max()))[1] if matrix.numel() else 0


def delta_rows(
    factors: Factors, start: int, stop: int, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return rows `start:stop` of the delta, `(stop - start, d_in)`, in float32 or wider.

    Computed in a fixed grid of `TILE_ROWS` rows: equal bits for every way of asking.

    Args:
        factors: One adapter's factors.
        start: First row.
        stop: Row after the last, at most d_out.
        out: Contiguous tensor of that shape and dtype that takes the result.
    """
    dtype = torch.promote_types(factors.A.dtype, torch.float32)
    A, B = factors.A.to(dtype), factors.B.to(dtype)
    if out is None:
        out = A.new_empty(stop - start, factors.d_in)
    for tile in range(start // TILE_ROWS * TILE_ROWS, stop, TILE_ROWS):
        last = min(tile + TILE_ROWS, factors.d_out)
        if tile >= start and last <= stop:
            torch.mm(B[tile:last], A, out=out[tile - start : last - start])
        else:
            first, end = max(tile, start), min(last, stop)
            out[first - start : end - start] = (B[tile:last] @ A)[first - tile : end - tile]
    return out.mul_(factors.scaling)
