"""Torch tensors to numpy arrays and back, bit for bit, bfloat16 included."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from unmerge.errors import NonFiniteError

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as manifests and options write it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """Return a contiguous numpy array with the same shape, dtype and bits."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(array: np.ndarray[Any, np.dtype[Any]]) -> torch.Tensor:
    """Return a tensor with the same shape, dtype and bits, in memory of its own."""
    copy = np.array(array, order="C", copy=True)
    if copy.dtype == np.dtype(ml_dtypes.bfloat16):
        return torch.from_numpy(copy.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(copy)


def round_once(tensor: torch.Tensor, dtype: torch.dtype, what: str) -> torch.Tensor:
    """Return `tensor` rounded to `dtype`, refusing what is not finite before or after.

    Raises:
        NonFiniteError: Names `what` and, where the dtype is too narrow, a wider one.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(f"{what}: the result holds NaN or infinity")
    rounded = tensor.to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise NonFiniteError(
            f"{what}: the result exceeds the range of {dtype_name(dtype)}; use --dtype float32"
        )
    return rounded
