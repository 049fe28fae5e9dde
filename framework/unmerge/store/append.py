"""Writing staged adapters into an open session: one resize and one region write per array."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from unmerge.adapter import Adapter
from unmerge.arrays import dtype_name
from unmerge.errors import StoreError
from unmerge.store.layout import (
    FACTORS,
    STORE_FORMAT,
    Factor,
    adapter_path,
    array_path,
    chunk_shape,
    crc32,
    factor_chunks,
    storage_dtype,
    to_stored,
    verbatim_path,
)
from unmerge.store.records import (
    FactorRecord,
    ModuleRecord,
    StoredAdapter,
    StoreIndex,
    VerbatimRecord,
    sha256,
)
from unmerge.store.repository import backend

Progress = Callable[[int, int], None]
_Array = NDArray[np.generic]


def append(
    root: zarr.Group,
    index: StoreIndex,
    staged: Mapping[str, Adapter],
    *,
    digests: Mapping[str, str],
    added: str,
    progress: Progress | None,
) -> None:
    """Write `staged` adapters behind those of `index`, and the new index.

    Args:
        root: Root group of a writable session at the version that `index` belongs to.
        index: That version's index.
        staged: Checked adapters by name, none of them in `index`.
        digests: `Adapter.digest()` of each.
        added: Time to record, ISO 8601.
        progress: Called with (arrays and adapters written, of how many).
    """
    names = sorted(staged)
    batches = _batches([staged[name] for name in names])
    total = len(batches) + len(names)
    done = 0
    places: dict[tuple[str, str, Factor], FactorRecord] = {}
    for (path, factor, rank, dtype), members in sorted(batches.items()):
        rows = {
            adapter.name: to_stored(getattr(adapter.modules[path], factor)) for adapter in members
        }
        # A damaged last chunk cannot be completed: say which it is.
        with backend(f"{path}: factor {factor} (rank {rank}, {dtype}) cannot be appended to"):
            first = _append_rows(root, array_path(path, factor, rank, dtype), dtype, rows)
        for offset, (name, row) in enumerate(rows.items()):
            places[name, path, factor] = FactorRecord(
                dtype=dtype, row=first + offset, crc32=crc32(row)
            )
        done += 1
        if progress is not None:
            progress(done, total)
    records: dict[str, str] = {}
    for name in names:
        text = _record(staged[name], places, digest=digests[name], added=added).text()
        root.create_group(adapter_path(name), attributes={"record": text})
        for key, tensor in staged[name].verbatim.items():
            data = to_stored(tensor)
            array = _create(
                root,
                verbatim_path(name, key),
                shape=data.shape,
                chunks=chunk_shape(data.shape, data.itemsize),
                dtype=dtype_name(tensor.dtype),
            )
            array[...] = data
        records[name] = sha256(text)
        done += 1
        if progress is not None:
            progress(done, total)
    write_index(root, _next_index(index, staged, records))


def write_index(root: zarr.Group, index: StoreIndex) -> None:
    """Write the attributes of the root group."""
    text = index.text()
    root.attrs.put({"store_format": STORE_FORMAT, "index": text, "index_sha256": sha256(text)})


def _next_index(
    index: StoreIndex, staged: Mapping[str, Adapter], records: Mapping[str, str]
) -> StoreIndex:
    base_model, revision = index.base_model, index.revision
    if not base_model:
        # A store made without a base model is for that of the first adapter that names one.
        for adapter in staged.values():
            if adapter.base_model:
                base_model, revision = adapter.base_model, revision or adapter.revision
                break
    adapters = dict(sorted({**index.adapters, **records}.items()))
    return StoreIndex(base_model=base_model, revision=revision, adapters=adapters)


def _batches(adapters: Iterable[Adapter]) -> dict[tuple[str, Factor, int, str], list[Adapter]]:
    """Return which adapters share an array, by (module path, factor, rank, dtype)."""
    batches: dict[tuple[str, Factor, int, str], list[Adapter]] = {}
    for adapter in adapters:
        for path, factors in adapter.modules.items():
            for factor in FACTORS:
                dtype = dtype_name(getattr(factors, factor).dtype)
                batches.setdefault((path, factor, factors.rank, dtype), []).append(adapter)
    return batches


def _append_rows(root: zarr.Group, path: str, dtype: str, rows: Mapping[str, _Array]) -> int:
    """Append rows to the array at `path`, made if there is none; return the first one's index."""
    batch = np.stack(list(rows.values()))
    if path not in root:
        chunks = factor_chunks(batch.shape[1:], batch.itemsize)
        _create(root, path, shape=batch.shape, chunks=chunks, dtype=dtype)[...] = batch
        return 0
    array = root[path]
    if not isinstance(array, zarr.Array) or array.shape[1:] != batch.shape[1:]:
        raise StoreError(
            f"{path}: expected an array with rows of shape {batch.shape[1:]}, got {array}; "
            "the store is damaged: restore it from a copy"
        )
    first = int(array.shape[0])
    array.resize((first + len(batch), *array.shape[1:]))
    array[first:] = batch
    return first


def _create(
    root: zarr.Group, path: str, *, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str
) -> zarr.Array[Any]:
    return root.create_array(
        path,
        shape=shape,
        chunks=chunks,
        dtype=storage_dtype(dtype),
        # The checksum goes last, over what lies on the disk: a flipped bit is an error.
        compressors=[BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"), Crc32cCodec()],
        attributes={"logical_dtype": dtype},
        # Without it a chunk of zeros is not written, and nothing tells it from a lost one.
        config={"write_empty_chunks": True},
    )


def _record(
    adapter: Adapter,
    places: Mapping[tuple[str, str, Factor], FactorRecord],
    *,
    digest: str,
    added: str,
) -> StoredAdapter:
    return StoredAdapter(
        name=adapter.name,
        format=adapter.format,
        source=adapter.source,
        base_model=adapter.base_model,
        revision=adapter.revision,
        digest=digest,
        added=added,
        config=adapter.config,
        modules={
            path: ModuleRecord(
                d_out=factors.d_out,
                d_in=factors.d_in,
                rank=factors.rank,
                scaling=factors.scaling.hex(),
                A=places[adapter.name, path, "A"],
                B=places[adapter.name, path, "B"],
            )
            for path, factors in adapter.modules.items()
        },
        verbatim={
            key: VerbatimRecord(
                dtype=dtype_name(tensor.dtype),
                shape=tuple(tensor.shape),
                crc32=crc32(to_stored(tensor)),
            )
            for key, tensor in adapter.verbatim.items()
        },
    )
