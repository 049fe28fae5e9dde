"""Best affine subspaces for many small point sets at once: the closed form behind RMM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unmerge.adapter import Factors
from unmerge.kernels.eigen import leading_eigenvectors_last
from unmerge.kernels.positions import BLOCK, orthonormalise, positions_first, positions_last

# Batched products of fewer multiplications than this torch does by a loop of its own, at a quarter
# of the speed of the BLAS: with a column of zeros or two a product is worth more.
_SMALLEST_FOR_BLAS = 400


@dataclass(frozen=True, slots=True)
class AffineBasis:
    """For each of P positions, the affine subspace of dimension p nearest to N points.

    Attributes:
        mean: `(P, r)`.
        basis: `(P, p, r)`, rows orthonormal, leading directions first.
        coefficients: `(P, N, p)`; point n is `mean + coefficients[n] @ basis`.
        energy: Sum of the squared lengths of all points.
        residual: Sum of their squared distances from their subspaces.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    coefficients: torch.Tensor
    energy: float
    residual: float


def affine_basis(points: torch.Tensor, size: int) -> AffineBasis:
    """Return the least-squares affine subspace of dimension `size` at every position.

    Args:
        points: `(P, N, r)`: at each position N points of dimension r.
        size: Dimension p, 0 ≤ p ≤ min(N − 1, r).

    Returns:
        Float64 tensors on the device of `points`. Where the points span fewer than p directions,
        the rest of the basis is arbitrary (and deterministic), with coefficients of rounding size.
        A position's bits do not depend on the other positions, but for one that is alone in the
        last block of 2048: libraries multiply a batch of one another way.

    Raises:
        NonFiniteError: Products of the points exceed float64.

    Numerics: float64. The top right singular vectors of the centred points come from the
        eigenvectors of the smaller Gram matrix, r × r or (N − 1) × (N − 1). The latter is that of
        N − 1 orthonormal contrasts, so that the direction that centring removes cannot mix with
        small ones, and its vectors are orthonormalised in order (Gram-Schmidt; Householder QR
        where a direction vanishes), so that p = min(N − 1, r) returns the points to rounding
        however small a singular value is. In each basis vector the entry of largest magnitude is
        positive (of two equal ones, one is). `residual` is a difference: below 1e-15 of `energy`
        it is rounding. O(P N r min(N, r)).
    Source: "Towards Reversible Model Merging for Low-rank Weights", section 5.1 and Theorem 1.
        Algorithm 1 line 7 prints the mean without 1/N; the text has it, and so does this.
    """
    # A fixed grid of blocks: each stays near the processor, and memory does not grow with P.
    # Without autograd's bookkeeping, a tenth of the time on operations as short as these.
    with torch.inference_mode():
        parts = [_affine_basis(block, size) for block in torch.split(points, BLOCK)]
    return AffineBasis(
        mean=torch.cat([part.mean for part in parts]),
        basis=torch.cat([part.basis for part in parts]),
        coefficients=torch.cat([part.coefficients for part in parts]),
        energy=math.fsum(part.energy for part in parts),
        residual=math.fsum(part.residual for part in parts),
    )


def factor_positions(factors: Sequence[Factors], rank: int) -> torch.Tensor:
    """Return N adapters as points `(d_in + d_out, N, rank)`: columns of A, then rows of B.

    Args:
        factors: Of one `(d_out, d_in)`.
        rank: What smaller ranks are filled up to with zeros.
    """
    pad = torch.nn.functional.pad
    A = [f.A if f.rank == rank else pad(f.A, (0, 0, 0, rank - f.rank)) for f in factors]
    B = [f.B if f.rank == rank else pad(f.B, (0, rank - f.rank)) for f in factors]
    # By way of one matrix, whose transposition is fast.
    columns = torch.cat(A).t().reshape(-1, len(factors), rank)
    return torch.cat([columns, torch.stack(B, dim=1)])


def _affine_basis(points: torch.Tensor, size: int) -> AffineBasis:
    count, dimension = points.shape[1:]
    centred = points.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    mean = centred.mean(dim=1)
    centred -= mean[:, None]
    if size == 0:
        columns = centred.new_zeros(len(points), dimension, 0)
    elif count <= dimension:
        rows = _helmert(count, points.device) @ centred  # (P, N − 1, r)
        gram = rows @ rows.transpose(1, 2)
        left = positions_first(leading_eigenvectors_last(gram, size))
        columns = _with_fixed_signs(_orthonormal(_product(rows.transpose(1, 2), left)))
    else:
        gram = centred.transpose(1, 2) @ centred
        columns = _with_fixed_signs(leading_eigenvectors_last(gram, size))
    coefficients = _product(centred, columns)
    spread = _squares(centred)
    return AffineBasis(
        mean=mean,
        basis=columns.transpose(1, 2),
        coefficients=coefficients,
        energy=spread + count * _squares(mean),
        residual=max(spread - _squares(coefficients), 0.0),
    )


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return `left (P, a, b) @ right (P, b, c)`."""
    columns = right.shape[2]
    wanted = -(-_SMALLEST_FOR_BLAS // (left.shape[1] * left.shape[2]))
    if not columns < wanted <= 2 * columns:
        return left @ right
    product = left @ torch.nn.functional.pad(right, (0, wanted - columns))
    return product[:, :, :columns]


def _squares(tensor: torch.Tensor) -> float:
    flat = tensor.reshape(-1)
    return float(torch.dot(flat, flat))


def _helmert(count: int, device: torch.device) -> torch.Tensor:
    """Return `count − 1` orthonormal rows that are orthogonal to the vector of ones."""
    rows = torch.tril(torch.ones(count, count, dtype=torch.float64, device=device), -1)[1:]
    index = torch.arange(1, count, dtype=torch.float64, device=device)
    rows[torch.arange(count - 1), torch.arange(1, count)] = -index
    return rows / (index * (index + 1)).sqrt()[:, None]


def _orthonormal(directions: torch.Tensor) -> torch.Tensor:
    """Return orthonormal `(r, p, P)` for `directions (P, r, p)`; the span of the first k is kept.

    The columns are orthogonal but for rounding, so that one pass of Gram-Schmidt is enough, except
    where rounding is most of a column: those positions are done by QR.
    """
    wide = positions_last(directions)
    kept = orthonormalise(wide)[: len(directions)]
    result, lost = wide[:, :, : len(directions)], (~kept).nonzero()[:, 0]
    if len(lost):
        result[:, :, lost] = torch.linalg.qr(directions[lost]).Q.permute(1, 2, 0)
    return result


def _with_fixed_signs(columns: torch.Tensor) -> torch.Tensor:
    """Return `columns (r, p, P)` as `(P, r, p)`, each one's entry of largest magnitude positive."""
    largest, smallest = columns.amax(0), columns.amin(0)
    return positions_first(columns * torch.where(largest >= -smallest, 1.0, -1.0))
