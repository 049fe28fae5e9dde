"""How far what is restored is from the originals, without ever forming an original's delta."""

from __future__ import annotations

import math

import numpy as np

from unmerge_bundle.arrays import Array, FloatDtype
from unmerge_bundle.encodings import Restores, RestoringEncoding
from unmerge_bundle.model import ModuleErrors
from unmerge_bundle.reconstruct import Restored, reconstruct

__all__ = ["compare", "delta_error", "measure", "relative_errors"]

_PIECE = 1 << 20


def measure(
    encoding: RestoringEncoding[Array],
    name: str,
    original: tuple[Array, Array],
    *,
    source_scaling: float,
    dtype: FloatDtype,
    path: str = "",
) -> ModuleErrors:
    """Return the errors with which adapter `name` will come back from `encoding`.

    Measured on the reader's own arithmetic, from the stored tensors and rounded to the source's
    dtype: the error recorded is the one a user gets.

    Args:
        encoding: Any encoding that restores adapters, its tensors in the stored dtype.
        name: The adapter.
        original: Its original A `(r, d_in)` and B `(d_out, r)`, finite.
        source_scaling: What the original's factors are used with.
        dtype: Dtype of the original's factors.
        path: Module path, for errors.

    Raises:
        KeyError: The encoding does not hold that adapter.
        ValueError: The original's shapes do not fit.
        TensorMismatchError: The encoding's tensors do not fit together.
        NonFiniteError: A restored value overflows `dtype`.
    """
    restored = reconstruct(encoding, name, dtype=dtype, path=path)
    return compare(
        original,
        restored,
        restores=encoding.restores,
        source_scaling=source_scaling,
        scaling=encoding.scaling(name),
    )


def compare(
    original: tuple[Array, Array],
    restored: Restored,
    *,
    restores: Restores | None,
    source_scaling: float,
    scaling: float,
) -> ModuleErrors:
    """Return the errors of what came back for one module, factors or a delta.

    Args:
        original: A `(r, d_in)` and B `(d_out, r)`, finite.
        restored: Factors, or a delta with its scaling inside.
        restores: "factors" where the factors that came back stand for the original ones, "delta"
            where only their product does.
        source_scaling: What the original's factors are used with.
        scaling: What restored factors are used with.

    Raises:
        ValueError: Shapes do not fit together.
    """
    if not isinstance(restored, tuple):
        return delta_error(original, restored, source_scaling=source_scaling)
    errors = relative_errors(original, restored, source_scaling=source_scaling, scaling=scaling)
    return errors if restores == "factors" else errors.model_copy(update={"factors": None})


def delta_error(
    original: tuple[Array, Array], delta: Array, *, source_scaling: float = 1.0
) -> ModuleErrors:
    """Return the relative Frobenius error `‖Δ̂ − s BA‖ / ‖s BA‖` of one module's dense delta.

    Args:
        original: A `(r, d_in)` and B `(d_out, r)`, finite.
        delta: Δ̂ `(d_out, d_in)`, its scaling inside, finite.
        source_scaling: `s`.

    Returns:
        The error, `factors` of which is `None`. 0/0 counts as 0, x/0 as infinity.

    Raises:
        ValueError: Shapes do not fit together.

    Numerics: float64, in row blocks of about a million entries. Time O(d_out · d_in · r).
    """
    A, B = _padded(original, len(original[0]))
    d_out, d_in = len(B), A.shape[1]
    if delta.shape != (d_out, d_in):
        raise ValueError(f"restored delta {delta.shape} does not fit the original's {d_out, d_in}")
    B = source_scaling * B
    rows = max(1, _PIECE // d_in)
    error = norm = 0.0
    for start in range(0, d_out, rows):
        block = B[start : start + rows] @ A
        norm = math.hypot(norm, float(np.linalg.norm(block)))
        block -= delta[start : start + rows].astype(np.float64)
        error = math.hypot(error, float(np.linalg.norm(block)))
    return ModuleErrors(factors=None, delta=_ratio(error, norm))


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
    so that nothing cancels where the factors are alike, and exact restoration gives exactly 0.
    Factors of another form (another gauge, a larger rank) may differ much and have one product:
    an orthogonal reduction keeps that cancellation near 1e-16 too. Time O((d_in + d_out) r²).
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
    # With equal scalings they cancel from the relative error, except where they make it 0/0.
    delta_norm = abs(source_scaling) * _product_norm(B, A)
    difference = abs(source_scaling) * _difference_norm(E_B, A_hat, B, E_A)
    return ModuleErrors(
        factors=_ratio(
            math.hypot(float(np.linalg.norm(E_A)), float(np.linalg.norm(E_B))),
            math.hypot(float(np.linalg.norm(A)), float(np.linalg.norm(B))),
        ),
        delta=_ratio(difference, delta_norm),
    )


def _padded(factors: tuple[Array, Array], rank: int) -> tuple[Array, Array]:
    A, B = (factor.astype(np.float64) for factor in factors)
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(
            f"expected A (r, d_in) and B (d_out, r), got shapes {A.shape} and {B.shape}"
        )
    missing = rank - len(A)
    return np.pad(A, ((0, missing), (0, 0))), np.pad(B, ((0, 0), (0, missing)))


def _difference_norm(E_B: Array, A_hat: Array, B: Array, E_A: Array) -> float:
    """Return `‖E_B Â + B E_A‖`."""
    left = np.concatenate([E_B, B], axis=1)  # (d_out, 2r)
    right = np.concatenate([A_hat, E_A], axis=0)  # (2r, d_in)
    norm = _product_norm(left, right)
    terms = [float(np.linalg.norm(factor)) for factor in (E_B, A_hat, B, E_A)]
    # Gram matrices square: where the two terms cancel below 1e-6 of their size, the square's
    # float64 noise would be what is measured.
    if norm >= 1e-6 * (terms[0] * terms[1] + terms[2] * terms[3]):
        return norm
    return float(np.linalg.norm(np.linalg.qr(left, mode="r") @ right))


def _product_norm(left: Array, right: Array) -> float:
    # ‖X Y‖² = tr(XᵀX · YYᵀ) = Σ (XᵀX) ∘ (YYᵀ), both of size r × r.
    squared = float(np.sum((left.T @ left) * (right @ right.T)))
    return math.sqrt(max(squared, 0.0))  # rounding may leave it just below zero


def _ratio(error: float, norm: float) -> float:
    if error == 0.0:
        return 0.0
    return error / norm if norm > 0.0 else math.inf
