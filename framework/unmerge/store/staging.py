"""Adapters that wait for a commit: their tensors in one nameless file, their facts in memory."""

from __future__ import annotations

import math
import os
import tempfile
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from unmerge.adapter import Adapter
from unmerge.arrays import dtype_name
from unmerge.errors import StoreError
from unmerge.store.failures import backend
from unmerge.store.layout import Bits, Factor, crc32, storage_dtype, to_stored
from unmerge.store.records import Layer, LinkedFile

# Below this much no file is made.
_IN_MEMORY = 32 << 20


@dataclass(frozen=True, slots=True)
class StagedTensor:
    """A tensor that is to be stored.

    Attributes:
        dtype: Name of its dtype.
        shape: Its shape.
        crc32: CRC-32 of its bytes.
        start: Where they begin.
        file: Where they are: in this file, which the adapter is linked to, or in the spool.
    """

    dtype: str
    shape: tuple[int, ...]
    crc32: int
    start: int
    file: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * np.dtype(storage_dtype(self.dtype)).itemsize


@dataclass(frozen=True, slots=True)
class StagedModule:
    """One module and its factors."""

    scaling: float
    kind: str
    A: StagedTensor
    B: StagedTensor

    @property
    def rank(self) -> int:
        """Number of rows of A and columns of B."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_out, d_in)`."""
        return self.B.shape[0], self.A.shape[1]

    def factor(self, factor: Factor) -> StagedTensor:
        """Return factor `factor`."""
        return self.A if factor == "A" else self.B


@dataclass(frozen=True, slots=True)
class Links:
    """Where the factors of an adapter are that is linked to files instead of being copied.

    Attributes:
        files: What the files are, by absolute path.
        places: File and first byte of every factor, by module path and factor.
    """

    files: Mapping[str, LinkedFile]
    places: Mapping[tuple[str, Factor], tuple[str, int]]


@dataclass(frozen=True, slots=True)
class StagedAdapter:
    """A checked adapter that the next commit writes.

    Attributes:
        name: As `Adapter`'s, and so on up to `config`.
        digest: `Adapter.digest()`.
        note: Free text.
        metadata: Keys and values.
        replace: Whether it takes the place of the stored adapter of its name.
        duplicate: Whether it may be there under another name, bit for bit.
        modules: By module path, sorted.
        files: The files that it is linked to, by absolute path; empty where it is copied.
        verbatim: By key, sorted.
    """

    name: str
    format: str
    source: str
    base_model: str | None
    revision: str | None
    config: str
    digest: str
    note: str
    metadata: Mapping[str, str]
    replace: bool
    duplicate: bool
    modules: Mapping[str, StagedModule]
    files: Mapping[str, LinkedFile]
    verbatim: Mapping[str, StagedTensor]

    @property
    def linked(self) -> bool:
        """Whether it is linked to files."""
        return bool(self.files)

    @property
    def layers(self) -> dict[str, Layer]:
        """What its modules are, by path."""
        return {path: (*module.shape, module.kind) for path, module in self.modules.items()}


@dataclass(frozen=True, slots=True)
class Annotation:
    """The note and the metadata that a stored adapter gets."""

    note: str
    metadata: Mapping[str, str]


class Changes:
    """What the next commit does.

    Attributes:
        added: Adapters by name.
        removed: Names of adapters that go.
        noted: What adapters had as note and metadata when that was staged, and what they get, by
            name.
        layers: What the added adapters' modules are, by path.
        base: Base model that the added adapters name, and its revision, so far as they do.
    """

    def __init__(self) -> None:
        self.added: dict[str, StagedAdapter] = {}
        self.removed: set[str] = set()
        self.noted: dict[str, tuple[Annotation, Annotation]] = {}
        self.layers: dict[str, Layer] = {}
        self._digests: dict[str, str] = {}
        self.base: tuple[str | None, str | None] = (None, None)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all adapters concerned, sorted."""
        return tuple(sorted({*self.added, *self.removed, *self.noted}))

    def __contains__(self, name: object) -> bool:
        return name in self.added or name in self.removed or name in self.noted

    def twins(self, digest: str) -> list[str]:
        """Return the first added adapter that has this digest, if there is one."""
        return [self._digests[digest]] if digest in self._digests else []

    def add(self, adapter: StagedAdapter) -> None:
        """Have the commit add `adapter`."""
        self.added[adapter.name] = adapter
        self.layers.update(adapter.layers)
        self._digests.setdefault(adapter.digest, adapter.name)
        if adapter.base_model:  # without it a revision is one of nothing
            self.base = (adapter.base_model, self.base[1] or adapter.revision)


class Spool:
    """Bytes of staged tensors, in memory while they are few, else in a file without a name.

    A nameless file is gone with the process, however that ends.

    Args:
        directory: Where the file is made; the system's place for temporary files by default.
    """

    def __init__(self, directory: Path | None = None) -> None:
        # Held for as long as the store object lives: there is no `with` it could be in.
        self._file = tempfile.SpooledTemporaryFile(  # noqa: SIM115
            max_size=_IN_MEMORY, dir=None if directory is None else os.fspath(directory)
        )
        self.close = weakref.finalize(self, self._file.close)
        """Gives the memory or the file back."""
        self._lock = threading.Lock()
        self._end = 0

    def stage(
        self,
        adapter: Adapter,
        annotation: Annotation,
        *,
        replace: bool,
        duplicate: bool,
        links: Links | None = None,
    ) -> StagedAdapter:
        """Write a checked adapter's tensors, but not those that `links` knows; return the rest.

        Raises:
            StoreError: They cannot be written.
        """

        def staged(path: str, factor: Factor, tensor: torch.Tensor) -> StagedTensor:
            if links is None:
                return self._put(tensor)
            file, start = links.places[path, factor]
            return _described(tensor, start, file)

        return StagedAdapter(
            name=adapter.name,
            format=adapter.format,
            source=adapter.source,
            base_model=adapter.base_model,
            revision=adapter.revision,
            config=adapter.config,
            digest=adapter.digest(),
            note=annotation.note,
            metadata=annotation.metadata,
            replace=replace,
            duplicate=duplicate,
            modules={
                path: StagedModule(
                    scaling=factors.scaling,
                    kind=factors.kind,
                    A=staged(path, "A", factors.A),
                    B=staged(path, "B", factors.B),
                )
                for path, factors in sorted(adapter.modules.items())
            },
            files={} if links is None else links.files,
            verbatim={key: self._put(tensor) for key, tensor in sorted(adapter.verbatim.items())},
        )

    def get(self, tensor: StagedTensor) -> Bits:
        """Return a tensor's bits.

        Raises:
            StoreError: They are not what was put in.
        """
        with self._lock:
            self._file.seek(tensor.start)
            data = self._file.read(tensor.nbytes)
        bits: Bits = np.frombuffer(data, dtype=storage_dtype(tensor.dtype)).reshape(tensor.shape)
        if crc32(bits) != tensor.crc32:
            raise StoreError("the temporary file of staged tensors was damaged; add them again")
        return bits

    def forget(self, adapter: StagedAdapter) -> None:
        """Take back the bytes of the adapter that was staged last."""
        tensors = [*adapter.verbatim.values()]
        tensors.extend(f for module in adapter.modules.values() for f in (module.A, module.B))
        starts = [tensor.start for tensor in tensors if tensor.file is None]
        self._end = min(starts, default=self._end)

    def _put(self, tensor: torch.Tensor) -> StagedTensor:
        bits = to_stored(tensor)
        with self._lock, backend("the temporary file of staged tensors cannot be written"):
            start = self._file.seek(self._end)
            self._file.write(np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data)
            self._end = self._file.tell()
        return _described(tensor, start)


def _described(tensor: torch.Tensor, start: int, file: str | None = None) -> StagedTensor:
    return StagedTensor(
        dtype=dtype_name(tensor.dtype),
        shape=tuple(tensor.shape),
        crc32=crc32(to_stored(tensor)),
        start=start,
        file=file,
    )
