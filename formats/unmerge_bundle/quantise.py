"""Matrices as integers with scales: how they are read, bit for bit, and how we make them."""

from __future__ import annotations

import math

import numpy as np

from unmerge_bundle.arrays import FLOAT_DTYPES, Array, FloatDtype, all_finite
from unmerge_bundle.encodings import QuantisedMatrix
from unmerge_bundle.errors import NonFiniteError

__all__ = ["dequantise", "quantise"]


def dequantise(matrix: QuantisedMatrix[Array]) -> Array:
    """Return the matrix as float32 `(rows, columns)`.

    Each entry is `float32(code - 2^(bits - 1)) · float32(scale)`, one multiplication rounded to
    nearest-even; an overflow gives an infinity, which the caller judges.
    """
    if matrix.bits == 4:
        halves = np.stack([matrix.codes & 0x0F, matrix.codes >> 4], axis=-1)
        codes = halves.reshape(len(halves), -1)[:, : matrix.columns]
    else:
        codes = matrix.codes
    values = codes.astype(np.float32)
    values -= np.float32(1 << (matrix.bits - 1))
    # A group may be said to be far longer than the row; that must not cost memory.
    repeats = min(matrix.group_size, matrix.columns)
    scales = np.repeat(matrix.scales.astype(np.float32), repeats, axis=1)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        np.multiply(values, scales[:, : matrix.columns], out=values)
    return values


def quantise(
    matrix: Array, *, bits: int, group_size: int, dtype: FloatDtype
) -> QuantisedMatrix[Array]:
    """Return `matrix` quantised symmetrically, each group by its largest magnitude.

    With `m = 2^(bits - 1) - 1`, a group's scale is its largest magnitude over m, rounded to 8
    significant bits, which float32 and bfloat16 hold exactly, and then to `dtype`; its codes are
    the entries over that scale, rounded to nearest-even, at most m in magnitude, plus
    `2^(bits - 1)`. A group of zeros has the scale 0. Computed in float64.

    Args:
        matrix: `(rows, columns)`, finite.
        bits: 4 or 8.
        group_size: Entries per scale, ≥ 1.
        dtype: Dtype of the scales.

    Raises:
        NonFiniteError: A scale overflows `dtype`.
    """
    rows, columns = matrix.shape
    width = min(group_size, columns)  # a longer group is the whole row
    groups = math.ceil(columns / width)
    largest = (1 << (bits - 1)) - 1
    padded = np.zeros((rows, groups * width))
    padded[:, :columns] = matrix
    grouped = padded.reshape(rows, groups, width)
    mantissa, exponent = np.frexp(np.abs(grouped).max(axis=2) / largest)
    exact = np.ldexp(np.rint(np.ldexp(mantissa, 8)), exponent - 8)
    with np.errstate(over="ignore", under="ignore"):
        scales = exact.astype(FLOAT_DTYPES[dtype])
    if not all_finite(scales):
        raise NonFiniteError(f"a scale overflows {dtype}; quantise in a wider dtype")
    divisor = scales.astype(np.float64)[:, :, None]
    quotient = np.divide(grouped, divisor, out=np.zeros_like(grouped), where=divisor > 0)
    # Clipped for float16 alone, whose subnormal scales may be rounded down by much.
    integers = np.clip(np.rint(quotient), -largest, largest).astype(np.int16) + (largest + 1)
    codes = integers.reshape(rows, -1)[:, :columns].astype(np.uint8)
    if bits == 4:
        even = np.zeros((rows, math.ceil(columns / 2) * 2), dtype=np.uint8)
        even[:, :columns] = codes
        codes = even[:, 0::2] | even[:, 1::2] << 4
    return QuantisedMatrix(
        codes=codes, scales=scales, bits=bits, group_size=group_size, columns=columns
    )
