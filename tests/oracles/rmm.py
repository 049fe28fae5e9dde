"""Reversible Model Merging, position by position, from Algorithm 1 of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from oracles.common import Matrix, Part, canonical_signs


class Position(NamedTuple):
    """RMM at one task-vector position: what is stored, what comes back, and the tail."""

    mean: Matrix  # (r,)
    basis: Matrix  # (r, p), orthonormal columns
    coefficients: Matrix  # (N, p)
    restored: Matrix  # (N, r)
    tail: float  # Σ of the squared singular values left out


def rmm_position(X: npt.NDArray[Any], basis_size: int) -> Position:
    """Run Algorithm 1 of RMM, lines 5 to 12 and 19, on one position `X (N, r)`.

    Line 7 prints the mean without its 1/n; section 5.1 has it, and so has this function.
    """
    X = np.asarray(X, np.float64)
    mean = X.sum(axis=0) / X.shape[0]
    centred = X - mean
    _, S, Vt = np.linalg.svd(centred, full_matrices=True)
    W = Vt[:basis_size].T
    C = centred @ W
    restored = np.stack([C[i] @ W.T + mean for i in range(X.shape[0])])
    return Position(mean, W, C, restored, float((S[basis_size:] ** 2).sum()))


class RmmRestored(NamedTuple):
    """Every adapter's factors after RMM, and the two squared errors Theorem 1 predicts."""

    A: list[Matrix]
    B: list[Matrix]
    tail_A: float
    tail_B: float


def rmm_restore(
    As: Sequence[npt.NDArray[Any]], Bs: Sequence[npt.NDArray[Any]], basis_size: int
) -> RmmRestored:
    """Compress and restore one module's factors, position by position (RMM, Algorithm 1).

    The paper writes `Δ = A B` with `A (m, r)`: its rows of A are rows of our B, its columns of B
    are columns of our A.
    """
    restored_A = [np.zeros(np.shape(A)) for A in As]
    restored_B = [np.zeros(np.shape(B)) for B in Bs]
    tail_A = tail_B = 0.0
    for column in range(np.shape(As[0])[1]):
        position = rmm_position(np.stack([A[:, column] for A in As]), basis_size)
        tail_A += position.tail
        for i, x in enumerate(position.restored):
            restored_A[i][:, column] = x
    for row in range(np.shape(Bs[0])[0]):
        position = rmm_position(np.stack([B[row, :] for B in Bs]), basis_size)
        tail_B += position.tail
        for i, x in enumerate(position.restored):
            restored_B[i][row, :] = x
    return RmmRestored(restored_A, restored_B, tail_A, tail_B)


def rmm_storage_ratio(adapters: int, rank: int, basis_size: int) -> float:
    """Return `(p(r + n) + r) / (r n)` (RMM, section 6.1)."""
    return (basis_size * (rank + adapters) + rank) / (rank * adapters)


def balanced_factors(part: Part) -> tuple[Matrix, Matrix]:
    """Return `A = √Σ Vᵀ` and `B = U √Σ` of `B @ A`, scaling left out, at the adapter's rank.

    Left singular vectors have their entry of largest magnitude positive; an adapter of a rank above
    `min(d_out, d_in)` is filled up with zeros.
    """
    A, B = np.asarray(part[0], np.float64), np.asarray(part[1], np.float64)
    rank = A.shape[0]
    U, S, Vt = np.linalg.svd(B @ A, full_matrices=False)
    kept = min(rank, S.size)
    signs, roots = canonical_signs(U[:, :kept]), np.sqrt(S[:kept])
    balanced_A, balanced_B = np.zeros(A.shape), np.zeros(B.shape)
    balanced_A[:kept] = (signs * roots)[:, None] * Vt[:kept]
    balanced_B[:, :kept] = U[:, :kept] * (signs * roots)
    return balanced_A, balanced_B
