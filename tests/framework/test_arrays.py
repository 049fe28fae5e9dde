"""Arrays hold a tensor's bits, and a result is rounded once or refused for what it is."""

from __future__ import annotations

import math

import pytest
import torch

from unmerge.arrays import DTYPES, VERBATIM_DTYPES, dtype_name, round_once, to_numpy, to_torch
from unmerge.errors import CapabilityError, NonFiniteError
from unmerge.store.layout import from_stored, storage_dtype, to_stored


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 2)])
@pytest.mark.parametrize("name", VERBATIM_DTYPES)
def test_arrays_and_stored_bits_come_back(name: str, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(VERBATIM_DTYPES[name])
    array = to_numpy(tensor)
    assert (array.dtype.name, dtype_name(tensor.dtype), array.shape) == (name, name, shape)
    stored = to_stored(tensor)
    assert stored.dtype.name == storage_dtype(name)
    for back in (to_torch(array), from_stored(stored, name)):
        assert back.dtype == tensor.dtype
        assert torch.equal(back, tensor)


def test_arrays_share_memory() -> None:
    tensor = torch.zeros(2, dtype=torch.bfloat16)
    to_torch(to_numpy(tensor))[0] = 1
    assert tensor.tolist() == [1, 0]


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("source", [torch.float64, *DTYPES.values()])
def test_rounding_to_every_dtype(source: torch.dtype, name: str) -> None:
    rounded = round_once(torch.tensor([1 / 3], dtype=source), DTYPES[name], "x (ties)")
    assert torch.equal(rounded, torch.tensor([1 / 3], dtype=source).to(DTYPES[name]))


@pytest.mark.parametrize(
    ("value", "dtype", "advice"),
    [
        (1e5, torch.float16, "the range of float16; use --dtype float32"),
        (1e50, torch.float32, "the range of float32, the widest dtype that can be stored; use sm"),
        (1e50, torch.float16, "the range of float32, the widest dtype that can be stored; use sm"),
        (math.nan, torch.float32, "the result holds NaN or infinity"),
    ],
)
def test_what_has_no_finite_rounding(value: float, dtype: torch.dtype, advice: str) -> None:
    with pytest.raises(NonFiniteError, match=r"^x \(ties\): ") as caught:
        round_once(torch.tensor([0.0, value], dtype=torch.float64), dtype, "x (ties)")
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]
)
def test_what_is_no_real_floating_point(dtype: torch.dtype) -> None:
    with pytest.raises(CapabilityError, match="expected real floating-point") as caught:
        round_once(torch.ones(2).to(dtype), torch.float32, "x (ties)")
    assert str(caught.value).startswith(f"x (ties): the result is {dtype_name(dtype)}, ")
