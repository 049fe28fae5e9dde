"""What all oracles share: an adapter's part of a module, its delta, and the spaces of a rule.

An adapter's part of one module is a tuple `(A, B, scaling, weight)` with `A (r, d_in)` and
`B (d_out, r)`, the names and shapes of PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Part = tuple[npt.NDArray[Any], npt.NDArray[Any], float, float]
Rule = Callable[[Sequence[Matrix], Sequence[float]], Matrix]
"""What one matrix and one weight per adapter become."""


def dense(part: Part) -> Matrix:
    """Return `scaling · B @ A` without the weight."""
    A, B, scaling, _ = part
    delta: Matrix = float(scaling) * (np.asarray(B, np.float64) @ np.asarray(A, np.float64))
    return delta


def sign(number: float) -> float:
    """Return −1 or +1; +1 for 0."""
    return -1.0 if number < 0 else 1.0


def factor_matrices(part: Part) -> tuple[Matrix, Matrix]:
    """Return A and B as a rule in factor space sees them: `√|s|` on each, the sign of s on A."""
    A, B, scaling, _ = part
    root = math.sqrt(abs(float(scaling)))
    return (
        sign(scaling) * root * np.asarray(A, np.float64),
        root * np.asarray(B, np.float64),
    )


def factor_weights(part: Part) -> tuple[float, float]:
    """Return the weights of A and of B in factor space: `√|w|` each, the sign of w on A."""
    weight = float(part[3])
    return sign(weight) * math.sqrt(abs(weight)), math.sqrt(abs(weight))


def in_deltas(rule: Rule, parts: Sequence[Part]) -> Matrix:
    """Return `f({Δ_i})`: multiply first, then apply the rule."""
    return rule([dense(part) for part in parts], [float(part[3]) for part in parts])


def in_factors(rule: Rule, parts: Sequence[Part]) -> Matrix:
    """Return `f({B_i}) · f({A_i})`: apply the rule to the factors apart, then multiply.

    PEFT's convention (its `linear`, `ties`, `dare_*`, `magnitude_prune`): each factor of adapter i
    carries `√|w_i s_i|`, and A the sign.
    """
    merged_A = rule(
        [factor_matrices(part)[0] for part in parts], [factor_weights(part)[0] for part in parts]
    )
    merged_B = rule(
        [factor_matrices(part)[1] for part in parts], [factor_weights(part)[1] for part in parts]
    )
    return merged_B @ merged_A


def renormalised(parts: Sequence[Part], all_weights: Sequence[float]) -> list[Part]:
    """Return the parts with weights scaled up to the sum of all adapters' weights."""
    present = sum(float(part[3]) for part in parts)
    return [(A, B, s, float(w) * sum(all_weights) / present) for A, B, s, w in parts]


def canonical_signs(U: Matrix) -> Matrix:
    """Return ±1 per column, making the column's entry of largest magnitude positive."""
    return np.array([sign(column[np.abs(column).argmax()]) for column in U.T])


def numerical_rank(singular_values: Matrix, cutoff: float) -> int:
    """Return how many singular values exceed `cutoff` times the largest; 0 for a zero matrix."""
    if singular_values.size == 0 or singular_values[0] == 0.0:
        return 0
    return int((singular_values > cutoff * singular_values[0]).sum())


def truncated(matrix: Matrix, rank: int) -> Matrix:
    """Return the best approximation of that rank (Eckart–Young), by a full SVD."""
    U, S, Vt = np.linalg.svd(matrix, full_matrices=False)
    best: Matrix = (U[:, :rank] * S[:rank]) @ Vt[:rank]
    return best
