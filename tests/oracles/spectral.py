"""What acts on singular values: MM-SVD, truncation, TSV-M, Iso-C and LoRE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from oracles.common import Matrix, Part, dense, numerical_rank, truncated
from oracles.linear import average, task_arithmetic
from oracles.sparse import ties_rule


class TruncatedSvd(NamedTuple):
    """What `truncated_svd` returns: factors, their product, and all singular values."""

    A: Matrix  # (rank, d_in)
    B: Matrix  # (d_out, rank)
    delta: Matrix  # (d_out, d_in)
    singular_values: Matrix  # (min(d_out, d_in),), of the matrix before truncation


def truncated_svd(matrix: Matrix, rank: int, split: str = "A") -> TruncatedSvd:
    """Return `SVD_r` as factors; `split` says which of them carries Σ."""
    U, S, Vt = np.linalg.svd(matrix, full_matrices=False)
    U, kept, Vt = U[:, :rank], S[:rank], Vt[:rank]
    on_A, on_B = {
        "A": (kept, np.ones_like(kept)),
        "B": (np.ones_like(kept), kept),
        "balanced": (np.sqrt(kept), np.sqrt(kept)),
    }[split]
    A, B = on_A[:, None] * Vt, U * on_B[None, :]
    return TruncatedSvd(A, B, B @ A, S)


def mm_svd(
    parts: Sequence[Part], rank: int, *, inner: str = "sum", scale: float = 1.0, split: str = "A"
) -> TruncatedSvd:
    """Return `SVD_r(f({Δ_i}))` of MM-SVD, section 3.4: `B = U` and `A = Σ Vᵀ` for split `"A"`.

    `inner` is `"sum"` (`λ Σ w_i Δ_i`) or `"average"`.
    """
    total = average(parts) if inner == "average" else task_arithmetic(parts, scale)
    return truncated_svd(total, rank, split)


def rank_for_energy(matrix: Matrix, energy: float) -> int:
    """Return the smallest rank that keeps this fraction of the squared Frobenius norm."""
    S = np.linalg.svd(matrix, compute_uv=False)
    for rank in range(S.size + 1):
        if (S[:rank] ** 2).sum() >= energy * (S**2).sum():
            return rank
    return int(S.size)


def rank_for_error(matrix: Matrix, error: float) -> int:
    """Return the smallest rank whose relative Frobenius truncation error is at most `error`."""
    S = np.linalg.svd(matrix, compute_uv=False)
    for rank in range(S.size + 1):
        if math.sqrt((S[rank:] ** 2).sum()) <= error * math.sqrt((S**2).sum()):
            return rank
    return int(S.size)


def truncate(part: Part, rank: int) -> Matrix:
    """Return one adapter's delta at its best rank-k approximation, weight left out."""
    return truncated(dense(part), rank)


def _polar(matrix: Matrix, cutoff: float) -> Matrix:
    """Return the polar factor `P Qᵀ` of `P D Qᵀ` over the numerical rank."""
    P, D, Qt = np.linalg.svd(matrix, full_matrices=False)
    rank = numerical_rank(D, cutoff)
    factor: Matrix = P[:, :rank] @ Qt[:rank]
    return factor


def tsv(
    parts: Sequence[Part],
    *,
    rank: int | None = None,
    scale: float = 1.0,
    cutoff: float = 1e-7,
) -> Matrix:
    """Return `λ U⊥ Σ V⊥ᵀ` of Task Singular Vectors merging (arXiv 2412.00081, Algorithm 1).

    Of every `w_i Δ_i` the leading k singular triplets are kept, k = min(r_i, ⌊min(m, n)/N⌋) unless
    given, with N the adapters that have the module; `U = [U_1 … U_N]` and V are replaced by their
    polar factors. Directions without a singular value are no directions: they are left out, as are
    null directions of U and V.
    """
    Us, Ss, Vs = [], [], []
    for part in parts:
        delta = float(part[3]) * dense(part)
        U, S, Vt = np.linalg.svd(delta, full_matrices=False)
        kept = min(np.shape(part[0])[0], min(delta.shape) // len(parts)) if rank is None else rank
        kept = min(kept, numerical_rank(S, cutoff))
        Us.append(U[:, :kept])
        Ss.append(S[:kept])
        Vs.append(Vt[:kept].T)
    U, V = np.concatenate(Us, axis=1), np.concatenate(Vs, axis=1)
    if U.shape[1] == 0:
        return np.zeros_like(dense(parts[0]))
    merged: Matrix = _polar(U, cutoff) @ np.diag(np.concatenate(Ss)) @ _polar(V, cutoff).T
    return scale * merged


def iso_c(parts: Sequence[Part], *, scale: float = 1.0, cutoff: float = 1e-7) -> Matrix:
    """Return `λ s̄ U Vᵀ` for `Σ w_i Δ_i = U S Vᵀ` (Iso-C, arXiv 2502.04959, section 4).

    Mean and directions run over the numerical rank; the paper's over min(m, n), where the null
    directions of a low-rank sum are whatever the SVD completes.
    """
    total = task_arithmetic(parts)
    U, S, Vt = np.linalg.svd(total, full_matrices=False)
    rank = numerical_rank(S, cutoff)
    if rank == 0:
        return np.zeros_like(total)
    merged: Matrix = scale * S[:rank].mean() * (U[:, :rank] @ Vt[:rank])
    return merged


def svt(matrix: Matrix, mu: float) -> Matrix:
    """Return `U (Σ − μ)₊ Vᵀ`, singular-value thresholding."""
    U, S, Vt = np.linalg.svd(matrix, full_matrices=False)
    thresholded: Matrix = (U * np.maximum(S - mu, 0.0)) @ Vt
    return thresholded


class LowRankEstimate(NamedTuple):
    """LoRE after some iterations: the estimated base and one low-rank delta per model."""

    base: Matrix
    deltas: list[Matrix]

    def objective(self, thetas: Sequence[Matrix], mu: float) -> float:
        """Return `Σ ½‖θ_0 + δ_i − θ_i‖² + μ‖δ_i‖_*`, what the iteration descends."""
        return sum(
            0.5 * float(np.linalg.norm(self.base + delta - theta)) ** 2
            + mu * float(np.linalg.svd(delta, compute_uv=False).sum())
            for theta, delta in zip(thetas, self.deltas, strict=True)
        )


def low_rank_estimate(
    thetas: Sequence[Matrix],
    mu: float,
    iterations: int,
    *,
    warmup: int = 0,
    rank_ratio: float | None = None,
) -> LowRankEstimate:
    """Run LoRE's Algorithm 1, step 1, for exactly `iterations` rounds from `δ_i = 0`.

    After `warmup` rounds every δ is also cut to rank ⌈rank_ratio · min(m, n)⌉ (section 4).
    """
    base = np.zeros_like(thetas[0])
    deltas = [np.zeros_like(theta) for theta in thetas]
    for iteration in range(iterations):
        base = np.zeros_like(thetas[0])
        for theta, delta in zip(thetas, deltas, strict=True):
            base = base + (theta - delta) / len(thetas)
        deltas = [svt(theta - base, mu) for theta in thetas]
        if rank_ratio is not None and iteration >= warmup:
            cap = math.ceil(rank_ratio * min(base.shape))
            deltas = [truncated(delta, cap) for delta in deltas]
    return LowRankEstimate(base, deltas)


def lore(
    parts: Sequence[Part],
    *,
    mu: float,
    iterations: int,
    scale: float = 1.0,
    finish: Literal["sum", "mean", "ties"] = "sum",
    density: float = 1.0,
    warmup: int = 0,
    rank_ratio: float | None = None,
) -> Matrix:
    """Return `θ_0 + λ τ` relative to the base the adapters sit on (LoRE, Algorithm 1).

    With `θ_i = W + Δ_i`, W passes through `θ_0` unchanged, so the iteration runs on the deltas.
    `τ` is `Σ δ_i` (option 1), their mean (the text), or a TIES selection over them (option 2; the
    algorithm trims nothing, that is `density` 1).
    """
    thetas = [dense(part) for part in parts]
    base, deltas = low_rank_estimate(thetas, mu, iterations, warmup=warmup, rank_ratio=rank_ratio)
    if finish == "ties":
        # Two models have δ_2 = −δ_1: a vote that is drawn but for rounding keeps nothing.
        total, most = np.sum(deltas, axis=0), np.sum(np.abs(deltas), axis=0)
        drawn = np.abs(total) <= 1e-12 * most
        kept = ties_rule(density=density)(deltas, [1.0] * len(deltas))
        tau = np.where(drawn, 0.0, kept)
    else:
        tau = np.zeros_like(base)
        for delta in deltas:
            tau = tau + delta
        if finish == "mean":
            tau = tau / len(deltas)
    return base + scale * tau
