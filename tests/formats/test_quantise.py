from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.kinds import by_hand
from unmerge_bundle import NonFiniteError, dequantise, quantise
from unmerge_bundle.arrays import FLOAT_DTYPES, FloatDtype


@pytest.mark.parametrize("dtype", list(FLOAT_DTYPES))
@pytest.mark.parametrize("bits", [4, 8])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), columns=st.integers(1, 9), group=st.integers(1, 5))
def test_every_entry_is_off_by_half_a_step_at_most(
    dtype: FloatDtype, bits: int, seed: int, columns: int, group: int
) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((3, columns)) * 10.0 ** rng.integers(0, 4, (3, 1))
    matrix[1] = 0
    result = quantise(matrix, bits=bits, group_size=group, dtype=dtype)
    assert result.codes.shape == (3, -(-columns * bits // 8))
    assert result.scales.shape == (3, -(-columns // group))
    assert result.scales.dtype == FLOAT_DTYPES[dtype]
    values = dequantise(result)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, by_hand(result))
    steps = np.repeat(result.scales.astype(np.float64), group, axis=1)[:, :columns]
    assert (np.abs(values - matrix) <= steps * 0.5000001).all()
    assert not values[1].any()


def test_codes_and_scales_by_hand() -> None:
    result = quantise(
        np.array([[7.0, -3.5, 0.4, -0.2, 1.0]]), bits=4, group_size=2, dtype="float32"
    )
    # Scales 7/7, 0.4/7 rounded to 8 significant bits, 1/7 likewise; halves go to even.
    assert result.scales.tolist() == [[1.0, 234 / 4096, 146 / 1024]]
    # 7, −4 | 7, −4 (−3.5009…) | 7, each plus 8, low half first; the last half byte is empty.
    assert result.codes.tolist() == [[15 | 4 << 4, 15 | 4 << 4, 15]]


def test_subnormal_scales_never_leave_the_range_of_codes() -> None:
    tiny = float(np.finfo(np.float16).smallest_subnormal)
    matrix = np.array([[127 * 1.4 * tiny, -127 * 1.4 * tiny, 0.3 * tiny]])
    result = quantise(matrix, bits=8, group_size=3, dtype="float16")
    assert result.scales.tolist() == [[tiny]]
    assert result.codes.tolist() == [[255, 1, 128]]
    nothing = quantise(matrix * 1e-6, bits=8, group_size=3, dtype="float16")
    assert (nothing.scales.tolist(), nothing.codes.tolist()) == ([[0.0]], [[128, 128, 128]])


def test_scales_beyond_the_dtype_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="float16"):
        quantise(np.array([[1e8]]), bits=8, group_size=1, dtype="float16")


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_is_read(bits: Any) -> None:
    codes = np.arange(256, dtype=np.uint8)[None, :]
    columns = 256 * 8 // bits
    matrix = quantise(np.zeros((1, columns)), bits=bits, group_size=64, dtype="bfloat16")
    scales = np.full(matrix.scales.shape, 0.375, dtype=FLOAT_DTYPES["bfloat16"])
    every = type(matrix)(codes=codes, scales=scales, bits=bits, group_size=64, columns=columns)
    np.testing.assert_array_equal(dequantise(every), by_hand(every))


def test_a_group_longer_than_the_row_costs_nothing() -> None:
    matrix = np.array([[1.0, -0.5, 0.25]])
    expected = quantise(matrix, bits=8, group_size=3, dtype="float32")
    result = quantise(matrix, bits=8, group_size=10**15, dtype="float32")
    assert result.scales.tolist() == expected.scales.tolist()
    assert result.codes.tolist() == expected.codes.tolist()
    assert dequantise(result).tolist() == dequantise(expected).tolist()
