"""The dtypes of adapters, and torch tensors to numpy arrays and back, bit for bit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from unmerge.errors import CapabilityError, NonFiniteError

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""What factors and merged tensors may be stored in, by name."""

VERBATIM_DTYPES: dict[str, torch.dtype] = {
    **DTYPES,
    "float64": torch.float64,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "uint32": torch.uint32,
    "uint64": torch.uint64,
    "bool": torch.bool,
}
"""What verbatim tensors may be, by name."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as manifests and options write it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """Return a contiguous array with the same shape, dtype and bits, of the same memory if it is.

    Args:
        tensor: Of any dtype in `VERBATIM_DTYPES`.
    """
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(array: np.ndarray[Any, np.dtype[Any]]) -> torch.Tensor:
    """Return a tensor with the same shape, dtype and bits, of the same memory.

    Args:
        array: Writable, of any dtype in `VERBATIM_DTYPES`.
    """
    if array.dtype == np.dtype(ml_dtypes.bfloat16):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def round_once(tensor: torch.Tensor, dtype: torch.dtype, what: str) -> torch.Tensor:
    """Return `tensor` rounded to `dtype`, refusing what is not finite before or after.

    Args:
        tensor: A result, float64 or one of `DTYPES`.
        dtype: One of `DTYPES`.
        what: Whose result it is, for the message.

    Raises:
        CapabilityError: The tensor is complex, an integer or of another dtype without finite
            rounding: a strategy must return real floating-point numbers.
        NonFiniteError: Names `what` and, where one is wide enough, the dtype to use.
    """
    if tensor.dtype not in (torch.float64, *DTYPES.values()):
        raise CapabilityError(
            f"{what}: the result is {dtype_name(tensor.dtype)}, expected real floating-point: "
            f"float64, {', '.join(DTYPES)}; convert it inside the strategy"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(f"{what}: the result holds NaN or infinity")
    rounded = tensor.to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        # float32 is the widest there is: advised only where it holds this result.
        fits = bool(torch.isfinite(tensor.to(torch.float32)).all())
        raise NonFiniteError(
            f"{what}: the result exceeds the range of {dtype_name(dtype)}; use --dtype float32"
            if fits
            else f"{what}: the result exceeds the range of float32, the widest dtype that can be "
            "stored; use smaller weights"
        )
    return rounded
