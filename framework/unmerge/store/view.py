"""Reading one version of a store: index, records, and the factors of a module or an adapter."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import zarr

from unmerge.adapter import Adapter, Factors
from unmerge.errors import AdapterNotInStoreError, ModuleNotInAdapterError, StoreError
from unmerge.store.failures import backend, is_failure, reason
from unmerge.store.layout import (
    FACTORS,
    INDEX,
    STORE_FORMAT,
    Bits,
    Factor,
    crc32,
    from_stored,
    storage_dtype,
    verbatim_path,
)
from unmerge.store.linking import REPAIR, altered
from unmerge.store.records import Layer, ModuleRecord, StoredAdapter, StoreIndex, parse
from unmerge.store.repository import StoreRepository
from unmerge.store.segments import read_bytes, read_rows
from unmerge.store.writing import read_records

_RESTORE = "the store is damaged: restore it from a copy"
# Names in a message.
_SHOWN = 20
# Tables read at a time: waiting for the disk and decoding overlap, and two cores are kept busy.
_THREADS = 4


class StoreView:
    """One version of a store. It never changes, so threads may share it.

    Attributes:
        version: Its id.
        index: Base model and adapter names.
    """

    def __init__(self, repository: StoreRepository, version: str) -> None:
        """Read the index of `version`.

        Raises:
            StoreError: It is damaged, not a store's, or of a later format.
        """
        self.version = version
        self._place = f"{repository.address}: version {version}"
        with backend(f"{self._place} cannot be read"):
            self._root = repository.read(version)
            attributes = self._root.attrs.asdict()
        found = attributes.get("store_format")
        if found != STORE_FORMAT:
            raise StoreError(
                f"{self._place} has store_format {found!r}, expected {STORE_FORMAT}; "
                "it is no adapter store, or one of another release of unmerge"
            )
        with backend(f"{self._place}: the index cannot be read"):
            data = read_bytes(self._root, INDEX).tobytes()
        self.index = parse(
            StoreIndex, data, attributes.get("index_sha256"), where=f"{self._place}: index"
        )
        self._repository = repository
        self._linked: tuple[frozenset[Path], zarr.Group] = frozenset(), self._root
        self._segments: dict[int, list[bytes]] = {}
        self._records: dict[str, StoredAdapter] = {}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all adapters, sorted."""
        return tuple(sorted(self.index.adapters))

    @property
    def records(self) -> dict[str, StoredAdapter]:
        """Every adapter's record by name, sorted."""
        return {name: self.record(name) for name in self.names}

    @cached_property
    def twins(self) -> dict[str, list[str]]:
        """Names of the adapters that have a digest, sorted, by digest."""
        table: dict[str, list[str]] = {}
        for name in self.names:
            table.setdefault(self.index.adapters[name].digest, []).append(name)
        return table

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return `(d_out, d_in)` of every module path any adapter has, sorted by path."""
        return {path: (d_out, d_in) for path, (d_out, d_in, _) in self.layers().items()}

    def layers(self) -> dict[str, Layer]:
        """Return `(d_out, d_in, kind)` of every module path any adapter has, sorted by path."""
        known: dict[str, Layer] = {}
        for record in self.records.values():
            known.update(record.modules.layers())
        return dict(sorted(known.items()))

    def record(self, name: str) -> StoredAdapter:
        """Return one adapter's record, parsed once.

        Raises:
            AdapterNotInStoreError: There is no such adapter.
            StoreError: The record is damaged.
        """
        if name in self._records:
            return self._records[name]
        if name not in self.index.adapters:
            raise AdapterNotInStoreError(
                f'{self._place} has no adapter "{name}"; it has {_some(self.names)}'
            )
        place = self.index.adapters[name]
        where = f'{self._place}: adapter "{name}"'
        first = 0
        for length in self.index.records:
            if place.row < first + length:
                break
            first += length
        else:
            raise StoreError(f"{where}: there is no record {place.row}; {_RESTORE}")
        if first not in self._segments:
            with backend(f"{where}: the record cannot be read"):
                self._segments[first] = read_records(self._root, first, length)
        line = self._segments[first][place.row - first]
        return self._records.setdefault(name, parse(StoredAdapter, line, place.sha256, where=where))

    def read_module(self, path: str, names: Sequence[str] | None) -> list[tuple[str, Factors]]:
        """Return one module's factors by adapter; see `AdapterStore.read_module`."""
        asked = self.names if names is None else sorted(set(names))
        records = {name: self.record(name) for name in asked}
        holders = {
            name: record.modules[path] for name, record in records.items() if path in record.modules
        }
        if not holders:
            who = "no adapter" if names is None else "none of the adapters asked for"
            raise ModuleNotInAdapterError(
                f"{path}: {who} in {self._place} has this module; "
                "module paths have no base_model.model. in front and no .weight at the end"
            )
        return self._read({path: holders})[path]

    def read_adapter(self, name: str) -> Adapter:
        """Return a whole adapter; see `AdapterStore.read_adapter`."""
        record = self.record(name)
        wanted = {path: {name: record.modules[path]} for path in record.modules.path}
        modules = {path: factors for path, [(_, factors)] in self._read(wanted).items()}
        adapter = Adapter(
            name=name,
            modules=modules,
            verbatim=self.read_verbatim(name),
            config=record.config,
            format=record.format,
            base_model=record.base_model,
            revision=record.revision,
            source=record.source,
        )
        if adapter.digest() != record.digest:
            raise StoreError(
                f'{self._place}: adapter "{name}" has digest {adapter.digest()}, expected '
                f"{record.digest}; the store is damaged: restore it from a copy"
            )
        return adapter

    def read_verbatim(self, name: str) -> dict[str, torch.Tensor]:
        """Return an adapter's verbatim tensors; see `AdapterStore.read_verbatim`."""
        record = self.record(name)
        data: Bits = np.empty(0, dtype=np.uint8)
        if record.verbatim_digest:
            where = f'{self._place}: adapter "{name}": verbatim tensors'
            keys = ", ".join(f'"{key}"' for key in record.verbatim)
            with backend(f"{where} {keys} cannot be read"):
                data = read_bytes(self._root, verbatim_path(record.verbatim_digest))
        tensors: dict[str, torch.Tensor] = {}
        for key, stored in sorted(record.verbatim.items()):
            # A copy: it is aligned, and does not keep the other tensors alive.
            bits = data[stored.start : stored.start + stored.nbytes].copy()
            if bits.nbytes != stored.nbytes or crc32(bits) != stored.crc32:
                raise StoreError(
                    _damage(f'{self._place}: adapter "{name}": verbatim tensor "{key}"')
                )
            typed = bits.view(storage_dtype(stored.dtype)).reshape(stored.shape)
            tensors[key] = from_stored(typed, stored.dtype)
        return tensors

    def _read(
        self, wanted: Mapping[str, Mapping[str, ModuleRecord]]
    ) -> dict[str, list[tuple[str, Factors]]]:
        """Return factors by module path, several tables at a time.

        Args:
            wanted: By module path, the records of the adapters that are asked for.
        """
        tables = [
            _Rows(path, factor, module, owners)
            for path, holders in wanted.items()
            for factor in FACTORS
            for module, owners in _by_table(holders, factor)
        ]
        tensors: dict[tuple[str, Factor, str], torch.Tensor] = {}
        with ThreadPoolExecutor(_THREADS) as pool:
            for rows, found in zip(tables, pool.map(self._read_table, tables), strict=True):
                for name, tensor in found:
                    tensors[rows.path, rows.factor, name] = tensor
        return {
            path: [
                (
                    name,
                    Factors(
                        tensors[path, "A", name],
                        tensors[path, "B", name],
                        module.scaling,
                        module.kind,
                    ),
                )
                for name, module in holders.items()
            ]
            for path, holders in wanted.items()
        }

    def _read_table(self, wanted: _Rows) -> list[tuple[str, torch.Tensor]]:
        """Return one factor of one module for adapters whose rows are in one table."""
        dtype = wanted.module.factor(wanted.factor).dtype
        where = (
            f"{self._place}: {wanted.path}: factor {wanted.factor} "
            f"(rank {wanted.module.rank}, {dtype})"
        )
        found = []
        for rows, block in self._read_rows(wanted, where=where):
            tensors = from_stored(block, dtype)
            content = block.reshape(-1).view(np.uint8).data
            nbytes = len(content) // len(rows)
            for i, row in enumerate(rows):
                name, checksum = wanted.owners[row]
                if zlib.crc32(content[i * nbytes : (i + 1) * nbytes]) != checksum:
                    files = sorted(self.record(name).files)
                    raise StoreError(_damage(f'{where}, row {row}, adapter "{name}"', files))
                found.append((name, tensors[i]))
        return found

    def _read_rows(self, wanted: _Rows, *, where: str) -> list[tuple[Sequence[int], Bits]]:
        """Return blocks of rows of one table; where that fails, say whose they are."""
        table = wanted.module.table(wanted.path, wanted.factor)
        shape = wanted.module.factor_shape(wanted.factor)
        dtype = wanted.module.factor(wanted.factor).dtype
        segments = self.index.tables.get(table, [])
        root = self._linked_root(wanted.names, where=where) if wanted.module.linked else self._root

        def read(rows: Sequence[int]) -> list[tuple[Sequence[int], Bits]]:
            return list(read_rows(root, table, segments, shape, dtype, rows))

        try:
            return read(sorted(wanted.owners))
        except BaseException as error:
            if not is_failure(error):
                raise
            # Which chunk it was is found row by row; slow, but only once and for a person.
            lost = [name for row, (name, _) in wanted.owners.items() if not _succeeds(read, [row])]
            lost = lost or sorted(wanted.names)
            who = ", ".join(f'"{name}"' for name in lost)
            files = {file for name in lost for file in self.record(name).files}
            problem = f"cannot be read: {reason(error)}"
            raise StoreError(f"{where} of {who} {_advice(problem, sorted(files))}") from error

    def _linked_root(self, names: Sequence[str], *, where: str) -> zarr.Group:
        """Return a root group from which what these adapters are linked to can be read.

        Raises:
            StoreError: A file is not what it was; says whose it is.
        """
        folders: set[Path] = set()
        for name in names:
            for file, facts in self.record(name).files.items():
                if problem := altered(file, facts):
                    raise StoreError(
                        f'{where} of "{name}" is linked to {file}, which {problem}; {REPAIR}'
                    )
                folders.add(Path(file).parent)
        allowed, root = self._linked
        if not folders <= allowed:
            # With those before, so that reading one adapter after the other ends up with one root.
            allowed |= folders
            with backend(f"{self._place}: linked adapters cannot be read"):
                root = self._repository.read_linked(self.version, allowed)
            self._linked = allowed, root
        return root


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of one table that are to be read.

    Attributes:
        path: Module path.
        factor: Which factor of it.
        module: The record of one of the adapters; the others' agree in shape and dtype.
        owners: Name of the adapter and CRC-32 by row.
    """

    path: str
    factor: Factor
    module: ModuleRecord
    owners: dict[int, tuple[str, int]]

    @property
    def names(self) -> list[str]:
        """Names of the adapters."""
        return [name for name, _ in self.owners.values()]


def _by_table(
    holders: Mapping[str, ModuleRecord], factor: Factor
) -> list[tuple[ModuleRecord, dict[int, tuple[str, int]]]]:
    """Split adapters by the table that their factor `factor` of one module is in."""
    groups: dict[tuple[int, str, bool], tuple[ModuleRecord, dict[int, tuple[str, int]]]] = {}
    for name, module in holders.items():
        stored = module.factor(factor)
        table = module.rank, stored.dtype, module.linked
        _, owners = groups.setdefault(table, (module, {}))
        owners[stored.row] = (name, stored.crc32)
    return list(groups.values())


def _succeeds(read: Callable[[list[int]], object], rows: list[int]) -> bool:
    try:
        read(rows)
    except BaseException as error:
        if not is_failure(error):
            raise
        return False
    return True


def _some(names: Sequence[str]) -> str:
    """Return the names for a message, not all of them where they are many."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more


def _damage(where: str, files: Sequence[str] = ()) -> str:
    problem = "the numbers read do not have the CRC-32 recorded for them"
    return f"{where}: {_advice(problem, files)}"


def _advice(problem: str, files: Sequence[str]) -> str:
    """Return a problem and what to do, with the numbers of linked adapters in `files`."""
    if not files:
        return f"{problem}; {_RESTORE}"
    return f"{problem}; linked to {' and '.join(files)}: {REPAIR}"
