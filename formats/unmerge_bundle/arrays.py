"""The tensor dtypes of the format and what numpy calls them, bfloat16 included."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

__all__ = ["DTYPES", "FLOAT_DTYPES", "Array", "FloatDtype", "all_finite", "dtype_code", "round_to"]

Array: TypeAlias = npt.NDArray[Any]
FloatDtype = Literal["float32", "float16", "bfloat16"]

# Code in a safetensors header → numpy dtype; the format is little-endian throughout.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype(np.bool_),
}

# The dtypes factors may have, by the name the manifest uses.
FLOAT_DTYPES: dict[FloatDtype, np.dtype[Any]] = {
    "float32": DTYPES["F32"],
    "float16": DTYPES["F16"],
    "bfloat16": DTYPES["BF16"],
}

_CODES = {dtype.name: code for code, dtype in DTYPES.items()}

# Tensors are examined in pieces, so that a check never doubles the memory of what it checks.
_PIECE = 1 << 20


def dtype_code(dtype: np.dtype[Any]) -> str | None:
    """Return the header code of `dtype`, or `None` if the format has no such dtype."""
    return _CODES.get(dtype.name)


def all_finite(array: Array) -> bool:
    """Return whether no entry is NaN or infinite; true for integers and bools.

    Works in pieces along the leading axis; never copies the whole array.
    """
    if array.dtype.kind in "biu":
        return True
    if array.ndim == 0:
        return bool(np.isfinite(array))
    if array.size == 0:
        return True
    rows = max(1, _PIECE * len(array) // array.size)
    return all(
        bool(np.isfinite(array[start : start + rows]).all()) for start in range(0, len(array), rows)
    )


def round_to(array: Array, dtype: np.dtype[Any]) -> Array:
    """Return `array` in `dtype`, rounded once to nearest-even; overflow gives an infinity.

    The result is a copy even where nothing changes, so that callers may hand it out.
    """
    with np.errstate(over="ignore", under="ignore"):
        return array.astype(dtype)
