"""ElementwiseMerger: rules that look at one entry of all adapters at a time, given a few facts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator, Field, PlainSerializer

from unmerge.errors import CapabilityError, IncompatibleAdaptersError
from unmerge.kernels.lowrank import TILE_ROWS
from unmerge.matrices import BLOCK_BYTES, Block, Blocks, Matrices, Space, module_matrices
from unmerge.merger import Capabilities, MergeContext, Merger, OutputSize, Passes
from unmerge.stack import FactorStack, ModuleShape, StackModule
from unmerge_bundle.encodings import DeltaEncoding, Encoding, FactorsEncoding

__all__ = ["ElementwiseMerger", "InnerRule", "SignEquivariantRule"]


class ElementwiseMerger(Merger, frozen=True, extra="forbid"):
    """A rule on one entry at a time, streamed over row blocks; never sees more than a block.

    `space="delta"` multiplies first and returns a `delta`; `space="factors"` applies the rule to
    A and B apart (direct merging: cross terms between adapters) and returns `factors`. There,
    each factor carries `sqrt(scaling)` and the square root of the weight, as in PEFT's rules, and
    equal ranks are required. A wrapper runs the rule on matrices of its own. Facts come from
    `measure`: per matrix, or once for all modules where `capabilities.needs_survey` is declared.

    Class attributes:
        bytes_per_value: Most bytes that one value of a block takes while it is measured or
            combined, the float32 value itself included.
    """

    bytes_per_value: ClassVar[int] = 24

    space: Space = Field(default="delta", description="where the rule is applied")

    @property
    def capabilities(self) -> Capabilities:
        """Deltas of any rank can be compared entry by entry; factors need one rank."""
        return Capabilities(
            mixed_ranks=self.space == "delta", gauge_invariant=self.space == "delta"
        )

    def measure(self, blocks: Blocks, context: MergeContext) -> Any:  # noqa: ARG002
        """Return facts about all `blocks` (thresholds, say) for `combine`. Default: none."""
        return None

    @abstractmethod
    def combine(self, block: Block, state: Any) -> torch.Tensor:
        """Return the merged rows, `(rows, cols)`, from `block.values (N, rows, cols)`."""

    def survey(self, passes: Passes, context: MergeContext) -> Any:
        """Measure over the blocks of all modules, where the rule declares that it needs to."""
        return self.survey_matrices(
            lambda: (
                matrices
                for stack in passes
                for module in stack
                for matrices in module_matrices(module, self.space, context)
            ),
            context,
        )

    def survey_matrices(
        self, passes: Callable[[], Iterable[Matrices]], context: MergeContext
    ) -> Any:
        """Measure over the matrices of all modules, where the rule declares that it needs to.

        Args:
            passes: Starts one pass over the matrices of all modules, at each call.
            context: As for `measure`.
        """
        if not self.capabilities.needs_survey:
            return None

        def blocks() -> Iterator[Block]:
            for matrices in passes():
                yield from matrices.blocks(context.block_rows)

        return self.measure(Blocks(blocks), context)

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        """Stream the blocks of every module through `measure` and `combine`."""
        return [self._merge_module(module, context) for module in stack]

    def merge_matrices(self, matrices: Matrices, context: MergeContext) -> torch.Tensor:
        """Return the merged matrix, `(rows, cols)`, in the dtype that `combine` returns.

        What a wrapper calls to apply the rule to matrices of its own; `context.state` is what
        `survey_matrices` returned.
        """
        height = context.block_rows
        if self.capabilities.needs_survey:
            state = context.state
        else:
            state = self.measure(Blocks(lambda: matrices.blocks(height)), context)
        merged: torch.Tensor | None = None
        for block in matrices.blocks(height):
            rows = self.combine(block, state)
            if rows.shape != block.values.shape[1:]:
                raise CapabilityError(
                    f"{self.method}.combine returned shape {tuple(rows.shape)} for a block of "
                    f"{tuple(block.values.shape[1:])}"
                )
            if merged is None:
                merged = rows.new_empty(matrices.shape)
            merged[block.row : block.row + rows.shape[0]] = rows
        if merged is None:
            raise CapabilityError(f"{matrices.module}: {self.method} was given matrices of no rows")
        return merged

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

    def workspace_bytes(self, shape: ModuleShape) -> int:
        """Return the bytes of a row block in work and of the merged matrix."""
        return self.matrix_bytes(len(shape.ranks), shape.d_out, shape.d_in)

    def matrix_bytes(self, adapters: int, rows: int, cols: int) -> int:
        """Return the most bytes that `merge_matrices` needs, its float32 result included.

        What a wrapper counts for its inner rule; float64 matrices need twice as many.
        """
        block = max(BLOCK_BYTES // 4, TILE_ROWS * adapters * cols)
        return self.bytes_per_value * min(block, adapters * rows * cols) + 4 * rows * cols

    def _merge_module(self, module: StackModule, context: MergeContext) -> Encoding[torch.Tensor]:
        self.check(module.shape, context)
        merged = [
            self.merge_matrices(matrices, context)
            for matrices in module_matrices(module, self.space, context)
        ]
        if self.space == "delta":
            return DeltaEncoding(delta=merged[0])
        return FactorsEncoding(A=merged[0], B=merged[1])


def _without_space(rule: ElementwiseMerger) -> ElementwiseMerger:
    if "space" in rule.model_fields_set:
        raise ValueError(
            f'"{rule.method}" runs in the space of the strategy around it; leave its space out'
        )
    return rule


def _recipe_without_space(rule: ElementwiseMerger) -> dict[str, Any]:
    return {key: value for key, value in rule.recipe().items() if key != "space"}


def _turns_with_signs(rule: ElementwiseMerger) -> ElementwiseMerger:
    if not rule.capabilities.sign_equivariant:
        raise ValueError(
            f'"{rule.method}" with these fields does not turn with the signs of its input, which '
            "are arbitrary in a singular basis; with ties use zero_vote=drop"
        )
    return rule


InnerRule = Annotated[
    ElementwiseMerger, AfterValidator(_without_space), PlainSerializer(_recipe_without_space)
]
"""Field type of a wrapper that runs an elementwise rule on matrices of its own: the rule or its
recipe, without a `space`, which the wrapper decides."""

SignEquivariantRule = Annotated[InnerRule, AfterValidator(_turns_with_signs)]
"""An `InnerRule` for a basis whose signs are arbitrary: it must declare `sign_equivariant`."""
