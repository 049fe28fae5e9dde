"""Leading eigenvectors of many small symmetric matrices at once: LAPACK takes them one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unmerge.errors import NonFiniteError
from unmerge.kernels.positions import (
    BLOCK,
    dot,
    orthonormalise,
    positions_first,
    positions_last,
    total,
)

# From here on LAPACK is as fast (measured on one core, float64).
_LARGEST_ORDER = 32

# Halvings of the interval that holds an eigenvalue (more where more eigenvalues crowd), then Newton
# steps inside it. With fewer of either, more positions go to LAPACK; four steps square an error of
# 2⁻¹⁰ down to rounding wherever the next eigenvalue is not almost as near.
_HALVINGS = 9
_ORDER_PER_HALVING = 8
_NEWTON_STEPS = 4

_EPSILON = torch.finfo(torch.float64).eps


def leading_eigenvectors(gram: torch.Tensor, size: int) -> torch.Tensor:
    """Return eigenvectors of the `size` largest eigenvalues of P positive semidefinite matrices.

    Args:
        gram: `(P, n, n)`, symmetric positive semidefinite, of any floating dtype.
        size: How many, 0 ≤ size ≤ n.

    Returns:
        `(P, n, size)` float64 on the device of `gram`: orthonormal columns, largest eigenvalue
        first. Signs, and the choice within an eigenvalue that occurs several times, are arbitrary
        and deterministic; a matrix's result does not depend on the others.

    Raises:
        NonFiniteError: A matrix holds NaN or infinity.

    Numerics: float64; residual and orthogonality to the rounding of float64, relative to the
        largest eigenvalue. Where few eigenvectors of small matrices are wanted (2 size ≤ n ≤ 32)
        all positions go through Householder tridiagonalisation, bisection, Newton's method and
        one twisted factorisation together, as long vectors. What comes out is checked position by
        position; where an eigenvalue is not isolated (repeated, or nearly), a residual is above
        rounding or a vector is lost, that position is done by LAPACK. O(P n³).
    Source: bisection and twisted factorisations as in Dhillon and Parlett, "Multiple
        representations to compute orthogonal eigenvectors of symmetric tridiagonal matrices"
        (2004); with 1/γ_k the diagonal of (T − x)⁻¹, the Newton step of det(T − x) is 1/Σ(1/γ_k).
    """
    with torch.inference_mode():
        blocks = torch.split(gram.to(torch.float64), BLOCK)
        parts = [positions_first(leading_eigenvectors_last(block, size)) for block in blocks]
    return torch.cat(parts)


def leading_eigenvectors_last(gram: torch.Tensor, size: int) -> torch.Tensor:
    """Return `(n, size, P)` for one block `gram (P, n, n)` in float64: the same, positions last."""
    positions, order = gram.shape[:2]
    if not 0 < 2 * size <= order <= _LARGEST_ORDER:
        return _lapack(gram, size)
    vectors, proven = _vectorised(positions_last(gram), size)
    vectors, rest = vectors[:, :, :positions], (~proven[:positions]).nonzero()[:, 0]
    if len(rest):
        vectors[:, :, rest] = _lapack(gram[rest], size)
    return vectors


def _lapack(gram: torch.Tensor, size: int) -> torch.Tensor:
    if not bool(torch.isfinite(gram).all()):
        raise NonFiniteError("a Gram matrix is not finite; the points are too large for float64")
    vectors: torch.Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors.flip(-1)[..., :size].permute(1, 2, 0)


def _vectorised(matrix: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return vectors `(n, size, W)`, and `(W,)` bool where they are proven to be the right ones.

    `matrix (n, n, W)` is overwritten.
    """
    order = len(matrix)
    peak = matrix[0, 0].clone()
    for index in range(1, order):
        torch.maximum(peak, matrix[index, index], out=peak)
    matrix /= torch.where(peak > 0, peak, 1.0)
    t = _tridiagonalise(matrix)
    values, vectors, proven = _tridiagonal_vectors(t, size)
    proven &= orthonormalise(vectors)
    proven &= _residual(t, values, vectors) <= (64 * order * _EPSILON) ** 2
    for reflector, beta in reversed(t.reflectors):
        part = vectors[order - len(reflector) :]
        along = dot(part.unbind(0), [row[None] for row in reflector]).mul_(beta)
        for target, row in zip(part.unbind(0), reflector, strict=True):
            target.addcmul_(along, row[None], value=-1)
    return vectors, proven


@dataclass(frozen=True, slots=True)
class _Tridiagonal:
    """`Q T Qᵀ` per position, Q the product of reflectors `1 − β v vᵀ`.

    Attributes:
        diagonal: `(n, W)`.
        off: `(n − 1, W)`.
        reflectors: Per step the rows of v, which acts on the last `len(v)` coordinates, and β.
    """

    diagonal: torch.Tensor
    off: torch.Tensor
    reflectors: list[tuple[tuple[torch.Tensor, ...], torch.Tensor]]


def _tridiagonalise(matrix: torch.Tensor) -> _Tridiagonal:
    """Reduce `matrix (n, n, W)`, which is overwritten, by Householder reflectors."""
    order, width = matrix.shape[0], matrix.shape[2]
    off = matrix.new_empty(order - 1, width)
    reflectors = []
    for step in range(order - 2):
        # The row is done with: its remainder holds the reflector.
        vector = matrix[step, step + 1 :]
        rows = vector.unbind(0)
        length = dot(rows, rows).sqrt_()
        beta = rows[0].abs().add_(length).mul_(length)
        beta = torch.where(beta > 0, beta.reciprocal(), 0.0)
        signed = torch.copysign(length, rows[0])
        rows[0].add_(signed)
        torch.neg(signed, out=off[step])
        rest = matrix[step + 1 :, step + 1 :]
        image = dot(rest.unbind(0), rows).mul_(beta)
        half = dot(image.unbind(0), rows).mul_(beta).mul_(0.5)
        image.addcmul_(vector, half, value=-1)
        rest.addcmul_(vector[:, None], image[None], value=-1)
        rest.addcmul_(image[:, None], vector[None], value=-1)
        reflectors.append((rows, beta))
    if order > 1:
        off[order - 2] = matrix[order - 2, order - 1]
    diagonal = torch.stack([matrix[row, row] for row in range(order)])
    return _Tridiagonal(diagonal=diagonal, off=off, reflectors=reflectors)


class _Pivots:
    """Pivots of T − x, downwards and upwards, for one x per wanted eigenvalue and position.

    Buffers are allocated once: one evaluation is a handful of operations a row.
    """

    def __init__(self, t: _Tridiagonal, size: int, dtype: torch.dtype) -> None:
        order, width = t.diagonal.shape
        diagonal, squares = t.diagonal.to(dtype)[:, None], t.off.square().to(dtype)[:, None]
        self._diagonal = diagonal.expand(order, size, width).contiguous()
        self._squares = squares.expand(order - 1, size, width).unbind(0)
        self.shifted = torch.empty_like(self._diagonal)
        self.downwards = torch.empty_like(self._diagonal)
        self.upwards = torch.empty_like(self._diagonal)
        self._rows = self.shifted.unbind(0)
        self._quotient = torch.empty_like(self._rows[0])

    def go_down(self, x: torch.Tensor) -> None:
        """Fill `shifted` with `d_i − x` and `downwards` with `q_i = d_i − x − e²_{i−1}/q_{i−1}`."""
        torch.sub(self._diagonal, x, out=self.shifted)
        self._sweep(self._rows, self._squares, self.downwards.unbind(0))

    def go_both_ways(self, x: torch.Tensor) -> None:
        """Do the same, and fill `upwards` with `s_i = d_i − x − e²_i/s_{i+1}`."""
        self.go_down(x)
        self._sweep(self._rows[::-1], self._squares[::-1], self.upwards.unbind(0)[::-1])

    def _sweep(
        self,
        shifted: Sequence[torch.Tensor],
        squares: Sequence[torch.Tensor],
        pivots: Sequence[torch.Tensor],
    ) -> None:
        # A pivot of 0 gives infinity, then 0: right in IEEE arithmetic. 0/0 gives NaN, which no
        # test passes.
        pivots[0].copy_(shifted[0])
        for row, square in enumerate(squares):
            torch.div(square, pivots[row], out=self._quotient)
            torch.sub(shifted[row + 1], self._quotient, out=pivots[row + 1])


def _tridiagonal_vectors(
    t: _Tridiagonal, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the top eigenvalues `(size, W)`, vectors `(n, size, W)`, and where they are isolated.

    The k-th eigenvalue is bisected by Sturm counts until its interval should hold no other, then
    found by Newton's method inside it.
    """
    low, width = _bisect(t, size)
    pivots = _Pivots(t, size, torch.float64)
    pivots.go_down(low)
    # Exactly k eigenvalues above `low`: vectors that are orthogonal are then the k-th for each k.
    isolated = (_count_positive(pivots.downwards) == _numbers(low)).all(0)
    high = low + width
    x = low + 0.5 * width
    for _ in range(_NEWTON_STEPS):
        pivots.go_both_ways(x)
        twisted = pivots.upwards.sub_(pivots.shifted).add_(pivots.downwards)
        x += total(twisted.reciprocal_().unbind(0)).reciprocal_()
        torch.clamp(x, low, high, out=x)
    pivots.go_both_ways(x)
    return x, _twisted_vectors(t.off, pivots), isolated


def _bisect(t: _Tridiagonal, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return lower ends and widths `(size, W)` of intervals that hold the k-th eigenvalues.

    Half the work in float32, whose counts are those of a matrix nearby: the intervals are widened
    by more than that is off.
    """
    trace = total(t.diagonal.unbind(0))
    pivots = _Pivots(t, size, torch.float32)
    halvings = _HALVINGS + t.diagonal.shape[0] // _ORDER_PER_HALVING
    # k eigenvalues of at least λ_k add up to at most the trace, and none is below 0.
    ends = trace / torch.arange(1, size + 1, dtype=trace.dtype, device=trace.device)[:, None]
    step = ends.to(torch.float32)
    low, x = torch.zeros_like(step), torch.empty_like(step)
    index = _numbers(low)
    for _ in range(halvings):
        step *= 0.5
        torch.add(low, step, out=x)
        pivots.go_down(x)
        low.addcmul_(_count_positive(pivots.downwards).ge_(index), step)
    margin = 32 * torch.finfo(torch.float32).eps * trace
    return low.to(torch.float64) - margin, ends * 0.5**halvings + 2 * margin


def _numbers(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(1, len(like) + 1, dtype=like.dtype, device=like.device)[:, None]


def _count_positive(pivots: torch.Tensor) -> torch.Tensor:
    """Return how many of `pivots (n, size, W)`, overwritten, are positive: eigenvalues above x."""
    return total(pivots.gt_(0).unbind(0))


def _twisted_vectors(off: torch.Tensor, pivots: _Pivots) -> torch.Tensor:
    """Solve `(T − x) z = γ_k e_k` at the smallest |γ_k|, where z is nearest to an eigenvector."""
    twisted = pivots.shifted.neg_().add_(pivots.downwards).add_(pivots.upwards).abs_()
    rows = twisted.unbind(0)
    smallest = rows[0].clone()
    for row in rows[1:]:
        torch.minimum(smallest, row, out=smallest)
    start = twisted.eq_(smallest)
    above = (off[:, None] / pivots.downwards[:-1]).unbind(0)
    below = (off[:, None] / pivots.upwards[1:]).unbind(0)
    vectors, lower = start.clone(), start.clone()
    upper_rows, lower_rows = vectors.unbind(0), lower.unbind(0)
    for index in reversed(range(len(above))):
        upper_rows[index].addcmul_(above[index], upper_rows[index + 1], value=-1)
    for index in range(len(below)):
        lower_rows[index + 1].addcmul_(below[index], lower_rows[index], value=-1)
    return vectors.add_(lower).sub_(start)


def _residual(t: _Tridiagonal, values: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Return `(W,)`: the largest `‖T z − x z‖²` of a position."""
    residual = (t.diagonal[:, None] - values) * vectors
    residual[:-1].addcmul_(t.off[:, None], vectors[1:])
    residual[1:].addcmul_(t.off[:, None], vectors[:-1])
    rows = residual.unbind(0)
    return dot(rows, rows).amax(0)
