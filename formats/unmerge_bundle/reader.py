"""Opens a bundle and gives adapters back; needs neither torch nor the strategy that wrote it.

What is used is checked first: `bundle.json` and the generation document when the bundle is opened,
a blob by size and digest when something in it is first needed.
"""

from __future__ import annotations

import difflib
import math
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from unmerge_bundle.arrays import Array, FloatDtype, all_finite
from unmerge_bundle.blob import BlobReader
from unmerge_bundle.encodings import DeltaEncoding, FactorsEncoding, Restores
from unmerge_bundle.errors import (
    AdapterNotInBundleError,
    BlobError,
    BlobSizeError,
    DigestMismatchError,
    ManifestError,
    MissingBlobError,
    NonFiniteError,
    NotABundleError,
    TensorMismatchError,
    WrongKindError,
)
from unmerge_bundle.jsontext import parse_object
from unmerge_bundle.model import (
    MANIFEST_NAME,
    MAX_DOCUMENT_BYTES,
    MAX_MANIFEST_BYTES,
    AdapterMetadata,
    Amount,
    BundleSize,
    Descriptor,
    Generation,
    GenerationEntry,
    ModuleErrors,
    RestoredModuleRecord,
    check_size,
    parse_generation,
    parse_manifest,
    parse_model,
    sha256,
)
from unmerge_bundle.modules import (
    DeltaModule,
    FactorsModule,
    Layouts,
    ModuleEntry,
    RestoringModule,
    check_tensor,
)
from unmerge_bundle.reconstruct import restore_module
from unmerge_bundle.restored import (
    AnyRestored,
    MergedAdapter,
    Origin,
    RestoredAdapter,
    RestoredDelta,
    RestoredModule,
)

__all__ = ["Bundle", "open_bundle"]


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Open the bundle at `path` and check `bundle.json` and the current generation document.

    Blobs are checked when first used: opening takes the same time whatever the bundle's size.

    Raises:
        NotABundleError: There is no bundle at `path`.
        UnsupportedVersionError: Its format version is not the one this release reads.
        DigestMismatchError: A document is damaged.
        ManifestError: A document is malformed or contradicts another.
        MissingBlobError: The generation document is missing.
    """
    root = Path(path)
    file = root / MANIFEST_NAME
    if not file.is_file():
        raise NotABundleError(
            f"no {MANIFEST_NAME} here; expected the path of a bundle directory", path=str(root)
        )
    manifest = parse_manifest(read_limited(file, MAX_MANIFEST_BYTES, str(file)), where=str(file))
    entry = manifest.generations[-1]
    parent = manifest.generations[-2].document.digest if len(manifest.generations) > 1 else None
    generation = load_generation(root, entry, parent)
    return Bundle(root, manifest.generations, generation)


def read_limited(file: Path, limit: int, where: str) -> bytes:
    """Return the content of `file`, never reading more than `limit` bytes.

    Raises:
        ManifestTooLargeError: It is larger.
    """
    check_size(file.stat().st_size, limit, where)
    with file.open("rb") as stream:
        data = stream.read(limit + 1)
    check_size(len(data), limit, where)
    return data


def load_generation(root: Path, entry: GenerationEntry, parent: str | None) -> Generation:
    """Return the generation document that `entry` names, checked against size, digest and entry.

    Raises:
        BundleError: It is missing, damaged, malformed, or not the generation `entry` says.
    """
    file = blob_file(root, entry.document)
    where = str(file)
    data = read_limited(file, MAX_DOCUMENT_BYTES, where)
    if sha256(data) != entry.document.digest:
        raise DigestMismatchError(
            f"expected {entry.document.digest}, got {sha256(data)}; the file is damaged or was "
            "changed: get it again",
            path=where,
        )
    generation = parse_generation(data, where=where)
    if (generation.number, generation.parent) != (entry.number, parent):
        raise ManifestError(
            f"is generation {generation.number} with parent {generation.parent}, {MANIFEST_NAME} "
            f"lists generation {entry.number} with parent {parent}",
            path=where,
        )
    return generation


def blob_file(root: Path, descriptor: Descriptor) -> Path:
    """Return the path of a blob after checking that it is there and has the size it should have.

    Raises:
        MissingBlobError: It is not there.
        BlobSizeError: It has another size.
    """
    file = root / descriptor.file
    if not file.is_file():
        raise MissingBlobError(
            "the bundle names this blob, but it is not there; get the bundle again", path=str(file)
        )
    size = file.stat().st_size
    if size != descriptor.size:
        raise BlobSizeError(
            f"has {size} bytes, expected {descriptor.size}; the file is truncated or was changed: "
            "get it again",
            path=str(file),
        )
    return file


class _Slot:
    """One shared blob: opened and hashed by the first thread that needs it, others wait."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reader: BlobReader | None = None


class Bundle:
    """An open bundle, at its current generation. Safe to use from several threads at once.

    Shared blobs stay mapped once used; an adapter's blob is opened, checked and closed by each
    call that needs it, so that the number of open files does not grow with the adapters.

    Attributes:
        path: The bundle's directory.
        generations: All generations, oldest first; the last one is what is read.
        generation: The current generation's document.
    """

    def __init__(
        self, path: Path, generations: tuple[GenerationEntry, ...], generation: Generation
    ) -> None:
        """Take checked documents; use `unmerge_bundle.open` instead."""
        self.path = path
        self.generations = generations
        self.generation = generation
        self._slots = {descriptor.digest: _Slot() for descriptor in generation.shared}
        self._blobs = {adapter.name: adapter.blob for adapter in generation.adapters}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the documents; whoever unpickles opens the blobs, which locks guard here."""
        return Bundle, (self.path, self.generations, self.generation)

    def __repr__(self) -> str:
        kind = f"restores {self.restores}" if self.restores else "merged"
        return (
            f"<Bundle {str(self.path)!r}: {self.generation.strategy.method}, {kind}, "
            f"{len(self.modules)} modules, {len(self.adapters)} adapters>"
        )

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that can be restored, sorted; empty for a merged result."""
        return tuple(self._blobs)

    @property
    def modules(self) -> dict[str, ModuleEntry]:
        """What the manifest says of each module, by path, sorted."""
        return {module.path: module for module in self.generation.modules}

    @property
    def restores(self) -> Restores | None:
        """What each adapter comes back as: "factors" or "delta"; `None` for a merged result."""
        return self.generation.restores

    def restore(self, name: str, *, dtype: FloatDtype | None = None) -> RestoredAdapter:
        """Return adapter `name`, reading the shared blobs it needs and its own, no other.

        Args:
            name: One of `adapters`.
            dtype: Dtype of what is restored; by default each module's source dtype.

        Raises:
            WrongKindError: The bundle holds one merged result.
            AdapterNotInBundleError: It holds no such adapter.
            NonFiniteError: A value overflows the dtype.
            BundleError: A blob is missing, damaged or malformed.
        """
        own, metadata = self.open_adapter(name)
        return RestoredAdapter(
            name=name,
            modules=dict(self._restored(own, metadata, dtype)),
            # Copied, because a view would keep the blob mapped as long as the tensor lives.
            verbatim={key: own.array(f"verbatim/{key}").copy() for key in metadata.verbatim},
            config=metadata.config,
            format=metadata.format,
            base_model=metadata.base_model,
            revision=metadata.revision,
            source_digest=metadata.digest,
            origin=self._origin(),
            exact=partial(self.restore_modules, name, dtype="float32"),
        )

    def restore_modules(
        self, name: str, *, dtype: FloatDtype | None = None
    ) -> Iterator[tuple[str, AnyRestored]]:
        """Yield the modules of adapter `name` by path, sorted, holding one at a time.

        Args:
            name: One of `adapters`.
            dtype: Dtype of what is restored, by default each module's source dtype; "float32" is
                the reconstruction before it is rounded.

        Raises:
            WrongKindError: The bundle holds one merged result.
            AdapterNotInBundleError: It holds no such adapter.
            NonFiniteError: A value overflows the dtype.
            BundleError: A blob is missing, damaged or malformed.
        """
        yield from self._restored(*self.open_adapter(name), dtype)

    def errors(self, name: str) -> dict[str, ModuleErrors]:
        """Return the errors recorded for adapter `name`, by module path.

        Raises:
            WrongKindError: The bundle holds one merged result.
            AdapterNotInBundleError: It holds no such adapter.
            BundleError: The adapter's blob is missing, damaged or malformed.
        """
        return self.recorded_errors(*self.open_adapter(name))

    def merged(self) -> MergedAdapter:
        """Return the merged result; its arrays are read-only views of the bundle's files.

        Raises:
            WrongKindError: The bundle restores adapters and holds no merged result.
            BundleError: A blob is missing, damaged or malformed.
        """
        if self.restores is not None:
            raise WrongKindError(
                "the bundle restores its adapters and holds no merged one; use restore with one "
                f"of {', '.join(self.adapters[:5])}{', …' if len(self.adapters) > 5 else ''}",
                path=str(self.path),
            )
        modules: dict[str, FactorsEncoding[Array] | DeltaEncoding[Array]] = {}
        for entry in self.generation.modules:
            if not isinstance(entry, FactorsModule | DeltaModule):
                continue  # narrowing only: no module restores adapters, or all do
            tensors = self.shared_tensors(entry)
            for tensor_name, tensor in tensors.items():
                if not all_finite(tensor):
                    raise NonFiniteError(
                        f"tensor {tensor_name} holds NaN or an infinity; the bundle is not "
                        "trustworthy",
                        path=entry.path,
                    )
            modules[entry.path] = (
                FactorsEncoding(A=tensors["A"], B=tensors["B"], facts=entry.facts)
                if isinstance(entry, FactorsModule)
                else DeltaEncoding(delta=tensors["delta"], facts=entry.facts)
            )
        return MergedAdapter(modules=modules, origin=self._origin())

    def size(self) -> BundleSize:
        """Return what the current generation takes, reading headers only.

        Raises:
            BundleError: A blob is missing or malformed.
        """
        manifest = (self.path / MANIFEST_NAME).stat().st_size
        total = manifest + self.generations[-1].document.size
        shared = Amount()
        for descriptor in self.generation.shared:
            total += descriptor.size
            shared += _amount(self.open_blob(descriptor), "modules/")
        adapters: dict[str, Amount] = {}
        verbatim: dict[str, Amount] = {}
        for name, descriptor in self._blobs.items():
            total += descriptor.size
            blob = self.open_blob(descriptor)
            adapters[name] = _amount(blob, "modules/")
            verbatim[name] = _amount(blob, "verbatim/")
        counted = shared.bytes + sum(
            amount.bytes for amounts in (adapters, verbatim) for amount in amounts.values()
        )
        return BundleSize(
            shared=shared,
            adapters=adapters,
            verbatim=verbatim,
            overhead=total - counted,
            total=total,
        )

    def open_adapter(self, name: str) -> tuple[BlobReader, AdapterMetadata]:
        """Return adapter `name`'s blob, its digest checked, and what its header says.

        Raises:
            WrongKindError: The bundle holds one merged result.
            AdapterNotInBundleError: It holds no such adapter.
            BundleError: The blob is missing, damaged, malformed, or not that adapter's.
        """
        if self.restores is None:
            raise WrongKindError(
                f"the bundle holds one merged result, so {name!r} cannot be restored from it; use "
                "export (merged() in Python) to get the merged adapter",
                path=str(self.path),
            )
        descriptor = self._blobs.get(name)
        if descriptor is None:
            near = difflib.get_close_matches(name, self.adapters, n=3)
            hint = (
                f"did you mean {', '.join(near)}?"
                if near
                else f"it holds {len(self.adapters)}, among them {', '.join(self.adapters[:5])}"
            )
            raise AdapterNotInBundleError(f"holds no adapter {name!r}; {hint}", path=str(self.path))
        blob = self.open_blob(descriptor)
        blob.check_digest(descriptor.digest)
        return blob, self.adapter_metadata(name, blob)

    def adapter_metadata(self, name: str, blob: BlobReader) -> AdapterMetadata:
        """Return what the header of adapter `name`'s blob says, checked against the generation.

        Raises:
            BlobError: The header's text is missing or malformed, or describes another adapter.
        """
        if set(blob.metadata) != {"unmerge"}:
            raise BlobError(
                f'__metadata__ has the keys {sorted(blob.metadata)}, expected "unmerge" alone',
                path=blob.where,
            )
        text = blob.metadata["unmerge"].encode("utf-8")
        parse_object(text, where=blob.where, error=BlobError, floats=True)
        metadata = parse_model(AdapterMetadata, text, where=blob.where, error=BlobError)
        digests = {source.name: source.digest for source in self.generation.sources}
        paths = tuple(module.path for module in metadata.modules)
        if (metadata.name, metadata.digest) != (name, digests[name]):
            raise BlobError(
                f"describes adapter {metadata.name!r} with digest {metadata.digest}, expected "
                f"{name!r} with {digests[name]}",
                path=blob.where,
            )
        if paths != self.generation.adapter_paths(name):
            raise BlobError(
                f"describes {len(paths)} modules of adapter {name!r}, which are not the "
                f"{len(self.generation.adapter_paths(name))} the generation document gives it",
                path=blob.where,
            )
        for entry, record in self.records(metadata):
            if not entry.admits(record.restored_rank):
                raise BlobError(
                    f"gives module {entry.path} restored_rank {record.restored_rank}, which its "
                    f"encoding {entry.encoding} cannot have",
                    path=blob.where,
                )
        return metadata

    def records(
        self, metadata: AdapterMetadata
    ) -> Iterator[tuple[RestoringModule, RestoredModuleRecord]]:
        """Yield each module of an adapter as the generation and as the adapter describes it."""
        entries = self.modules
        for record in metadata.modules:
            entry = entries[record.path]
            if not isinstance(entry, FactorsModule | DeltaModule):  # narrowing only
                yield entry, record

    def recorded_errors(
        self, blob: BlobReader, metadata: AdapterMetadata
    ) -> dict[str, ModuleErrors]:
        """Return the errors an adapter's blob records, by module path.

        Raises:
            TensorMismatchError: They are missing, of a wrong shape, negative, or NaN anywhere but
                where a module gives back no factors to have an error.
        """
        tensors = {}
        for kind in ("factors", "delta"):
            tensor = blob.array(f"errors/{kind}")
            if tensor.dtype != np.float64 or tensor.shape != (len(metadata.modules),):
                raise TensorMismatchError(
                    f"tensor 'errors/{kind}' has dtype {tensor.dtype} and shape {tensor.shape}, "
                    f"expected float64 and {(len(metadata.modules),)}",
                    path=blob.where,
                )
            tensors[kind] = tensor
        errors = {}
        for index, (entry, _) in enumerate(self.records(metadata)):
            factors, delta = (float(tensors[kind][index]) for kind in ("factors", "delta"))
            no_factors = entry.restores == "delta"
            if not (delta >= 0 and (math.isnan(factors) if no_factors else factors >= 0)):
                raise TensorMismatchError(
                    f"recorded errors of module {entry.path} are {factors} of the factors and "
                    f"{delta} of the delta, NaN or negative where a number ≥ 0 is expected (no "
                    "factors come back from some encodings: there, and only there, NaN is right)",
                    path=blob.where,
                )
            errors[entry.path] = ModuleErrors(factors=None if no_factors else factors, delta=delta)
        return errors

    def shared_tensors(self, entry: ModuleEntry) -> dict[str, Array]:
        """Return a module's shared tensors, as read-only views of the bundle's file.

        Raises:
            BundleError: The blob is missing, damaged or malformed.
        """
        if entry.blob is None:
            return {}
        return self._tensors(self.shared_blob(entry.blob), entry.path, entry.shared_layout())

    def shared_blob(self, index: int) -> BlobReader:
        """Return a shared blob, its digest checked once however many threads ask.

        Raises:
            BundleError: It is missing, damaged or malformed.
        """
        descriptor = self.generation.shared[index]
        slot = self._slots[descriptor.digest]
        with slot.lock:
            if slot.reader is None:
                reader = self.open_blob(descriptor)
                reader.check_digest(descriptor.digest)
                slot.reader = reader
            return slot.reader

    def open_blob(self, descriptor: Descriptor) -> BlobReader:
        """Return a blob with its size and header checked, its digest not yet.

        Raises:
            BundleError: It is missing, of another size, or no well-formed safetensors file.
        """
        file = blob_file(self.path, descriptor)
        return BlobReader(file, where=str(file))

    def _restored(
        self, own: BlobReader, metadata: AdapterMetadata, dtype: FloatDtype | None
    ) -> Iterator[tuple[str, AnyRestored]]:
        errors = self.recorded_errors(own, metadata)
        for entry, record in self.records(metadata):
            layout = entry.adapter_layout(record.restored_rank)
            restored = restore_module(
                entry,
                {**self.shared_tensors(entry), **self._tensors(own, entry.path, layout)},
                scaling=record.scaling,
                dtype=dtype or record.dtype,
                where=f"{entry.path}, adapter {metadata.name!r}",
            )
            if isinstance(restored, tuple):
                yield (
                    entry.path,
                    RestoredModule(
                        A=restored[0],
                        B=restored[1],
                        scaling=record.scaling,
                        source_scaling=record.source_scaling,
                        source_rank=record.rank,
                        source_dtype=record.dtype,
                        errors=errors[entry.path],
                        kind=entry.kind,
                    ),
                )
            else:
                yield (
                    entry.path,
                    RestoredDelta(
                        delta=restored,
                        source_scaling=record.source_scaling,
                        source_rank=record.rank,
                        source_dtype=record.dtype,
                        errors=errors[entry.path],
                        kind=entry.kind,
                    ),
                )

    def _tensors(self, blob: BlobReader, path: str, layouts: Layouts) -> dict[str, Array]:
        tensors = {}
        for name, layout in layouts.items():
            full = f"modules/{path}/{name}"
            tensors[name] = blob.array(full)
            check_tensor(full, tensors[name], layout, self.generation.store_dtype, where=blob.where)
        return tensors

    def _origin(self) -> Origin:
        return Origin(
            bundle=self.path.absolute().name,
            digest=self.generations[-1].document.digest,
            generation=self.generation,
        )


def _amount(blob: BlobReader, prefix: str) -> Amount:
    infos = [info for name, info in blob.tensors.items() if name.startswith(prefix)]
    return Amount(
        elements=sum(info.elements for info in infos),
        bytes=sum(info.end - info.begin for info in infos),
    )
