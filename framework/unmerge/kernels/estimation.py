"""Singular-value thresholding, and the split of matrices into a common base and low-rank rests.

The iteration is the same on adapters, as cores in an orthonormal frame (`unmerge.kernels.cores`),
and on the dense matrices of full checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unmerge.errors import NonFiniteError

# Thresholding through a Gram matrix is off by about eps · σ_max² / μ. Below this, relative to
# σ_max, that is nothing; above it the singular value decomposition is taken.
_GRAM_ERROR = 2.5e-13


@dataclass(frozen=True, slots=True)
class Thresholded:
    """Matrices after singular-value thresholding.

    Attributes:
        matrices: `(n, a, b)`.
        nuclear_norms: `(n,)` sums of the singular values left.
        ranks: `(n,)` int64, how many are left.
    """

    matrices: torch.Tensor
    nuclear_norms: torch.Tensor
    ranks: torch.Tensor


def svt(matrices: torch.Tensor, mu: float, *, max_rank: int | None = None) -> Thresholded:
    """Return `U (Σ − μ)₊ Vᵀ` of every matrix `U Σ Vᵀ`; with μ = 0 and no cap, the matrices.

    Args:
        matrices: `(n, a, b)`, float32 or float64, finite.
        mu: The threshold, ≥ 0.
        max_rank: Keep at most so many directions, those of the largest singular values.

    Numerics: through the eigenvectors of the smaller Gram matrix, at half the price of an SVD,
        where its error, about `eps · σ_max² / μ`, is below 2.5e-13 of σ_max; through the SVD
        elsewhere. Which of the two depends on the values of the batch alone. O(n a b min(a, b)).
    Source: Cai, Candès, Shen: "A singular value thresholding algorithm for matrix completion"
        (2010), equation 2.1.
    """
    largest = float(torch.linalg.vector_norm(matrices, dim=(1, 2)).max())
    if mu > 0 and torch.finfo(matrices.dtype).eps * largest <= _GRAM_ERROR * mu:
        tall = matrices if matrices.shape[1] >= matrices.shape[2] else matrices.mT
        squares, V = torch.linalg.eigh(tall.mT @ tall)
        sigma = squares.clamp(min=0).sqrt()
        left = _capped((sigma - mu).clamp(min=0).flip(1), max_rank).flip(1)
        gain = torch.where(left > 0, left / sigma, 0.0)
        shrunk = (tall @ (V * gain[:, None, :])) @ V.mT
        result = shrunk if tall is matrices else shrunk.mT
    else:
        U, sigma, Vh = torch.linalg.svd(matrices, full_matrices=False)
        left = _capped((sigma - mu).clamp(min=0), max_rank)
        # As they are: U Σ Vᵀ would add rounding to an identity.
        result = matrices if mu == 0 and max_rank is None else (U * left[:, None, :]) @ Vh
    return Thresholded(matrices=result, nuclear_norms=left.sum(dim=1), ranks=(left > 0).sum(dim=1))


def _capped(descending: torch.Tensor, max_rank: int | None) -> torch.Tensor:
    if max_rank is None:
        return descending
    keep = torch.arange(descending.shape[1], device=descending.device) < max_rank
    return torch.where(keep, descending, 0.0)


@dataclass(frozen=True, slots=True)
class LowRankEstimate:
    """What `low_rank_estimation` found: `θ_i ≈ base + deltas[i]`.

    Attributes:
        base: `(a, b)`, the estimate of what the matrices have in common, θ_0.
        deltas: `(n, a, b)`, what each has besides.
        ranks: Rank of each of `deltas`.
        mu: The threshold used, in the unit of the matrices.
        iterations: How many were made.
        change: The last iteration's change of the deltas, relative to the spread of the matrices.
        converged: Whether that reached the tolerance.
        objective: `Σ w_i (½ ‖base + δ_i − θ_i‖² + μ ‖δ_i‖_*)`, which the iteration minimises.
    """

    base: torch.Tensor
    deltas: torch.Tensor
    ranks: tuple[int, ...]
    mu: float
    iterations: int
    change: float
    converged: bool
    objective: float


def low_rank_estimation(
    matrices: torch.Tensor,
    weights: Sequence[float],
    *,
    mu: float,
    relative: bool = False,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    warmup: int = 0,
    max_rank: int | None = None,
) -> LowRankEstimate:
    """Split matrices into a common base and low-rank rests, by coordinate descent from rests of 0.

    Repeats `θ_0 = Σ w_i (θ_i − δ_i) / Σ w_i` and `δ_i = SVT(θ_i − θ_0; μ)`. Cores and dense
    matrices alike: an orthonormal frame changes nothing, and neither does a term that all
    matrices share (a base model), which comes back inside `base`.

    Args:
        matrices: `(n, a, b)`, finite; float32 or wider.
        weights: One per matrix, ≥ 0 with a positive sum; a weight of 2 is the matrix given twice.
        mu: The threshold: absolute, or relative to the largest singular value of any matrix less
            the weighted mean (from 1 on all rests are zero and the base is that mean).
        relative: Which of the two.
        tolerance: Stop once `‖δ − δ_before‖ ≤ tolerance · ‖θ − mean‖`, both over all matrices,
            weighted.
        max_iterations: Stop after so many, converged or not; at least 1.
        warmup: Iterations before `max_rank` holds; no stop before it does.
        max_rank: Truncate each rest to this rank.

    Raises:
        NonFiniteError: The matrices' spread is not finite.

    Numerics: in the dtype of the matrices. The mean is taken off first and a power of two divided
        out, so that neither a large common term nor the size of the entries costs digits. No
        over-relaxation: the minimiser need not be unique, and this iteration's is meant.
        O(n a b min(a, b)) an iteration; about five times the memory of the matrices.
    Source: "LoRE-Merging", equation 2 and Algorithm 1, step 1. Equation 1 prints ‖δ‖_*² and no ½,
        of which SVT(·; μ) is not the minimiser; the algorithm is followed. It has no weights, no
        stopping rule, no cap (section 4 has one) and no relative threshold; these are ours.
    """
    total = math.fsum(weights)
    share = matrices.new_tensor([w / total for w in weights])[:, None, None]
    centre = (share * matrices).sum(dim=0)
    centred = matrices - centre
    peak = float(centred.abs().max())
    if not math.isfinite(peak):
        raise NonFiniteError("the matrices are not finite; check factors, scalings and weights")
    unit = math.ldexp(1.0, math.frexp(peak)[1] - 1)  # entries end up below 2
    centred = centred / unit
    spread = _norm(centred, share)
    if relative:
        mu = mu * unit * float(torch.linalg.matrix_norm(centred, ord=2).max())

    deltas = torch.zeros_like(centred)
    for iteration in range(1, max_iterations + 1):
        base = (share * (centred - deltas)).sum(dim=0)
        cap = max_rank if iteration > warmup else None
        rest = svt(centred - base, mu / unit, max_rank=cap)
        change = _norm(rest.matrices - deltas, share)
        deltas = rest.matrices
        converged = change <= tolerance * spread and cap == max_rank
        if converged:
            break
    misfit = _norm(base + deltas - centred, share)
    penalty = float((share[:, 0, 0] * rest.nuclear_norms).sum())
    return LowRankEstimate(
        base=centre + unit * base,
        deltas=unit * deltas,
        ranks=tuple(rest.ranks.tolist()),
        mu=mu,
        iterations=iteration,
        change=change / spread if spread else 0.0,
        converged=converged,
        objective=total * (unit * misfit * unit * misfit / 2 + mu * (unit * penalty)),
    )


def _norm(matrices: torch.Tensor, share: torch.Tensor) -> float:
    return float((share * matrices.square()).sum().sqrt())
