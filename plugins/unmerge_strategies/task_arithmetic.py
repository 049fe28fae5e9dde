"""Task arithmetic: the weighted sum of all adapters, exact in factor space."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from unmerge import Absent, Capabilities, LinearMerger, Merger, PartWeights


class TaskArithmetic(LinearMerger, frozen=True):
    """The weighted sum `Δ = λ Σ w_i Δ_i`, as one adapter of rank Σ r_i.

    The factors are concatenated, `B = [λ w_i s_i B_i]`, `A = [A_i]`: exact, no cross terms, no
    singular value decomposition. To get a smaller rank wrap it: `MmSvd(inner=TaskArithmetic())`.
    `space="factors"` adds A and B apart, with `√|λ w_i s_i|` on each and the signs on A, as PEFT's
    `linear` does: another rule, with cross terms between adapters.

    Source: arXiv 2212.04089 (task arithmetic on deltas). PEFT's `cat` is this in `delta` space.
    """

    method: ClassVar[str] = "task_arithmetic"

    scale: float = Field(
        default=1.0, allow_inf_nan=False, description="λ, applied to the whole sum"
    )
    absent: Absent = Field(
        default="zero",
        description="an adapter that lacks a module counts there as a zero delta, or not at all: "
        "the weights of the others are scaled up to the sum of all",
    )

    @property
    def capabilities(self) -> Capabilities:
        """As every linear rule; doubling a weight doubles that adapter's part of a delta."""
        return replace(
            super().capabilities,
            weight_scales_delta=self.space == "delta" and self.absent == "zero",
        )

    def coefficients(self, weights: PartWeights) -> list[float]:
        """Return `λ w_i`.

        Raises:
            ConfigError: To be renormalised, and the weights sum to zero.
        """
        scale = weights.scale(self.scale) * weights.renormalisation(self.absent)
        return [scale * w for w in weights.values]

    def lossless(self) -> Merger:
        """Return it with λ = 1."""
        return self.model_copy(update={"scale": 1.0})
