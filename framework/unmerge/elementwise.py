"""ElementwiseMerger: rules that look at one entry of all adapters at a time, given a few facts."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field

from unmerge.adapter import Factors
from unmerge.errors import CapabilityError, IncompatibleAdaptersError
from unmerge.kernels.counter import counter_uniform, stream_key
from unmerge.kernels.lowrank import delta_rows
from unmerge.merger import Capabilities, MergeContext, Merger, OutputSize, Passes
from unmerge.stack import FactorStack, ModuleShape, StackModule
from unmerge_bundle.encodings import DeltaEncoding, Encoding, FactorsEncoding

__all__ = ["Block", "Blocks", "ElementwiseMerger", "Part", "Space"]

Space = Literal["delta", "factors"]
Part = Literal["delta", "A", "B"]


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of one matrix of a module, for all adapters that have the module.

    Attributes:
        values: `(N, rows, cols)`, float32 or wider; not to be written to.
        weights: `(N,)` float64, on the device of `values`.
        adapters: The N adapter names, sorted.
        module: Module path.
        part: Which matrix: the "delta", or in `factors` space "A" or "B".
        row: Index of the first row in the whole matrix.
        shape: `(rows, cols)` of the whole matrix.
        space: The space the rule runs in.
        seed: Key of the merge's randomness.
    """

    values: torch.Tensor
    weights: torch.Tensor
    adapters: tuple[str, ...]
    module: str
    part: Part
    row: int
    shape: tuple[int, int]
    space: Space
    seed: int

    def uniform(self, label: str = "") -> torch.Tensor:
        """Return a uniform float64 in [0, 1) per entry, `(N, rows, cols)`.

        A function of (seed, label, adapter, module, part, row-major entry index) alone.
        """
        rows, cols = self.values.shape[1:]
        index = torch.arange(rows * cols, device=self.values.device) + self.row * cols
        draws = [
            counter_uniform(stream_key(self.seed, label, name, self.module, self.part), index)
            for name in self.adapters
        ]
        return torch.stack(draws).reshape(len(self.adapters), rows, cols)


class Blocks(Iterable[Block]):
    """Row blocks to be iterated as often as `measure` needs, always in the same order."""

    def __init__(self, blocks: Callable[[], Iterator[Block]]) -> None:
        self._blocks = blocks

    def __iter__(self) -> Iterator[Block]:
        return self._blocks()


class ElementwiseMerger(Merger, frozen=True, extra="forbid"):
    """A rule on one entry at a time, streamed over row blocks; never sees more than a block.

    `space="delta"` multiplies first and returns a `delta`; `space="factors"` applies the rule to
    A and B apart (direct merging: cross terms between adapters) and returns `factors`. There,
    each factor carries `sqrt(scaling)`, as PEFT's factor-space rules do, and equal ranks are
    required. Facts come from `measure`: per matrix, or once for all modules where
    `capabilities.needs_survey` is declared.
    """

    space: Space = Field(default="delta", description="where the rule is applied")

    @property
    def capabilities(self) -> Capabilities:
        """Deltas of any rank can be compared entry by entry; factors need one rank."""
        return Capabilities(mixed_ranks=self.space == "delta")

    def measure(self, blocks: Blocks, context: MergeContext) -> Any:  # noqa: ARG002
        """Return facts about all `blocks` (thresholds, say) for `combine`. Default: none."""
        return None

    @abstractmethod
    def combine(self, block: Block, state: Any) -> torch.Tensor:
        """Return the merged rows, `(rows, cols)`, from `block.values (N, rows, cols)`."""

    def survey(self, passes: Passes, context: MergeContext) -> Any:
        """Measure over the blocks of all modules, where the rule declares that it needs to."""
        if not self.capabilities.needs_survey:
            return None

        def blocks() -> Iterator[Block]:
            for stack in passes:
                for module in stack:
                    yield from self._blocks(module, context)

        return self.measure(Blocks(blocks), context)

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        """Stream the blocks of every module through `measure` and `combine`."""
        return [self._merge_module(module, context) for module in stack]

    def check(self, shape: ModuleShape, context: MergeContext) -> None:  # noqa: ARG002
        """Refuse mixed ranks in factor space, where entries have no common meaning."""
        if self.space == "factors" and len(set(shape.ranks)) > 1:
            ranks = ", ".join(str(rank) for rank in sorted(set(shape.ranks)))
            raise IncompatibleAdaptersError(
                f"{shape.path}: ranks {ranks} differ; {self.method} with space=factors needs "
                "equal ranks, space=delta does not"
            )

    def predict(self, shape: ModuleShape) -> OutputSize:
        """Return the elements of a dense delta, or of one pair of factors."""
        if self.space == "delta":
            return OutputSize(shared=shape.d_out * shape.d_in)
        return OutputSize(shared=max(shape.ranks) * (shape.d_out + shape.d_in))

    def _merge_module(self, module: StackModule, context: MergeContext) -> Encoding[torch.Tensor]:
        self.check(module.shape, context)
        merged: dict[Part, torch.Tensor] = {}
        for part in _parts(self.space):

            def blocks(part: Part = part) -> Iterator[Block]:
                return _part_blocks(module, part, self.space, context)

            if self.capabilities.needs_survey:
                state = context.state
            else:
                state = self.measure(Blocks(blocks), context)
            merged[part] = torch.cat([self._checked(block, state) for block in blocks()])
        if self.space == "delta":
            return DeltaEncoding(delta=merged["delta"])
        return FactorsEncoding(A=merged["A"], B=merged["B"])

    def _checked(self, block: Block, state: Any) -> torch.Tensor:
        rows = self.combine(block, state)
        if rows.shape != block.values.shape[1:]:
            raise CapabilityError(
                f"{self.method}.combine returned shape {tuple(rows.shape)} for a block of "
                f"{tuple(block.values.shape[1:])}"
            )
        return rows

    def _blocks(self, module: StackModule, context: MergeContext) -> Iterator[Block]:
        for part in _parts(self.space):
            yield from _part_blocks(module, part, self.space, context)


def _parts(space: Space) -> tuple[Part, ...]:
    return ("delta",) if space == "delta" else ("A", "B")


def _part_blocks(
    module: StackModule, part: Part, space: Space, context: MergeContext
) -> Iterator[Block]:
    shape = module.shape
    rank = max(shape.ranks)
    rows, cols = {
        "delta": (shape.d_out, shape.d_in),
        "A": (rank, shape.d_in),
        "B": (shape.d_out, rank),
    }[part]
    device = module.factors[0].A.device
    weights = torch.tensor(context.weights_of(module.adapters), dtype=torch.float64, device=device)
    for start in range(0, rows, context.block_rows):
        stop = min(start + context.block_rows, rows)
        yield Block(
            values=torch.stack([_rows(f, part, start, stop) for f in module.factors]),
            weights=weights,
            adapters=module.adapters,
            module=module.path,
            part=part,
            row=start,
            shape=(rows, cols),
            space=space,
            seed=context.seed,
        )


def _rows(factors: Factors, part: Part, start: int, stop: int) -> torch.Tensor:
    if part == "delta":
        return delta_rows(factors, start, stop)
    matrix = factors.A if part == "A" else factors.B
    rows = matrix[start:stop].to(torch.promote_types(matrix.dtype, torch.float32))
    # A negative scaling has its sign on A, so that the product keeps it.
    root = math.sqrt(abs(factors.scaling))
    return rows * (-root if part == "A" and factors.scaling < 0 else root)
