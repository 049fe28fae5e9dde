"""Who owns which row: all tables of one version at once, for verifying and compacting it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import zarr

from unmerge.errors import StoreError
from unmerge.store.layout import FACTORS, Factor, node_name, storage_dtype, verbatim_path
from unmerge.store.records import StoredAdapter, StoreIndex
from unmerge.store.segments import chunks_of_rows

_TABLE = re.compile(
    r"modules/(?P<module>[^/]+)/(?P<factor>[AB])-r(?P<rank>\d+)-(?P<dtype>\w+)(?P<linked>-linked)?"
)


@dataclass(frozen=True, slots=True)
class Table:
    """The factors of one module that have one rank and one dtype.

    Attributes:
        path: What the paths of its arrays begin with.
        module: Module path.
        factor: Which factor.
        rank: Their rank.
        dtype: Name of their dtype.
        linked: Whether the rows are references to bytes in files.
        shape: Shape of a row.
        segments: Rows of every segment.
        owners: Name of the adapter whose each row is; rows that are nobody's are dead.
    """

    path: str
    module: str
    factor: Factor
    rank: int
    dtype: str
    linked: bool
    shape: tuple[int, int]
    segments: Sequence[int]
    owners: Mapping[int, str]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(self.segments)

    @property
    def dead(self) -> int:
        """Number of dead rows.

        A reference takes no space to speak of, so those of a linked table only count together,
        once nobody is linked in it any more.
        """
        if self.linked and self.owners:
            return 0
        return sum(row not in self.owners for row in range(self.rows))

    @property
    def row_bytes(self) -> int:
        """Bytes that a row has in the store, uncompressed."""
        if self.linked:
            return 0
        return math.prod(self.shape) * np.dtype(storage_dtype(self.dtype)).itemsize

    @property
    def label(self) -> str:
        """The table, for messages."""
        return f"{self.module}: factor {self.factor} (rank {self.rank}, {self.dtype})"

    def chunks(self) -> Iterator[range]:
        """Give the numbers of all rows, those that share a chunk at a time.

        In a linked table each row is a chunk; as many of them as would share one elsewhere.
        """
        return chunks_of_rows(self.segments, self.shape, self.dtype)


def tables_of(index: StoreIndex, records: Mapping[str, StoredAdapter]) -> list[Table]:
    """Return all tables of a version, sorted by module, those of A before those of B.

    Args:
        index: The version's index.
        records: Records of its adapters by name. Rows of one that is left out count as dead.

    Raises:
        StoreError: The index names a table that cannot be.
    """
    owners: dict[str, dict[int, str]] = {path: {} for path in index.tables}
    for name, record in records.items():
        for module in record.modules.path:
            stored = record.modules[module]
            for factor in FACTORS:
                rows = owners.setdefault(stored.table(module, factor), {})
                rows[stored.factor(factor).row] = name
    modules = {node_name(module): module for module in index.layers}
    tables = []
    for path, rows in owners.items():
        match = _TABLE.fullmatch(path)
        if match is None or match["module"] not in modules:
            raise StoreError(f"the index names {path}, expected tables of modules it knows")
        module = modules[match["module"]]
        d_out, d_in, _ = index.layers[module]
        factor, rank = cast(Factor, match["factor"]), int(match["rank"])
        tables.append(
            Table(
                path=path,
                module=module,
                factor=factor,
                rank=rank,
                dtype=match["dtype"],
                linked=match["linked"] is not None,
                shape=(rank, d_in) if factor == "A" else (d_out, rank),
                segments=index.tables.get(path, []),
                owners=rows,
            )
        )
    return sorted(tables, key=lambda t: (t.module, t.factor, t.rank, t.dtype, t.linked))


def unused_verbatim(root: zarr.Group, records: Mapping[str, StoredAdapter]) -> list[str]:
    """Return the paths of verbatim tensors that belong to none of these adapters, sorted."""
    node = root.get("verbatim")
    found = {f"verbatim/{key}" for key in node} if isinstance(node, zarr.Group) else set()
    used = {verbatim_path(r.verbatim_digest) for r in records.values() if r.verbatim_digest}
    return sorted(found - used)


@dataclass(frozen=True, slots=True)
class DeadSpace:
    """What a version holds that none of its adapters uses: what replaced and removed ones left.

    Attributes:
        rows: Number of factors.
        records: Number of adapters' records.
        verbatim: Number of sets of verbatim tensors.
        nbytes: Bytes of those factors and verbatim tensors, uncompressed.
    """

    rows: int
    records: int
    verbatim: int
    nbytes: int

    def __bool__(self) -> bool:
        """Return whether there is anything."""
        return bool(self.rows or self.records or self.verbatim)


def dead_space(
    root: zarr.Group,
    index: StoreIndex,
    records: Mapping[str, StoredAdapter],
    tables: Sequence[Table],
) -> DeadSpace:
    """Return what of a version is dead.

    Args:
        root: Its root group.
        index: Its index.
        records: The records of all its adapters by name.
        tables: Its tables.
    """
    verbatim = unused_verbatim(root, records)
    # What Zarr raises for a damaged array is the caller's to report.
    sizes = [cast("zarr.Array[Any]", root[path]).nbytes for path in verbatim]
    return DeadSpace(
        rows=sum(table.dead for table in tables),
        records=sum(index.records) - len(index.adapters),
        verbatim=len(verbatim),
        nbytes=sum(table.dead * table.row_bytes for table in tables) + sum(sizes),
    )
