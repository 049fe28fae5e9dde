"""Choosing among the factorings `(B G, G⁻¹ A)` of a delta, for rules that depend on which."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unmerge.adapter import Factors
from unmerge.kernels.lowrank import svd_of_product
from unmerge.kernels.positions import total

# Of the alternation: it converges linearly and gains little after a few.
_ROUNDS = 10


def balanced(factors: Factors) -> Factors:
    """Return `A = √S Vᵀ` and `B = U √S` of the delta `scaling · B A = U S Vᵀ`, with scaling 1.

    Returns:
        Float64 factors of the delta's numerical rank (0 for a zero one). Equal deltas give equal
        factors to rounding: signs are fixed by the columns of U, in which the entry of largest
        magnitude is positive. Repeated singular values leave a rotation open.

    Raises:
        NonFiniteError: The product is not finite.

    Numerics: float64; singular values up to max(d_out, d_in) · ε of the largest are rounding and
        cut off, because their roots would not be: 1e-16 of the delta is 1e-8 of a factor.
        O((d_out + d_in) r²).
    """
    svd = svd_of_product(factors.scaling * factors.B.to(torch.float64), factors.A, factors.rank)
    cutoff = max(factors.d_out, factors.d_in) * torch.finfo(torch.float64).eps
    rank = int(torch.count_nonzero(cutoff * svd.S[0] < svd.S))
    A, B = svd.factors("balanced")
    return Factors(A=A[:rank], B=B[:, :rank], scaling=1.0)


def aligned(factors: Sequence[Factors], rank: int) -> list[Factors]:
    """Return `(B Rᵀ, R A)`, R orthogonal, with which all adapters lie as near each other as can be.

    Generalised Procrustes: every adapter is turned towards the mean of all, which is then taken
    anew; the sum of squared distances from the mean never grows. It starts from the adapter of
    largest norm (the first of several), so that names play no part.

    Args:
        factors: N adapters of one `(d_out, d_in)`.
        rank: What smaller ranks are filled up to with zeros.

    Returns:
        Float64 factors of that rank, with the scalings and the deltas of those given.

    Numerics: float64, ten rounds whatever happens, so that the result is a function of the factors
        alone; a local optimum. O(N r² (d_out + d_in)) a round.
    Source: Gower, "Generalized Procrustes analysis" (1975), without translation and scaling.
    """
    rows = torch.stack([_rows(f, rank) for f in factors])
    target = rows[int(torch.linalg.vector_norm(rows, dim=(1, 2)).argmax())]
    turned = rows
    for _ in range(_ROUNDS):
        turned = torch.stack([_rotation(own @ target.T) @ own for own in rows])
        target = total(turned.unbind(0)).div_(len(rows))
    d_in = factors[0].d_in
    return [
        Factors(A=own[:, :d_in], B=own[:, d_in:].T, scaling=f.scaling)
        for f, own in zip(factors, turned, strict=True)
    ]


def _rows(f: Factors, rank: int) -> torch.Tensor:
    """Return A beside Bᵀ, `(rank, d_in + d_out)`, filled up with zeros."""
    rows = torch.cat([f.A, f.B.T], dim=1).to(torch.float64)
    return torch.nn.functional.pad(rows, (0, 0, 0, rank - f.rank))


def _rotation(overlap: torch.Tensor) -> torch.Tensor:
    """Return the orthogonal R that maximises `tr(R overlap)`."""
    U, _, Vh = torch.linalg.svd(overlap)
    rotation: torch.Tensor = (U @ Vh).T
    return rotation
