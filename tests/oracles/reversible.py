"""Reversible methods but RMM: EMR, joint diagonalisation and integer quantisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from oracles.common import Matrix
from oracles.sparse import Mask, Tensors


class Emr(NamedTuple):
    """EMR: one unified matrix per module; masks and one rescaler per adapter."""

    unified: list[Matrix]
    masks: list[dict[str, Mask]]
    rescalers: dict[str, float]

    def restore(self, module: int, name: str) -> Matrix:
        """Return `λ_i M_i ⊙ τ`."""
        delta: Matrix = self.rescalers[name] * np.where(
            self.masks[module][name], self.unified[module], 0.0
        )
        return delta


def emr(tensors: Tensors) -> Emr:
    """Elect, mask and rescale over everything a scope covers (EMR-Merging, arXiv 2405.17461).

    Elect: per entry the sign of `Σ τ_i`, with the largest magnitude among the τ_i of that sign.
    Mask: where `τ_i ⊙ τ > 0`. Rescale: `λ_i = Σ|τ_i| / Σ|M_i ⊙ τ|` over all matrices the scope
    covers; 0 for an adapter that is zero throughout.
    """
    unified: list[Matrix] = []
    masks: list[dict[str, Mask]] = []
    for tensor in tensors:
        names = sorted(tensor)
        elected = np.zeros_like(tensor[names[0]])
        for entry in np.ndindex(*elected.shape):
            values = [float(tensor[name][entry]) for name in names]
            winner = np.sign(sum(values))
            agreeing = [abs(value) for value in values if value * winner > 0]
            elected[entry] = winner * max(agreeing, default=0.0)
        unified.append(elected)
        masks.append({name: tensor[name] * elected > 0 for name in names})
    rescalers = {}
    for name in sorted({name for tensor in tensors for name in tensor}):
        own = left = 0.0
        for tensor, elected, mask in zip(tensors, unified, masks, strict=True):
            if name in tensor:
                own += float(np.abs(tensor[name]).sum())
                left += float(np.abs(elected[mask[name]]).sum())
        rescalers[name] = own / left if left else 0.0
    return Emr(unified, masks, rescalers)


class Joint(NamedTuple):
    """A joint decomposition `Δ_i ≈ U C_i Vᵀ`."""

    U: Matrix  # (d_out, k)
    V: Matrix  # (d_in, k)
    cores: list[Matrix]  # (k, k)

    def restore(self, index: int) -> Matrix:
        """Return `U C_i Vᵀ`."""
        delta: Matrix = self.U @ self.cores[index] @ self.V.T
        return delta

    def squared_error(self, deltas: Sequence[Matrix]) -> float:
        """Return `Σ ‖Δ_i − U C_i Vᵀ‖²`."""
        return sum(
            float(np.linalg.norm(delta - self.restore(i))) ** 2 for i, delta in enumerate(deltas)
        )


def diagonal_round(
    deltas: Sequence[Matrix], U: Matrix, V: Matrix, diagonals: Matrix
) -> tuple[Matrix, Matrix, Matrix]:
    """Improve U, then V, then the diagonals, each by least squares with the others fixed (JD-Diag).

    U is `(d_out, k)`, V `(d_in, k)`, `diagonals` `(N, k)`; `Δ_i ≈ U diag(c_i) Vᵀ`.
    """
    right = np.concatenate([(V * c).T for c in diagonals], axis=1)
    U = np.concatenate(deltas, axis=1) @ np.linalg.pinv(right)
    left = np.concatenate([U * c for c in diagonals], axis=0)
    V = (np.linalg.pinv(left) @ np.concatenate(deltas, axis=0)).T
    directions = np.stack([np.outer(u, v).ravel() for u, v in zip(U.T, V.T, strict=True)], axis=1)
    fitted = np.linalg.pinv(directions) @ np.stack([delta.ravel() for delta in deltas], axis=1)
    return U, V, fitted.T


def diagonal_error(deltas: Sequence[Matrix], U: Matrix, V: Matrix, diagonals: Matrix) -> float:
    """Return `Σ ‖Δ_i − U diag(c_i) Vᵀ‖²`."""
    return sum(
        float(np.linalg.norm(delta - (U * c) @ V.T)) ** 2
        for delta, c in zip(deltas, diagonals, strict=True)
    )


def _leading(gram: Matrix, size: int) -> Matrix:
    _, vectors = np.linalg.eigh(gram)
    return vectors[:, ::-1][:, :size]


def with_best_cores(deltas: Sequence[Matrix], U: Matrix, V: Matrix) -> Joint:
    """Return orthonormal U and V with the cores that fit best, `C_i = Uᵀ Δ_i V`."""
    return Joint(U, V, [U.T @ delta @ V for delta in deltas])


def joint_full(deltas: Sequence[Matrix], rank: int, iterations: int) -> Joint:
    """Alternate between the best U for V and the best V for U (arXiv 2407.00066, JD-Full).

    For fixed V the error `Σ‖Δ_i − U Uᵀ Δ_i V Vᵀ‖²` is least for the leading eigenvectors of
    `Σ Δ_i V Vᵀ Δ_iᵀ`. Starts from those of `Σ Δ_iᵀ Δ_i`.
    """
    V = _leading(np.sum([delta.T @ delta for delta in deltas], axis=0), rank)
    for _ in range(iterations):
        U = _leading(np.sum([(delta @ V) @ (delta @ V).T for delta in deltas], axis=0), rank)
        V = _leading(np.sum([(delta.T @ U) @ (delta.T @ U).T for delta in deltas], axis=0), rank)
    return with_best_cores(deltas, U, V)


class Quantised(NamedTuple):
    """Integers with one scale per group of consecutive entries of a row."""

    codes: npt.NDArray[np.int64]  # (rows, columns)
    scales: Matrix  # (rows, ⌈columns / group_size⌉)
    values: Matrix  # (rows, columns), code · scale


def quantise(
    matrix: npt.NDArray[Any], bits: int, group_size: int, *, step_bits: int | None = None
) -> Quantised:
    """Round every entry to a multiple of its group's `absmax / (2^(bits−1) − 1)`, half to even.

    `step_bits` rounds that step to so many significant bits, which a narrow dtype can hold.
    """
    matrix = np.asarray(matrix, np.float64)
    rows, columns = matrix.shape
    largest = 2 ** (bits - 1) - 1
    codes = np.zeros((rows, columns), np.int64)
    scales = np.zeros((rows, -(-columns // group_size)))
    values = np.zeros((rows, columns))
    for i in range(rows):
        for g, start in enumerate(range(0, columns, group_size)):
            group = matrix[i, start : start + group_size]
            step = float(np.abs(group).max()) / largest
            if step_bits is not None:
                mantissa, exponent = math.frexp(step)
                step = math.ldexp(round(math.ldexp(mantissa, step_bits)), exponent - step_bits)
            scales[i, g] = step
            for j, value in enumerate(group, start):
                # Python's round() is half to even.
                codes[i, j] = round(float(value) / step) if step else 0
                values[i, j] = codes[i, j] * step
    return Quantised(codes, scales, values)
