"""Which modules are merged together: same-shaped ones, as many as the memory budget holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from unmerge.errors import MemoryBudgetError
from unmerge.merger import Merger
from unmerge.stack import ModuleShape

__all__ = ["Chunk", "chunk_modules"]

# Beyond this a larger chunk only delays the first result.
_TARGET_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Chunk:
    """Modules of one shape that are read, merged and written together.

    Attributes:
        modules: Their shapes, sorted by path.
        peak_bytes: Most memory that reading, merging and encoding them takes.
    """

    modules: tuple[ModuleShape, ...]
    peak_bytes: int

    @property
    def paths(self) -> tuple[str, ...]:
        """The module paths."""
        return tuple(shape.path for shape in self.modules)


def chunk_modules(
    shapes: Iterable[ModuleShape],
    merger: Merger,
    *,
    adapters: int,
    memory_budget: int,
    workers: int = 1,
) -> list[Chunk]:
    """Return the chunks of a merge, in the order in which they are merged and written.

    Modules are ordered by shape and path. The chunk boundaries depend on the budget, the order
    does not, so bundles are the same bytes for every budget.

    Args:
        shapes: All modules of the merge.
        merger: Declares its workspace per module.
        adapters: Number of adapters, N.
        memory_budget: Most bytes that a chunk may take.
        workers: Modules that are merged at the same time, each with a workspace of its own.

    Raises:
        MemoryBudgetError: A single module exceeds the budget; says which would be enough.
    """
    ordered = sorted(shapes, key=lambda shape: (shape.d_out, shape.d_in, shape.path))
    required = max((_peak_bytes([s], merger, adapters, workers) for s in ordered), default=0)
    if required > memory_budget:
        largest = max(ordered, key=lambda s: _peak_bytes([s], merger, adapters, workers))
        raise MemoryBudgetError(
            f"{largest.path} needs {required} bytes with {adapters} adapters, the memory budget "
            f"is {memory_budget}; the smallest budget that works is {required}",
            required=required,
        )
    chunks: list[Chunk] = []
    pending: list[ModuleShape] = []
    for shape in ordered:
        same = not pending or (pending[0].d_out, pending[0].d_in) == (shape.d_out, shape.d_in)
        peak = _peak_bytes([*pending, shape], merger, adapters, workers)
        if pending and (not same or peak > min(memory_budget, _TARGET_BYTES)):
            chunks.append(_chunk(pending, merger, adapters, workers))
            pending = []
        pending.append(shape)
    if pending:
        chunks.append(_chunk(pending, merger, adapters, workers))
    return chunks


def _chunk(shapes: list[ModuleShape], merger: Merger, adapters: int, workers: int) -> Chunk:
    return Chunk(modules=tuple(shapes), peak_bytes=_peak_bytes(shapes, merger, adapters, workers))


def _peak_bytes(shapes: list[ModuleShape], merger: Merger, adapters: int, workers: int) -> int:
    working = sorted((_working_bytes(s, merger) for s in shapes), reverse=True)[:workers]
    return sum(_held_bytes(s, merger, adapters) for s in shapes) + sum(working)


def _held_bytes(shape: ModuleShape, merger: Merger, adapters: int) -> int:
    """Bytes a module holds while its chunk is there: as read, padded in float32, and its result."""
    padded = adapters * max(shape.ranks) * (shape.d_out + shape.d_in)
    return 4 * (shape.elements + padded + _result_elements(shape, merger))


def _working_bytes(shape: ModuleShape, merger: Merger) -> int:
    """Bytes a module takes while it is read, merged and measured, besides what it holds."""
    result = _result_elements(shape, merger)
    reading = 8 * shape.elements  # decoded chunks, and rows copied out of them
    merging = 4 * shape.elements + merger.workspace_bytes(shape) + 8 * result
    return reading + max(merging, _measuring_bytes(shape, merger, result) + 8 * result)


def _measuring_bytes(shape: ModuleShape, merger: Merger, result: int) -> int:
    """Bytes that measuring what comes back, or what rounding changed, takes."""
    factors = max(shape.ranks) * (shape.d_out + shape.d_in)
    if merger.capabilities.restores is None:
        return 10 * 8 * result
    # Original, stored and difference of both factors in float64, and those side by side.
    of_factors = 10 * 8 * factors
    if merger.capabilities.restores == "factors":
        return of_factors
    dense = shape.d_out * shape.d_in
    # One restored delta, and row blocks of it and of the original in float64.
    return of_factors + 4 * dense + 3 * 8 * min(dense, 1 << 20)


def _result_elements(shape: ModuleShape, merger: Merger) -> int:
    """Elements of a module's encoding, packed bytes counted as if they were such."""
    output = merger.predict(shape)
    if output is None:
        return max(shape.d_out * shape.d_in, shape.elements)
    return output.total + output.packed_bytes // 4
