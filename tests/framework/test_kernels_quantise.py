"""Quantisation against every entry computed on its own, and the packing byte by byte."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import pytest
import torch

import oracles
from unmerge.errors import NonFiniteError
from unmerge.kernels.quantise import dequantise, packed_columns, quantise
from unmerge_bundle.encodings import QuantisedMatrix

Bits = Literal[4, 8]
LIMIT = {4: 7, 8: 127}


def matrix(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator)


def codes(quantised: QuantisedMatrix[torch.Tensor]) -> list[list[int]]:
    """Return the signed integers, unpacked by the format's words, entry by entry."""
    half = 2 ** (quantised.bits - 1)
    rows = []
    for packed in quantised.codes.tolist():
        row = []
        for column in range(quantised.columns):
            if quantised.bits == 8:
                code = packed[column]
            else:
                byte = packed[column // 2]
                code = byte >> 4 if column % 2 else byte & 0xF
            row.append(code - half)
        rows.append(row)
    return rows


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [1, 2, 3, 5, 8, 64])
@pytest.mark.parametrize("columns", range(1, 12))
def test_every_entry_is_the_nearest_multiple_of_its_groups_scale(
    bits: Bits, group_size: int, columns: int
) -> None:
    values = matrix(3, columns, seed=columns)
    quantised = quantise(values, bits=bits, group_size=group_size)
    assert quantised.codes.shape == (3, packed_columns(columns, bits))
    assert quantised.codes.dtype == torch.uint8
    assert quantised.scales.shape == (3, -(-columns // group_size))
    restored = dequantise(quantised)
    for i, row in enumerate(codes(quantised)):
        for j, integer in enumerate(row):
            group = values[i, j // group_size * group_size : (j // group_size + 1) * group_size]
            scale = float(quantised.scales[i, j // group_size])
            # 8 significant bits: what bfloat16 makes of it, half to even.
            largest = group.abs().max().double()
            assert scale == float((largest / LIMIT[bits]).to(torch.bfloat16))
            assert abs(integer) <= LIMIT[bits]
            exact = Fraction(float(values[i, j])) / Fraction(scale)
            assert abs(integer - exact) <= Fraction(1, 2)
            assert integer == round(exact)  # Python's round() is half to even, and exact here
            assert restored[i, j] == integer * scale


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("columns", [1, 7, 8, 130])
def test_it_is_the_oracle_where_scales_need_no_rounding(bits: Bits, columns: int) -> None:
    # Integers up to the limit: every scale is a power of two, and every value comes back.
    generator = torch.Generator().manual_seed(columns)
    values = torch.randint(-LIMIT[bits], LIMIT[bits] + 1, (4, columns), generator=generator) / 8.0
    values[:, ::3] = LIMIT[bits] / 8.0
    quantised = quantise(values, bits=bits, group_size=3)
    expected = oracles.quantise(values.numpy(), bits, 3)
    assert codes(quantised) == expected.codes.tolist()
    assert quantised.scales.tolist() == expected.scales.tolist()
    assert dequantise(quantised).tolist() == values.double().tolist()


def test_four_bits_by_hand() -> None:
    # absmax 7: scale 1, codes 7 → 15, −7 → 1, 2.5 → 2 (even) → 10, 3.5 → 4 → 12, 0 → 8.
    quantised = quantise(torch.tensor([[7.0, -7.0, 2.5, 3.5, 0.0]]), bits=4, group_size=5)
    assert quantised.scales.tolist() == [[1.0]]
    assert quantised.codes.tolist() == [[15 | 1 << 4, 10 | 12 << 4, 8]]
    assert dequantise(quantised).tolist() == [[7.0, -7.0, 2.0, 4.0, 0.0]]


def test_eight_bits_by_hand() -> None:
    quantised = quantise(torch.tensor([[127.0, -127.0, 0.5, 1.5]]), bits=8, group_size=4)
    assert quantised.scales.tolist() == [[1.0]]
    assert quantised.codes.tolist() == [[255, 1, 128, 130]]


def test_a_scale_is_rounded_to_eight_bits_half_to_even() -> None:
    # 1 / 7 = 146.29 / 1024; 128.5 and 129.5 lie between two numbers of 8 bits; 255.5 carries.
    values = torch.tensor([[1.0, 7 * 128.5, 7 * 129.5, 7 * 255.5, 7 * 255.25]])
    quantised = quantise(values, bits=4, group_size=1)
    assert quantised.scales.tolist() == [[146 / 1024, 128.0, 130.0, 256.0, 255.0]]


def test_a_scale_rounded_down_by_the_most_lifts_no_code_past_the_limit() -> None:
    # 127 · 128.5 over 128 is 127.496: still 127, and less than half a step off.
    quantised = quantise(torch.tensor([[127 * 128.5]]), bits=8, group_size=1)
    assert quantised.scales.tolist() == [[128.0]]
    assert codes(quantised) == [[127]]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_group_of_zeros_has_scale_zero_and_the_code_of_zero(bits: Bits) -> None:
    values = torch.zeros(2, 5)
    values[1, 4] = 3.0
    quantised = quantise(values, bits=bits, group_size=2)
    assert quantised.scales[0].tolist() == [0.0, 0.0, 0.0]
    assert codes(quantised)[0] == [0] * 5
    assert codes(quantised)[1] == [0, 0, 0, 0, LIMIT[bits]]
    assert not dequantise(quantised)[0].any()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1e20, 3.4e38])
def test_the_largest_entry_keeps_its_place_at_every_size(bits: Bits, size: float) -> None:
    quantised = quantise(torch.tensor([[size, -size, 0.0]]), bits=bits, group_size=3)
    assert codes(quantised) == [[LIMIT[bits], -LIMIT[bits], 0]]
    assert torch.isfinite(dequantise(quantised)).all()


def test_stored_scales_of_bfloat16_stand_for_the_same_matrix() -> None:
    quantised = quantise(matrix(5, 130) * 1e-3, bits=8, group_size=64)
    stored = quantised.map(lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t)
    back = stored.map(lambda t: t.float() if t.is_floating_point() else t)
    # In float32 too: 7 bits times 8 bits fit.
    assert torch.equal(dequantise(back).double(), dequantise(quantised))


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.005), (4, 0.09)])
def test_the_error_is_that_of_a_uniform_step(bits: Bits, bound: float) -> None:
    values = matrix(16, 512).double()
    error = dequantise(quantise(values, bits=bits, group_size=64)) - values
    assert float(error.norm() / values.norm()) < bound * 2
    assert float(error.norm() / values.norm()) > bound / 2


def test_groups_do_not_cross_rows() -> None:
    values = torch.tensor([[7.0, 7.0, 700.0], [7.0, 7.0, 7.0]])
    quantised = quantise(values, bits=4, group_size=2)
    assert codes(quantised)[1] == [7, 7, 7]
    assert quantised.scales[1].tolist() == [1.0, 1.0]


def test_an_empty_half_of_a_byte_is_zero() -> None:
    quantised = quantise(torch.full((2, 3), -1.0), bits=4, group_size=64)
    assert (quantised.codes[:, 1] >> 4).tolist() == [0, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    values = matrix(2, 3)
    values[1, 1] = value
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        quantise(values, bits=8, group_size=2)


def test_a_transposed_view_is_read_as_it_says() -> None:
    values = matrix(6, 4)
    ours = quantise(values.T, bits=8, group_size=4)
    assert torch.equal(ours.codes, quantise(values.T.contiguous(), bits=8, group_size=4).codes)
