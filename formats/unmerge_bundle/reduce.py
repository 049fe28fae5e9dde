"""The best approximation of a delta by factors of a given rank, in numpy alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from unmerge_bundle.arrays import Array

__all__ = ["Reduced", "reduce_delta", "reduce_factors"]

_PIECE = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Reduced:
    """Factors of a smaller rank.

    Attributes:
        A: `(rank, d_in)`, float32.
        B: `(d_out, rank)`, float32; both share the singular values evenly.
        error: `‖B @ A − delta‖ / ‖delta‖`, 0 for a delta of 0.
    """

    A: Array
    B: Array
    error: float


def reduce_delta(delta: Array, rank: int) -> Reduced:
    """Return the truncated singular value decomposition of a dense delta.

    Args:
        delta: `(d_out, d_in)`, finite.
        rank: Rank kept, 1 ≤ rank ≤ min(d_out, d_in).

    Numerics: float64. The leading subspace is that of the Gram matrix of the smaller side, read
    by row blocks, and the delta is projected onto it (Rayleigh–Ritz), so that the squares decide
    the directions only, never the values. Time O(d_out · d_in · n + n³), n the smaller side;
    besides the delta, memory for two matrices `(n, n)` and one row block.
    """
    rows, columns = delta.shape
    # Work on the orientation with the fewer rows; a transpose is a view.
    flat = delta if rows <= columns else delta.T
    gram = np.zeros((len(flat), len(flat)))
    step = max(1, _PIECE // len(flat))
    blocks = [slice(start, start + step) for start in range(0, flat.shape[1], step)]
    for block in blocks:
        part = flat[:, block].astype(np.float64)
        gram += part @ part.T
    _, vectors = np.linalg.eigh(gram)
    leading = vectors[:, : -rank - 1 : -1]  # eigh sorts upwards
    projected = np.concatenate(
        [leading.T @ flat[:, block].astype(np.float64) for block in blocks], axis=1
    )
    left, right = _split(leading, projected)
    error = norm = 0.0
    for block in blocks:
        part = flat[:, block].astype(np.float64)
        norm = math.hypot(norm, float(np.linalg.norm(part)))
        part -= left.astype(np.float64) @ right[:, block].astype(np.float64)
        error = math.hypot(error, float(np.linalg.norm(part)))
    A, B = (right, left) if rows <= columns else (left.T, right.T)
    return Reduced(
        A=np.ascontiguousarray(A),
        B=np.ascontiguousarray(B),
        error=error / norm if norm > 0 else 0.0,
    )


def reduce_factors(A: Array, B: Array, rank: int) -> Reduced:
    """Return the truncated singular value decomposition of `B @ A`, never forming the product.

    Args:
        A: `(r, d_in)`, finite.
        B: `(d_out, r)`, finite.
        rank: Rank kept, 1 ≤ rank ≤ r.

    Numerics: float64; orthogonal reductions of both sides, then the core's. Rank that the product
    does not have comes back as zeros. Time O((d_in + d_out) r²).
    """
    Q_B, R_B = np.linalg.qr(B.astype(np.float64))
    Q_A, R_A = np.linalg.qr(A.astype(np.float64).T)
    left, values, right = np.linalg.svd(R_B @ R_A.T, full_matrices=False)
    kept = min(rank, len(values))
    roots = np.sqrt(values[:kept])
    missing = rank - kept
    norm = float(np.linalg.norm(values))
    return Reduced(
        A=np.pad((roots[:, None] * right[:kept]) @ Q_A.T, ((0, missing), (0, 0))).astype(
            np.float32
        ),
        B=np.pad(Q_B @ (left[:, :kept] * roots), ((0, 0), (0, missing))).astype(np.float32),
        error=float(np.linalg.norm(values[kept:])) / norm if norm > 0 else 0.0,
    )


def _split(leading: Array, projected: Array) -> tuple[Array, Array]:
    """Return `leading @ projected` as float32 factors that share its singular values evenly."""
    left, values, right = np.linalg.svd(projected, full_matrices=False)
    roots = np.sqrt(values)
    return (
        (leading @ (left * roots)).astype(np.float32),
        (roots[:, None] * right).astype(np.float32),
    )
