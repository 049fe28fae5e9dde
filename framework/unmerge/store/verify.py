"""Reads a whole version of a store and lists everything wrong with it, instead of stopping."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import zarr

from unmerge.adapter import AdapterDigest
from unmerge.errors import StoreError
from unmerge.store.failures import backend
from unmerge.store.layout import Bits, Factor, crc32, from_stored, verbatim_path
from unmerge.store.linking import REPAIR, damaged
from unmerge.store.records import LinkedFile, StoredAdapter, StoreIndex, sha256
from unmerge.store.repository import StoreRepository
from unmerge.store.segments import read_bytes, read_rows
from unmerge.store.tables import DeadSpace, Table, dead_space, tables_of, unused_verbatim
from unmerge.store.view import StoreView
from unmerge.store.writing import read_records

Progress = Callable[[int, int], None]

_Block = tuple[Sequence[int], Bits]

# Chunks read ahead of the one that is checked: reading and hashing keep a core each busy.
_AHEAD = 2
# Names in a message.
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class StoreProblem:
    """One thing that is wrong.

    Attributes:
        adapters: Names of the adapters it harms, sorted. None where no adapter of this version
            needs what is damaged; older versions may, and so may adding adapters.
        module: Module path of a damaged factor, else `None`.
        factor: Which factor it is, else `None`.
        message: What is wrong, in one line.
    """

    adapters: tuple[str, ...]
    module: str | None
    factor: Factor | None
    message: str


@dataclass(frozen=True, slots=True)
class StoreReport:
    """What `AdapterStore.verify` found.

    Attributes:
        address: The store.
        version: Id of the version that was read.
        problems: Everything wrong, in the order it was met.
        adapters: Number of adapters that came out right: record, every tensor, digest.
        nbytes: Bytes of tensors that were read, uncompressed.
        dead: What the version holds and none of its adapters uses; no problem in itself, and
            `AdapterStore.gc` can reclaim it. `None` where damage hides it.
    """

    address: str
    version: str
    problems: tuple[StoreProblem, ...]
    adapters: int
    nbytes: int
    dead: DeadSpace | None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(
    repository: StoreRepository, version: str, *, progress: Progress | None = None
) -> StoreReport:
    """Read a version, all of it, and check it; see `AdapterStore.verify`."""
    findings = _Findings()
    with findings.noting("the version"):
        # What the repository at hand remembers says nothing about the disk.
        fresh = repository.reopened()
        _verify(fresh, StoreView(fresh, version), findings, progress)
    return StoreReport(
        address=repository.address,
        version=version,
        problems=tuple(findings.problems),
        adapters=len(findings.adapters - findings.harmed),
        nbytes=findings.nbytes,
        dead=findings.dead,
    )


class _Findings:
    """What has been found so far.

    Attributes:
        problems: As in the report, and so are `nbytes` and `dead`.
        adapters: Names of all adapters.
        harmed: Names of those that have a problem.
    """

    def __init__(self) -> None:
        self.problems: list[StoreProblem] = []
        self.adapters: set[str] = set()
        self.harmed: set[str] = set()
        self.nbytes = 0
        self.dead: DeadSpace | None = None

    def add(self, message: str, names: Iterable[str] = (), table: Table | None = None) -> None:
        """Note a problem of these adapters."""
        harmed = tuple(sorted(set(names)))
        self.harmed.update(harmed)
        module, factor = (None, None) if table is None else (table.module, table.factor)
        self.problems.append(StoreProblem(harmed, module, factor, message))

    @contextmanager
    def noting(
        self, what: str, names: Iterable[str] = (), table: Table | None = None
    ) -> Iterator[None]:
        """Make a problem of these adapters out of whatever fails inside, and go on behind it."""
        try:
            with backend(f"{what} cannot be read"):
                yield
        except StoreError as error:
            self.add(str(error), names, table)


def _verify(
    repository: StoreRepository, view: StoreView, findings: _Findings, progress: Progress | None
) -> None:
    root, index = repository.read(view.version), view.index
    findings.adapters = set(index.adapters)
    records = _check_records(view, root, findings)
    tables = tables_of(index, records)
    files = _linked_files(records)
    chunks = [(table, rows) for table in tables for rows in table.chunks()]
    total = len(files) + len(chunks) + len(records)
    steps = itertools.count(1)
    sound: set[Path] = set()
    for (file, facts), names in files.items():
        if problem := damaged(file, facts):
            findings.add(f"{file}, to which {_some(names)} is linked, {problem}; {REPAIR}", names)
        else:
            sound.add(Path(file).parent)
        if progress is not None:
            progress(next(steps), total)
    linked_root = repository.read_linked(view.version, sound) if sound else root
    unreadable = {name for name in records if records[name].files and name in findings.harmed}

    def read(table: Table, rows: range) -> list[_Block]:
        if not table.linked:
            return _rows(root, table, rows)
        # Of a file that is another no reference has more to tell, and nobody's may lead nowhere.
        owned = [row for row in rows if row in table.owners]
        return _rows(linked_root, table, [r for r in owned if table.owners[r] not in unreadable])

    digests = {name: AdapterDigest() for name in records}
    module = None
    # Module by module, so that each chunk is read once, for all adapters that have a row in it.
    for table, rows, reading in _ahead(read, chunks):
        if table.module != module:
            module = table.module
            for name, record in records.items():
                if (stored := record.modules.get(module)) is not None:
                    digests[name].module(module, stored.scaling, stored.kind)
        _check_rows(table, rows, reading, records, digests, findings)
        if progress is not None:
            progress(next(steps), total)
    for table in tables:
        for row, name in table.owners.items():
            if row >= table.rows:
                findings.add(f'{table.label}: no row {row} of adapter "{name}"', (name,), table)
    for name, record in records.items():
        _check_adapter(view, record, digests[name], findings)
        if progress is not None:
            progress(next(steps), total)
    for path in unused_verbatim(root, records):
        with findings.noting(path):
            digest = sha256(read_bytes(root, path).tobytes())
            if verbatim_path(digest) != path:
                raise StoreError(f"{path}: the bytes have another sha256 than it says")
    if len(records) == len(index.adapters):
        with findings.noting("what no adapter uses"):
            findings.dead = dead_space(root, index, records, tables)


def _check_records(
    view: StoreView, root: zarr.Group, findings: _Findings
) -> dict[str, StoredAdapter]:
    """Return the records that are sound, by adapter name, sorted."""
    records = {}
    for name in view.names:
        with findings.noting(f'adapter "{name}": the record', (name,)):
            record = view.record(name)
            found = (record.name, record.digest, *_strangers(record, view.index))
            expected = (name, view.index.adapters[name].digest)
            if found != expected:
                raise StoreError(
                    f'adapter "{name}": the record says {found}, the index {expected}; '
                    "written by a faulty release of unmerge?"
                )
            records[name] = record
    first = 0
    live = {place.row for place in view.index.adapters.values()}
    for length in view.index.records:
        if live.isdisjoint(range(first, first + length)):
            with findings.noting(f"records/{first}, which no adapter uses,"):
                read_records(root, first, length)
        first += length
    return records


def _strangers(record: StoredAdapter, index: StoreIndex) -> list[str]:
    """Return the module paths that a record has and the index knows otherwise or not at all."""
    layers = record.modules.layers().items()
    return [path for path, layer in layers if index.layers.get(path) != layer]


def _linked_files(
    records: Mapping[str, StoredAdapter],
) -> dict[tuple[str, LinkedFile], list[str]]:
    """Return what each linked file should be, with the names of the adapters that say so."""
    files: dict[tuple[str, LinkedFile], list[str]] = {}
    for name, record in records.items():
        for entry in record.files.items():
            files.setdefault(entry, []).append(name)
    return dict(sorted(files.items(), key=lambda item: item[0][0]))


def _check_rows(
    table: Table,
    rows: range,
    reading: Future[list[_Block]],
    records: Mapping[str, StoredAdapter],
    digests: Mapping[str, AdapterDigest],
    findings: _Findings,
) -> None:
    """Check the rows of one chunk, and pass those of adapters on to the digests."""
    names = [table.owners[row] for row in rows if row in table.owners]
    where = f"{table.label}, rows {rows.start} to {rows.stop - 1}, of {_some(names)}"
    with findings.noting(where, names, table):
        for numbers, block in reading.result():
            findings.nbytes += block.nbytes
            for row, bits in zip(numbers, block, strict=True):
                name = table.owners.get(row)
                if name is None:
                    continue
                stored = records[name].modules[table.module].factor(table.factor)
                if crc32(bits) != stored.crc32:
                    message = (
                        f'{table.label}, row {row}, of "{name}": the numbers do not have the '
                        "CRC-32 recorded for them"
                    )
                    findings.add(message, (name,), table)
                elif name not in findings.harmed:
                    digests[name].tensor(table.factor, from_stored(bits, table.dtype))


def _check_adapter(
    view: StoreView, record: StoredAdapter, digest: AdapterDigest, findings: _Findings
) -> None:
    """Check an adapter's verbatim tensors, and then its digest, if nothing is known against it."""
    name = record.name
    with findings.noting(f'adapter "{name}": verbatim tensors', (name,)):
        for key, tensor in view.read_verbatim(name).items():
            findings.nbytes += tensor.nbytes
            digest.verbatim(key, tensor)
    if name not in findings.harmed and str(digest) != record.digest:
        message = f'adapter "{name}" has digest {digest}, expected {record.digest}'
        findings.add(message, (name,))


def _rows(root: zarr.Group, table: Table, rows: Sequence[int]) -> list[_Block]:
    return list(read_rows(root, table.path, table.segments, table.shape, table.dtype, rows))


def _ahead(
    read: Callable[[Table, range], list[_Block]], chunks: Iterable[tuple[Table, range]]
) -> Iterator[tuple[Table, range, Future[list[_Block]]]]:
    """Give the rows of every chunk, in order; the next few are read meanwhile."""
    waiting: deque[tuple[Table, range, Future[list[_Block]]]] = deque()
    with ThreadPoolExecutor(_AHEAD) as pool:
        try:
            for table, rows in chunks:
                waiting.append((table, rows, pool.submit(read, table, rows)))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(cancel_futures=True)


def _some(names: Sequence[str]) -> str:
    """Return names for a message, not all of them where they are many."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(f'"{name}"' for name in names[:_SHOWN]) or "no adapter") + more
