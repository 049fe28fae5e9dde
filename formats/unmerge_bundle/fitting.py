"""What a new adapter stores in the fixed shared tensors of a module: the spec's "Appending".

Per encoding and not per strategy, so that appending needs no plugin; float64 throughout, rounded
once to the stored dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from unmerge_bundle.arrays import FLOAT_DTYPES, Array, FloatDtype, all_finite, round_to
from unmerge_bundle.errors import NonFiniteError, RefitError
from unmerge_bundle.modules import (
    AdapterFactorsModule,
    AffineBasisModule,
    MaskedDeltaModule,
    RestoringModule,
)
from unmerge_bundle.quantise import quantise

__all__ = ["Fit", "fit_adapter"]

_PIECE = 1 << 20

# Distance of 1 from the next larger number.
_PRECISION: dict[FloatDtype, float] = {
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
}


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """An adapter's own tensors in one module, and what its record says of it.

    Attributes:
        tensors: By tensor name, in the stored dtype or as bits.
        scaling: What is restored is multiplied with it.
        restored_rank: Components that come back, `None` for a dense delta.
    """

    tensors: dict[str, Array]
    scaling: float
    restored_rank: int | None


def fit_adapter(
    entry: RestoringModule,
    shared: Mapping[str, Array],
    factors: tuple[Array, Array],
    *,
    source_scaling: float,
    scaling: float,
    store_dtype: FloatDtype,
) -> Fit:
    """Return what represents an adapter best, given a module's shared tensors.

    Args:
        entry: The module.
        shared: Its shared tensors, as stored.
        factors: The adapter's A `(r, d_in)` and B `(d_out, r)`, finite.
        source_scaling: What these factors are used with.
        scaling: What an affine basis's factors are used with: the source's, or the scaling that
            remains where the basis was made of factors with theirs folded in. The source's goes
            with the other encodings.
        store_dtype: Dtype of stored numbers.

    Raises:
        RefitError: The factors' shapes are not the module's, or their rank is larger than an
            affine basis has.
        NonFiniteError: A stored number would overflow `store_dtype`.
    """
    A, B = (factor.astype(np.float64) for factor in factors)
    if A.shape[1] != entry.d_in or B.shape[0] != entry.d_out:
        raise RefitError(
            f"the adapter has (d_out, d_in) {(B.shape[0], A.shape[1])}, the module "
            f"{(entry.d_out, entry.d_in)}; it was made for another base model",
            path=entry.path,
        )
    if isinstance(entry, MaskedDeltaModule):
        mask, rescaler = _mask(shared["unified"], source_scaling * B, A)
        return Fit({"mask": mask}, rescaler, None)
    if isinstance(entry, AdapterFactorsModule):
        tensors = _own(entry, A, B, store_dtype)
        return Fit(tensors, source_scaling, len(A))
    cutoff = _PRECISION[store_dtype]
    if isinstance(entry, AffineBasisModule):
        if scaling != source_scaling:
            B = (source_scaling / scaling) * B
        exact = _coefficients(entry, shared, A, B, cutoff)
        rank = entry.rank
    else:
        scaling = source_scaling
        exact = {"core": _core(shared["U"], shared["V"], A, B, cutoff, diagonal=entry.diagonal)}
        rank = min(entry.rank_out, entry.rank_in)
    return Fit(_stored(exact, entry.path, store_dtype), scaling, rank)


def _stored(exact: Mapping[str, Array], path: str, dtype: FloatDtype) -> dict[str, Array]:
    tensors = {name: round_to(tensor, FLOAT_DTYPES[dtype]) for name, tensor in exact.items()}
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise NonFiniteError(
                f"{name} of the adapter overflows {dtype}, in which the bundle is stored; merge "
                "again with a wider dtype",
                path=path,
            )
    return tensors


def _coefficients(
    entry: AffineBasisModule, shared: Mapping[str, Array], A: Array, B: Array, cutoff: float
) -> dict[str, Array]:
    """Return the least-squares coefficients of every position, column of A and row of B."""
    missing = entry.rank - len(A)
    if missing < 0:
        raise RefitError(
            f"the adapter has rank {len(A)}, the basis {entry.rank}; merge again with it",
            path=entry.path,
        )
    result = {}
    for name, points in (
        ("A", np.pad(A, ((0, missing), (0, 0))).T),  # (d_in, r)
        ("B", np.pad(B, ((0, 0), (0, missing)))),  # (d_out, r)
    ):
        mean = shared[f"mean_{name}"].astype(np.float64)
        basis = shared[f"basis_{name}"].astype(np.float64)
        columns = basis.transpose(2, 1, 0) if name == "A" else basis.transpose(1, 2, 0)
        centred = points - (mean.T if name == "A" else mean)
        solved = _least_squares(columns, centred[:, :, None], cutoff)  # (positions, p, 1)
        result[f"coefficients_{name}"] = solved[:, :, 0].T
    return result


def _core(U: Array, V: Array, A: Array, B: Array, cutoff: float, *, diagonal: bool) -> Array:
    """Return the core that makes `U · core · V` the nearest to `B · A`."""
    left, right = U.astype(np.float64), V.astype(np.float64)
    if not diagonal:
        # The two sides are independent: U⁺ B A V⁺ is the least-squares solution.
        outer = _least_squares(left, B, cutoff)  # (k_out, r)
        inner = _least_squares(right.T, A.T, cutoff)  # (k_in, r)
        return outer @ inner.T
    # Σ_k c_k u_k v_k against B A: the normal equations are those of the rank-one matrices, scaled
    # to norm 1, whose inner products are products of inner products.
    norms = np.linalg.norm(left, axis=0) * np.linalg.norm(right, axis=1)
    scale = np.where(norms > 0, norms, 1.0)
    gram = (left.T @ left) * (right @ right.T) / np.outer(scale, scale)
    target = np.sum((left.T @ B) * (right @ A.T), axis=1) / scale
    # Eigenvalues are squares of singular values, and so is their cut-off.
    solved: Array = np.linalg.pinv(gram, rcond=max(cutoff**2, 1e-14), hermitian=True) @ target
    return solved / scale


def _least_squares(columns: Array, target: Array, cutoff: float) -> Array:
    """Return the x that brings `columns @ x` nearest to `target`; leading axes are batches.

    Columns are scaled to norm 1 first: what is cut off, relative to the largest singular value, is
    what the stored dtype cannot tell from dependence, whatever the columns' sizes.
    """
    norms = np.linalg.norm(columns, axis=-2, keepdims=True)
    scale = np.where(norms > 0, norms, 1.0)
    solved: Array = np.linalg.pinv(columns / scale, rcond=cutoff) @ target
    return solved / np.swapaxes(scale, -1, -2)


def _mask(unified: Array, B: Array, A: Array) -> tuple[Array, float]:
    """Return the mask of the entries whose sign agrees, and the rescaler that keeps the L1 norm."""
    d_out, d_in = unified.shape
    mask = np.empty((d_out, math.ceil(d_in / 8)), dtype=np.uint8)
    rows = max(1, _PIECE // d_in)
    whole: list[float] = []
    kept: list[float] = []
    for start in range(0, d_out, rows):
        block = slice(start, start + rows)
        delta = B[block] @ A
        common = unified[block].astype(np.float64)
        agree = delta * common > 0
        mask[block] = np.packbits(agree, axis=1, bitorder="little")
        whole.append(float(np.abs(delta).sum()))
        kept.append(float(np.abs(common[agree]).sum()))
    through = math.fsum(kept)
    return mask, math.fsum(whole) / through if through > 0 else 1.0


def _own(
    entry: AdapterFactorsModule, A: Array, B: Array, store_dtype: FloatDtype
) -> dict[str, Array]:
    scheme = entry.quantisation
    matrices = {"A": A, "B_transposed": np.ascontiguousarray(B.T)}
    if scheme is None:
        return _stored(matrices, entry.path, store_dtype)
    tensors = {}
    for name, matrix in matrices.items():
        quantised = quantise(
            matrix, bits=scheme.bits, group_size=scheme.group_size, dtype=store_dtype
        )
        tensors[f"{name}.codes"] = quantised.codes
        tensors[f"{name}.scales"] = quantised.scales
    return tensors
