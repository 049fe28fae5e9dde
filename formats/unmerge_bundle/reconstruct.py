"""The arithmetic of restoring, defined bit for bit: `docs/spec/bundle-v1.md`, "Reconstruction".

Plain element-wise float32 operations in a fixed order give the same bits on every machine; a
matrix product would leave order and fused operations to the BLAS at hand.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from unmerge_bundle.arrays import FLOAT_DTYPES, Array, FloatDtype, all_finite, round_to
from unmerge_bundle.encodings import AffineBasisEncoding
from unmerge_bundle.errors import NonFiniteError

__all__ = ["reconstruct", "restore_affine_basis"]


def reconstruct(
    encoding: AffineBasisEncoding[Array], name: str, *, dtype: FloatDtype, path: str = ""
) -> tuple[Array, Array]:
    """Return adapter `name`'s restored A `(r, d_in)` and B `(d_out, r)`, rounded once to `dtype`.

    What a strategy's encoding will restore to, bit for bit, before it is written; errors are
    measured on this.

    Raises:
        KeyError: The encoding does not hold that adapter.
        NonFiniteError: A value overflows `dtype`.
    """
    tensors = {**encoding.shared_tensors(), **encoding.adapter_tensors(name)}
    return restore_affine_basis(tensors, dtype=dtype, where=f"{path}, adapter {name!r}")


def restore_affine_basis(
    tensors: Mapping[str, Array], *, dtype: FloatDtype, where: str
) -> tuple[Array, Array]:
    """Return the restored A `(r, d_in)` and B `(d_out, r)` of one adapter's module.

    Args:
        tensors: `mean_A (r, d_in)`, `basis_A (p, r, d_in)`, `coefficients_A (p, d_in)`,
            `mean_B (d_out, r)`, `basis_B (p, d_out, r)`, `coefficients_B (p, d_out)`.
        dtype: What the result is rounded to.
        where: Module and adapter, for errors.

    Raises:
        NonFiniteError: A value overflows `dtype`.

    Time O(p r (d_in + d_out)); besides the result, one scratch array of its size.
    """
    factors = []
    for factor in ("A", "B"):
        coefficients = tensors[f"coefficients_{factor}"].astype(np.float32)
        # Position j of A is a column, position i of B a row: one coefficient for each.
        per_position = coefficients[:, None, :] if factor == "A" else coefficients[:, :, None]
        exact = _affine(tensors[f"mean_{factor}"], tensors[f"basis_{factor}"], per_position)
        rounded = round_to(exact, FLOAT_DTYPES[dtype])
        if not all_finite(rounded):
            raise NonFiniteError(
                f"restored factor {factor} has values that are not finite in {dtype}; "
                "restore it in a wider dtype",
                path=where,
            )
        factors.append(rounded)
    A, B = factors
    return A, B


def _affine(mean: Array, basis: Array, coefficients: Array) -> Array:
    result = mean.astype(np.float32)  # exact: the stored dtypes are float32 or narrower
    scratch = np.empty_like(result)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # judged after rounding
        for k in range(len(basis)):
            np.copyto(scratch, basis[k])
            np.multiply(scratch, coefficients[k], out=scratch)
            np.add(result, scratch, out=result)
    return result
