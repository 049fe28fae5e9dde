"""Checks a whole bundle and lists everything wrong with it, instead of stopping at the first."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from unmerge_bundle.arrays import Array
from unmerge_bundle.blob import BlobReader
from unmerge_bundle.errors import (
    BundleError,
    DigestMismatchError,
    NotABundleError,
    ReconstructionMismatchError,
    TensorMismatchError,
)
from unmerge_bundle.measure import compare
from unmerge_bundle.model import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Descriptor,
    Generation,
    Manifest,
    parse_manifest,
)
from unmerge_bundle.modules import check_tensor
from unmerge_bundle.reader import Bundle, load_generation, read_limited
from unmerge_bundle.restored import AnyRestored, RestoredModule

__all__ = ["UNKNOWN_SOURCE", "Depth", "Problem", "VerifyReport", "verify"]

# A problem of a report, never an error raised: only the caller's digests can be without a source.
UNKNOWN_SOURCE = "unknown-source"

Depth = Literal["structure", "digests", "reconstruction"]
Originals: TypeAlias = Callable[[str], Mapping[str, tuple[Array, Array]]]

# Recorded errors may have been measured by another BLAS, or on another device.
_ABSOLUTE = 1e-6
_RELATIVE = 1e-3


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: a stable code, where, and what.

    The codes are those of the errors, and `unknown-source`.
    """

    code: str
    path: str
    message: str


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        path: The bundle.
        depth: How far it was checked.
        problems: Everything wrong, in the order it was met.
        generations: Number of generations checked.
        blobs: Number of distinct safetensors blobs checked.
        sources: Number of sources whose digest was compared with that of the original.
        adapters: Number of adapters restored (0 unless the depth is "reconstruction").
        compared: Number of those compared with their originals, module by module.
        left_out: Sorted paths of modules that compared originals have and the generation lists
            for no adapter: they were not merged, and nothing is compared in them.
    """

    path: str
    depth: Depth
    problems: tuple[Problem, ...] = ()
    generations: int = 0
    blobs: int = 0
    sources: int = 0
    adapters: int = 0
    compared: int = 0
    left_out: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(
    path: str | os.PathLike[str],
    depth: Depth = "digests",
    originals: Originals | None = None,
    digests: Mapping[str, str] | None = None,
) -> VerifyReport:
    """Check every generation of the bundle at `path`, and the current one against its originals.

    What is compared with originals is counted in the report: `sources` for digests, `compared`
    for factors. A merged result has no adapters to compare, so that its digests are all there is.

    Args:
        path: The bundle.
        depth: "structure" checks documents, sizes and headers of blobs; "digests" also every
            byte of every blob; "reconstruction" also restores every adapter of the current
            generation, or reads the merged result, and checks that all values are finite.
        originals: Gives an adapter's original factors, `(A, B)` by module path, from its name;
            with it, and depth "reconstruction", the recorded errors are measured again (within
            1e-6 absolute plus 1e-3 relative). It must have every module the adapter is restored
            in, and no other that the generation lists; modules that the generation lists for no
            adapter were left out of the merge, not lost in it, and are reported in `left_out`.
        digests: Digests of the originals by name, such as a store has them, at any depth. Every
            source of the current generation must be there (else `unknown-source`) and have that
            digest (else `digest-mismatch`); `originals` is not asked for those that fail.

    Returns:
        The report; a bundle that cannot even be opened is a report with that one problem.

    Raises:
        ValueError: `originals` is given with another depth, where it would have no effect.
    """
    if originals is not None and depth != "reconstruction":
        raise ValueError(f'originals need depth "reconstruction", got {depth!r}')
    run = _Run(Path(path), depth)
    with run.collecting():
        run.check(originals, digests)
    return VerifyReport(
        path=str(path),
        depth=depth,
        problems=tuple(run.problems),
        generations=run.generations,
        blobs=len(run.seen),
        sources=run.sources,
        adapters=run.adapters,
        compared=run.compared,
        left_out=tuple(sorted(run.left_out)),
    )


@dataclass
class _Run:
    root: Path
    depth: Depth
    problems: list[Problem] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    checked: set[tuple[object, ...]] = field(default_factory=set)
    generations: int = 0
    sources: int = 0
    adapters: int = 0
    compared: int = 0
    left_out: set[str] = field(default_factory=set)
    not_original: set[str] = field(default_factory=set)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Turn a bundle's error into a problem of the report, and go on behind the block."""
        try:
            yield
        except BundleError as error:
            message = str(error).removeprefix(f"{error.path}: ")
            self.report(Problem(error.code, error.path, message))

    def report(self, problem: Problem) -> None:
        """Add `problem`, unless it is there: a bad shared blob spoils every adapter."""
        if problem not in self.problems:
            self.problems.append(problem)

    def check(self, originals: Originals | None, digests: Mapping[str, str] | None) -> None:
        file = self.root / MANIFEST_NAME
        if not file.is_file():
            raise NotABundleError(f"no {MANIFEST_NAME} here", path=str(self.root))
        data = read_limited(file, MAX_MANIFEST_BYTES, str(file))
        manifest = parse_manifest(data, where=str(file))
        current = self._check_generations(manifest)
        if current is not None and digests is not None:
            self._compare_sources(current, digests)
        if self.depth == "reconstruction" and current is not None:
            self._reconstruct(current, originals)

    def _check_generations(self, manifest: Manifest) -> Bundle | None:
        """Check all generations; return the current one, unless its document is bad."""
        parent: str | None = None
        bundle: Bundle | None = None
        before: Generation | None = None
        for entry in manifest.generations:
            bundle = None
            with self.collecting():
                generation = load_generation(self.root, entry, parent)
                bundle = Bundle(self.root, manifest.generations[: entry.number], generation)
                # An append changes neither; then blobs that were checked need not be again, which
                # would take the square of the number of generations.
                if before is None or (before.modules, before.store_dtype) != (
                    generation.modules,
                    generation.store_dtype,
                ):
                    self.checked.clear()
                before = generation
                self._check_blobs(bundle)
            parent = entry.document.digest
            self.generations += 1
        return bundle

    def _check_blobs(self, bundle: Bundle) -> None:
        dtype = bundle.generation.store_dtype
        for index, descriptor in enumerate(bundle.generation.shared):
            if self._is_checked(index, descriptor):
                continue
            with self.collecting():
                blob = self._open(bundle, descriptor)
                for entry in bundle.generation.modules:
                    if entry.blob == index:
                        for tensor, layout in entry.shared_layout().items():
                            name = f"modules/{entry.path}/{tensor}"
                            check_tensor(name, blob.array(name), layout, dtype, where=blob.where)
        digests = {source.name: source.digest for source in bundle.generation.sources}
        for adapter in bundle.generation.adapters:
            absent = bundle.generation.absent.get(adapter.name, ())
            if self._is_checked(adapter.blob, adapter.name, digests[adapter.name], absent):
                continue
            with self.collecting():
                blob = self._open(bundle, adapter.blob)
                metadata = bundle.adapter_metadata(adapter.name, blob)
                for entry, record in bundle.records(metadata):
                    for tensor, layout in entry.adapter_layout(record.restored_rank).items():
                        name = f"modules/{entry.path}/{tensor}"
                        check_tensor(name, blob.array(name), layout, dtype, where=blob.where)
                for key in metadata.verbatim:
                    blob.array(f"verbatim/{key}")
                bundle.recorded_errors(blob, metadata)

    def _is_checked(self, *what: object) -> bool:
        """Return whether this was asked for before, among generations of the same modules."""
        known = what in self.checked
        self.checked.add(what)
        return known

    def _open(self, bundle: Bundle, descriptor: Descriptor) -> BlobReader:
        blob = bundle.open_blob(descriptor)
        if self.depth != "structure" and descriptor.digest not in self.seen:
            blob.check_digest(descriptor.digest)
        self.seen.add(descriptor.digest)
        return blob

    def _compare_sources(self, bundle: Bundle, digests: Mapping[str, str]) -> None:
        for source in bundle.generation.sources:
            where = f"source {source.name!r}"
            found = digests.get(source.name)
            if found is None:
                self.report(
                    Problem(
                        UNKNOWN_SOURCE,
                        where,
                        f"expected an original with digest {source.digest}, there is none of that "
                        "name; compare with the store it was merged from",
                    )
                )
            else:
                self.sources += 1
                if found != source.digest:
                    self.report(
                        Problem(
                            DigestMismatchError.code,
                            where,
                            f"expected an original with digest {source.digest}, got {found}; it is "
                            "another adapter, or was changed since the merge",
                        )
                    )
            if found != source.digest:
                self.not_original.add(source.name)

    def _reconstruct(self, bundle: Bundle, originals: Originals | None) -> None:
        if bundle.restores is None:
            with self.collecting():
                bundle.merged()
            return
        for name in bundle.adapters:
            with self.collecting():
                compared = originals is not None and name not in self.not_original
                self._check_adapter(
                    bundle, name, originals(name) if originals is not None and compared else None
                )

    def _check_adapter(
        self, bundle: Bundle, name: str, factors: Mapping[str, tuple[Array, Array]] | None
    ) -> None:
        """Restore an adapter, one module at a time, and compare it with `factors` if given."""
        if factors is not None:
            listed = bundle.modules.keys()
            own = frozenset(bundle.generation.adapter_paths(name))
            self.left_out |= factors.keys() - listed
            # Listed, but not for this adapter: the bundle says that the original lacks the module.
            if differing := sorted((factors.keys() & listed) ^ own):
                message = (
                    f"the original and the restored adapter differ in module {differing[0]!r} "
                    f"and {len(differing) - 1} more; is it the right original?"
                )
                self.report(Problem(TensorMismatchError.code, f"adapter {name!r}", message))
                factors = None
        for path, module in bundle.restore_modules(name):
            if factors is not None:
                with self.collecting():
                    _compare_module(f"{path}, adapter {name!r}", module, factors[path])
        self.adapters += 1
        self.compared += factors is not None


def _compare_module(where: str, module: AnyRestored, original: tuple[Array, Array]) -> None:
    restored, scaling = (
        ((module.A, module.B), module.scaling)
        if isinstance(module, RestoredModule)
        else (module.delta, 1.0)
    )
    try:
        measured = compare(
            original,
            restored,
            restores="delta" if module.errors.factors is None else "factors",
            source_scaling=module.source_scaling,
            scaling=scaling,
        )
    except ValueError as problem:
        raise TensorMismatchError(str(problem), path=where) from problem
    for kind, recorded, found in (
        ("factor", module.errors.factors, measured.factors),
        ("delta", module.errors.delta, measured.delta),
    ):
        if recorded is not None and found is not None:
            _compare(where, kind, recorded, found)


def _compare(where: str, kind: str, recorded: float, found: float) -> None:
    if recorded == found:  # both infinite, too
        return
    allowed = _ABSOLUTE + _RELATIVE * recorded
    if math.isinf(recorded) or not abs(found - recorded) <= allowed:
        raise ReconstructionMismatchError(
            f"{kind} error is {found:.6g}, the bundle records {recorded:.6g}; the original or the "
            "bundle is not what it was",
            path=where,
        )
