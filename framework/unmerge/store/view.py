"""Reading one version of a store: index, records, and the factors of a module or an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from unmerge.adapter import Adapter, Factors
from unmerge.errors import AdapterNotInStoreError, ModuleNotInAdapterError, StoreError
from unmerge.store.layout import (
    FACTORS,
    STORE_FORMAT,
    Factor,
    adapter_path,
    array_path,
    crc32,
    from_stored,
    storage_dtype,
    verbatim_path,
)
from unmerge.store.records import ModuleRecord, StoredAdapter, StoreIndex, parse
from unmerge.store.repository import StoreRepository, backend, is_failure, reason

_Array = NDArray[np.generic]


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
        self._place = f"{repository.path}: version {version}"
        with backend(f"{self._place} cannot be read"):
            self._root = repository.read(version)
            attributes = self._root.attrs.asdict()
        found = attributes.get("store_format")
        if found != STORE_FORMAT:
            raise StoreError(
                f"{self._place} has store_format {found!r}, expected {STORE_FORMAT}; "
                "it is no adapter store, or one of a later release of unmerge"
            )
        self.index = parse(
            StoreIndex,
            attributes.get("index"),
            attributes.get("index_sha256"),
            where=f"{self._place}: index",
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all adapters, sorted."""
        return tuple(sorted(self.index.adapters))

    @cached_property
    def records(self) -> dict[str, StoredAdapter]:
        """Every adapter's record by name, sorted; parsed once, about 2 ms per adapter."""
        return {name: self.record(name) for name in self.names}

    @cached_property
    def modules(self) -> dict[str, dict[str, ModuleRecord]]:
        """By module path, sorted: the adapters that have it, sorted, with their records."""
        table: dict[str, dict[str, ModuleRecord]] = {}
        for name, record in self.records.items():
            for path, module in record.modules.items():
                table.setdefault(path, {})[name] = module
        return dict(sorted(table.items()))

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return `(d_out, d_in)` of every module path any adapter has, sorted by path."""
        return {
            path: (module.d_out, module.d_in)
            for path, adapters in self.modules.items()
            for module in [next(iter(adapters.values()))]
        }

    def record(self, name: str) -> StoredAdapter:
        """Return one adapter's record.

        Raises:
            AdapterNotInStoreError: There is no such adapter.
            StoreError: The record is damaged.
        """
        if name not in self.index.adapters:
            raise AdapterNotInStoreError(
                f'{self._place} has no adapter "{name}"; it has {", ".join(self.names) or "none"}'
            )
        where = f'{self._place}: adapter "{name}"'
        with backend(f"{where}: the record cannot be read"):
            text = self._root[adapter_path(name)].attrs.get("record")
        return parse(StoredAdapter, text, self.index.adapters[name], where=where)

    def read_module(self, path: str, names: Sequence[str] | None) -> list[tuple[str, Factors]]:
        """Return one module's factors by adapter; see `AdapterStore.read_module`."""
        holders = self.modules.get(path, {})
        if names is not None:
            for name in names:
                if name not in self.index.adapters:
                    self.record(name)  # raises, with the names there are
            asked = set(names)
            holders = {name: module for name, module in holders.items() if name in asked}
        if not holders:
            who = "no adapter" if names is None else "none of the adapters asked for"
            raise ModuleNotInAdapterError(
                f"{path}: {who} in {self._place} has this module; "
                "module paths have no base_model.model. in front and no .weight at the end"
            )
        A, B = (self._read_factor(path, factor, holders) for factor in FACTORS)
        return [
            (name, Factors(A[name], B[name], float.fromhex(module.scaling)))
            for name, module in holders.items()
        ]

    def read_adapter(self, name: str) -> Adapter:
        """Return a whole adapter; see `AdapterStore.read_adapter`."""
        record = self.record(name)
        modules: dict[str, Factors] = {}
        for path, module in sorted(record.modules.items()):
            A, B = (self._read_factor(path, factor, {name: module})[name] for factor in FACTORS)
            modules[path] = Factors(A, B, float.fromhex(module.scaling))
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
        tensors: dict[str, torch.Tensor] = {}
        for key, stored in sorted(self.record(name).verbatim.items()):
            where = f'{self._place}: adapter "{name}": verbatim tensor "{key}"'
            with backend(f"{where} cannot be read"):
                array = self._array(verbatim_path(name, key), stored.shape, stored.dtype)
                # A copy: of a scalar Zarr returns a numpy scalar, which torch cannot view.
                data: _Array = np.array(array[...], dtype=storage_dtype(stored.dtype))
            if crc32(data) != stored.crc32:
                raise StoreError(_damage(where))
            tensors[key] = from_stored(data, stored.dtype)
        return tensors

    def _read_factor(
        self, path: str, factor: Factor, holders: dict[str, ModuleRecord]
    ) -> dict[str, torch.Tensor]:
        """Return factor `factor` of one module for some adapters: one read per array."""
        groups: dict[tuple[int, str], list[str]] = {}
        for name, module in holders.items():
            groups.setdefault((module.rank, module.factor(factor).dtype), []).append(name)
        factors: dict[str, torch.Tensor] = {}
        for (rank, dtype), names in groups.items():
            rows = {holders[name].factor(factor).row: name for name in names}
            shape = holders[names[0]].factor_shape(factor)
            where = f"{self._place}: {path}: factor {factor} (rank {rank}, {dtype})"
            with backend(f"{where} cannot be read"):
                array = self._array(array_path(path, factor, rank, dtype), (None, *shape), dtype)
            block = _read_rows(array, rows, where=where)
            for index, (row, name) in enumerate(sorted(rows.items())):
                if crc32(block[index]) != holders[name].factor(factor).crc32:
                    raise StoreError(_damage(f'{where}, row {row}, adapter "{name}"'))
                factors[name] = from_stored(block[index], dtype)
        return factors

    def _array(self, path: str, shape: tuple[int | None, ...], dtype: str) -> zarr.Array[Any]:
        array = self._root[path]
        expected = (shape, storage_dtype(dtype))
        if not isinstance(array, zarr.Array):
            raise StoreError(f"{self._place}: {path} is a group, expected an array")
        found = tuple(None if e is None else n for n, e in zip(array.shape, shape, strict=True))
        if (found, str(array.dtype)) != expected:
            raise StoreError(
                f"{self._place}: {path} has shape {array.shape} and dtype {array.dtype}, expected "
                f"{shape} and {storage_dtype(dtype)}; the store is damaged: restore it from a copy"
            )
        return array


def _read_rows(array: zarr.Array[Any], rows: dict[int, str], *, where: str) -> _Array:
    """Return the given rows in ascending order; `rows` says whose they are."""
    try:
        return _take(array, sorted(rows))
    except BaseException as error:
        if not is_failure(error):
            raise
        # Which chunk it was is found by reading row by row; slow, but only once and for a person.
        lost = [name for row, name in sorted(rows.items()) if not _readable(array, row)]
        owners = ", ".join(f'"{name}"' for name in lost or rows.values())
        raise StoreError(
            f"{where} of {owners} cannot be read: {reason(error)}; "
            "the store is damaged: restore it from a copy"
        ) from error


def _take(array: zarr.Array[Any], rows: list[int]) -> _Array:
    first, last = rows[0], rows[-1]
    if last >= array.shape[0]:
        raise IndexError(f"it has {array.shape[0]} rows, expected more than {last}")
    contiguous = last - first + 1 == len(rows)
    block = array[first : last + 1] if contiguous else array.oindex[np.array(rows)]
    return np.asarray(block)


def _readable(array: zarr.Array[Any], row: int) -> bool:
    try:
        _take(array, [row])
    except BaseException as error:
        if not is_failure(error):
            raise
        return False
    return True


def _damage(where: str) -> str:
    return (
        f"{where}: the numbers read do not have the CRC-32 recorded for them; "
        "the store is damaged: restore it from a copy"
    )
