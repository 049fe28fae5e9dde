"""Appends an adapter to a bundle: a new generation, every earlier file untouched."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError

from unmerge_bundle.adapters import AdapterBlob, AdapterRecord, RecordedModule, check_finite
from unmerge_bundle.arrays import Array
from unmerge_bundle.blob import Spool
from unmerge_bundle.documents import (
    check_created,
    check_message,
    generation_bytes,
    producer_version,
    write_documents,
)
from unmerge_bundle.errors import (
    AdapterInBundleError,
    BundleBusyError,
    InvalidInputError,
    RefitError,
)
from unmerge_bundle.fitting import Fit, fit_adapter
from unmerge_bundle.lock import locked
from unmerge_bundle.measure import compare
from unmerge_bundle.model import (
    MANIFEST_NAME,
    AdapterEntry,
    Descriptor,
    Generation,
    ModuleErrors,
    Producer,
    Source,
    first_problem,
)
from unmerge_bundle.modules import DeltaModule, FactorsModule, RestoringModule
from unmerge_bundle.publish import flush_directory
from unmerge_bundle.reader import Bundle, open_bundle
from unmerge_bundle.reconstruct import restore_module

__all__ = ["Appended", "append_adapter"]


@dataclass(frozen=True, slots=True)
class Appended:
    """What appending an adapter gave.

    Attributes:
        generation: Number of the new generation.
        errors: How far the adapter comes back from its original, by module path, sorted: the
            shared tensors were not made for it, so that this may be anything.
    """

    generation: int
    errors: dict[str, ModuleErrors]


def append_adapter(
    path: str | os.PathLike[str],
    record: AdapterRecord,
    factors: Mapping[str, tuple[Array, Array]],
    verbatim: Mapping[str, Array],
    *,
    weight: float = 1.0,
    message: str = "",
    created: datetime | None = None,
    timeout: float = 60.0,
) -> Appended:
    """Add one adapter to a bundle that restores, by what its encodings keep per adapter.

    Shared tensors stay as they are, and so do all adapters in the bundle: the new one is fitted
    to them (`docs/spec/bundle-v1.md`, "Appending"), and how well that went is measured as for any
    other. Modules of the bundle that the adapter lacks are recorded as absent. The new generation
    appears with the last step, the replacement of `bundle.json`: a crash before leaves the bundle
    as it was, and a reader that has it open goes on with the generation it opened. Writers on one
    machine queue.

    Args:
        path: The bundle.
        record: The adapter, as its source describes it.
        factors: Its A `(r, d_in)` and B `(d_out, r)` by module path: those of `record.modules`.
            Another form of the same delta, such as the gauge that the basis was made in, may be
            given; the error of the factors is then against these.
        verbatim: Its tensors that are no low-rank update, by their key in the source.
        weight: The weight recorded for it; it had none in the merge.
        message: What the generation is for; see `check_message`.
        created: Aware time of creation, now by default.
        timeout: Seconds to wait for another writer.

    Raises:
        RefitError: The bundle holds one merged result, or the adapter has a module the bundle has
            not, another kind or shape of one, or a rank that an affine basis cannot hold.
        AdapterInBundleError: The bundle holds an adapter of that name.
        BundleBusyError: Another writer is at work, or has changed the bundle meanwhile.
        InvalidInputError: The record, the factors or the message do not fit together, or the
            adapter names another base model.
        NonFiniteError: A number is not finite, or overflows the dtype it is stored or restored in.
        BundleError: The bundle cannot be opened, or a blob is missing or damaged.
    """
    check_message(message)
    moment = check_created(created)
    open_bundle(path)  # says what is wrong with the path before anything is made beside it
    root = Path(path).resolve()
    with locked(root, timeout=timeout):
        manifest = (root / MANIFEST_NAME).read_bytes()
        bundle = open_bundle(root)
        modules = _check(bundle, record, factors)
        staging = root.with_name(f".{root.name}.{secrets.token_hex(8)}.partial")
        (staging / "blobs").mkdir(parents=True)
        try:
            spool = Spool(staging / "adapter.spool")
            try:
                blob = AdapterBlob(spool)
                blob.announce(record, verbatim)
                errors = _fit(bundle, record, factors, modules, blob)
                descriptor = blob.finish(record, staging / "blobs")
            finally:
                spool.close()
            generation = _generation(bundle, record, descriptor, weight)
            write_documents(
                staging,
                generation_bytes(generation, path=str(root)),
                before=bundle.generations,
                message=message,
                created=moment,
                path=str(root),
            )
            _publish(root, staging, manifest)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return Appended(generation.number, errors)


def _check(
    bundle: Bundle, record: AdapterRecord, factors: Mapping[str, tuple[Array, Array]]
) -> dict[str, RestoringModule]:
    """Return the bundle's modules that the adapter has, by path.

    Raises:
        BundleError: The adapter cannot be appended.
    """
    where = str(bundle.path)
    generation = bundle.generation
    if bundle.restores is None:
        raise RefitError(
            "the bundle holds one merged result, to which nothing can be appended; merge again "
            f"with {record.name!r}",
            path=where,
        )
    if record.name in {source.name for source in generation.sources}:
        raise AdapterInBundleError(
            f"holds an adapter {record.name!r} already; append it under another name, or merge "
            "again to replace it",
            path=where,
        )
    base = generation.base_model.id
    if None not in (base, record.base_model) and base != record.base_model:
        raise InvalidInputError(
            f"adapter {record.name!r} is for the base model {record.base_model!r}, the bundle for "
            f"{base!r}",
            path=where,
        )
    recorded = {module.path: module for module in record.modules}
    if differing := sorted(recorded.keys() ^ factors.keys()):
        raise InvalidInputError(
            f"its record and its factors differ in {differing[0]!r} and {len(differing) - 1} more",
            path=f"adapter {record.name!r}",
        )
    entries = {
        module.path: module
        for module in generation.modules
        if not isinstance(module, FactorsModule | DeltaModule)
    }
    if unseen := sorted(recorded.keys() - entries.keys()):
        raise RefitError(
            f"adapter {record.name!r} has module {unseen[0]!r} and {len(unseen) - 1} more that the "
            "bundle has not; merge again with it",
            path=where,
        )
    for module in record.modules:
        if module.kind != entries[module.path].kind:
            raise RefitError(
                f"adapter {record.name!r} has the module as {module.kind}, the bundle as "
                f"{entries[module.path].kind}; it was made for another base model",
                path=module.path,
            )
        _check_factors(record.name, module, factors[module.path])
    return {path: entries[path] for path in sorted(recorded)}


def _check_factors(name: str, module: RecordedModule, factors: tuple[Array, Array]) -> None:
    A, B = factors
    where = f"{module.path}, adapter {name!r}"
    if A.ndim != 2 or B.ndim != 2 or not len(A) == B.shape[1] == module.rank:
        raise InvalidInputError(
            f"expected A ({module.rank}, d_in) and B (d_out, {module.rank}), got shapes {A.shape} "
            f"and {B.shape}",
            path=where,
        )
    for factor, array in (("A", A), ("B", B)):
        check_finite(array, f"{where}, factor {factor}")


def _fit(
    bundle: Bundle,
    record: AdapterRecord,
    factors: Mapping[str, tuple[Array, Array]],
    modules: Mapping[str, RestoringModule],
    blob: AdapterBlob,
) -> dict[str, ModuleErrors]:
    """Fit every module, add it to `blob` and return what comes back of it."""
    recorded = {module.path: module for module in record.modules}
    folded = _folded(bundle, modules)
    errors = {}
    for path, entry in modules.items():
        source = recorded[path]
        shared = bundle.shared_tensors(entry)
        fit = fit_adapter(
            entry,
            shared,
            factors[path],
            source_scaling=source.source_scaling,
            scaling=folded.get(path, source.source_scaling),
            store_dtype=bundle.generation.store_dtype,
        )
        errors[path] = _measured(entry, shared, fit, factors[path], source, record.name)
        blob.add_module(
            path,
            fit.tensors,
            scaling=fit.scaling,
            restored_rank=fit.restored_rank,
            errors=errors[path],
        )
    return errors


def _measured(
    entry: RestoringModule,
    shared: Mapping[str, Array],
    fit: Fit,
    original: tuple[Array, Array],
    source: RecordedModule,
    name: str,
) -> ModuleErrors:
    restored = restore_module(
        entry,
        {**shared, **fit.tensors},
        scaling=fit.scaling,
        dtype=source.dtype,
        where=f"{entry.path}, adapter {name!r}",
    )
    return compare(
        original,
        restored,
        restores=entry.restores,
        source_scaling=source.source_scaling,
        scaling=fit.scaling,
    )


def _folded(bundle: Bundle, modules: Mapping[str, RestoringModule]) -> dict[str, float]:
    """Return the scaling that remains, by path, where scalings were folded into an affine basis.

    The bundle does not say so, but its adapters do: their restored factors are then used with
    another scaling than their sources'.
    """
    looked_at = {path for path, entry in modules.items() if entry.encoding == "affine_basis"}
    found: dict[str, float] = {}
    for name in bundle.adapters:
        if looked_at <= found.keys():
            break
        _, metadata = bundle.open_adapter(name)
        for record in metadata.modules:
            if record.path in looked_at and record.scaling not in (record.source_scaling, 0.0):
                found.setdefault(record.path, record.scaling)
    return found


def _generation(
    bundle: Bundle, record: AdapterRecord, blob: Descriptor, weight: float
) -> Generation:
    before = bundle.generation
    number = before.number + 1
    present = {module.path for module in record.modules}
    absent = tuple(module.path for module in before.modules if module.path not in present)
    fields = {
        **{name: getattr(before, name) for name in Generation.model_fields},
        "number": number,
        "parent": bundle.generations[-1].document.digest,
        "producer": Producer(name="unmerge", version=producer_version()),
        "absent": {**before.absent, **({record.name: absent} if absent else {})},
    }
    try:
        fields["sources"] = tuple(
            sorted(
                (*before.sources, Source(name=record.name, digest=record.digest, weight=weight)),
                key=lambda source: source.name,
            )
        )
        fields["adapters"] = tuple(
            sorted(
                (*before.adapters, AdapterEntry(name=record.name, generation=number, blob=blob)),
                key=lambda adapter: adapter.name,
            )
        )
        return Generation(**fields)
    except ValidationError as problem:
        raise InvalidInputError(first_problem(problem), path=str(bundle.path)) from problem


def _publish(root: Path, staging: Path, manifest: bytes) -> None:
    """Move the new files in, blobs first; nothing refers to them before `bundle.json` does."""
    for file in sorted((staging / "blobs").iterdir()):
        file.replace(root / "blobs" / file.name)
    flush_directory(root / "blobs")
    # The lock keeps writers of this machine out; a directory may be shared with others.
    if (root / MANIFEST_NAME).read_bytes() != manifest:
        raise BundleBusyError(
            "another writer has changed the bundle meanwhile, nothing is appended; try again",
            path=str(root),
        )
    (staging / MANIFEST_NAME).replace(root / MANIFEST_NAME)
    flush_directory(root)
