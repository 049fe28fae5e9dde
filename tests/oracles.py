"""Dense float64 references, written from the papers, that the strategies are compared with.

Nothing here is shared with the code under test: every delta is multiplied out, every decomposition
is `numpy.linalg.svd` of the full matrix, every loop is a loop. Slow on purpose.

An adapter's part of one module is a tuple `(A, B, scaling, weight)` with `A (r, d_in)` and
`B (d_out, r)`, the names and shapes of PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Part = tuple[npt.NDArray[Any], npt.NDArray[Any], float, float]


def dense(part: Part) -> Matrix:
    """Return `scaling · B @ A` without the weight."""
    A, B, scaling, _ = part
    delta: Matrix = float(scaling) * (np.asarray(B, np.float64) @ np.asarray(A, np.float64))
    return delta


def task_arithmetic(parts: Sequence[Part], scale: float = 1.0) -> Matrix:
    """Return `λ Σ w_i Δ_i` (Ilharco et al., 2023)."""
    total = np.zeros_like(dense(parts[0]))
    for part in parts:
        total += float(part[3]) * dense(part)
    return float(scale) * total


def average(parts: Sequence[Part]) -> Matrix:
    """Return `Σ w_i Δ_i / Σ w_i`."""
    total: Matrix = task_arithmetic(parts) / sum(float(part[3]) for part in parts)
    return total


def direct_merge(parts: Sequence[Part]) -> Matrix:
    """Return `L_DM = (Σ B_i)(Σ A_i)` of MM-SVD, eq. 2, each factor carrying `√(w_i s_i)`.

    Needs equal ranks and `w_i s_i ≥ 0`.
    """
    roots = [math.sqrt(float(scaling) * float(weight)) for _, _, scaling, weight in parts]
    total_A = sum(
        root * np.asarray(part[0], np.float64) for root, part in zip(roots, parts, strict=True)
    )
    total_B = sum(
        root * np.asarray(part[1], np.float64) for root, part in zip(roots, parts, strict=True)
    )
    product: Matrix = np.asarray(total_B) @ np.asarray(total_A)
    return product


class TruncatedSvd(NamedTuple):
    """What `mm_svd` returns: factors, their product, and every singular value of the sum."""

    A: Matrix  # (rank, d_in)
    B: Matrix  # (d_out, rank)
    delta: Matrix  # (d_out, d_in)
    singular_values: Matrix  # (min(d_out, d_in),), of the sum before truncation


def mm_svd(
    parts: Sequence[Part], rank: int, *, inner: str = "sum", scale: float = 1.0, split: str = "A"
) -> TruncatedSvd:
    """Return `SVD_r(f({Δ_i}))` of MM-SVD, section 3.4: `B = U` and `A = Σ Vᵀ` for split `"A"`.

    `inner` is `"sum"` (`λ Σ w_i Δ_i`) or `"average"`; `split` says which factor carries Σ.
    """
    total = average(parts) if inner == "average" else task_arithmetic(parts, scale)
    U, S, Vt = np.linalg.svd(total, full_matrices=False)
    U, kept, Vt = U[:, :rank], S[:rank], Vt[:rank]
    on_A, on_B = {
        "A": (kept, np.ones_like(kept)),
        "B": (np.ones_like(kept), kept),
        "balanced": (np.sqrt(kept), np.sqrt(kept)),
    }[split]
    A, B = on_A[:, None] * Vt, U * on_B[None, :]
    return TruncatedSvd(A, B, B @ A, S)


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


_MASK = (1 << 64) - 1


def splitmix64(seed: int, count: int) -> list[int]:
    """Return the first outputs of the published SplitMix64 generator, in exact Python integers."""
    state, outputs = seed & _MASK, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        outputs.append(z ^ (z >> 31))
    return outputs
