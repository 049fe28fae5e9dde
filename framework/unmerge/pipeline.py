"""MergePipeline: from a store and a merger to a bundle, in chunks of same-shaped modules."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unmerge.arrays import to_numpy
from unmerge.chunking import Chunk
from unmerge.errors import ConfigError, IncompatibleAdaptersError
from unmerge.execution import (
    MergedModule,
    is_packed,
    merge_stack,
    one_thread_per_task,
    reported_as,
)
from unmerge.merger import MergeContext, Merger, Passes
from unmerge.plan import Plan, make_plan
from unmerge.recipe import Recipe
from unmerge.registry import Registry, default_registry
from unmerge.stack import FactorStack
from unmerge.store import AdapterInfo, AdapterStore
from unmerge_bundle import (
    AdapterRecord,
    BundleWriter,
    DeltaEncoding,
    GenerationInfo,
    ModuleErrors,
    RecordedModule,
    check_message,
)

__all__ = ["MergePipeline", "Progress", "RunReport", "silent"]

Progress = Callable[[str, int, int], None]

_DEFAULT_BUDGET = 2 << 30


@dataclass(frozen=True)
class RunReport:
    """What a run did.

    Attributes:
        path: The bundle.
        plan: The plan it followed.
        elements: Elements stored for all encodings.
        nbytes: Bytes of those.
        total_bytes: Bytes of the whole bundle: verbatim tensors, configurations, manifest too.
        packed: Whether codes or masks are stored, which only bytes measure.
        errors: Relative reconstruction errors by adapter and module; empty for a merged result.
        facts: What the strategy has to say about each module, by path: iterations, truncation.
        rounding: Largest relative change, over the modules, of a merged delta by rounding to the
            stored dtype; 0 for a reversible bundle, whose errors include it.
        full_rank: Whether a module's result is a dense delta, which is no adapter.
    """

    path: Path
    plan: Plan
    elements: int
    nbytes: int
    total_bytes: int
    packed: bool
    errors: Mapping[str, Mapping[str, ModuleErrors]]
    facts: Mapping[str, Mapping[str, float]]
    rounding: float
    full_rank: bool

    @property
    def element_ratio(self) -> float | None:
        """Stored elements relative to the adapters'; `None` where codes or masks are stored."""
        return None if self.packed else self.elements / self.plan.input_elements

    @property
    def byte_ratio(self) -> float:
        """Bytes of the encodings relative to the adapters' factors as stored."""
        return self.nbytes / self.plan.input_bytes


class MergePipeline:
    """Runs one recipe over a store.

    Args:
        store: Where the adapters are read, at the version it was opened at.
        merger: The strategy, or its recipe such as `{"method": "rmm", "basis_size": 3}`.
        adapters: Names to merge; all of the store unless given.
        modules: Glob patterns of module paths; all modules unless given.
        weights: Weight per adapter; 1 where not given.
        seed: Key of all randomness.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
        memory_budget: Most bytes that a chunk may take.
        dtype: Dtype of stored tensors; the widest input dtype unless given.
        workers: Modules merged at the same time on the CPU; the number of cores unless given.
        registry: Where recipes look up strategies; all installed plugins unless given.

    Raises:
        ConfigError: An argument is wrong; nothing has been read.

    Results are bit-identical for any budget and number of workers.
    """

    def __init__(
        self,
        store: AdapterStore,
        merger: Merger | Mapping[str, Any],
        *,
        adapters: Sequence[str] | None = None,
        modules: Sequence[str] | None = None,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
        device: str = "auto",
        memory_budget: int | None = None,
        dtype: str | None = None,
        workers: int | None = None,
        registry: Registry | None = None,
    ) -> None:
        self._registry = default_registry() if registry is None else registry
        self.recipe = Recipe.from_data(
            {
                "merger": merger,
                "adapters": adapters,
                "modules": modules,
                "weights": dict(weights or {}),
                "seed": seed,
                "dtype": dtype,
            },
            registry=self._registry,
        )
        self.store = store
        self.device = _device(device)
        self.memory_budget = memory_budget if memory_budget is not None else _DEFAULT_BUDGET
        if self.memory_budget < 1:
            raise ConfigError(f"the memory budget is {memory_budget}, expected a positive number")
        if workers is not None and workers < 1:
            raise ConfigError(f"the number of workers is {workers}, expected at least 1")
        cores = workers if workers is not None else os.cpu_count() or 1
        self.workers = cores if self.device.type == "cpu" else 1

    @classmethod
    def from_recipe(
        cls,
        store: AdapterStore,
        recipe: Recipe,
        *,
        device: str = "auto",
        memory_budget: int | None = None,
        workers: int | None = None,
        registry: Registry | None = None,
    ) -> MergePipeline:
        """Return the pipeline that a recipe describes."""
        return cls(
            store,
            recipe.merger,
            adapters=recipe.adapters,
            modules=recipe.modules,
            weights=recipe.weights,
            seed=recipe.seed,
            dtype=recipe.dtype,
            device=device,
            memory_budget=memory_budget,
            workers=workers,
            registry=registry,
        )

    @property
    def _distribution(self) -> str:
        return self._registry.distribution(self.merger)

    @property
    def merger(self) -> Merger:
        """The strategy."""
        return self.recipe.merger

    def plan(self) -> Plan:
        """Return what `run` would do: a dry run that reads no tensor.

        Raises:
            AdapterNotInStoreError: An adapter, or a weight's adapter, is not there.
            ModuleNotInAdapterError: No module matches the patterns.
            IncompatibleAdaptersError: Adapters disagree on a module's shape, or one has none of
                the selected modules.
            MemoryBudgetError: One module exceeds the budget.
        """
        return make_plan(
            self.store, self.recipe, memory_budget=self.memory_budget, workers=self.workers
        )

    def run(
        self,
        out: str | Path,
        *,
        overwrite: bool = False,
        message: str = "",
        progress: Progress | None = None,
    ) -> RunReport:
        """Merge and write the bundle `out`, which appears complete or not at all.

        Args:
            out: Path of the bundle.
            overwrite: Replace an existing bundle.
            message: Free text kept with the bundle's first generation.
            progress: Called with a phase ("survey", "merge"), modules done and modules in all.

        Raises:
            UnmergeError: As `plan`, or while merging; the store and `out` are as before.
            OutputExistsError: `out` exists and `overwrite` was not given.
        """
        check_message(message)
        plan = self.plan()
        if plan.refusals:
            raise IncompatibleAdaptersError("; ".join(plan.refusals))
        report = progress or silent
        context = plan.context
        info = self._generation_info(plan)
        errors: dict[str, dict[str, ModuleErrors]] = {}
        facts: dict[str, dict[str, float]] = {}
        rounding: dict[str, float] = {}
        full_rank = packed = False
        with (
            one_thread_per_task(),
            BundleWriter(out, info=info, overwrite=overwrite) as writer,
            ThreadPoolExecutor(max_workers=self.workers) as pool,
        ):
            if self.merger.capabilities.needs_survey:
                context = self._survey(plan, context, report)
            if plan.reversible:
                for source in plan.sources:
                    self._add_adapter(writer, source, plan)
            total = len(plan.modules)
            report("merge", 0, total)
            for chunk in plan.chunks:
                for module in self._merge(chunk, plan, context, pool):
                    writer.add_module(
                        module.path, module.encoding, kind=module.kind, errors=module.errors
                    )
                    for name, measured in module.errors.items():
                        errors.setdefault(name, {})[module.path] = measured
                    rounding[module.path] = module.rounding
                    if module.encoding.facts:
                        facts[module.path] = dict(module.encoding.facts)
                    full_rank |= isinstance(module.encoding, DeltaEncoding)
                    packed |= is_packed(module.encoding)
                    report("merge", len(rounding), total)
            summary = writer.finish(message=message)
        encoded = sum(summary.adapters.values(), start=summary.shared)
        return RunReport(
            path=Path(out),
            plan=plan,
            elements=encoded.elements,
            nbytes=encoded.bytes,
            total_bytes=summary.total,
            packed=packed,
            errors=errors,
            facts=facts,
            rounding=max(rounding.values()),
            full_rank=full_rank,
        )

    def _survey(self, plan: Plan, context: MergeContext, report: Progress) -> MergeContext:
        total = len(plan.modules)

        def stacks() -> Iterator[FactorStack]:
            done = 0
            report("survey", 0, total)
            for chunk in plan.chunks:
                yield self._read(chunk, plan)
                done += len(chunk.modules)
                report("survey", done, total)

        with reported_as(f"{self.merger.method} (from {self._distribution}), survey"):
            state = self.merger.survey(Passes(stacks), context)
        return MergeContext(
            weights=context.weights,
            seed=context.seed,
            block_rows=context.block_rows,
            state=state,
        )

    def _read(self, chunk: Chunk, plan: Plan) -> FactorStack:
        modules = [(path, self.store.read_module(path, plan.having(path))) for path in chunk.paths]
        return FactorStack.build(modules, plan.adapters, device=self.device)

    def _merge(
        self, chunk: Chunk, plan: Plan, context: MergeContext, pool: Executor
    ) -> Iterator[MergedModule]:
        """Yield a chunk's modules in order; nothing of the chunk outlives the iteration."""
        stack = self._read(chunk, plan)
        parts = [stack] if self.device.type != "cpu" else _split(stack)
        task = functools.partial(
            merge_stack,
            self.merger,
            context=context,
            plan=plan,
            distribution=self._distribution,
        )
        for merged in pool.map(task, parts):
            yield from merged

    def _add_adapter(self, writer: BundleWriter, info: AdapterInfo, plan: Plan) -> None:
        selected = {shape.path for shape in plan.modules}
        writer.add_adapter(
            AdapterRecord(
                name=info.name,
                format=info.format,
                config=self.store.read_config(info.name),
                base_model=info.base_model,
                revision=info.revision,
                digest=info.digest,
                modules=tuple(
                    RecordedModule(
                        path=path,
                        rank=m.rank,
                        dtype=m.dtype,
                        source_scaling=m.scaling,
                        kind=m.kind,
                    )
                    for path, m in info.modules.items()
                    if path in selected
                ),
            ),
            {key: to_numpy(tensor) for key, tensor in self.store.read_verbatim(info.name).items()},
        )

    def _generation_info(self, plan: Plan) -> GenerationInfo:
        merger = self.merger
        bases = {(i.base_model, i.revision) for i in plan.sources if i.base_model}
        base_model, revision = (
            next(iter(bases)) if len(bases) == 1 else (self.store.base_model, self.store.revision)
        )
        return GenerationInfo.model_validate(
            {
                "strategy": {
                    "method": merger.method,
                    "version": merger.version,
                    "distribution": self._distribution,
                },
                "recipe": self.recipe.to_data(),
                "base_model": {"id": base_model, "revision": revision},
                "store_dtype": plan.store_dtype,
                "libraries": _library_versions(),
                "sources": [
                    {"name": i.name, "digest": i.digest, "weight": plan.context.weights[i.name]}
                    for i in plan.sources
                ],
                "unmerged": {name: list(keys) for name, keys in plan.unmerged.items()},
                "absent": {name: list(paths) for name, paths in plan.absent.items()},
            }
        )


def silent(phase: str, done: int, total: int) -> None:
    """Show no progress."""


def _split(stack: FactorStack) -> list[FactorStack]:
    return [stack.narrow(index) for index in range(len(stack))]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f'"{name}" is no device; use auto, cpu, cuda or cuda:N') from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f'device "{name}" is not supported; use auto, cpu, cuda or cuda:N')
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f'device "{name}" was asked for, but no CUDA device is available')
    return device


def _library_versions() -> dict[str, str]:
    names = ("unmerge", "torch", "numpy", "ml_dtypes", "safetensors", "zarr", "icechunk")
    return {name: importlib.metadata.version(name) for name in names}
