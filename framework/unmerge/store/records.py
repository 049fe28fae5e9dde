"""What the store writes about itself, as validated data, and the values it shows to callers.

Icechunk does not checksum its own metadata: a flipped bit in a manifest can exchange two chunks,
one in a snapshot can change an attribute, both without an error. So the root has the sha256 of the
index, the index that of every adapter's record, and a record has a CRC-32 of every tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import PurePath
from typing import Annotated, NamedTuple, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from unmerge.arrays import DTYPES, VERBATIM_DTYPES, dtype_name
from unmerge.errors import StoreError
from unmerge.store.layout import Factor, rows_path
from unmerge_bundle.kinds import check_kind

DocumentT = TypeVar("DocumentT", bound="Document")


def _check_hex_float(text: str) -> str:
    if not math.isfinite(float.fromhex(text)):
        raise ValueError("not a finite number")
    return text


def _check_factor_dtype(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"no dtype of factors: {name}")
    return name


def _check_verbatim_dtype(name: str) -> str:
    if name not in VERBATIM_DTYPES:
        raise ValueError(f"no dtype of tensors: {name}")
    return name


Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
FactorDtype = Annotated[str, AfterValidator(_check_factor_dtype)]
VerbatimDtype = Annotated[str, AfterValidator(_check_verbatim_dtype)]


Layer = tuple[Positive, Positive, Annotated[str, AfterValidator(check_kind)]]
"""What the base model has at a module path: `(d_out, d_in, kind)`."""


class Document(BaseModel):
    """A JSON document kept as text, so that its sha256 is that of exactly these bytes."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def text(self) -> str:
        """Return the document as JSON text."""
        return self.model_dump_json()


# Tuples: thousands are made for every module that is read, and a frozen dataclass takes five times
# as long to make.
class FactorRecord(NamedTuple):
    """Where one factor lies: its dtype (which selects the table), row, and CRC-32."""

    dtype: str
    row: int
    crc32: int


class ModuleRecord(NamedTuple):
    """One module of an adapter."""

    d_out: int
    d_in: int
    rank: int
    kind: str
    scaling: float
    A: FactorRecord
    B: FactorRecord
    linked: bool

    def factor(self, factor: Factor) -> FactorRecord:
        """Return the record of factor `factor`."""
        return self.A if factor == "A" else self.B

    def factor_shape(self, factor: Factor) -> tuple[int, int]:
        """Return the shape of factor `factor`."""
        return (self.rank, self.d_in) if factor == "A" else (self.d_out, self.rank)

    def table(self, path: str, factor: Factor) -> str:
        """Return the path of the table that factor `factor` of the module at `path` is in."""
        dtype = self.factor(factor).dtype
        return rows_path(path, factor, self.rank, dtype, linked=self.linked)


class ModuleTable(BaseModel):
    """The modules of an adapter as columns, one entry per module in each, sorted by path.

    Columns are several times smaller and faster to parse than one object per module.
    `scaling` is `float.hex()`: exact whatever parses the JSON. `linked` is said of all modules at
    once: their factors are references, see `StoredAdapter.files`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    path: tuple[str, ...]
    d_out: tuple[Positive, ...]
    d_in: tuple[Positive, ...]
    rank: tuple[Positive, ...]
    kind: tuple[Annotated[str, AfterValidator(check_kind)], ...]
    scaling: tuple[Annotated[str, AfterValidator(_check_hex_float)], ...]
    dtype_A: tuple[FactorDtype, ...]
    dtype_B: tuple[FactorDtype, ...]
    row_A: tuple[Natural, ...]
    row_B: tuple[Natural, ...]
    crc32_A: tuple[Natural, ...]
    crc32_B: tuple[Natural, ...]
    linked: bool = False

    @model_validator(mode="after")
    def _aligned(self) -> ModuleTable:
        columns = type(self).model_fields.keys() - {"linked"}
        lengths = {len(getattr(self, column)) for column in columns}
        if lengths != {len(set(self.path))}:
            raise ValueError("columns of different lengths, or a module path given twice")
        return self

    def __contains__(self, path: object) -> bool:
        """Return whether there is a module at `path`."""
        return path in self.places

    def layers(self) -> dict[str, Layer]:
        """Return `(d_out, d_in, kind)` by path."""
        return dict(zip(self.path, zip(self.d_out, self.d_in, self.kind, strict=True), strict=True))

    @cached_property
    def places(self) -> dict[str, int]:
        """Index of every module path in the columns."""
        return {path: index for index, path in enumerate(self.path)}

    def __getitem__(self, path: str) -> ModuleRecord:
        """Return the record of the module at `path`."""
        i = self.places[path]
        return ModuleRecord(
            d_out=self.d_out[i],
            d_in=self.d_in[i],
            rank=self.rank[i],
            kind=self.kind[i],
            scaling=float.fromhex(self.scaling[i]),
            A=FactorRecord(self.dtype_A[i], self.row_A[i], self.crc32_A[i]),
            B=FactorRecord(self.dtype_B[i], self.row_B[i], self.crc32_B[i]),
            linked=self.linked,
        )

    def get(self, path: str) -> ModuleRecord | None:
        """Return the record of the module at `path`, `None` if there is none."""
        if path not in self:
            return None
        return self[path]

    @classmethod
    def of(cls, modules: Mapping[str, ModuleRecord], *, linked: bool) -> ModuleTable:
        """Return the table of `modules`, by path, which are all linked or none of them."""
        paths = sorted(modules)
        records = [modules[path] for path in paths]
        return cls(
            path=tuple(paths),
            d_out=tuple(record.d_out for record in records),
            d_in=tuple(record.d_in for record in records),
            rank=tuple(record.rank for record in records),
            kind=tuple(record.kind for record in records),
            scaling=tuple(record.scaling.hex() for record in records),
            dtype_A=tuple(record.A.dtype for record in records),
            dtype_B=tuple(record.B.dtype for record in records),
            row_A=tuple(record.A.row for record in records),
            row_B=tuple(record.B.row for record in records),
            crc32_A=tuple(record.A.crc32 for record in records),
            crc32_B=tuple(record.B.crc32 for record in records),
            linked=linked,
        )


class VerbatimRecord(BaseModel):
    """One verbatim tensor: dtype, shape, CRC-32, and where its bytes begin."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    dtype: VerbatimDtype
    shape: tuple[Natural, ...]
    crc32: Natural
    start: Natural

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * VERBATIM_DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class LinkedFile:
    """What a file was when an adapter was linked to it.

    Attributes:
        size: Its bytes.
        sha256: `sha256:…` of them.
        modified: When it was last written to, in seconds since 1970, rounded up.
    """

    size: Natural
    sha256: str
    modified: Natural


class StoredAdapter(Document):
    """Everything about one adapter but the numbers in its tensors.

    Attributes:
        files: The files that hold the factors of a linked adapter, by absolute path.
        verbatim_digest: Digest of the bytes of all verbatim tensors, which says where they are;
            empty where there are none.
    """

    name: str
    format: str
    source: str
    base_model: str | None
    revision: str | None
    digest: str
    added: str
    config: str
    note: str
    metadata: dict[str, str]
    modules: ModuleTable
    files: dict[str, LinkedFile] = {}
    verbatim: dict[str, VerbatimRecord]
    verbatim_digest: str

    @model_validator(mode="after")
    def _linked_to_files(self) -> StoredAdapter:
        if self.modules.linked != bool(self.files):
            raise ValueError("linked without files, or files without being linked")
        for file in map(PurePath, self.files):
            # Access is given to the directories of these, so what they are must be plain to see.
            if not file.is_absolute() or ".." in file.parts:
                raise ValueError(f"linked to {file}, expected an absolute path without ..")
        return self

    def info(self) -> AdapterInfo:
        """Return the record as callers see it."""
        table = self.modules
        modules: dict[str, ModuleInfo] = {}
        sizes: list[tuple[int, str]] = []
        for i, path in enumerate(table.path):
            modules[path] = ModuleInfo(
                rank=table.rank[i],
                d_out=table.d_out[i],
                d_in=table.d_in[i],
                dtype=_widest(table.dtype_A[i], table.dtype_B[i]),
                scaling=float.fromhex(table.scaling[i]),
                kind=table.kind[i],
            )
            sizes.append((table.rank[i] * table.d_in[i], table.dtype_A[i]))
            sizes.append((table.d_out[i] * table.rank[i], table.dtype_B[i]))
        verbatim = {key: (v.dtype, v.shape) for key, v in sorted(self.verbatim.items())}
        others = [(math.prod(shape), dtype) for dtype, shape in verbatim.values()]
        return AdapterInfo(
            name=self.name,
            format=self.format,
            source=self.source,
            base_model=self.base_model,
            revision=self.revision,
            digest=self.digest,
            added=self.added,
            note=self.note,
            metadata=dict(sorted(self.metadata.items())),
            modules=modules,
            files=dict(sorted(self.files.items())),
            verbatim=verbatim,
            elements=sum(n for n, _ in sizes + others),
            nbytes=_nbytes(sizes + others),
            verbatim_nbytes=_nbytes(others),
        )


@dataclass(frozen=True, slots=True)
class RecordPlace:
    """Where an adapter's record is: its row among the records, its sha256; the adapter's digest."""

    row: Natural
    sha256: str
    digest: str


class StoreIndex(Document):
    """The document from which all else is found.

    Attributes:
        base_model: Id of the base model, if known.
        revision: Its revision, if known.
        adapters: Where each adapter's record is, by name.
        layers: What the base model has at each module path that any adapter ever had; so that
            adding an adapter needs no other adapter's record.
        records: Segments of the records.
        tables: Segments of the factors' rows, by the path of their table.
    """

    base_model: str | None
    revision: str | None
    adapters: dict[str, RecordPlace]
    layers: dict[str, Layer]
    records: list[Positive]
    tables: dict[str, list[Positive]]


def sha256(data: str | bytes) -> str:
    """Return `sha256:…` of the bytes, a text's in UTF-8."""
    raw = data.encode() if isinstance(data, str) else data
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


def parse(kind: type[DocumentT], data: bytes, digest: object, *, where: str) -> DocumentT:
    """Return the document that `data` holds.

    Args:
        kind: Its model.
        data: Its bytes.
        digest: The sha256 they must have.
        where: What is being read, for the message.

    Raises:
        StoreError: They have another sha256, or are no such document.
    """
    if sha256(data) != digest:
        raise StoreError(
            f"{where}: the stored text does not have the sha256 recorded for it; "
            "the store is damaged: restore it from a copy"
        )
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise StoreError(
            f"{where}: {place}: {problem['msg']}; written by an incompatible release of unmerge?"
        ) from error


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """One module of a stored adapter.

    Attributes:
        rank: Rows of A, columns of B.
        d_out: Output features.
        d_in: Input features.
        dtype: Name of the factors' dtype; where A and B differ, of the one both fit in.
        scaling: What `B @ A` is multiplied by.
        kind: The layer the module is, see `unmerge_bundle.check_kind`.
    """

    rank: int
    d_out: int
    d_in: int
    dtype: str
    scaling: float
    kind: str


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What is known of a stored adapter without reading a tensor.

    Attributes:
        name: Its name in the store.
        format: Format it was imported from.
        source: Where it was imported from, for people.
        base_model: Base model its source names, if any.
        revision: Revision of the base model its source names, if any.
        digest: `Adapter.digest()` at import.
        added: When it was committed, ISO 8601 in UTC.
        note: Free text of whoever added it.
        metadata: Keys and values of whoever added it, sorted.
        modules: By module path, sorted.
        files: The files that hold the factors, by absolute path, sorted; empty where the store
            holds them itself, as it does unless the adapter was linked.
        verbatim: Dtype name and shape of each verbatim tensor by its key, sorted.
        elements: Numbers in all its tensors.
        nbytes: Bytes of all its tensors, uncompressed.
        verbatim_nbytes: Those of the verbatim tensors alone.
    """

    name: str
    format: str
    source: str
    base_model: str | None
    revision: str | None
    digest: str
    added: str
    note: str
    metadata: Mapping[str, str]
    modules: Mapping[str, ModuleInfo]
    files: Mapping[str, LinkedFile]
    verbatim: Mapping[str, tuple[str, tuple[int, ...]]]
    elements: int
    nbytes: int
    verbatim_nbytes: int


@dataclass(frozen=True, slots=True)
class Version:
    """One commit.

    Attributes:
        id: Names the version for ever.
        parent: Id of the version it followed, `None` for a store's first.
        message: What its writer said.
        written_at: When, in UTC.
        tags: Names given to it, sorted.
    """

    id: str
    parent: str | None
    message: str
    written_at: datetime
    tags: tuple[str, ...]


def _nbytes(sizes: list[tuple[int, str]]) -> int:
    return sum(n * VERBATIM_DTYPES[dtype].itemsize for n, dtype in sizes)


def _widest(first: str, second: str) -> str:
    if first == second:
        return first
    return dtype_name(torch.promote_types(DTYPES[first], DTYPES[second]))
