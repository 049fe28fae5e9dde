"""Writes a bundle as modules arrive: bounded memory, equal bytes for equal inputs, or nothing."""

from __future__ import annotations

import importlib.metadata
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from unmerge_bundle.arrays import DTYPES, FLOAT_DTYPES, Array, FloatDtype, all_finite
from unmerge_bundle.blob import BlobWriter, Spool, Spooled, WrittenBlob, check_dtype
from unmerge_bundle.encodings import (
    AffineBasisEncoding,
    DeltaEncoding,
    Encoding,
    FactorsEncoding,
)
from unmerge_bundle.errors import InvalidInputError, NonFiniteError, TensorMismatchError
from unmerge_bundle.jsontext import canonical_bytes
from unmerge_bundle.model import (
    BLOB_MEDIA_TYPE,
    GENERATION_MEDIA_TYPE,
    MANIFEST_NAME,
    MAX_DOCUMENT_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_MESSAGE_CHARACTERS,
    AdapterEntry,
    AdapterMetadata,
    AffineBasisModule,
    BaseModelId,
    BundleSize,
    DeltaModule,
    Descriptor,
    Digest,
    FactorsModule,
    Generation,
    GenerationEntry,
    Key,
    Manifest,
    ModuleErrors,
    ModulePath,
    Name,
    Positive,
    Producer,
    RestoredModuleRecord,
    Source,
    Strategy,
    check_size,
    check_sorted,
    first_problem,
    seal,
    sha256,
)
from unmerge_bundle.names import check_key
from unmerge_bundle.publish import BUNDLE, OutputDirectory, write_file
from unmerge_bundle.reader import open_bundle

__all__ = ["AdapterRecord", "BundleWriter", "GenerationInfo", "RecordedModule", "check_message"]

_Module = FactorsModule | DeltaModule | AffineBasisModule


class _Input(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GenerationInfo(_Input):
    """What the generation document says besides what the writer learns from the tensors.

    Attributes:
        strategy: Who made the encodings.
        recipe: The whole recipe, as JSON.
        base_model: The model the adapters sit on.
        store_dtype: Dtype of every tensor of every encoding.
        libraries: Versions that the numbers depend on, by library.
        sources: The adapters that went in; sorted here.
        unmerged: Per adapter, keys of verbatim tensors a merged result could not merge.
        absent: Per adapter, the modules it lacks; for adapters that can be restored this must
            be exact, and is checked.
    """

    strategy: Strategy
    recipe: dict[str, JsonValue]
    base_model: BaseModelId = BaseModelId()
    store_dtype: FloatDtype
    libraries: dict[str, str] = Field(default_factory=dict)
    sources: tuple[Source, ...] = Field(min_length=1)
    unmerged: dict[Name, tuple[Key, ...]] = Field(default_factory=dict)
    absent: dict[Name, tuple[ModulePath, ...]] = Field(default_factory=dict)


class RecordedModule(_Input):
    """One module of an adapter's original: path, rank, scaling and dtype of its factors."""

    path: ModulePath
    rank: Positive
    source_scaling: float
    dtype: FloatDtype


class AdapterRecord(_Input):
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


class _Adapter:
    """What has arrived for one adapter so far; tensor bytes are in the spool."""

    def __init__(self, spool: Spool) -> None:
        self.blob = BlobWriter(spool)
        self.record: AdapterRecord | None = None
        self.verbatim: list[str] = []
        self.scalings: dict[str, float] = {}  # by module path
        self.errors: dict[str, ModuleErrors] = {}  # likewise


class BundleWriter:
    """Writes a new bundle; use it in a `with` statement and end with `finish`.

    Everything goes to a hidden sibling directory that `finish` renames to `path`; leaving the
    `with` block without it removes that directory and leaves `path` as it was. Memory holds one
    module and the tensors' names, whatever the number of modules; the disk needs about twice the
    bundle's size while it is assembled. Not for use from several threads at once.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        info: GenerationInfo,
        overwrite: bool = False,
        shared_blob_bytes: int = 64 << 20,
    ) -> None:
        """Check that `path` may be written; nothing is written before the `with` block.

        Args:
            path: The bundle to write.
            info: What the generation document says.
            overwrite: Replace an existing bundle (or empty directory), once the new one is whole;
                a directory that holds anything besides a bundle is never replaced.
            shared_blob_bytes: Where the next module, in ascending order of path, would take the
                tensors of a shared blob beyond this size, the next blob begins. A module's tensors
                are never divided, so a blob may be larger where one module alone is.

        Raises:
            InvalidInputError: `path` cannot be a path, or two sources have one name.
            OutputExistsError: `path` exists and may not be replaced.
        """
        self._output = OutputDirectory(Path(path), overwrite=overwrite, kind=BUNDLE)
        self._info = info
        self._sources = {source.name: source for source in info.sources}
        if len(self._sources) != len(info.sources):
            raise InvalidInputError("two sources have one name", path=str(path))
        self._shared_limit = shared_blob_bytes
        self._modules: dict[str, _Module] = {}
        self._shared: dict[str, dict[str, Spooled]] = {}  # by module path, then tensor name
        self._adapters: dict[str, _Adapter] = {}
        self._open = False

    def __enter__(self) -> BundleWriter:
        self._output.__enter__()
        try:
            self._blobs = self._output.partial / "blobs"
            self._blobs.mkdir()
            self._shared_spool = Spool(self._output.partial / "shared.spool")
            self._adapter_spool = Spool(self._output.partial / "adapters.spool")
        except BaseException:
            self._output.discard()
            raise
        self._open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open = False
        self._shared_spool.close()
        self._adapter_spool.close()
        self._output.discard()

    def add_adapter(self, record: AdapterRecord, verbatim: Mapping[str, Array]) -> None:
        """Announce an adapter that can be restored, with the tensors it keeps as they are.

        Every adapter of every restoring encoding must be announced once, before or after the
        modules.

        Args:
            record: What its source says of it.
            verbatim: Tensors that are no low-rank update, by their key in the source.

        Raises:
            InvalidInputError: The adapter is announced twice or is not the source of its name, a
                key is not allowed, or a tensor has a dtype the format has not.
            NonFiniteError: A verbatim tensor holds NaN or an infinity.
        """
        self._check_open()
        where = f"adapter {record.name!r}"
        source = self._sources.get(record.name)
        if source is None or source.digest != record.digest:
            found = "no source has that name" if source is None else f"got {source.digest}"
            raise InvalidInputError(
                f"expected among the sources with digest {record.digest}, {found}", path=where
            )
        adapter = self._adapter(record.name)
        if adapter.record is not None:
            raise InvalidInputError("announced twice", path=where)
        for key in sorted(verbatim):
            try:
                check_key(key)
            except ValueError as problem:
                raise InvalidInputError(str(problem), path=where) from None
            place = f"{where}, verbatim tensor {key!r}"
            check_dtype(verbatim[key].dtype, where=place)
            _check_finite(verbatim[key], place)
        for key in sorted(verbatim):
            adapter.blob.add(f"verbatim/{key}", verbatim[key])
        adapter.verbatim = sorted(verbatim)
        adapter.record = record

    def add_module(
        self,
        path: str,
        encoding: Encoding[Array],
        *,
        errors: Mapping[str, ModuleErrors] | None = None,
    ) -> None:
        """Add one module; its bytes go to the disk at once.

        Args:
            path: Module path. Modules may come in any order, each once; the bytes written do not
                depend on it.
            encoding: One of the format's encodings, every tensor in `store_dtype`.
            errors: Measured errors, for exactly the adapters the encoding restores; `None` where
                it restores none.

        Raises:
            InvalidInputError: The path is not allowed or was added before, the encoding is not one
                of the format's, merged and restoring modules are mixed, or errors are missing.
            TensorMismatchError: A tensor has the wrong shape or dtype.
            NonFiniteError: A tensor or a scaling is not finite.
        """
        self._check_open()
        if path in self._modules:
            raise InvalidInputError("added twice; add every module once", path=path)
        shared = encoding.shared_tensors()
        entry = _entry(path, encoding)
        first = next(iter(self._modules.values()), entry)
        if entry.restores != first.restores:
            raise InvalidInputError(
                f"{entry.encoding} cannot be mixed with {first.encoding}: a bundle "
                "either restores its adapters or holds one merged result",
                path=path,
            )
        measured = dict(errors or {})
        names = encoding.adapters
        if set(measured) != set(names) or len(set(names)) != len(names):
            raise InvalidInputError(
                f"expected distinct adapters with one measured error each, got adapters "
                f"{sorted(names)} and errors of {sorted(measured)}",
                path=path,
            )
        self._check_tensors(path, shared, entry.shared_shapes())
        own = {name: encoding.adapter_tensors(name) for name in names}
        for name, tensors in own.items():
            self._check_tensors(f"{path}, adapter {name!r}", tensors, entry.adapter_shapes())
        scalings = _scalings(path, encoding)

        self._shared[path] = {
            f"modules/{path}/{key}": self._shared_spool.append(tensor, name=key)
            for key, tensor in shared.items()
        }
        for name, tensors in own.items():
            adapter = self._adapter(name)
            for tensor_name, tensor in tensors.items():
                adapter.blob.add(f"modules/{path}/{tensor_name}", tensor)
            adapter.scalings[path] = scalings[name]
            adapter.errors[path] = measured[name]
        self._modules[path] = entry

    def finish(self, *, message: str = "", created: datetime | None = None) -> BundleSize:
        """Assemble the blobs, write the documents and let the bundle appear at its path.

        Args:
            message: What the generation is for, for people; see `check_message`.
            created: Aware time of creation, now by default; kept to the second.

        Returns:
            What was written, by what it is for.

        Raises:
            InvalidInputError: `message` or `created` is not allowed, announced adapters and
                modules do not fit together, no module was added, or `info` contradicts them.
            ManifestTooLargeError: A JSON document would be larger than the format allows.
            OutputExistsError: The path has appeared meanwhile.
        """
        self._check_open()
        check_message(message)
        moment = created or datetime.now(UTC)
        if moment.tzinfo is None:
            raise InvalidInputError(f"created {moment} has no time zone; give an aware time")
        path = str(self._output.path)
        records = {name: self._record(name) for name in sorted(self._adapters)}
        shared, modules = self._finish_shared()
        adapters = tuple(
            AdapterEntry(name=name, blob=self._finish_adapter(record))
            for name, record in records.items()
        )
        self._shared_spool.remove()
        self._adapter_spool.remove()
        try:
            generation = Generation(
                number=1,
                parent=None,
                producer=Producer(name="unmerge", version=producer_version()),
                strategy=self._info.strategy,
                recipe=self._info.recipe,
                base_model=self._info.base_model,
                store_dtype=self._info.store_dtype,
                libraries=self._info.libraries,
                sources=tuple(self._sources[name] for name in sorted(self._sources)),
                modules=modules,
                shared=shared,
                adapters=adapters,
                unmerged={name: tuple(sorted(k)) for name, k in self._info.unmerged.items() if k},
                absent={name: tuple(sorted(p)) for name, p in self._info.absent.items() if p},
            )
            document = canonical_bytes(generation.model_dump(mode="json"))
        except ValidationError as problem:
            raise InvalidInputError(first_problem(problem), path=path) from problem
        except ValueError as problem:  # a recipe with NaN, or text UTF-8 cannot express
            raise InvalidInputError(f"cannot be written as JSON: {problem}", path=path) from None
        check_size(len(document), MAX_DOCUMENT_BYTES, f"{path}: generation document")
        descriptor = Descriptor(
            digest=sha256(document), size=len(document), media_type=GENERATION_MEDIA_TYPE
        )
        write_file(self._output.partial / descriptor.file, document)
        entry = GenerationEntry(
            number=1,
            document=descriptor,
            created=moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            message=message,
        )
        manifest = seal(Manifest(generations=(entry,)))
        check_size(len(manifest), MAX_MANIFEST_BYTES, f"{path}: {MANIFEST_NAME}")
        write_file(self._output.partial / MANIFEST_NAME, manifest)
        size = open_bundle(self._output.partial).size()
        self._output.publish()
        self._open = False
        return size

    def _check_open(self) -> None:
        if not self._open:
            raise InvalidInputError(
                "the writer is not open; use it once, inside its with statement",
                path=str(self._output.path),
            )

    def _adapter(self, name: str) -> _Adapter:
        if name not in self._adapters:
            self._adapters[name] = _Adapter(self._adapter_spool)
        return self._adapters[name]

    def _check_tensors(
        self, where: str, tensors: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        dtype = FLOAT_DTYPES[self._info.store_dtype]
        if tensors.keys() != shapes.keys():
            raise TensorMismatchError(
                f"the encoding gives tensors {sorted(tensors)}, expected {sorted(shapes)}",
                path=where,
            )
        for name, shape in shapes.items():
            tensor = tensors[name]
            if tensor.shape != shape or tensor.dtype != dtype:
                raise TensorMismatchError(
                    f"tensor {name} has shape {tensor.shape} and dtype {tensor.dtype}, expected "
                    f"{shape} and {dtype}",
                    path=where,
                )
            _check_finite(tensor, f"{where}, tensor {name}")

    def _finish_shared(self) -> tuple[tuple[Descriptor, ...], tuple[_Module, ...]]:
        """Write the shared blobs; return them and the modules, which now know their blob.

        Grouped by path here, not on arrival: the bytes must not depend on how the work was cut.
        """
        blobs: list[Descriptor] = []
        modules: list[_Module] = []
        group = BlobWriter(self._shared_spool)
        for path in sorted(self._modules):
            size = sum(tensor.nbytes for tensor in self._shared[path].values())
            if group.nbytes and group.nbytes + size > self._shared_limit:
                blobs.append(_descriptor(group.finish(self._blobs)))
                group = BlobWriter(self._shared_spool)
            group.take(self._shared[path])
            modules.append(self._modules[path].model_copy(update={"blob": len(blobs)}))
        if modules:
            blobs.append(_descriptor(group.finish(self._blobs)))
        return tuple(blobs), tuple(modules)

    def _record(self, name: str) -> AdapterRecord:
        """Return the announced record, checked against the modules and `info.absent`."""
        adapter = self._adapters[name]
        where = f"adapter {name!r}"
        if adapter.record is None:
            raise InvalidInputError("modules restore it, but it was never announced", path=where)
        announced = {module.path for module in adapter.record.modules}
        if difference := sorted(announced ^ adapter.scalings.keys()):
            raise InvalidInputError(
                f"its record and the modules that restore it differ in {difference[0]!r}"
                f" and {len(difference) - 1} more",
                path=where,
            )
        absent = self._modules.keys() - announced
        if set(self._info.absent.get(name, ())) != absent:
            raise InvalidInputError(
                f"info.absent gives {sorted(self._info.absent.get(name, ()))}, the modules it "
                f"lacks are {sorted(absent)}",
                path=where,
            )
        return adapter.record

    def _finish_adapter(self, record: AdapterRecord) -> Descriptor:
        adapter = self._adapters[record.name]
        sources = {module.path: module for module in record.modules}
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
                    scaling=scaling,
                    source_scaling=sources[path].source_scaling,
                    dtype=sources[path].dtype,
                )
                for path, scaling in sorted(adapter.scalings.items())
            ),
            verbatim=tuple(adapter.verbatim),
        )
        measured = [errors for _, errors in sorted(adapter.errors.items())]
        for kind, values in (
            ("factors", [errors.factors for errors in measured]),
            ("delta", [errors.delta for errors in measured]),
        ):
            adapter.blob.add(f"errors/{kind}", np.array(values, dtype=DTYPES["F64"]))
        text = canonical_bytes(metadata.model_dump(mode="json")).decode("utf-8")
        return _descriptor(adapter.blob.finish(self._blobs, {"unmerge": text}))


def check_message(message: str) -> str:
    """Return `message` if a generation may carry it.

    `BundleWriter.finish` checks it again; call this before hours of work depend on it.

    Raises:
        InvalidInputError: It has more than 4096 characters, or UTF-8 cannot express it.
    """
    if len(message) > MAX_MESSAGE_CHARACTERS:
        raise InvalidInputError(
            f"the message has {len(message)} characters, at most {MAX_MESSAGE_CHARACTERS} are "
            "allowed; shorten it"
        )
    try:
        message.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise InvalidInputError(
            f"the message holds {message[problem.start]!a} at position {problem.start}, which "
            "UTF-8 cannot express; remove it"
        ) from None
    return message


def producer_version() -> str:
    """Return the installed version of unmerge, "unknown" when run from a bare source tree."""
    try:
        return importlib.metadata.version("unmerge")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _descriptor(blob: WrittenBlob) -> Descriptor:
    return Descriptor(digest=blob.digest, size=blob.size, media_type=BLOB_MEDIA_TYPE)


def _check_finite(array: Array, where: str) -> None:
    if not all_finite(array):
        raise NonFiniteError("holds NaN or an infinity; nothing is written", path=where)


def _entry(path: str, encoding: Encoding[Array]) -> _Module:
    """Return the manifest entry of an encoding, not yet in a blob; shapes are checked later."""
    try:
        d_out, d_in = encoding.shape
        if isinstance(encoding, FactorsEncoding):
            return FactorsModule(
                path=path, d_out=d_out, d_in=d_in, blob=0, rank=encoding.A.shape[0]
            )
        if isinstance(encoding, DeltaEncoding):
            return DeltaModule(path=path, d_out=d_out, d_in=d_in, blob=0)
        if isinstance(encoding, AffineBasisEncoding):
            basis_size, rank, _ = encoding.basis_A.shape
            return AffineBasisModule(
                path=path, d_out=d_out, d_in=d_in, blob=0, rank=rank, basis_size=basis_size
            )
    except ValidationError as problem:
        raise InvalidInputError(first_problem(problem), path=path) from problem
    except (ValueError, IndexError):
        shapes = {name: tensor.shape for name, tensor in encoding.shared_tensors().items()}
        raise TensorMismatchError(
            f"tensors of a {encoding.kind} encoding have shapes {shapes}", path=path
        ) from None
    raise InvalidInputError(
        f"encoding {encoding.kind!r} is not one of factors, delta, affine_basis; return one of "
        "the format's own classes",
        path=path,
    )


def _scalings(path: str, encoding: Encoding[Array]) -> dict[str, float]:
    if not isinstance(encoding, AffineBasisEncoding):
        return {}
    if len(encoding.scalings) != len(encoding.names):
        raise InvalidInputError(
            f"{len(encoding.names)} adapters, but {len(encoding.scalings)} scalings", path=path
        )
    for name, scaling in zip(encoding.names, encoding.scalings, strict=True):
        if not math.isfinite(scaling):
            raise NonFiniteError(f"scaling is {scaling}", path=f"{path}, adapter {name!r}")
    return dict(zip(encoding.names, encoding.scalings, strict=True))
