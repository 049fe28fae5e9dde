"""Giving space back: a version without what nobody uses, old versions forgotten, collection."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import zarr

from unmerge.errors import ConfigError, StoreError
from unmerge.store.failures import backend
from unmerge.store.layout import FACTORS, RECORDS, Bits, crc32, node_name
from unmerge.store.records import Layer, RecordPlace, StoredAdapter, StoreIndex, Version, sha256
from unmerge.store.repository import StoreRepository
from unmerge.store.segments import read_rows, write_rows
from unmerge.store.tables import DeadSpace, Table, dead_space, tables_of, unused_verbatim
from unmerge.store.view import StoreView
from unmerge.store.writing import append_records, write_index

Progress = Callable[[int, int], None]

_NOTHING = DeadSpace(rows=0, records=0, verbatim=0, nbytes=0)


@dataclass(frozen=True, slots=True)
class GcReport:
    """What `AdapterStore.gc` did, or would do.

    Attributes:
        forgotten: Ids of the versions forgotten, sorted.
        compacted: Id of the version written without what no adapter uses; `None` without one.
        dropped: What it was written without.
        objects: Number of objects deleted.
        nbytes: Their bytes.
        size_before: Bytes of the store's files before; `None` on S3.
        size_after: Likewise, afterwards.
        dry_run: Whether nothing was done: `forgotten` and `dropped` are what would be. What would
            be deleted is not known before it is done, so that the rest says nothing.
    """

    forgotten: tuple[str, ...]
    compacted: str | None
    dropped: DeadSpace
    objects: int
    nbytes: int
    size_before: int | None
    size_after: int | None
    dry_run: bool


def gc(
    repository: StoreRepository,
    *,
    forget_before: datetime | None,
    older_than: datetime | None,
    force: bool,
    dry_run: bool,
    progress: Progress | None,
) -> GcReport:
    """Forget old versions and reclaim what only they used; see `AdapterStore.gc`."""
    # Refused before hours of work, not after them.
    repository.check_cutoff(older_than, force=force)
    if forget_before is not None and forget_before.tzinfo is None:
        raise ConfigError(
            f"forget_before is {forget_before.isoformat()}, expected a time with a time zone"
        )
    if dry_run:
        return _foresee(repository, forget_before)
    with contextlib.ExitStack() as held:
        with backend(f"{repository.address}: cannot lock the store"):
            held.enter_context(repository.lock())
        size = _size(repository)
        compacted, dropped, forgotten = None, _NOTHING, []
        if forget_before is not None:
            repository.check_tags()
            compacted, dropped = _compact(repository, forget_before, progress)
            forgotten = repository.expire(forget_before)
        garbage = repository.collect_garbage(older_than=older_than, force=force)
        return GcReport(
            forgotten=tuple(forgotten),
            compacted=compacted,
            dropped=dropped,
            objects=garbage.objects,
            nbytes=garbage.bytes,
            size_before=size,
            size_after=_size(repository),
            dry_run=False,
        )


def _foresee(repository: StoreRepository, forget_before: datetime | None) -> GcReport:
    dropped, forgotten = _NOTHING, set[str]()
    if forget_before is not None:
        with backend(f"{repository.address}: cannot read the history"):
            tags, tip = repository.tags(), repository.tip()
            known = {v.id: v for start in (tip, *tags.values()) for v in repository.history(start)}
        old = {version.id for version in known.values() if version.written_at < forget_before}
        state = _State(repository, tip)
        if state.pays(known[tip], forget_before):
            dropped = state.dead
        else:
            old.discard(tip)
        forgotten = old - set(tags.values())
    size = _size(repository)
    return GcReport(
        forgotten=tuple(sorted(forgotten)),
        compacted=None,
        dropped=dropped,
        objects=0,
        nbytes=0,
        size_before=size,
        size_after=size,
        dry_run=True,
    )


class _State:
    """All there is in a version, and what of it is dead."""

    def __init__(self, repository: StoreRepository, version: str) -> None:
        view = StoreView(repository, version)
        self.index = view.index
        self.records = view.records
        self.tables = tables_of(self.index, self.records)
        with backend(f"{repository.address}: version {version} cannot be read"):
            self.root = repository.read(version)
            self.dead = dead_space(self.root, self.index, self.records, self.tables)

    def pays(self, version: Version, forget_before: datetime) -> bool:
        """Return whether to write this version again without what is dead in it.

        Nothing is reclaimed while the version itself is kept. So it is written again where it is
        about to be forgotten; else only where the dead is no less than the living, which bounds
        what is written by what will be reclaimed.
        """
        if version.written_at < forget_before and not version.tags:
            return bool(self.dead)
        heads = {r.verbatim_digest: r.verbatim for r in self.records.values()}
        living = sum(tensor.nbytes for head in heads.values() for tensor in head.values())
        living += sum((table.rows - table.dead) * table.row_bytes for table in self.tables)
        return bool(self.dead) and self.dead.nbytes >= living


def _compact(
    repository: StoreRepository, forget_before: datetime, progress: Progress | None
) -> tuple[str | None, DeadSpace]:
    """Write a version without what is dead, if that pays; return its id and what was left out."""

    def write(root: zarr.Group, tip: str) -> DeadSpace:
        state = _State(repository, tip)
        with backend(f"{repository.address}: cannot read the history"):
            [version] = repository.history(tip, limit=1)
        if not state.pays(version, forget_before):
            return _NOTHING
        _write_living(root, state, progress)
        return state.dead

    with backend(f"{repository.address}: cannot compact"):
        version, dropped = repository.transact(write, "gc: without what no adapter uses")
    return (version if dropped else None), dropped


def _write_living(root: zarr.Group, state: _State, progress: Progress | None) -> None:
    """Rewrite what has something dead in it; the rest stays as it is."""
    segments: dict[str, list[int]] = {}
    moved: dict[str, dict[int, int]] = {}
    for done, table in enumerate(state.tables, start=1):
        segments[table.path] = list(table.segments)
        if table.dead:
            with backend(f"{table.label} cannot be rewritten"):
                segments[table.path], moved[table.path] = _rewrite(root, table, state)
        if progress is not None:
            progress(done, len(state.tables))
    for path in unused_verbatim(root, state.records):
        del root[path]
    layers: dict[str, Layer] = {}
    for record in state.records.values():
        layers.update(record.modules.layers())
    for module in state.index.layers.keys() - layers.keys():
        del root[f"modules/{node_name(module)}"]
    places, records = _write_records(root, state.index, state.records, moved)
    write_index(
        root,
        state.index.model_copy(
            update={
                "adapters": places,
                "layers": dict(sorted(layers.items())),
                "records": records,
                "tables": {path: kept for path, kept in sorted(segments.items()) if kept},
            }
        ),
    )


def _rewrite(root: zarr.Group, table: Table, state: _State) -> tuple[list[int], dict[int, int]]:
    """Write a table's living rows from the first segment on that has a dead one.

    Returns:
        The table's segments, and the new number of every row that was written, by its old one.
    """
    kept: list[int] = []
    first = 0
    for length in table.segments:
        if not all(row in table.owners for row in range(first, first + length)):
            break
        kept.append(length)
        first += length
    start = first
    for length in table.segments[len(kept) :]:
        del root[f"{table.path}.{start}"]
        start += length
    living = [row for row in sorted(table.owners) if row >= first]
    if living:
        rows = _living_rows(state.root, table, living, state.records)
        path = f"{table.path}.{first}"
        write_rows(root, path, len(living), table.shape, table.dtype, rows)
        kept.append(len(living))
    return kept, {old: new for new, old in enumerate(living, start=first)}


def _living_rows(
    root: zarr.Group, table: Table, living: Sequence[int], records: Mapping[str, StoredAdapter]
) -> Iterator[Bits]:
    """Give these rows in order, a chunk of them in memory; damage must not become permanent."""
    wanted = set(living)
    for chunk in table.chunks():
        numbers = [row for row in chunk if row in wanted]
        if not numbers:
            continue
        for rows, block in read_rows(
            root, table.path, table.segments, table.shape, table.dtype, numbers
        ):
            for row, bits in zip(rows, block, strict=True):
                name = table.owners[row]
                if crc32(bits) != records[name].modules[table.module].factor(table.factor).crc32:
                    raise StoreError(
                        f'{table.label}, adapter "{name}": the numbers read do not have the '
                        "CRC-32 recorded for them; nothing is rewritten: restore the store from "
                        "a copy, or remove the adapter"
                    )
                yield bits


def _write_records(
    root: zarr.Group,
    index: StoreIndex,
    records: Mapping[str, StoredAdapter],
    moved: Mapping[str, Mapping[int, int]],
) -> tuple[dict[str, RecordPlace], list[int]]:
    """Write the records of all adapters, with the rows' new numbers; return where they are."""
    first = 0
    for length in index.records:
        del root[f"{RECORDS}/{first}"]
        first += length
    texts = {name: _moved(record, moved).text() for name, record in records.items()}
    segments = append_records(root, [], list(texts.values())) if texts else []
    places = {
        name: RecordPlace(row, sha256(text), records[name].digest)
        for row, (name, text) in enumerate(texts.items())
    }
    return places, segments


def _moved(record: StoredAdapter, moved: Mapping[str, Mapping[int, int]]) -> StoredAdapter:
    """Return a record with the new numbers of its rows."""
    modules = record.modules
    rows: dict[str, tuple[int, ...]] = {}
    for factor in FACTORS:
        numbers = []
        for path in modules.path:
            stored = modules[path]
            old = stored.factor(factor).row
            numbers.append(moved.get(stored.table(path, factor), {}).get(old, old))
        rows[f"row_{factor}"] = tuple(numbers)
    return record.model_copy(update={"modules": modules.model_copy(update=rows)})


def _size(repository: StoreRepository) -> int | None:
    """Return the bytes of all files of a local store."""
    if not repository.is_local:
        return None
    with backend(f"{repository.address}: cannot be read"):
        files = [Path(folder, n) for folder, _, names in os.walk(repository.path) for n in names]
        return sum(file.stat().st_size for file in files)
