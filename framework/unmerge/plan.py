"""What a run would do, known before any tensor is read: selection, chunks, sizes, refusals."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from unmerge.arrays import DTYPES, dtype_name
from unmerge.chunking import Chunk, chunk_modules
from unmerge.errors import (
    AdapterNotInStoreError,
    ConfigError,
    IncompatibleAdaptersError,
    ModuleNotInAdapterError,
    UnmergeError,
)
from unmerge.merger import MergeContext, Merger, OutputSize
from unmerge.recipe import Recipe
from unmerge.stack import ModuleShape, one_kind
from unmerge.store import AdapterInfo, AdapterStore

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """What a run would do, known without reading a tensor.

    Attributes:
        sources: What the store says of the adapters, sorted by name.
        context: The weights and the seed of the merge.
        chunks: Modules that are merged together, in order.
        absent: Module paths that an adapter lacks, by adapter; adapters lacking none are left out.
        unmerged: Verbatim tensors a merged result cannot hold, by adapter.
        store_dtype: Dtype of stored tensors.
        input_elements: Elements of all adapters' factors.
        input_bytes: Their bytes as stored, verbatim tensors not counted.
        output: What all encodings will hold; `None` where the merger cannot tell.
        verbatim_bytes: Bytes of the verbatim tensors that go into the bundle.
        refusals: Why `run` would refuse, one line each; empty where it would not.
        advice: What the merger has to say about these modules, one line each.
        reversible: Whether the adapters come back from the bundle.
    """

    sources: tuple[AdapterInfo, ...]
    context: MergeContext
    chunks: tuple[Chunk, ...]
    absent: Mapping[str, tuple[str, ...]]
    unmerged: Mapping[str, tuple[str, ...]]
    store_dtype: str
    input_elements: int
    input_bytes: int
    output: OutputSize | None
    verbatim_bytes: int
    refusals: tuple[str, ...]
    advice: tuple[str, ...]
    reversible: bool

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters, sorted."""
        return tuple(info.name for info in self.sources)

    def source(self, name: str) -> AdapterInfo:
        """Return what the store says of adapter `name`."""
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[str, AdapterInfo]:
        return {info.name: info for info in self.sources}

    def having(self, path: str) -> list[str]:
        """Return the names of the adapters that have module `path`, sorted."""
        return [info.name for info in self.sources if path in info.modules]

    @property
    def modules(self) -> tuple[ModuleShape, ...]:
        """All modules, in the order in which they are merged."""
        return tuple(shape for chunk in self.chunks for shape in chunk.modules)

    @property
    def peak_bytes(self) -> int:
        """Most memory that a chunk takes."""
        return max(chunk.peak_bytes for chunk in self.chunks)

    @property
    def output_bytes(self) -> int | None:
        """Bytes of the stored tensors of all encodings."""
        if self.output is None:
            return None
        return self.output.total * DTYPES[self.store_dtype].itemsize + self.output.packed_bytes

    @property
    def element_ratio(self) -> float | None:
        """Stored elements relative to the adapters': the papers' storage ratio.

        `None` where they are unknown, or codes and masks are stored, which only bytes measure.
        """
        if self.output is None or self.output.packed_bytes:
            return None
        return self.output.total / self.input_elements

    @property
    def byte_ratio(self) -> float | None:
        """Stored bytes relative to the adapters', verbatim tensors left out on both sides."""
        return None if self.output_bytes is None else self.output_bytes / self.input_bytes

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know before running, one line each."""
        return (*self.advice, *self._size_warnings(), *self._content_warnings())

    def _size_warnings(self) -> Iterator[str]:
        up_to = "up to " if self.output is not None and self.output.at_most else ""
        for ratio, what in ((self.element_ratio, "elements"), (self.byte_ratio, "bytes")):
            if ratio is not None and (ratio > 1 or (self.reversible and ratio == 1)):
                yield (
                    f"the bundle would hold {up_to}{ratio:.0%} of the adapters' {what}: "
                    f"it {'may save' if up_to else 'saves'} nothing"
                )

    def _content_warnings(self) -> Iterator[str]:
        for name, paths in self.absent.items():
            yield f'"{name}" lacks {len(paths)} of {len(self.modules)} modules, such as {paths[0]}'
        if self.unmerged:
            keys = sorted({key for keys in self.unmerged.values() for key in keys})
            yield (
                f"{', '.join(self.unmerged)}: tensors that are no low-rank update are not merged: "
                + ", ".join(keys)
            )


def make_plan(store: AdapterStore, recipe: Recipe, *, memory_budget: int, workers: int) -> Plan:
    """Return the plan of running `recipe` over `store`; see `MergePipeline.plan`."""
    merger = recipe.merger
    sources = _select_adapters(store, recipe)
    paths = _select_modules(sources, recipe.modules)
    shapes = [_shape(path, sources) for path in paths]
    context = MergeContext(
        weights={info.name: recipe.weights.get(info.name, 1.0) for info in sources},
        seed=recipe.seed,
    )
    refusals = tuple(_refusals(recipe, context, sources, shapes))
    reversible = merger.capabilities.restores is not None
    chunks = chunk_modules(
        shapes, merger, adapters=len(sources), memory_budget=memory_budget, workers=workers
    )
    predicted = [None if refusals else merger.predict(shape) for shape in shapes]
    selected = [info.modules[path] for info in sources for path in paths if path in info.modules]
    absent = {info.name: tuple(p for p in paths if p not in info.modules) for info in sources}
    return Plan(
        sources=tuple(sources),
        context=context,
        chunks=tuple(chunks),
        absent={name: lacking for name, lacking in absent.items() if lacking},
        unmerged={i.name: tuple(i.verbatim) for i in sources if i.verbatim and not reversible},
        store_dtype=recipe.dtype or _widest([module.dtype for module in selected]),
        input_elements=sum(shape.elements for shape in shapes),
        input_bytes=sum((m.d_out + m.d_in) * m.rank * DTYPES[m.dtype].itemsize for m in selected),
        output=_total(predicted),
        verbatim_bytes=sum(info.verbatim_nbytes for info in sources) if reversible else 0,
        refusals=refusals,
        advice=() if refusals else tuple(merger.advise(shapes)),
        reversible=reversible,
    )


def _total(sizes: Sequence[OutputSize | None]) -> OutputSize | None:
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return None
    return OutputSize(
        shared=sum(size.shared for size in known),
        per_adapter=sum(size.per_adapter for size in known),
        packed_bytes=sum(size.packed_bytes for size in known),
        at_most=any(size.at_most for size in known),
    )


def _select_adapters(store: AdapterStore, recipe: Recipe) -> list[AdapterInfo]:
    infos = {info.name: info for info in store.list()}
    if not infos:
        raise ConfigError(f"{store.address}: the store holds no adapters; add some first")
    wanted = recipe.adapters or tuple(sorted(infos))
    for name in [*wanted, *recipe.weights]:
        if name not in infos:
            raise AdapterNotInStoreError(
                f'the store holds no adapter "{name}" (it holds {", ".join(sorted(infos))})'
            )
    for name in recipe.weights:
        if name not in wanted:
            raise ConfigError(f'a weight is given for "{name}", which is not selected')
    return [infos[name] for name in wanted]


def _select_modules(sources: Sequence[AdapterInfo], patterns: Sequence[str] | None) -> list[str]:
    union = sorted({path for info in sources for path in info.modules})
    for pattern in patterns or ():
        if not any(fnmatch.fnmatchcase(path, pattern) for path in union):
            raise ModuleNotInAdapterError(
                f'no module matches "{pattern}"; the first of {len(union)} is {union[0]}'
            )
    paths = [
        path
        for path in union
        if patterns is None or any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
    ]
    for info in sources:
        if not any(path in info.modules for path in paths):
            raise IncompatibleAdaptersError(
                f'adapter "{info.name}" has none of the {len(paths)} selected modules; '
                "leave it out with --adapters"
            )
    return paths


def _shape(path: str, sources: Sequence[AdapterInfo]) -> ModuleShape:
    having = [info.modules[path] for info in sources if path in info.modules]
    sizes = {(module.d_out, module.d_in) for module in having}
    if len(sizes) > 1:
        raise IncompatibleAdaptersError(
            f"{path}: adapters disagree on (d_out, d_in): {sorted(sizes)}; "
            "check that all used the same base model"
        )
    d_out, d_in = sizes.pop()
    names = tuple(info.name for info in sources if path in info.modules)
    kinds = [module.kind for module in having]
    kind = one_kind(path, zip(names, kinds, strict=True))
    ranks = tuple(module.rank for module in having)
    return ModuleShape(path, d_out, d_in, names, ranks, kind=kind)


def _refusals(
    recipe: Recipe,
    context: MergeContext,
    sources: Sequence[AdapterInfo],
    shapes: Sequence[ModuleShape],
) -> Iterator[str]:
    merger = recipe.merger
    capabilities = merger.capabilities
    if capabilities.needs_activations or capabilities.needs_base_weights:
        needed = "activations" if capabilities.needs_activations else "base weights"
        yield f"{merger.method} needs {needed}, which this pipeline does not provide"
    if capabilities.ignores_weights and recipe.weights:
        yield f"{merger.method} does not use weights; leave them out"
    if capabilities.restores is not None:
        selected = {shape.path for shape in shapes}
        for info in sources:
            left = [path for path in info.modules if path not in selected]
            if left:
                yield (
                    f'a restored "{info.name}" would lack {len(left)} of its modules, such as '
                    f"{left[0]}: {merger.method} restores whole adapters, so leave out the "
                    "selection of modules"
                )
                break
    # One line a reason, not a line a module.
    reasons: dict[str, list[str]] = {}
    for shape in shapes:
        reason = _refusal(merger, shape, context)
        if reason is not None:
            reasons.setdefault(reason.removeprefix(f"{shape.path}: "), []).append(shape.path)
    for reason, paths in reasons.items():
        others = f" (and {len(paths) - 1} more modules)" if len(paths) > 1 else ""
        yield f"{paths[0]}{others}: {reason}"


def _refusal(merger: Merger, shape: ModuleShape, context: MergeContext) -> str | None:
    try:
        merger.check(shape, context)
    except UnmergeError as error:
        return str(error)
    if len(set(shape.ranks)) > 1 and not merger.capabilities.mixed_ranks:
        ranks = ", ".join(str(rank) for rank in sorted(set(shape.ranks)))
        return f"ranks {ranks} differ, and {merger.method} does not say that it takes mixed ranks"
    return None


def _widest(names: Sequence[str]) -> str:
    widest = DTYPES[names[0]]
    for name in names[1:]:
        widest = torch.promote_types(widest, DTYPES[name])
    return dtype_name(widest)
