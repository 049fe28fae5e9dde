"""The blobs: safetensors files, written as a stream under their own digest, read with distrust.

The `safetensors` library keeps a whole file in memory to write it, cannot give numpy bfloat16
and accepts repeated header keys; blobs are larger than memory, hold bfloat16 and come from
strangers. The files are ordinary safetensors nevertheless: the tests read each kind of file
with the other implementation.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from unmerge_bundle.arrays import DTYPES, Array, dtype_code
from unmerge_bundle.errors import (
    BlobError,
    DigestMismatchError,
    InvalidInputError,
    TensorMismatchError,
)
from unmerge_bundle.jsontext import canonical_bytes, parse_object

__all__ = [
    "MAX_HEADER_BYTES",
    "BlobReader",
    "BlobWriter",
    "Held",
    "Spool",
    "Spooled",
    "TensorInfo",
    "WrittenBlob",
    "check_dtype",
    "write_safetensors",
]

MAX_HEADER_BYTES = 100_000_000
_CHUNK = 1 << 20
_MAX_DIMENSIONS = 32
_MAX_ELEMENTS = 1 << 48
_LENGTH = struct.Struct("<Q")


def check_dtype(dtype: np.dtype[Any], *, where: str) -> str:
    """Return the header code of `dtype`.

    Raises:
        InvalidInputError: The format has no such dtype.
    """
    code = dtype_code(dtype)
    if code is None:
        raise InvalidInputError(
            f"tensor has dtype {dtype}, expected one of "
            f"{', '.join(allowed.name for allowed in DTYPES.values())}; convert it first",
            path=where,
        )
    return code


class Stored(Protocol):
    """A tensor that can be written: what the header says of it, and its bytes."""

    @property
    def code(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...
    def chunks(self) -> Iterator[memoryview | bytes]: ...


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor in memory, C-contiguous and of one of the format's dtypes."""

    code: str
    shape: tuple[int, ...]
    raw: Array

    @classmethod
    def of(cls, array: Array, *, name: str) -> Held:
        """Return `array` ready to be written.

        Raises:
            InvalidInputError: The format has no such dtype.
        """
        code = check_dtype(array.dtype, where=name)
        flat = np.ascontiguousarray(array, dtype=DTYPES[code]).reshape(-1)
        return cls(code=code, shape=array.shape, raw=flat.view(np.uint8))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.raw.nbytes

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes in order."""
        data = self.raw.data
        for start in range(0, len(data), _CHUNK):
            yield data[start : start + _CHUNK]


@dataclass(frozen=True, slots=True)
class Spooled:
    """A tensor whose bytes wait in a spool file."""

    code: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    file: BinaryIO

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes in order."""
        self.file.seek(self.offset)
        left = self.nbytes
        while left:
            data = self.file.read(min(left, _CHUNK))
            if not data:
                raise OSError(f"{self.file.name}: spool file ends early; was it truncated?")
            left -= len(data)
            yield data


class Spool:
    """An append-only file that holds tensor bytes until their blob is assembled.

    One file for all adapters, whatever their number, so that neither memory nor open files grow.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w+b")

    def append(self, array: Array, *, name: str) -> Spooled:
        """Write `array`'s bytes at the end and return where they are.

        Raises:
            InvalidInputError: The format has no such dtype.
        """
        held = Held.of(array, name=name)
        offset = self._file.seek(0, os.SEEK_END)
        for chunk in held.chunks():
            self._file.write(chunk)
        return Spooled(held.code, held.shape, held.nbytes, offset, self._file)

    def remove(self) -> None:
        """Close and delete the file."""
        self._file.close()
        self._path.unlink()

    def close(self) -> None:
        """Close the file and leave it to whoever removes its directory."""
        self._file.close()


@dataclass(frozen=True, slots=True)
class WrittenBlob:
    """A finished file: `sha256:…` over its bytes, and its size in bytes."""

    digest: str
    size: int


def write_safetensors(
    path: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str] | None = None
) -> WrittenBlob:
    """Write a safetensors file at `path` and flush it to the disk.

    Equal tensors and metadata give equal bytes: header keys are sorted, tensors follow each other
    by falling item size and then name (which aligns each without holes), and the header is padded
    with spaces to a multiple of 8 bytes.

    Raises:
        InvalidInputError: The header would be larger than the format allows.
        OSError: The disk is full, or `path` cannot be written.
    """
    order = sorted(tensors, key=lambda name: (-DTYPES[tensors[name].code].itemsize, name))
    header: dict[str, Any] = {}
    if metadata is not None:
        header["__metadata__"] = dict(metadata)
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": tensor.code,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = canonical_bytes(header)
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise InvalidInputError(
            f"the header needs {len(text)} bytes, at most {MAX_HEADER_BYTES} are allowed; "
            "write fewer tensors into one file",
            path=path.name,
        )
    total = hashlib.sha256()
    with path.open("xb") as file:
        for chunk in (_LENGTH.pack(len(text)), text):
            file.write(chunk)
            total.update(chunk)
        for name in order:
            for data in tensors[name].chunks():
                file.write(data)
                total.update(data)
        file.flush()
        os.fsync(file.fileno())
    return WrittenBlob(f"sha256:{total.hexdigest()}", _LENGTH.size + len(text) + offset)


class BlobWriter:
    """Collects the tensors of one blob in a spool, then writes it under its digest.

    Attributes:
        nbytes: Bytes of the tensors added so far.
    """

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._tensors: dict[str, Spooled] = {}
        self.nbytes = 0

    def add(self, name: str, array: Array) -> None:
        """Add a tensor; its bytes go to the spool at once.

        Raises:
            InvalidInputError: The name is taken, or the format has no such dtype.
        """
        if name in self._tensors:
            raise InvalidInputError("tensor added twice", path=name)
        self.take({name: self._spool.append(array, name=name)})

    def take(self, tensors: Mapping[str, Spooled]) -> None:
        """Add tensors that are in a spool already."""
        self._tensors.update(tensors)
        self.nbytes += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self, directory: Path, metadata: Mapping[str, str] | None = None) -> WrittenBlob:
        """Write `directory/<sha256>.safetensors`; time and disk O(bytes), memory O(header)."""
        partial = directory / f".{secrets.token_hex(8)}.partial"
        blob = write_safetensors(partial, self._tensors, metadata)
        partial.rename(directory / f"{blob.digest.removeprefix('sha256:')}.safetensors")
        return blob


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor; `begin` and `end` count from the end of the header."""

    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


class BlobReader:
    """A safetensors file, mapped into memory, its header checked.

    Attributes:
        where: The place named in errors.
        size: Bytes of the file.
        metadata: The header's `__metadata__`, or empty.
        tensors: What the header says, by tensor name.

    The arrays handed out are views of the mapping: the file must not be changed or truncated
    while they live. Blobs are immutable, so nothing that follows the format does.
    """

    def __init__(self, path: Path, *, where: str) -> None:
        """Map the file and check its header.

        Raises:
            BlobError: The file is no well-formed safetensors file.
            OSError: It cannot be opened.
        """
        self.where = where
        with path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size < _LENGTH.size:
                raise BlobError(
                    f"file has {self.size} bytes, expected at least 8; it is truncated", path=where
                )
            # Not closed here: the views keep the mapping, and the mapping goes with the last.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        (length,) = _LENGTH.unpack_from(self._map)
        if length > MAX_HEADER_BYTES or length > self.size - _LENGTH.size:
            raise BlobError(
                f"header claims {length} bytes in a file of {self.size} (at most "
                f"{MAX_HEADER_BYTES} allowed); the file is truncated or no safetensors",
                path=where,
            )
        self._data_start = _LENGTH.size + length
        header = parse_object(
            self._map[_LENGTH.size : self._data_start], where=where, error=BlobError, floats=False
        )
        self.metadata = _metadata(header.pop("__metadata__", {}), where)
        self.tensors = {name: _tensor_info(name, item, where) for name, item in header.items()}
        _check_coverage(self.tensors, self.size - self._data_start, where)

    def digest(self) -> str:
        """Return `sha256:…` over the whole file, about a second per gigabyte."""
        total = hashlib.sha256()
        with memoryview(self._map) as data:
            for start in range(0, self.size, _CHUNK):
                total.update(data[start : start + _CHUNK])
        return f"sha256:{total.hexdigest()}"

    def check_digest(self, expected: str) -> None:
        """Check the whole file against `expected`.

        Raises:
            DigestMismatchError: It differs.
        """
        found = self.digest()
        if found != expected:
            raise DigestMismatchError(
                f"expected {expected}, got {found}; the file is damaged or was changed: "
                "get it again",
                path=self.where,
            )

    def array(self, name: str) -> Array:
        """Return tensor `name` as a read-only view.

        Raises:
            TensorMismatchError: There is no such tensor.
            BlobError: A bool tensor holds bytes other than 0 and 1.
        """
        info = self.tensors.get(name)
        if info is None:
            raise TensorMismatchError(f"tensor {name!r} is missing", path=self.where)
        dtype = DTYPES[info.code]
        if info.elements == 0:
            empty = np.empty(info.shape, dtype=dtype)
            empty.flags.writeable = False
            return empty
        raw = np.frombuffer(
            self._map,
            dtype=np.uint8,
            count=info.end - info.begin,
            offset=self._data_start + info.begin,
        )
        if info.code == "BOOL" and int(raw.max()) > 1:
            raise BlobError(f"bool tensor {name!r} holds bytes other than 0 and 1", path=self.where)
        return raw.view(dtype).reshape(info.shape)


def _metadata(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise BlobError("header's __metadata__ must map strings to strings", path=where)
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor_info(name: str, item: Any, where: str) -> TensorInfo:
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise BlobError(
            f"header entry {name!r} must be an object of dtype, shape and data_offsets", path=where
        )
    code, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise BlobError(
            f"tensor {name!r} has dtype {code!r}, expected one of {', '.join(DTYPES)}", path=where
        )
    if not isinstance(shape, list) or not all(_is_count(n) for n in shape):
        raise BlobError(f"tensor {name!r} has shape {shape!r}, expected counts", path=where)
    # An empty tensor costs no bytes, yet a huge dimension or many of them cannot be represented.
    if len(shape) > _MAX_DIMENSIONS or math.prod(n or 1 for n in shape) > _MAX_ELEMENTS:
        raise BlobError(f"tensor {name!r} has an impossible shape {shape!r}", path=where)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise BlobError(f"tensor {name!r} has data_offsets {offsets!r}", path=where)
    info = TensorInfo(code, tuple(shape), offsets[0], offsets[1])
    expected = info.elements * DTYPES[code].itemsize
    if info.end - info.begin != expected:
        raise BlobError(
            f"tensor {name!r} of shape {shape} and dtype {code} needs {expected} bytes, its "
            f"data_offsets {offsets} hold {info.end - info.begin}",
            path=where,
        )
    return info


def _check_coverage(tensors: Mapping[str, TensorInfo], size: int, where: str) -> None:
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            kind = "overlaps the one before" if info.begin < position else "leaves a hole before it"
            raise BlobError(
                f"tensor {name!r} begins at {info.begin}, expected {position}: it {kind}",
                path=where,
            )
        position = info.end
    if position != size:
        raise BlobError(
            f"the tensors cover {position} bytes of data, the file holds {size}", path=where
        )
