"""Writes a bundle as modules arrive: bounded memory, equal bytes for equal inputs, or nothing."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType

from pydantic import Field, JsonValue, ValidationError

from unmerge_bundle.adapters import (
    AdapterBlob,
    AdapterRecord,
    InputModel,
    check_stored,
)
from unmerge_bundle.arrays import Array, FloatDtype
from unmerge_bundle.blob import BlobWriter, Spool, Spooled
from unmerge_bundle.documents import (
    check_created,
    check_message,
    generation_bytes,
    producer_version,
    write_documents,
)
from unmerge_bundle.encodings import Encoding, RestoringEncoding
from unmerge_bundle.entry import Module, module_entry
from unmerge_bundle.errors import InvalidInputError, NonFiniteError, TensorMismatchError
from unmerge_bundle.fields import Key, ModulePath, Name
from unmerge_bundle.kinds import LINEAR
from unmerge_bundle.model import (
    BLOB_MEDIA_TYPE,
    AdapterEntry,
    BaseModelId,
    BundleSize,
    Descriptor,
    Generation,
    ModuleErrors,
    Producer,
    Source,
    Strategy,
    first_problem,
)
from unmerge_bundle.modules import DeltaModule, FactorsModule
from unmerge_bundle.publish import BUNDLE, OutputDirectory
from unmerge_bundle.reader import open_bundle

__all__ = ["BundleWriter", "GenerationInfo"]


class GenerationInfo(InputModel):
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
        self._modules: dict[str, Module] = {}
        self._shared: dict[str, dict[str, Spooled]] = {}  # by module path, then tensor name
        self._adapters: dict[str, AdapterBlob] = {}
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
        self._adapter(record.name).announce(record, verbatim)

    def add_module(
        self,
        path: str,
        encoding: Encoding[Array],
        *,
        kind: str = LINEAR,
        errors: Mapping[str, ModuleErrors] | None = None,
    ) -> None:
        """Add one module; its bytes go to the disk at once.

        Args:
            path: Module path. Modules may come in any order, each once; the bytes written do not
                depend on it.
            encoding: One of the format's encodings, every tensor in `store_dtype`.
            kind: The layer the module is, see `unmerge_bundle.check_kind`; that of every adapter
                that has it.
            errors: Measured errors, for exactly the adapters the encoding restores; `None` where
                it restores none.

        Raises:
            InvalidInputError: The path is not allowed or was added before, there is no such kind
                or the module's shape does not fit it, the encoding is not one of the format's,
                merged and restoring modules are mixed, or errors are missing.
            TensorMismatchError: A tensor has the wrong shape or dtype.
            NonFiniteError: A tensor or a scaling is not finite.
        """
        self._check_open()
        if path in self._modules:
            raise InvalidInputError("added twice; add every module once", path=path)
        measured = dict(errors or {})
        names = encoding.adapters
        if set(measured) != set(names) or len(set(names)) != len(names):
            raise InvalidInputError(
                f"expected distinct adapters with one measured error each, got adapters "
                f"{sorted(names)} and errors of {sorted(measured)}",
                path=path,
            )
        entry = module_entry(path, encoding, kind=kind)
        first = next(iter(self._modules.values()), entry)
        if (entry.restores is None) != (first.restores is None):
            raise InvalidInputError(
                f"{entry.encoding} cannot be mixed with {first.encoding}: a bundle "
                "either restores its adapters or holds one merged result",
                path=path,
            )
        dtype = self._info.store_dtype
        shared = encoding.shared_tensors()
        check_stored(path, shared, entry.shared_layout(), dtype)
        own: dict[str, dict[str, Array]] = {}
        if isinstance(encoding, RestoringEncoding) and not isinstance(
            entry, FactorsModule | DeltaModule
        ):
            _check_scalings(path, encoding)
            for name in names:
                where = f"{path}, adapter {name!r}"
                rank = encoding.restored_rank(name)
                own[name] = encoding.adapter_tensors(name)
                if not entry.admits(rank) or rank == 0:
                    raise TensorMismatchError(
                        f"keeps {rank} components, which {entry.encoding} cannot", path=where
                    )
                check_stored(where, own[name], entry.adapter_layout(rank), dtype)
                if (measured[name].factors is None) != (entry.restores == "delta"):
                    raise InvalidInputError(
                        f"{entry.encoding} restores {entry.restores}, but the measured error of "
                        f"the factors is {measured[name].factors}; use unmerge_bundle.measure",
                        path=where,
                    )
            for name, tensors in own.items():
                self._adapter(name).add_module(
                    path,
                    tensors,
                    scaling=encoding.scaling(name),
                    restored_rank=encoding.restored_rank(name),
                    errors=measured[name],
                )
        self._shared[path] = {
            f"modules/{path}/{key}": self._shared_spool.append(tensor, name=key)
            for key, tensor in shared.items()
        }
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
        moment = check_created(created)
        path = str(self._output.path)
        records = {name: self._record(name) for name in sorted(self._adapters)}
        shared, modules = self._finish_shared()
        adapters = tuple(
            AdapterEntry(
                name=name,
                generation=1,
                blob=self._adapters[name].finish(record, self._blobs),
            )
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
        except ValidationError as problem:
            raise InvalidInputError(first_problem(problem), path=path) from problem
        write_documents(
            self._output.partial,
            generation_bytes(generation, path=path),
            before=(),
            message=message,
            created=moment,
            path=path,
        )
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

    def _adapter(self, name: str) -> AdapterBlob:
        if name not in self._adapters:
            self._adapters[name] = AdapterBlob(self._adapter_spool)
        return self._adapters[name]

    def _finish_shared(self) -> tuple[tuple[Descriptor, ...], tuple[Module, ...]]:
        """Write the shared blobs; return them and the modules, which now know their blob.

        Grouped by path here, not on arrival: the bytes must not depend on how the work was cut.
        """
        blobs: list[Descriptor] = []
        modules: list[Module] = []
        group = BlobWriter(self._shared_spool)
        for path in sorted(self._modules):
            entry = self._modules[path]
            if entry.blob is None:  # nothing is shared
                modules.append(entry)
                continue
            size = sum(tensor.nbytes for tensor in self._shared[path].values())
            if group.nbytes and group.nbytes + size > self._shared_limit:
                blobs.append(self._finish_group(group))
                group = BlobWriter(self._shared_spool)
            group.take(self._shared[path])
            modules.append(entry.model_copy(update={"blob": len(blobs)}))
        if group.nbytes:
            blobs.append(self._finish_group(group))
        return tuple(blobs), tuple(modules)

    def _finish_group(self, group: BlobWriter) -> Descriptor:
        blob = group.finish(self._blobs)
        return Descriptor(digest=blob.digest, size=blob.size, media_type=BLOB_MEDIA_TYPE)

    def _record(self, name: str) -> AdapterRecord:
        """Return the announced record, checked against the modules and `info.absent`."""
        adapter = self._adapters[name]
        where = f"adapter {name!r}"
        if adapter.record is None:
            raise InvalidInputError("modules restore it, but it was never announced", path=where)
        announced = {module.path for module in adapter.record.modules}
        if difference := sorted(announced ^ adapter.paths):
            raise InvalidInputError(
                f"its record and the modules that restore it differ in {difference[0]!r}"
                f" and {len(difference) - 1} more",
                path=where,
            )
        for module in adapter.record.modules:
            if module.kind != self._modules[module.path].kind:
                raise InvalidInputError(
                    f"its record says kind {module.kind}, the module was added as "
                    f"{self._modules[module.path].kind}",
                    path=f"{module.path}, {where}",
                )
        absent = self._modules.keys() - announced
        if set(self._info.absent.get(name, ())) != absent:
            raise InvalidInputError(
                f"info.absent gives {sorted(self._info.absent.get(name, ()))}, the modules it "
                f"lacks are {sorted(absent)}",
                path=where,
            )
        return adapter.record


def _check_scalings(path: str, encoding: RestoringEncoding[Array]) -> None:
    if len(encoding.scalings) != len(encoding.names):
        raise InvalidInputError(
            f"{len(encoding.names)} adapters, but {len(encoding.scalings)} scalings", path=path
        )
    for name, scaling in zip(encoding.names, encoding.scalings, strict=True):
        if not math.isfinite(scaling):
            raise NonFiniteError(f"scaling is {scaling}", path=f"{path}, adapter {name!r}")
