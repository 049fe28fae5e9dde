"""Where things lie inside a store: node names, chunk shapes, dtypes as stored.

/                                     attributes: `store_format`, sha256 of the index
/index                                the index document, JSON as bytes
/records/<first>                      records of adapters, one JSON document per line, as bytes
/modules/<module>/<rows>.<first>      factors of one kind, rank and dtype: (adapters, rows, columns)
/modules/<module>/<rows>-linked.0     likewise, but references into files (`linking.py`)
/verbatim/<digest>                    bytes of the verbatim tensors of an adapter, one after another

What grows with every adapter, records and rows of factors, lies in segments (`segments.py`), each
an array of its own whose name ends in the number of its first row.
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
Bits = NDArray[np.generic]
"""Numbers as Zarr stores them."""

STORE_FORMAT = 2

INDEX = "index"
RECORDS = "records"

# Large enough that a read is one disk request, small enough that one adapter's row stays cheap.
CHUNK_BYTES = 2 << 20
# A single row may take more; beyond this it is split.
LONGEST_CHUNK_BYTES = 4 << 20
# A bound for tiny rows, whose chunks would otherwise take thousands of adapters to fill.
CHUNK_ADAPTERS = 1024


def storage_dtype(name: str) -> str:
    """Return the Zarr dtype that dtype `name` is stored in; Zarr and numpy have no bfloat16."""
    return "uint16" if name == "bfloat16" else name


def to_stored(tensor: torch.Tensor) -> Bits:
    """Return `to_numpy(tensor)` seen as its storage dtype."""
    return to_numpy(tensor).view(storage_dtype(dtype_name(tensor.dtype)))


def from_stored(array: Bits, name: str) -> torch.Tensor:
    """Return stored bits as a tensor of dtype `name`, without a copy; undoes `to_stored`."""
    return to_torch(array.view(name))


def crc32(array: Bits) -> int:
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


def rows_path(module: str, factor: Factor, rank: int, dtype: str, *, linked: bool) -> str:
    """Return what the paths of the arrays begin with that hold such factors of one module."""
    suffix = "-linked" if linked else ""
    return f"modules/{node_name(module)}/{factor}-r{rank}-{dtype}{suffix}"


def verbatim_path(digest: str) -> str:
    """Return the path of the verbatim tensors whose bytes have the digest `sha256:…`."""
    return f"verbatim/{digest.removeprefix('sha256:')}"


def rows_per_chunk(shape: tuple[int, ...], itemsize: int) -> int:
    """Return how many rows of one `shape` a full chunk holds."""
    return max(1, min(CHUNK_ADAPTERS, CHUNK_BYTES // (math.prod(shape) * itemsize)))


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the largest chunk of at most `LONGEST_CHUNK_BYTES` that splits leading axes first.

    An axis is only split once those before it are down to one row, so that a chunk is a
    contiguous run of the array in row-major order.
    """
    # Zarr wants chunks of at least 1 also along an axis of length 0.
    lengths = [max(1, n) for n in shape]
    chunk: list[int] = []
    for axis, length in enumerate(lengths):
        rest = lengths[axis + 1 :]
        rows = max(1, min(length, LONGEST_CHUNK_BYTES // (math.prod(rest) * itemsize)))
        chunk.append(rows)
        if rows > 1:
            return (*chunk, *rest)
    return tuple(chunk)
