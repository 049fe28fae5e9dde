"""Quantisation: every adapter on its own, its factors as 8- or 4-bit integers in groups."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from unmerge import (
    AdapterFactorsEncoding,
    Capabilities,
    Encoding,
    FactorStack,
    MergeContext,
    ModuleShape,
    OutputSize,
    QuantisedMatrix,
    ReversibleMerger,
    StackModule,
)
from unmerge.kernels.quantise import packed_columns, quantise


class Quantize(ReversibleMerger, frozen=True):
    """Every adapter alone, its factors as 8- or 4-bit integers in groups with a scale.

    Groups run along the rows of A and of Bᵀ, so that each belongs to one rank-one component of one
    adapter and takes that component's size; a group's step is its largest magnitude over 127
    (8 bits) or 7 (4 bits). Nothing is shared between adapters, scalings stay apart and as they
    were, and weights play no part. An entry is off by at most half a step: 0.4 % of the largest
    entry of its group with 8 bits, 7.2 % with 4.

    Steps are rounded to 8 significant bits, so that storing them in float32 or bfloat16 rounds
    nothing, and codes and steps fit together as stored; in float16 that holds for steps from
    6·10⁻⁵ on, and below it float32 or bfloat16 keep more.

    Source: symmetric absolute-maximum quantisation in groups, as in common 8- and 4-bit weight
    formats; no calibration data, no zero points.
    """

    method: ClassVar[str] = "quantize"

    bits: Literal[8, 4] = Field(default=8, description="bits per entry")
    group_size: int = Field(
        default=64, ge=1, description="consecutive entries of a row that share a step"
    )

    @property
    def capabilities(self) -> Capabilities:
        """Restores factors nearly as they were, whatever the weights and ranks."""
        return Capabilities(restores="factors", ignores_weights=True, mixed_ranks=True)

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:  # noqa: ARG002
        """Quantise every adapter of every module. O((d_out + d_in) Σ r_i) each.

        Raises:
            NonFiniteError: A factor holds NaN or infinity.
        """
        return [self._quantise(module) for module in stack]

    def predict(self, shape: ModuleShape) -> OutputSize:
        """Return the steps as elements and the codes as packed bytes."""
        ranks, sides = sum(shape.ranks), (shape.d_out, shape.d_in)
        return OutputSize(
            shared=0,
            per_adapter=ranks * sum(-(-side // self.group_size) for side in sides),
            packed_bytes=ranks * sum(packed_columns(side, self.bits) for side in sides),
        )

    def workspace_bytes(self, shape: ModuleShape) -> int:
        """Return all codes and steps, and of one matrix float64 copies of its padded rows."""
        size = self.predict(shape)
        side = max(shape.d_out, shape.d_in)
        padded = side + min(side, self.group_size)
        return size.packed_bytes + 8 * size.total + 40 * max(shape.ranks) * padded

    def _quantise(self, module: StackModule) -> AdapterFactorsEncoding[torch.Tensor]:
        def quantised(matrix: torch.Tensor) -> QuantisedMatrix[torch.Tensor]:
            return quantise(matrix, bits=self.bits, group_size=self.group_size)

        shape = module.shape
        return AdapterFactorsEncoding(
            names=module.adapters,
            scalings=tuple(f.scaling for f in module.factors),
            A=tuple(quantised(f.A) for f in module.factors),
            B_transposed=tuple(quantised(f.B.T) for f in module.factors),
            d_out=shape.d_out,
            d_in=shape.d_in,
        )
