"""What the store writes about itself, as validated data, and the values it shows to callers.

Icechunk does not checksum its own metadata: a flipped bit in a manifest can exchange two chunks,
one in a snapshot can change an attribute, both without an error. So the root holds an index with
the sha256 of every adapter's record and of itself, and a record holds a CRC-32 of every tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from unmerge.arrays import DTYPES, VERBATIM_DTYPES, dtype_name
from unmerge.errors import StoreError
from unmerge.store.layout import Factor

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


class Document(BaseModel):
    """A JSON document kept as text, so that its sha256 is that of exactly these bytes."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def text(self) -> str:
        """Return the document as JSON text."""
        return self.model_dump_json()


# Plain slotted classes: there are hundreds per adapter, and pydantic parses them five times faster.
@dataclass(frozen=True, slots=True)
class FactorRecord:
    """Where one factor lies: its dtype (which selects the array), row, and CRC-32."""

    dtype: Annotated[str, AfterValidator(_check_factor_dtype)]
    row: Natural
    crc32: Natural


@dataclass(frozen=True, slots=True)
class ModuleRecord:
    """One module of an adapter. `scaling` is `float.hex()`: exact whatever parses the JSON."""

    d_out: Positive
    d_in: Positive
    rank: Positive
    scaling: Annotated[str, AfterValidator(_check_hex_float)]
    A: FactorRecord
    B: FactorRecord

    def factor(self, factor: Factor) -> FactorRecord:
        """Return the record of factor `factor`."""
        return self.A if factor == "A" else self.B

    def factor_shape(self, factor: Factor) -> tuple[int, int]:
        """Return the shape of factor `factor`."""
        return (self.rank, self.d_in) if factor == "A" else (self.d_out, self.rank)


@dataclass(frozen=True, slots=True)
class VerbatimRecord:
    """One verbatim tensor: dtype, shape, CRC-32."""

    dtype: Annotated[str, AfterValidator(_check_verbatim_dtype)]
    shape: tuple[Natural, ...]
    crc32: Natural


class StoredAdapter(Document):
    """Everything about one adapter but the numbers in its tensors."""

    name: str
    format: str
    source: str
    base_model: str | None
    revision: str | None
    digest: str
    added: str
    config: str
    modules: dict[str, ModuleRecord]
    verbatim: dict[str, VerbatimRecord]

    def info(self) -> AdapterInfo:
        """Return the record as callers see it."""
        modules: dict[str, ModuleInfo] = {}
        factors: list[tuple[int, str]] = []
        for path, module in sorted(self.modules.items()):
            modules[path] = ModuleInfo(
                rank=module.rank,
                d_out=module.d_out,
                d_in=module.d_in,
                dtype=_widest(module.A.dtype, module.B.dtype),
                scaling=float.fromhex(module.scaling),
            )
            factors.append((module.rank * module.d_in, module.A.dtype))
            factors.append((module.d_out * module.rank, module.B.dtype))
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
            modules=modules,
            verbatim=verbatim,
            elements=sum(n for n, _ in factors + others),
            nbytes=_nbytes(factors + others),
            verbatim_nbytes=_nbytes(others),
        )


class StoreIndex(Document):
    """The root's document: base model, and the sha256 of each adapter's record by name."""

    base_model: str | None
    revision: str | None
    adapters: dict[str, str]


def sha256(text: str) -> str:
    """Return `sha256:…` of the text's UTF-8 bytes."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def parse(kind: type[DocumentT], text: object, digest: object, *, where: str) -> DocumentT:
    """Return the document that `text` holds.

    Args:
        kind: Its model.
        text: What the store has as its text.
        digest: The sha256 it must have.
        where: What is being read, for the message.

    Raises:
        StoreError: It is no text, has another sha256, or is no such document.
    """
    if not isinstance(text, str) or sha256(text) != digest:
        raise StoreError(
            f"{where}: the stored text does not have the sha256 recorded for it; "
            "the store is damaged: restore it from a copy"
        )
    try:
        return kind.model_validate_json(text)
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
    """

    rank: int
    d_out: int
    d_in: int
    dtype: str
    scaling: float


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
        modules: By module path, sorted.
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
    modules: Mapping[str, ModuleInfo]
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
