"""The blob of one adapter, assembled the same way for a new bundle and for an appended one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from unmerge_bundle.arrays import DTYPES, Array, FloatDtype, all_finite
from unmerge_bundle.blob import BlobWriter, Spool, check_dtype
from unmerge_bundle.errors import InvalidInputError, NonFiniteError, TensorMismatchError
from unmerge_bundle.fields import Digest, Kind, ModulePath, Name, Positive, check_sorted
from unmerge_bundle.jsontext import canonical_bytes
from unmerge_bundle.kinds import LINEAR
from unmerge_bundle.model import (
    BLOB_MEDIA_TYPE,
    AdapterMetadata,
    Descriptor,
    ModuleErrors,
    RestoredModuleRecord,
)
from unmerge_bundle.modules import Layouts, check_tensor
from unmerge_bundle.names import check_key

__all__ = [
    "AdapterBlob",
    "AdapterRecord",
    "InputModel",
    "RecordedModule",
    "check_finite",
    "check_stored",
]


class InputModel(BaseModel):
    """What callers hand in: immutable, no field too many, NaN refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RecordedModule(InputModel):
    """One module of an adapter's original: path, rank, scaling and dtype of its factors, kind."""

    path: ModulePath
    rank: Positive
    source_scaling: float
    dtype: FloatDtype
    kind: Kind = LINEAR


class AdapterRecord(InputModel):
    """An adapter that will be restorable, as its source describes it.

    Attributes:
        name: Its name; one of the sources.
        format: Format it was read from, "peft".
        config: Text of its configuration file, byte for byte, or "".
        base_model: Id of its base model, where the source names one.
        revision: Revision of its base model, likewise.
        digest: Digest of the original; the one its source has.
        modules: Its modules, distinct; every one must be added with an encoding that restores it.
    """

    name: Name
    format: str
    config: str
    base_model: str | None = None
    revision: str | None = None
    digest: Digest
    modules: tuple[RecordedModule, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> AdapterRecord:
        check_sorted("modules", sorted(module.path for module in self.modules))
        return self


class AdapterBlob:
    """What has arrived for one adapter so far; tensor bytes are in a spool.

    Attributes:
        record: What its source says of it, once announced.
    """

    def __init__(self, spool: Spool) -> None:
        self._blob = BlobWriter(spool)
        self._verbatim: list[str] = []
        self._modules: dict[str, tuple[float, int | None, ModuleErrors]] = {}
        self.record: AdapterRecord | None = None

    @property
    def paths(self) -> frozenset[str]:
        """Paths of the modules added."""
        return frozenset(self._modules)

    def announce(self, record: AdapterRecord, verbatim: Mapping[str, Array]) -> None:
        """Take the adapter's record and the tensors it keeps as they are.

        Raises:
            InvalidInputError: It was announced before, a key is not allowed, or a tensor has a
                dtype the format has not.
            NonFiniteError: A verbatim tensor holds NaN or an infinity.
        """
        where = f"adapter {record.name!r}"
        if self.record is not None:
            raise InvalidInputError("announced twice", path=where)
        for key in sorted(verbatim):
            try:
                check_key(key)
            except ValueError as problem:
                raise InvalidInputError(str(problem), path=where) from None
            place = f"{where}, verbatim tensor {key!r}"
            check_dtype(verbatim[key].dtype, where=place)
            check_finite(verbatim[key], place)
        for key in sorted(verbatim):
            self._blob.add(f"verbatim/{key}", verbatim[key])
        self._verbatim = sorted(verbatim)
        self.record = record

    def add_module(
        self,
        path: str,
        tensors: Mapping[str, Array],
        *,
        scaling: float,
        restored_rank: int | None,
        errors: ModuleErrors,
    ) -> None:
        """Take the adapter's own tensors of one module, already checked."""
        for name, tensor in tensors.items():
            self._blob.add(f"modules/{path}/{name}", tensor)
        self._modules[path] = (scaling, restored_rank, errors)

    def finish(self, record: AdapterRecord, folder: Path) -> Descriptor:
        """Write the blob into `folder`; `record` has exactly the modules added."""
        sources = {module.path: module for module in record.modules}
        added = sorted(self._modules.items())
        metadata = AdapterMetadata(
            name=record.name,
            format=record.format,
            config=record.config,
            base_model=record.base_model,
            revision=record.revision,
            digest=record.digest,
            modules=tuple(
                RestoredModuleRecord(
                    path=path,
                    rank=sources[path].rank,
                    restored_rank=restored_rank,
                    scaling=scaling,
                    source_scaling=sources[path].source_scaling,
                    dtype=sources[path].dtype,
                )
                for path, (scaling, restored_rank, _) in added
            ),
            verbatim=tuple(self._verbatim),
        )
        for kind, values in (
            ("factors", [errors.factors for _, (_, _, errors) in added]),
            ("delta", [errors.delta for _, (_, _, errors) in added]),
        ):
            numbers = [math.nan if value is None else value for value in values]
            self._blob.add(f"errors/{kind}", np.array(numbers, dtype=DTYPES["F64"]))
        text = canonical_bytes(metadata.model_dump(mode="json")).decode("utf-8")
        blob = self._blob.finish(folder, {"unmerge": text})
        return Descriptor(digest=blob.digest, size=blob.size, media_type=BLOB_MEDIA_TYPE)


def check_stored(
    where: str, tensors: Mapping[str, Array], layouts: Layouts, store_dtype: FloatDtype
) -> None:
    """Check the tensors that an encoding gives for one module, or for one adapter in it.

    Raises:
        TensorMismatchError: One is missing or too many, or is not what it must be.
        NonFiniteError: One holds NaN or an infinity.
    """
    if tensors.keys() != layouts.keys():
        raise TensorMismatchError(
            f"the encoding gives tensors {sorted(tensors)}, expected {sorted(layouts)}",
            path=where,
        )
    for name, layout in layouts.items():
        check_finite(tensors[name], f"{where}, tensor {name}")
        check_tensor(name, tensors[name], layout, store_dtype, where=where)


def check_finite(array: Array, where: str) -> None:
    """Refuse NaN and infinities.

    Raises:
        NonFiniteError: There are some.
    """
    if not all_finite(array):
        raise NonFiniteError("holds NaN or an infinity; nothing is written", path=where)
