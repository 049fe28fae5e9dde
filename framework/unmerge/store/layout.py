"""Where things lie inside a store: node names, array names, chunk shapes, dtypes as stored.

/                                 attributes: `store_format`, the index and its sha256
/modules/<module>/<array>         one array per factor, rank and dtype: (adapters, rows, columns)
/adapters/<adapter>               attribute: the adapter's record
/adapters/<adapter>/verbatim/<key>
"""

from __future__ import annotations

import math
import zlib
from typing import Literal
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import NDArray

from unmerge.arrays import dtype_name, to_numpy, to_torch

Factor = Literal["A", "B"]
FACTORS: tuple[Factor, Factor] = ("A", "B")

STORE_FORMAT = 1

# Large enough that a read is one disk request, small enough that one adapter's row stays cheap.
CHUNK_BYTES = 4 << 20
# More adapters per chunk would make reading one adapter slower without making chunks fewer.
CHUNK_ADAPTERS = 16


def storage_dtype(name: str) -> str:
    """Return the Zarr dtype that dtype `name` is stored in; Zarr and numpy have no bfloat16."""
    return "uint16" if name == "bfloat16" else name


def to_stored(tensor: torch.Tensor) -> NDArray[np.generic]:
    """Return `to_numpy(tensor)` seen as its storage dtype."""
    return to_numpy(tensor).view(storage_dtype(dtype_name(tensor.dtype)))


def from_stored(array: NDArray[np.generic], name: str) -> torch.Tensor:
    """Return stored bits as a tensor of dtype `name`, without a copy; undoes `to_stored`."""
    return to_torch(array.view(name))


def crc32(array: NDArray[np.generic]) -> int:
    """Return the CRC-32 of an array's bytes in row-major order."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def node_name(name: str) -> str:
    """Return `name` as one component of a Zarr key; different names give different components.

    Percent-encodes what is not a letter, digit or one of `_.-~`. Zarr reserves components that
    are dots only or begin with `__`, and Icechunk takes a component ending in `zarr.json` for a
    metadata document, so these get one more escape.
    """
    quoted = quote(name, safe="")
    if quoted.startswith("."):
        quoted = f"%2E{quoted[1:]}"
    if quoted.startswith("__"):
        quoted = f"%5F{quoted[1:]}"
    if quoted.endswith("zarr.json"):
        quoted = f"{quoted.removesuffix('.json')}%2Ejson"
    return quoted


def array_path(module: str, factor: Factor, rank: int, dtype: str) -> str:
    """Return the path of the array that holds such factors of one module, adapters on axis 0."""
    return f"modules/{node_name(module)}/{factor}-r{rank}-{dtype}"


def adapter_path(name: str) -> str:
    """Return the path of an adapter's group."""
    return f"adapters/{node_name(name)}"


def verbatim_path(name: str, key: str) -> str:
    """Return the path of one of an adapter's verbatim tensors."""
    return f"{adapter_path(name)}/verbatim/{node_name(key)}"


def factor_chunks(shape: tuple[int, int], itemsize: int) -> tuple[int, ...]:
    """Return the chunk shape, adapters first, for factors of one `shape`."""
    return chunk_shape((CHUNK_ADAPTERS, *shape), itemsize)


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the largest chunk of at most `CHUNK_BYTES` that splits leading axes first.

    An axis is only split once those before it are down to one row, so that a chunk is a
    contiguous run of the array in row-major order.
    """
    # Zarr wants chunks of at least 1 also along an axis of length 0.
    lengths = [max(1, n) for n in shape]
    chunk: list[int] = []
    for axis, length in enumerate(lengths):
        rest = lengths[axis + 1 :]
        rows = max(1, min(length, CHUNK_BYTES // (math.prod(rest) * itemsize)))
        chunk.append(rows)
        if rows > 1:
            return (*chunk, *rest)
    return tuple(chunk)
