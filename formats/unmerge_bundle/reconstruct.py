"""The arithmetic of restoring: `docs/spec/bundle-v1.md`, "Reconstruction".

Element-wise float32 operations in a fixed order give the same bits on every machine. Only the
product with a full core is left to the BLAS at hand, in float64 and rounded once, so that its
order of summation shows in the last bit of a float32 at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, overload

import numpy as np

from unmerge_bundle.arrays import FLOAT_DTYPES, Array, FloatDtype, all_finite, round_to
from unmerge_bundle.encodings import (
    AdapterFactorsEncoding,
    AffineBasisEncoding,
    MaskedDeltaEncoding,
    QuantisedMatrix,
    RestoringEncoding,
    SharedFactorsEncoding,
)
from unmerge_bundle.entry import module_entry
from unmerge_bundle.errors import NonFiniteError, WrongKindError
from unmerge_bundle.modules import (
    AdapterFactorsModule,
    AffineBasisModule,
    DeltaModule,
    FactorsModule,
    MaskedDeltaModule,
    RestoringModule,
    SharedFactorsModule,
    check_tensor,
)
from unmerge_bundle.quantise import dequantise

__all__ = ["Restored", "reconstruct", "restore_module"]

Restored: TypeAlias = tuple[Array, Array] | Array

_PIECE = 1 << 20


@overload
def reconstruct(
    encoding: AffineBasisEncoding[Array]
    | SharedFactorsEncoding[Array]
    | AdapterFactorsEncoding[Array],
    name: str,
    *,
    dtype: FloatDtype,
    path: str = "",
) -> tuple[Array, Array]: ...


@overload
def reconstruct(
    encoding: MaskedDeltaEncoding[Array], name: str, *, dtype: FloatDtype, path: str = ""
) -> Array: ...


@overload
def reconstruct(
    encoding: RestoringEncoding[Array], name: str, *, dtype: FloatDtype, path: str = ""
) -> Restored: ...


def reconstruct(
    encoding: RestoringEncoding[Array], name: str, *, dtype: FloatDtype, path: str = ""
) -> Restored:
    """Return what adapter `name` comes back as, rounded once to `dtype`.

    What a strategy's encoding will restore to, bit for bit, before it is written; errors are
    measured on this.

    Args:
        encoding: Any encoding that restores adapters, its tensors of one stored dtype.
        name: The adapter.
        dtype: What the result is rounded to.
        path: Module path, for errors.

    Returns:
        A `(r, d_in)` and B `(d_out, r)`, whose product is still to be multiplied with
        `encoding.scaling(name)`; for `masked_delta` the delta `(d_out, d_in)`, its scaling inside.

    Raises:
        KeyError: The encoding does not hold that adapter.
        TensorMismatchError: Its tensors do not fit together.
        NonFiniteError: A value overflows `dtype`.
    """
    where = f"{path}, adapter {name!r}" if path else f"adapter {name!r}"
    tensors = {**encoding.shared_tensors(), **encoding.adapter_tensors(name)}
    # The path is checked by whoever writes the encoding; here it may be empty.
    entry = module_entry(path or "module", encoding)
    if isinstance(entry, FactorsModule | DeltaModule):  # a class of its own: never ours
        raise WrongKindError(f"{entry.encoding} restores no adapter", path=where)
    layouts = {
        **entry.shared_layout(),
        **entry.adapter_layout(encoding.restored_rank(name)),
    }
    found = {tensors[tensor].dtype for tensor, layout in layouts.items() if layout.bits is None}
    # Of several dtypes, or none of the format's, the check below says which tensor is wrong.
    stored: FloatDtype = next(
        (key for key, value in FLOAT_DTYPES.items() if value in found), "float32"
    )
    for tensor, layout in layouts.items():
        check_tensor(tensor, tensors[tensor], layout, stored, where=where)
    return restore_module(entry, tensors, scaling=encoding.scaling(name), dtype=dtype, where=where)


def restore_module(
    entry: RestoringModule,
    tensors: Mapping[str, Array],
    *,
    scaling: float,
    dtype: FloatDtype,
    where: str,
) -> Restored:
    """Return the factors A `(r, d_in)` and B `(d_out, r)` of one adapter's module, or its delta.

    Args:
        entry: What the manifest says of the module.
        tensors: Its shared tensors and the adapter's own, already checked against their layouts.
        scaling: The adapter's. It goes into a delta; of factors it stays apart.
        dtype: What the result is rounded to.
        where: Module and adapter, for errors.

    Raises:
        NonFiniteError: A value overflows `dtype`, or a stored tensor is not finite.
    """
    if isinstance(entry, MaskedDeltaModule):
        delta = _masked(tensors["unified"], tensors["mask"], scaling, FLOAT_DTYPES[dtype])
        # The mask may hide what is not finite, and a bundle that holds it is not to be trusted.
        if not (all_finite(tensors["unified"]) and all_finite(delta)):
            raise _not_finite("delta", dtype, where)
        return delta
    if isinstance(entry, AffineBasisModule):
        A, B = (_affine(tensors, factor) for factor in ("A", "B"))
    elif isinstance(entry, SharedFactorsModule):
        A, B = _shared(tensors["U"], tensors["core"], tensors["V"], diagonal=entry.diagonal)
    else:
        A = _own(entry, tensors, "A", entry.d_in)
        B = np.ascontiguousarray(_own(entry, tensors, "B_transposed", entry.d_out).T)
    rounded = []
    for name, factor in (("A", A), ("B", B)):
        result = round_to(factor, FLOAT_DTYPES[dtype])
        if not all_finite(result):
            raise _not_finite(f"factor {name}", dtype, where)
        rounded.append(result)
    return rounded[0], rounded[1]


def _not_finite(what: str, dtype: FloatDtype, where: str) -> NonFiniteError:
    return NonFiniteError(
        f"restored {what} has values that are not finite in {dtype}; restore it in a wider dtype",
        path=where,
    )


def _affine(tensors: Mapping[str, Array], factor: str) -> Array:
    """Return `mean + Σ_k coefficients_k · basis_k`; besides it, one scratch array of its size."""
    basis = tensors[f"basis_{factor}"]
    coefficients = tensors[f"coefficients_{factor}"].astype(np.float32)
    # Position j of A is a column, position i of B a row: one coefficient for each.
    spread = coefficients[:, None, :] if factor == "A" else coefficients[:, :, None]
    result = tensors[f"mean_{factor}"].astype(np.float32)  # exact: stored float32 or narrower
    scratch = np.empty_like(result)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # judged after rounding
        for k in range(len(basis)):
            np.copyto(scratch, basis[k])
            np.multiply(scratch, spread[k], out=scratch)
            np.add(result, scratch, out=result)
    return result


def _shared(U: Array, core: Array, V: Array, *, diagonal: bool) -> tuple[Array, Array]:
    """Return V and U with the core multiplied into the one with more components."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # judged after rounding
        if diagonal:
            return core.astype(np.float32)[:, None] * V.astype(np.float32), U.astype(np.float32)
        wide = core.astype(np.float64)
        if core.shape[0] <= core.shape[1]:
            return (wide @ V.astype(np.float64)).astype(np.float32), U.astype(np.float32)
        return V.astype(np.float32), (U.astype(np.float64) @ wide).astype(np.float32)


def _masked(unified: Array, mask: Array, scaling: float, dtype: np.dtype[Any]) -> Array:
    """Return `scaling · unified` where the mask is set, +0 elsewhere, row block by row block."""
    d_out, d_in = unified.shape
    delta = np.zeros((d_out, d_in), dtype=dtype)
    rows = max(1, _PIECE // d_in)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # judged by the caller
        factor = np.float32(scaling)
        for start in range(0, d_out, rows):
            block = slice(start, start + rows)
            chosen = np.unpackbits(mask[block], axis=1, count=d_in, bitorder="little").view(bool)
            scaled = unified[block].astype(np.float32) * factor
            delta[block][chosen] = round_to(scaled, dtype)[chosen]
    return delta


def _own(
    entry: AdapterFactorsModule, tensors: Mapping[str, Array], name: str, columns: int
) -> Array:
    """Return one of an adapter's own matrices as float32."""
    if entry.quantisation is None:
        return tensors[name].astype(np.float32)
    return dequantise(
        QuantisedMatrix(
            codes=tensors[f"{name}.codes"],
            scales=tensors[f"{name}.scales"],
            bits=entry.quantisation.bits,
            group_size=entry.quantisation.group_size,
            columns=columns,
        )
    )
