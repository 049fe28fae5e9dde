"""Rows that keep being appended, in segments that merge as they grow, each a Zarr array.

Chunks of a Zarr array have one size. Were it large, appending one adapter would rewrite a large
chunk; were it small, reading all adapters would read many. So appended rows become a segment of
their own, and once `FANOUT` segments of like size have come together they are rewritten as one: a
row is written once per power of `FANOUT` up to a full chunk where rows come one by one, and at most
three times per power however they come. Rows keep their numbers throughout.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from unmerge.store.layout import Bits, chunk_shape, rows_per_chunk, storage_dtype

FANOUT = 4

# The checksum goes last, over what lies on the disk: a flipped bit is an error.
_NUMBERS = (BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"), Crc32cCodec())
_TEXT = (BloscCodec(cname="zstd", clevel=5, shuffle="noshuffle"), Crc32cCodec())


def merged_tail(segments: Sequence[int], rows: int, full: int) -> int:
    """Return how many segments, from the last, are rewritten when `rows` rows are appended.

    Args:
        segments: Rows of every segment, in order.
        rows: Rows that come behind them.
        full: Rows of a full chunk: a segment of that many is never rewritten.
    """
    taken = 0
    while True:
        limit = FANOUT ** (_size_class(rows) + 1)
        tail = taken
        while tail < len(segments) and segments[-1 - tail] < min(limit, full):
            tail += 1
        if tail - taken + 1 < FANOUT:
            return taken
        rows += sum(segments[len(segments) - tail : len(segments) - taken])
        taken = tail


def append_rows(
    root: zarr.Group,
    path: str,
    segments: Sequence[int],
    shape: tuple[int, ...],
    dtype: str,
    rows: Sequence[Callable[[], Bits]],
) -> list[int]:
    """Append rows to the table at `path` and return its segments.

    Args:
        root: Root group of a writable session.
        path: What the paths of the table's arrays begin with.
        segments: The table's segments so far; none if there is no such table.
        shape: Shape of a row.
        dtype: Name of the rows' dtype.
        rows: Called in order, for one row each; at most a chunk of them is held at a time.

    Returns:
        Rows of every segment, in order. The first new row has the number `sum(segments)`.
    """
    full = rows_per_chunk(shape, np.dtype(storage_dtype(dtype)).itemsize)
    taken = merged_tail(segments, len(rows), full)
    kept = list(segments[: len(segments) - taken])
    old = _take_away(root, path, segments, shape, dtype, after=sum(kept))
    write_rows(
        root,
        f"{path}.{sum(kept)}",
        len(old) + len(rows),
        shape,
        dtype,
        itertools.chain(old, (row() for row in rows)),
    )
    return [*kept, len(old) + len(rows)]


def write_rows(
    root: zarr.Group,
    path: str,
    count: int,
    shape: tuple[int, ...],
    dtype: str,
    rows: Iterator[Bits],
) -> None:
    """Write `count` rows of one `shape` as the segment at `path`, chunk by chunk."""
    itemsize = np.dtype(storage_dtype(dtype)).itemsize
    length = _chunk_rows(count, shape, dtype)
    chunks = (length, *shape) if length > 1 else chunk_shape((1, *shape), itemsize)
    array = create_array(root, path, shape=(count, *shape), chunks=chunks, dtype=dtype)
    for start in range(0, count, length):
        array[start : start + length] = np.stack(list(itertools.islice(rows, length)))


def read_rows(
    root: zarr.Group,
    path: str,
    segments: Sequence[int],
    shape: tuple[int, ...],
    dtype: str,
    rows: Sequence[int],
) -> Iterator[tuple[Sequence[int], Bits]]:
    """Give some rows of the table at `path`, in one read and one block per segment.

    Args:
        root: Root group of any session.
        path: What the paths of the table's arrays begin with.
        segments: The table's segments.
        shape: Shape of a row.
        dtype: Name of the rows' dtype.
        rows: Row numbers, ascending.

    Yields:
        Row numbers and their bits, `(rows, *shape)`.
    """
    wanted = np.asarray(rows)
    found = 0
    for first, length in _starts(segments):
        inside = wanted[(wanted >= first) & (wanted < first + length)] - first
        if not len(inside):
            continue
        found += len(inside)
        array = _array(root, f"{path}.{first}")
        expected = ((length, *shape), storage_dtype(dtype))
        if (array.shape, str(array.dtype)) != expected:
            raise TypeError(
                f"{path}.{first} has shape {array.shape} and dtype {array.dtype}, expected "
                f"{expected[0]} and {expected[1]}"
            )
        low, high = int(inside[0]), int(inside[-1])
        contiguous = high - low + 1 == len(inside)
        block = array[low : high + 1] if contiguous else array.oindex[inside]
        yield (inside + first).tolist(), np.ascontiguousarray(block)
    if found != len(wanted):
        raise IndexError(f"{path} has {sum(segments)} rows, expected more than {max(rows)}")


def chunks_of_rows(segments: Sequence[int], shape: tuple[int, ...], dtype: str) -> Iterator[range]:
    """Give the numbers of all rows of a table, those that share a chunk at a time."""
    for first, count in _starts(segments):
        length = _chunk_rows(count, shape, dtype)
        for start in range(first, first + count, length):
            yield range(start, min(start + length, first + count))


def _chunk_rows(count: int, shape: tuple[int, ...], dtype: str) -> int:
    """Return how many rows each chunk of a segment of `count` rows holds."""
    full = rows_per_chunk(shape, np.dtype(storage_dtype(dtype)).itemsize)
    # Of one length, so that the last is not mostly padding, which reading would have to decode.
    return -(-count // -(-count // full))


def _take_away(
    root: zarr.Group,
    path: str,
    segments: Sequence[int],
    shape: tuple[int, ...],
    dtype: str,
    *,
    after: int,
) -> list[Bits]:
    """Return the rows from number `after` on and delete their segments; a few chunks at most."""
    last = range(after, sum(segments))
    blocks = read_rows(root, path, segments, shape, dtype, last) if last else ()
    taken = [bits for _, block in blocks for bits in block]
    for first, _ in _starts(segments):
        if first >= after:
            del root[f"{path}.{first}"]
    return taken


def create_array(
    root: zarr.Group,
    path: str,
    *,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: str,
    text: bool = False,
) -> zarr.Array[Any]:
    """Create an array whose chunks carry checksums; every number is written, also zeros."""
    return root.create_array(
        path,
        shape=shape,
        chunks=chunks,
        dtype=storage_dtype(dtype),
        compressors=_TEXT if text else _NUMBERS,
        attributes={"logical_dtype": dtype},
        # Without it a chunk of zeros is not written, and nothing tells it from a lost one.
        config={"write_empty_chunks": True},
    )


def write_bytes(root: zarr.Group, path: str, data: bytes | Bits, *, text: bool) -> None:
    """Write `data` as the array of bytes at `path`, in place of what was there."""
    array = np.frombuffer(data, dtype=np.uint8)
    chunks = chunk_shape(array.shape, 1)
    if path in root:
        del root[path]
    create_array(root, path, shape=array.shape, chunks=chunks, dtype="uint8", text=text)[:] = array


def read_bytes(root: zarr.Group, path: str) -> Bits:
    """Return the array of bytes at `path`."""
    array = _array(root, path)
    if array.ndim != 1 or array.dtype != np.uint8:
        raise TypeError(f"{path} has shape {array.shape} and dtype {array.dtype}, expected bytes")
    return np.asarray(array[:])


def _starts(segments: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Give the first row and the number of rows of every segment."""
    first = 0
    for length in segments:
        yield first, length
        first += length


def _array(root: zarr.Group, path: str) -> zarr.Array[Any]:
    node = root[path]
    if not isinstance(node, zarr.Array):
        raise TypeError(f"{path} is a group, expected an array")
    return node


def _size_class(rows: int) -> int:
    size_class = 0
    while rows >= FANOUT:
        rows //= FANOUT
        size_class += 1
    return size_class
