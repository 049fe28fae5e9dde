"""The leading singular value decomposition of a dense matrix, where there are no factors to use.

Rules that look at entries (TIES, DARE, pruning) return a full-rank `d_out × d_in` delta; cutting
it to a low rank is the one place where this library decomposes a matrix of that size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from unmerge.errors import NonFiniteError
from unmerge.kernels.lowrank import ProductSvd, column_signs
from unmerge.kernels.truncation import RankChoice

# Up to this size a full SVD takes milliseconds and leaves nothing to explain.
_SMALL = 256
# Rows converted to float64 at a time; a constant, so that no bit depends on the memory budget.
_BLOCK_ROWS = 256
# Directions beyond the kept ones that Rayleigh–Ritz may choose from.
_OVERSAMPLING = 16
# Below this fraction of the squared norm, tails of a Gram spectrum are too inexact to cut by.
_GRAM_TAIL = 1e-9


@dataclass(frozen=True, slots=True)
class DenseSvd:
    """The leading part of the singular value decomposition of a dense matrix.

    Attributes:
        svd: Its `U`, `S`, `Vh`; beyond the kept values `spectrum` is that of the Gram matrix,
            noise below about 10⁻⁸ of the largest, where the full decomposition was not run.
        relative_error: Measured, not estimated: `‖M − U S Vh‖ / ‖M‖` in the Frobenius norm.
    """

    svd: ProductSvd
    relative_error: float


def leading_svd(matrix: torch.Tensor, choice: RankChoice) -> DenseSvd:
    """Return the best approximation of `matrix` of the rank that `choice` chooses, in SVD form.

    Args:
        matrix: `(d_out, d_in)`, float32 or wider.
        choice: How much is kept.

    Returns:
        Float64 tensors on the device of `matrix`.

    Raises:
        NonFiniteError: The matrix is not finite.

    Numerics: float64. The eigenvectors of the smaller Gram matrix, accumulated over row blocks of
        fixed height, give the leading subspace; its squaring would blur singular values below
        10⁻⁸ of the largest, so the factors come from Rayleigh–Ritz on the matrix itself, over the
        range of `M V` for the kept eigenvectors and 16 more. A matrix of rank ≤ k + 16 is
        reproduced to the rounding of float64 whatever its spectrum; else the error exceeds the
        best one by at most about 10⁻⁸ of the largest singular value, and by rounding where the
        kept ones are larger than that. The full SVD is used up to 256 on the smaller side, where
        more than a quarter of the values is kept, and where `choice` allows a tail below 10⁻⁹ of
        the squared norm (an error below 3·10⁻⁵), which a Gram spectrum cannot tell.
        With m the smaller and n the larger dimension, O(n m² + m³) time; m² + (k + 16)(m + n)
        float64 elements beside a float64 row block, or m n for a full SVD.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError("the merged delta holds NaN or infinity; check weights and scalings")
    if matrix.shape[0] < matrix.shape[1]:
        return _transposed(_leading(matrix.T, choice))
    return _leading(matrix, choice)


def _leading(tall: torch.Tensor, choice: RankChoice) -> DenseSvd:
    """Return the decomposition of a matrix with at least as many rows as columns."""
    rows, columns = tall.shape
    if columns <= _SMALL or (choice.tail is not None and choice.tail < _GRAM_TAIL):
        return _full(tall, choice)
    values, vectors = torch.linalg.eigh(_gram(tall))
    spectrum = values.flip(0).clamp(min=0).sqrt()
    noise = columns * torch.finfo(torch.float64).eps
    kept = choice.keep(spectrum, dimension=rows, noise=noise)
    if 4 * (kept + _OVERSAMPLING) > columns:
        return _full(tall, choice)
    leading = vectors.flip(1)[:, : kept + _OVERSAMPLING].contiguous()
    range_of = torch.linalg.qr(_times(tall, leading)).Q  # (rows, k + 16)
    small = _transposed_times(tall, range_of).T  # (k + 16, columns) = Qᵀ M
    U, S, Vh = torch.linalg.svd(small, full_matrices=False)
    U, S, Vh = range_of @ U[:, :kept], S[:kept], Vh[:kept]
    signs = column_signs(U)
    svd = ProductSvd(
        U=U * signs,
        S=S,
        Vh=(signs[:, None] * Vh).contiguous(),
        spectrum=torch.cat([S, spectrum[kept:]]),
    )
    return DenseSvd(svd=svd, relative_error=_relative_error(tall, svd))


def _full(tall: torch.Tensor, choice: RankChoice) -> DenseSvd:
    U, S, Vh = torch.linalg.svd(tall.to(torch.float64), full_matrices=False)
    kept = choice.keep(S, dimension=tall.shape[0])
    signs = column_signs(U[:, :kept])
    svd = ProductSvd(
        U=U[:, :kept] * signs,
        S=S[:kept],
        Vh=(signs[:, None] * Vh[:kept]).contiguous(),
        spectrum=S,
    )
    return DenseSvd(svd=svd, relative_error=svd.relative_error)


def _transposed(result: DenseSvd) -> DenseSvd:
    """Return the decomposition of the transpose, with the signs that its own U asks for."""
    svd = result.svd
    U = svd.Vh.T
    signs = column_signs(U)
    turned = ProductSvd(
        U=(U * signs).contiguous(),
        S=svd.S,
        Vh=(svd.U * signs).T.contiguous(),
        spectrum=svd.spectrum,
    )
    return DenseSvd(svd=turned, relative_error=result.relative_error)


def _blocks(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    for start in range(0, matrix.shape[0], _BLOCK_ROWS):
        yield matrix[start : start + _BLOCK_ROWS].to(torch.float64)


def _gram(tall: torch.Tensor) -> torch.Tensor:
    gram = tall.new_zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for block in _blocks(tall):
        gram.addmm_(block.T, block)
    return gram


def _times(tall: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.cat([block @ right for block in _blocks(tall)])


def _transposed_times(tall: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    product = left.new_zeros(tall.shape[1], left.shape[1])
    for block, rows in zip(_blocks(tall), _blocks(left), strict=True):
        product.addmm_(block.T, rows)
    return product


def _relative_error(tall: torch.Tensor, svd: ProductSvd) -> float:
    lost = total = 0.0
    right = svd.S[:, None] * svd.Vh
    for block, rows in zip(_blocks(tall), _blocks(svd.U), strict=True):
        total += float(block.square().sum())
        lost += float((block - rows @ right).square().sum())
    return math.sqrt(lost / total) if total > 0 else 0.0
