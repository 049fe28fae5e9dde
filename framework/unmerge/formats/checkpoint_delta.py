"""What fine-tuning changed in one tensor, and the low-rank factors of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from unmerge.arrays import round_once
from unmerge.errors import ConfigError
from unmerge.kernels.dense import leading_svd
from unmerge.kernels.truncation import RankChoice

__all__ = ["LowRank", "difference", "frobenius_norm", "low_rank", "rounding_norm", "same"]

# Rows looked at in float64 at a time.
_BLOCK_ROWS = 256
# What float32 factors may add to a relative error: no bound below it can be held.
_FLOAT32_ERROR = 1e-6


def same(tuned: torch.Tensor, base: torch.Tensor) -> bool:
    """Return whether two tensors of one shape have equal values, whatever their dtypes."""
    dtype = torch.promote_types(tuned.dtype, base.dtype)
    return torch.equal(tuned.to(dtype), base.to(dtype))


def difference(tuned: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Return `tuned - base` in float32, or in float64 if one of them is, rounded once per entry.

    A new tensor, the only one of that size that is made.
    """
    dtype = torch.promote_types(torch.promote_types(tuned.dtype, base.dtype), torch.float32)
    # In place on a copy: the inputs are mapped files, and narrow ones must not be subtracted in
    # their own dtype.
    return tuned.to(dtype, copy=True).sub_(base)


def frobenius_norm(matrix: torch.Tensor) -> float:
    """Return the norm of a tensor of two or more dimensions, accumulated in float64."""
    squares = (float(block.square().sum()) for block in _blocks(matrix.flatten(1)))
    return math.sqrt(sum(squares))


@dataclass(frozen=True, slots=True)
class LowRank:
    """The factors of a change, in the dtype they are stored in.

    Attributes:
        A: `(rank, d_in)`.
        B: `(d_out, rank)`.
        error: `‖Δ − B A‖ / ‖Δ‖`, Frobenius, measured on these factors in float64.
    """

    A: torch.Tensor
    B: torch.Tensor
    error: float


def low_rank(
    delta: torch.Tensor, norm: float, keep: RankChoice, dtype: torch.dtype, what: str
) -> LowRank:
    """Return balanced factors of the best approximation of `delta` that `keep` allows.

    Args:
        delta: `(d_out, d_in)`, finite, float32 or wider.
        norm: Its Frobenius norm, above 0.
        keep: How much of it is kept.
        dtype: What the factors are rounded to.
        what: Whose factors they are, for messages.

    Raises:
        ConfigError: Rounding to `dtype` alone takes the error above what `keep` allows.
        NonFiniteError: A factor exceeds the range of `dtype`.
    """
    A, B = (
        round_once(factor.contiguous(), dtype, what)
        for factor in leading_svd(delta, keep).svd.factors("balanced")
    )
    lost = 0.0
    for block, rows in zip(_blocks(delta), _blocks(B), strict=True):
        lost += float((block - rows @ A.to(torch.float64)).square().sum())
    error = math.sqrt(lost) / norm
    if keep.tail is not None and error > math.sqrt(keep.tail) + _FLOAT32_ERROR:
        raise ConfigError(
            f"{what} leave a relative error of {error:.2g} once rounded to their dtype, more than "
            f"the {math.sqrt(keep.tail):.2g} asked for; take float32 factors or allow more"
        )
    return LowRank(A=A, B=B, error=error)


def rounding_norm(tensor: torch.Tensor) -> float:
    """Return the Frobenius norm that the rounding of a tensor's entries to its dtype should have.

    Each entry is off by at most half a unit in its last place u, and on average by `u / √12` in
    the root of the mean square, as a uniform error is.
    """
    info = torch.finfo(tensor.dtype)
    total = 0.0
    for block in _blocks(tensor.flatten(1)):
        # |w| = m · 2^e with 1/2 ≤ m < 1, so that the last place is worth eps · 2^(e−1).
        exponents = torch.frexp(block).exponent
        units = torch.ldexp(torch.full_like(block, info.eps / 2), exponents)
        total += float(units.masked_fill_(block == 0, 0).square().sum())
    return math.sqrt(total / 12)


def _blocks(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    for start in range(0, matrix.shape[0], _BLOCK_ROWS):
        yield matrix[start : start + _BLOCK_ROWS].to(torch.float64)
