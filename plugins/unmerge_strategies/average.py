"""The weighted average of all deltas, exact in factor space."""

from __future__ import annotations

from typing import ClassVar, Literal

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
from unmerge.errors import ConfigError
from unmerge.kernels import concatenate


class Average(Merger, frozen=True):
    """`Δ = Σ w_i Δ_i / Σ w_i`, as one adapter of rank Σ r_i.

    A module that some adapters lack gets nothing from them; whether their weights still count in
    the divisor is the field `absent`.

    Source: the averaging baseline of all four papers; on deltas, so without the cross terms of
    averaging A and B apart (MM-SVD paper, equation 3).
    """

    method: ClassVar[str] = "average"

    absent: Literal["zero", "renormalise"] = Field(
        default="zero",
        description="an adapter that lacks a module counts there as a zero delta, or not at all",
    )

    @property
    def capabilities(self) -> Capabilities:
        """Exact in factors for any ranks; weights are relative, so none scales its delta."""
        return Capabilities(factor_exact=True, mixed_ranks=True)

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        """Concatenate the factors of every module. O((d_out + d_in) Σ r_i) each.

        Raises:
            ConfigError: The weights sum to zero.
        """
        encodings: list[Encoding[torch.Tensor]] = []
        for module in stack:
            divisor = self._divisor(module.shape, context)
            weights = context.weights_of(module.adapters)
            A, B = concatenate(module.factors, [w / divisor for w in weights])
            encodings.append(FactorsEncoding(A=A, B=B))
        return encodings

    def check(self, shape: ModuleShape, context: MergeContext) -> None:
        """Refuse weights that sum to zero.

        Raises:
            ConfigError: They do.
        """
        self._divisor(shape, context)

    def _divisor(self, shape: ModuleShape, context: MergeContext) -> float:
        names = shape.adapters if self.absent == "renormalise" else context.adapters
        counted = context.weights_of(names)
        # Relative: weights such as 0.1, 0.2, -0.3 sum to rounding noise, not to 0.
        if abs(sum(counted)) <= 1e-12 * sum(abs(w) for w in counted):
            raise ConfigError(
                f"{shape.path}: the weights sum to 0, so there is no average; "
                "use task_arithmetic, which does not divide by them"
            )
        return sum(counted)

    def predict(self, shape: ModuleShape) -> OutputSize:
        """Return the elements of one adapter of rank Σ r_i."""
        return OutputSize(shared=shape.elements)
