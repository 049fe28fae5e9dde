"""MergePipeline: from a store and a merger to a bundle, in chunks of same-shaped modules."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from unmerge.adapter import Factors
from unmerge.arrays import DTYPES, round_once, to_numpy
from unmerge.chunking import Chunk
from unmerge.errors import (
    CapabilityError,
    ConfigError,
    IncompatibleAdaptersError,
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
    GenerationInfo,
    ModuleErrors,
    RecordedModule,
    reconstruct,
    relative_errors,
)
from unmerge_bundle.arrays import FloatDtype
from unmerge_bundle.encodings import AffineBasisEncoding, Encoding

__all__ = ["MergePipeline", "Plan", "RunReport"]

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
        errors: Relative reconstruction errors by adapter and module; empty for a merged result.
    """

    path: Path
    plan: Plan
    elements: int
    nbytes: int
    total_bytes: int
    errors: Mapping[str, Mapping[str, ModuleErrors]] = field(default_factory=dict)

    @property
    def element_ratio(self) -> float:
        """Stored elements relative to the adapters'."""
        return self.elements / self.plan.input_elements


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
        plan = self.plan()
        if plan.refusals:
            raise IncompatibleAdaptersError("; ".join(plan.refusals))
        report = progress or _silent
        context = MergeContext(
            weights={name: self.recipe.weights.get(name, 1.0) for name in plan.adapters},
            seed=self.recipe.seed,
        )
        info = self._generation_info(plan, context)
        collected: dict[str, dict[str, ModuleErrors]] = {}
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
            done = 0
            total = len(plan.modules)
            report("merge", 0, total)
            for chunk in plan.chunks:
                stack = self._read(chunk, plan)
                tasks = [stack] if self.device.type != "cpu" else _split(stack)
                for results in pool.map(lambda part: self._merge_stack(part, plan, context), tasks):
                    for path, encoding, errors in results:
                        writer.add_module(path, encoding, errors=errors)
                        for name, measured in errors.items():
                            collected.setdefault(name, {})[path] = measured
                        done += 1
                        report("merge", done, total)
            summary = writer.finish(message=message)
        encoded = sum(summary.adapters.values(), start=summary.shared)
        return RunReport(
            path=Path(out),
            plan=plan,
            elements=encoded.elements,
            nbytes=encoded.bytes,
            total_bytes=summary.total,
            errors=collected,
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

    def _merge_stack(
        self, stack: FactorStack, plan: Plan, context: MergeContext
    ) -> list[tuple[str, Encoding[np.ndarray[Any, Any]], dict[str, ModuleErrors]]]:
        encodings = self.merger.merge(stack, context)
        if len(encodings) != len(stack):
            raise CapabilityError(
                f"{self.merger.method}.merge returned {len(encodings)} encodings for "
                f"{len(stack)} modules"
            )
        dtype = DTYPES[plan.store_dtype]
        results = []
        for module, encoding in zip(stack, encodings, strict=True):
            stored = encoding.map(
                lambda tensor, path=module.path: to_numpy(  # type: ignore[misc]
                    round_once(tensor, dtype, f"{path} ({self.merger.method})")
                )
            )
            errors = {}
            if isinstance(stored, AffineBasisEncoding):
                for name, original in module:
                    source = plan.source(name).modules[module.path]
                    errors[name] = _measure(module.path, name, original, stored, source.dtype)
            results.append((module.path, stored, errors))
        return results

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
                    RecordedModule(path=path, rank=m.rank, dtype=m.dtype, source_scaling=m.scaling)
                    for path, m in info.modules.items()
                    if path in selected
                ),
            ),
            {key: to_numpy(tensor) for key, tensor in self.store.read_verbatim(info.name).items()},
        )

    def _generation_info(self, plan: Plan, context: MergeContext) -> GenerationInfo:
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
                    "distribution": self._registry.distribution(merger),
                },
                "recipe": self.recipe.to_data(),
                "base_model": {"id": base_model, "revision": revision},
                "store_dtype": plan.store_dtype,
                "libraries": _library_versions(),
                "sources": [
                    {"name": i.name, "digest": i.digest, "weight": context.weights[i.name]}
                    for i in plan.sources
                ],
                "unmerged": {name: list(keys) for name, keys in plan.unmerged.items()},
                "absent": {name: list(paths) for name, paths in plan.absent.items()},
            }
        )


def _silent(phase: str, done: int, total: int) -> None:
    """Show no progress."""


def _measure(
    path: str,
    name: str,
    original: Factors,
    stored: AffineBasisEncoding[np.ndarray[Any, Any]],
    dtype: str,
) -> ModuleErrors:
    # The reader's own arithmetic, on the stored tensors and rounded to the source's dtype: the
    # recorded error is the one a user gets.
    return relative_errors(
        (to_numpy(original.A), to_numpy(original.B)),
        reconstruct(stored, name, dtype=cast(FloatDtype, dtype), path=path),
        source_scaling=original.scaling,
        scaling=stored.scalings[stored.names.index(name)],
    )


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


@contextmanager
def one_thread_per_task() -> Iterator[None]:
    """Give BLAS and LAPACK one thread a task: parallelism is over modules, bits do not vary."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
