"""Writing one version: staged adapters behind those that are there, their records, the index."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import zarr

from unmerge.errors import StoreError
from unmerge.store.failures import backend, is_failure
from unmerge.store.layout import (
    FACTORS,
    INDEX,
    RECORDS,
    STORE_FORMAT,
    Bits,
    Factor,
    rows_path,
    verbatim_path,
)
from unmerge.store.linking import append_links
from unmerge.store.records import (
    FactorRecord,
    ModuleRecord,
    ModuleTable,
    RecordPlace,
    StoredAdapter,
    StoreIndex,
    VerbatimRecord,
    sha256,
)
from unmerge.store.segments import append_rows, merged_tail, read_bytes, write_bytes
from unmerge.store.staging import Changes, Spool, StagedAdapter, StagedTensor

Progress = Callable[[int, int], None]

# Of a segment of records: as many again are never rewritten with it.
_FULL_RECORDS = 1024


def write_changes(
    root: zarr.Group,
    index: StoreIndex,
    changes: Changes,
    noted: Sequence[StoredAdapter],
    spool: Spool | None,
    *,
    time: str,
    progress: Progress | None,
) -> None:
    """Write `changes` on top of the version that `index` belongs to, and the new index.

    Args:
        root: Root group of a writable session at that version.
        index: That version's index.
        changes: Checked against that version.
        noted: Records of the adapters whose note or metadata change, as they will be.
        spool: Holds the tensors of the added adapters; `None` where there are none.
        time: Time to record, ISO 8601.
        progress: Called with (tables and adapters written, of how many).
    """
    names = sorted(changes.added)
    batches = _batches([changes.added[name] for name in names])
    total = len(batches) + len(names)
    tables = dict(index.tables)
    rows: dict[tuple[str, str, Factor], int] = {}
    for done, (place, members) in enumerate(sorted(batches.items()), start=1):
        path, factor, rank, dtype, linked = place
        tensors = [adapter.modules[path].factor(factor) for adapter in members]
        table = rows_path(path, factor, rank, dtype, linked=linked)
        before = tables.get(table, [])
        # A damaged last segment cannot be completed: say which it is.
        with backend(f"{path}: factor {factor} (rank {rank}, {dtype}) cannot be appended to"):
            if linked:
                files = [adapter.files for adapter in members]
                tables[table] = append_links(root, table, before, tensors, files)
            else:
                tables[table] = append_rows(
                    root,
                    table,
                    before,
                    tensors[0].shape,
                    dtype,
                    [functools.partial(_bits, spool, tensor) for tensor in tensors],
                )
        for row, adapter in enumerate(members, start=sum(before)):
            rows[adapter.name, path, factor] = row
        if progress is not None:
            progress(done, total)
    records = []
    for done, name in enumerate(names, start=len(batches) + 1):
        verbatim_digest = _write_verbatim(root, changes.added[name], spool)
        records.append(_record(changes.added[name], rows, verbatim_digest, added=time))
        if progress is not None:
            progress(done, total)
    records.extend(noted)
    adapters = {n: place for n, place in index.adapters.items() if n not in changes.removed}
    segments = index.records
    if records:
        texts = [record.text() for record in records]
        with backend("the records cannot be appended to"):
            segments = append_records(root, index.records, texts)
        first = sum(index.records)
        for row, (record, text) in enumerate(zip(records, texts, strict=True), start=first):
            adapters[record.name] = RecordPlace(row, sha256(text), record.digest)
    base_model, revision = _base(index, changes)
    write_index(
        root,
        StoreIndex(
            base_model=base_model,
            revision=revision,
            adapters=dict(sorted(adapters.items())),
            layers=dict(sorted({**index.layers, **changes.layers}.items())),
            records=segments,
            tables=dict(sorted(tables.items())),
        ),
    )


def write_index(root: zarr.Group, index: StoreIndex) -> None:
    """Write the index, and into the root's attributes the sha256 that it must have."""
    text = index.text()
    write_bytes(root, INDEX, text.encode(), text=True)
    root.attrs.put({"store_format": STORE_FORMAT, "index_sha256": sha256(text)})


def append_records(root: zarr.Group, segments: Sequence[int], texts: Sequence[str]) -> list[int]:
    """Append records and return the segments of all; like rows, but of any length."""
    taken = merged_tail(segments, len(texts), _FULL_RECORDS)
    kept = list(segments[: len(segments) - taken])
    lines: list[bytes] = []
    first = sum(kept)
    for length in segments[len(kept) :]:
        lines.extend(read_records(root, first, length))
        del root[f"{RECORDS}/{first}"]
        first += length
    lines.extend(text.encode() for text in texts)
    write_bytes(root, f"{RECORDS}/{sum(kept)}", b"\n".join(lines), text=True)
    return [*kept, len(lines)]


def read_records(root: zarr.Group, first: int, length: int) -> list[bytes]:
    """Return the records of the segment whose first row is `first`.

    Raises:
        StoreError: There are not as many as expected.
    """
    lines = read_bytes(root, f"{RECORDS}/{first}").tobytes().split(b"\n")
    if len(lines) != length:
        raise StoreError(
            f"{RECORDS}/{first} has {len(lines)} records, expected {length}; "
            "the store is damaged: restore it from a copy"
        )
    return lines


def _bits(spool: Spool | None, tensor: StagedTensor) -> Bits:
    if spool is None:
        raise StoreError("tensors are to be written that were never staged")
    return spool.get(tensor)


def _base(index: StoreIndex, changes: Changes) -> tuple[str | None, str | None]:
    """Return base model and revision: what the store was made without is that of its adapters."""
    model, revision = changes.base
    return index.base_model or model, index.revision or revision


def _batches(
    adapters: Collection[StagedAdapter],
) -> dict[tuple[str, Factor, int, str, bool], list[StagedAdapter]]:
    """Return which adapters share a table, by (module path, factor, rank, dtype, linked)."""
    batches: dict[tuple[str, Factor, int, str, bool], list[StagedAdapter]] = {}
    for adapter in adapters:
        for path, module in adapter.modules.items():
            for factor in FACTORS:
                dtype = module.factor(factor).dtype
                place = (path, factor, module.rank, dtype, adapter.linked)
                batches.setdefault(place, []).append(adapter)
    return batches


def _write_verbatim(root: zarr.Group, adapter: StagedAdapter, spool: Spool | None) -> str:
    """Write an adapter's verbatim tensors; return the digest of their bytes, "" without any."""
    data = b"".join(_bits(spool, tensor).tobytes() for tensor in adapter.verbatim.values())
    if not data:
        return ""
    digest = sha256(data)
    path = verbatim_path(digest)
    # Adapters often share a head, and removed ones leave theirs.
    if not _holds(root, path, data):
        write_bytes(root, path, data, text=False)
    return digest


def _holds(root: zarr.Group, path: str, data: bytes) -> bool:
    """Return whether just these bytes are at `path`: to rely on damaged ones would lose data."""
    if path not in root:
        return False
    try:
        return np.array_equal(read_bytes(root, path), np.frombuffer(data, dtype=np.uint8))
    except BaseException as error:
        if not is_failure(error):
            raise
        return False


def _record(
    adapter: StagedAdapter,
    rows: Mapping[tuple[str, str, Factor], int],
    verbatim_digest: str,
    *,
    added: str,
) -> StoredAdapter:
    def placed(path: str, factor: Factor) -> FactorRecord:
        tensor = adapter.modules[path].factor(factor)
        return FactorRecord(tensor.dtype, rows[adapter.name, path, factor], tensor.crc32)

    ends = list(itertools.accumulate(tensor.nbytes for tensor in adapter.verbatim.values()))
    return StoredAdapter(
        name=adapter.name,
        format=adapter.format,
        source=adapter.source,
        base_model=adapter.base_model,
        revision=adapter.revision,
        digest=adapter.digest,
        added=added,
        config=adapter.config,
        note=adapter.note,
        metadata=dict(adapter.metadata),
        modules=ModuleTable.of(
            {
                path: ModuleRecord(
                    d_out=module.shape[0],
                    d_in=module.shape[1],
                    rank=module.rank,
                    kind=module.kind,
                    scaling=module.scaling,
                    A=placed(path, "A"),
                    B=placed(path, "B"),
                    linked=adapter.linked,
                )
                for path, module in adapter.modules.items()
            },
            linked=adapter.linked,
        ),
        files=dict(sorted(adapter.files.items())),
        verbatim={
            key: VerbatimRecord(dtype=t.dtype, shape=t.shape, crc32=t.crc32, start=end - t.nbytes)
            for (key, t), end in zip(adapter.verbatim.items(), ends, strict=True)
        },
        verbatim_digest=verbatim_digest,
    )
