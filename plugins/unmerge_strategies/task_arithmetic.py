"""Task arithmetic: the weighted sum of all deltas, exact in factor space."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from unmerge import (
    Capabilities,
    Encoding,
    FactorsEncoding,
    FactorStack,
    MergeContext,
    Merger,
    ModuleShape,
    OutputSize,
)
from unmerge.kernels import concatenate


class TaskArithmetic(Merger, frozen=True):
    """`Δ = λ Σ w_i Δ_i`, as one adapter of rank Σ r_i.

    The factors are concatenated, `B = [λ w_i s_i B_i]`, `A = [A_i]`: exact, no cross terms, no
    singular value decomposition. To get a smaller rank wrap it: `MmSvd(inner=TaskArithmetic())`.

    Source: arXiv 2212.04089 (task arithmetic on deltas). PEFT's `linear` adds A and B apart and
    so has cross terms between adapters; its `cat` is this.
    """

    method: ClassVar[str] = "task_arithmetic"

    scale: float = Field(
        default=1.0, allow_inf_nan=False, description="λ, applied to the whole sum"
    )

    @property
    def capabilities(self) -> Capabilities:
        """Exact in factors for any ranks; doubling a weight doubles that adapter's part."""
        return Capabilities(weight_scales_delta=True, factor_exact=True, mixed_ranks=True)

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        """Concatenate the factors of every module. O((d_out + d_in) Σ r_i) each."""
        encodings: list[Encoding[torch.Tensor]] = []
        for module in stack:
            weights = context.weights_of(module.adapters)
            A, B = concatenate(module.factors, [self.scale * w for w in weights])
            encodings.append(FactorsEncoding(A=A, B=B))
        return encodings

    def predict(self, shape: ModuleShape) -> OutputSize:
        """Return the elements of one adapter of rank Σ r_i."""
        return OutputSize(shared=shape.elements)
