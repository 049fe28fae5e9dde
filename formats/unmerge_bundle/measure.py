"""How far restored factors are from the originals, without ever forming a dense delta."""

from __future__ import annotations

import math

import numpy as np

from unmerge_bundle.arrays import Array
from unmerge_bundle.model import ModuleErrors

__all__ = ["relative_errors"]


def relative_errors(
    original: tuple[Array, Array],
    restored: tuple[Array, Array],
    *,
    source_scaling: float = 1.0,
    scaling: float = 1.0,
) -> ModuleErrors:
    """Return the relative Frobenius errors of one module's factors and of its delta.

    With `s` the source's scaling and `ŝ` the restored one, the delta error is
    `‖ŝ B̂Â − s BA‖ / ‖s BA‖`. The factor error is `√((‖Â−A‖² + ‖B̂−B‖²) / (‖A‖² + ‖B‖²))`; where
    the scalings differ, each B is first multiplied by its own. Factors of different rank are
    compared as if the smaller were padded with zeros. 0/0 counts as 0, x/0 as infinity.

    Args:
        original: A `(r, d_in)` and B `(d_out, r)`, finite.
        restored: Â `(r̂, d_in)` and B̂ `(d_out, r̂)`, finite.
        source_scaling: `s`.
        scaling: `ŝ`.

    Raises:
        ValueError: Shapes do not fit together.

    Numerics: float64. `B̂Â − BA = [B̂−B, B] · [Â; Â−A]` makes the difference out of differences,
    so nothing cancels: exact restoration gives exactly 0. Time O((d_in + d_out) r²).
    """
    A, B = _padded(original, max(len(original[0]), len(restored[0])))
    A_hat, B_hat = _padded(restored, len(A))
    if A.shape != A_hat.shape or B.shape != B_hat.shape:
        raise ValueError(
            f"restored factors A {restored[0].shape}, B {restored[1].shape} do not fit the "
            f"originals A {original[0].shape}, B {original[1].shape}"
        )
    if scaling != source_scaling:
        B, B_hat = source_scaling * B, scaling * B_hat
        source_scaling = scaling = 1.0
    E_A = A_hat - A
    E_B = B_hat - B
    left = np.concatenate([E_B, B], axis=1)  # (d_out, 2r)
    right = np.concatenate([A_hat, E_A], axis=0)  # (2r, d_in)
    # With equal scalings they cancel from the relative error, except where they make it 0/0.
    delta_norm = abs(source_scaling) * _product_norm(B, A)
    delta_error = abs(source_scaling) * _product_norm(left, right)
    return ModuleErrors(
        factors=_ratio(
            math.hypot(float(np.linalg.norm(E_A)), float(np.linalg.norm(E_B))),
            math.hypot(float(np.linalg.norm(A)), float(np.linalg.norm(B))),
        ),
        delta=_ratio(delta_error, delta_norm),
    )


def _padded(factors: tuple[Array, Array], rank: int) -> tuple[Array, Array]:
    A, B = (factor.astype(np.float64) for factor in factors)
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(
            f"expected A (r, d_in) and B (d_out, r), got shapes {A.shape} and {B.shape}"
        )
    missing = rank - len(A)
    return np.pad(A, ((0, missing), (0, 0))), np.pad(B, ((0, 0), (0, missing)))


def _product_norm(left: Array, right: Array) -> float:
    # ‖X Y‖² = tr(XᵀX · YYᵀ) = Σ (XᵀX) ∘ (YYᵀ), both of size r × r.
    squared = float(np.sum((left.T @ left) * (right @ right.T)))
    return math.sqrt(max(squared, 0.0))  # rounding may leave it just below zero


def _ratio(error: float, norm: float) -> float:
    if error == 0.0:
        return 0.0
    return error / norm if norm > 0.0 else math.inf
