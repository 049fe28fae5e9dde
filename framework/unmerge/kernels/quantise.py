"""Symmetric integer quantisation of a matrix in groups, and back: codes, scales, packing."""

from __future__ import annotations

import math

import torch

from unmerge.errors import NonFiniteError
from unmerge_bundle.encodings import QuantisedMatrix

# Significant bits of a scale: those of bfloat16, the fewest of any dtype it may be stored in.
_SCALE_BITS = 8


def quantise(matrix: torch.Tensor, *, bits: int, group_size: int) -> QuantisedMatrix[torch.Tensor]:
    """Return `matrix` as integers with one scale per `group_size` consecutive entries of a row.

    Args:
        matrix: `(rows, columns)`, float32 or wider.
        bits: 4 or 8.
        group_size: Entries per scale, ≥ 1; the last group of a row may be shorter.

    Returns:
        Codes as the format packs them and float64 scales, on the device of `matrix`; every entry
        is off by at most half its scale.

    Raises:
        NonFiniteError: The matrix is not finite.

    Numerics: with `limit = 2^(bits − 1) − 1`, a scale is the group's largest magnitude over
        `limit`, rounded to 8 significant bits; an entry's integer is the nearest to entry over
        scale, halves to even, in −limit … limit (rounding a scale down by at most 2⁻⁸ lifts no
        entry to limit + ½). The scales are therefore exact in float32 and bfloat16, and in
        float16 from 2⁻¹⁴ ≈ 6·10⁻⁵ on; below, float16 has fewer bits and storing rounds the
        scale. Integer times scale has at most 15 significant bits and is exact in float32. A group
        of zeros has scale 0. O(rows · columns).
    """
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError("a matrix to be quantised holds NaN or infinity; check the adapters")
    rows, columns = matrix.shape
    width = min(group_size, columns)  # a larger group is one that the row does not fill
    groups = -(-columns // width)
    padded = matrix.new_zeros(rows, groups * width, dtype=torch.float64)
    padded[:, :columns] = matrix
    grouped = padded.view(rows, groups, width)
    scales = _rounded(grouped.abs().amax(dim=2) / (2 ** (bits - 1) - 1))
    # A group of zeros is divided by one instead of by zero.
    divisors = torch.where(scales > 0, scales, 1.0)
    integers = torch.round(grouped / divisors[:, :, None]).view(rows, -1)[:, :columns]
    return QuantisedMatrix(
        codes=_pack((integers + 2 ** (bits - 1)).to(torch.uint8), bits),
        scales=scales,
        bits=bits,
        group_size=group_size,
        columns=columns,
    )


def dequantise(quantised: QuantisedMatrix[torch.Tensor]) -> torch.Tensor:
    """Return the matrix that codes and scales stand for, in the dtype of the scales.

    Exact where that is float32 or wider. O(rows · columns).
    """
    integers = _unpack(quantised.codes, quantised.bits, quantised.columns).to(torch.int16)
    integers -= 2 ** (quantised.bits - 1)
    width = min(quantised.group_size, quantised.columns)
    scales = quantised.scales.repeat_interleave(width, dim=1)
    return integers.to(scales.dtype) * scales[:, : quantised.columns]


def packed_columns(columns: int, bits: int) -> int:
    """Return the bytes of one row of codes."""
    return math.ceil(columns * bits / 8)


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """Return the nearest numbers of 8 significant bits to `values` ≥ 0, halves to even."""
    # On the bit pattern, where a carry moves into the exponent as it must: exact, subnormals too.
    dropped = 53 - _SCALE_BITS
    pattern = values.view(torch.int64)
    pattern = pattern + (1 << (dropped - 1)) - 1 + ((pattern >> dropped) & 1)
    return (pattern & -(1 << dropped)).view(torch.float64)


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return `(rows, ceil(columns · bits / 8))`: 4 bits pack an even column into the low half."""
    if bits == 8:
        return codes.contiguous()
    rows, columns = codes.shape
    even = codes.new_zeros(rows, columns + columns % 2)
    even[:, :columns] = codes
    return even[:, 0::2] | (even[:, 1::2] << 4)


def _unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    if bits == 8:
        return packed
    pairs = torch.stack([packed & 0xF, packed >> 4], dim=2)
    return pairs.flatten(1)[:, :columns]
