"""Masks as bits: the order of the bits, what lies beyond the last column, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unmerge.kernels.bits import pack_bits, unpack_bits


def test_the_first_column_is_the_least_significant_bit() -> None:
    mask = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1, 1, 0]]).bool()
    assert pack_bits(mask).tolist() == [[1, 2], [128, 1]]


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 16, 31])
def test_packing_is_numpys_little_order_and_unpacking_undoes_it(columns: int) -> None:
    generator = np.random.default_rng(columns)
    mask = generator.random((2, 3, columns)) < 0.5
    packed = pack_bits(torch.from_numpy(mask))
    assert packed.dtype == torch.uint8
    np.testing.assert_array_equal(packed.numpy(), np.packbits(mask, axis=-1, bitorder="little"))
    np.testing.assert_array_equal(unpack_bits(packed, columns).numpy(), mask)


def test_bits_beyond_the_last_column_are_zero() -> None:
    assert pack_bits(torch.ones(1, 3, dtype=torch.bool)).tolist() == [[7]]
    assert unpack_bits(torch.tensor([[255]], dtype=torch.uint8), 3).tolist() == [[True] * 3]


def test_a_mask_need_not_be_contiguous() -> None:
    mask = torch.eye(9, dtype=torch.bool)[:, ::2]
    assert torch.equal(pack_bits(mask), pack_bits(mask.contiguous()))
