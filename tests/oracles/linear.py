"""Average, task arithmetic and direct merging, from their formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from oracles.common import Matrix, Part, dense


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


def sum_rule(matrices: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    """Return `Σ w_i X_i`, task arithmetic as a rule for any space."""
    total = np.zeros_like(matrices[0])
    for matrix, weight in zip(matrices, weights, strict=True):
        total = total + weight * matrix
    return total


def mean_rule(matrices: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    """Return `Σ w_i X_i / Σ w_i`, the average as a rule for any space."""
    mean: Matrix = sum_rule(matrices, weights) / sum(weights)
    return mean


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
