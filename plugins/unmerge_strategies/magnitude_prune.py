"""Magnitude pruning: each adapter's largest entries, then the weighted sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field

from unmerge import (
    Absent,
    Block,
    Capabilities,
    MergeContext,
    Merger,
    ModuleShape,
    PartWeights,
    TrimmingMerger,
)
from unmerge.kernels import Cut


class MagnitudePrune(TrimmingMerger, frozen=True):
    """Task arithmetic on the largest entries of every adapter: `Δ = λ Σ w_i trim(Δ_i)`.

    Exactly `⌊density · numel⌋` entries of each adapter are kept as they are, the others are 0.

    Source: PEFT's `magnitude_prune`, which works on A and B apart (`space="factors"` here) and
    has no λ.
    """

    method: ClassVar[str] = "magnitude_prune"

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
        """Trimming looks at one adapter alone, so the sum stays linear in the weights."""
        return replace(
            super().capabilities,
            weight_scales_delta=self.space == "delta" and self.absent == "zero",
            sign_equivariant=True,
        )

    def check(self, shape: ModuleShape, context: MergeContext) -> None:
        """Refuse weights that cannot be renormalised, and mixed ranks in factor space.

        Raises:
            ConfigError: They are to be renormalised, and sum to zero.
        """
        super().check(shape, context)
        for part in ("A", "B") if self.space == "factors" else (self.space,):
            weights = PartWeights.of(shape.path, shape.adapters, part, context)
            weights.renormalisation(self.absent)

    def combine(self, block: Block, state: Mapping[str, Cut]) -> torch.Tensor:
        """Return the weighted sum of what is kept.

        Raises:
            ConfigError: To be renormalised, and the weights sum to zero.
        """
        weights = block.part_weights
        scale = weights.scale(self.scale) * weights.renormalisation(self.absent)
        total = torch.zeros_like(block.values[0])
        for values, weight in zip(self.trimmed(block, state), weights.values, strict=True):
            total += (scale * weight) * values
        return total

    def lossless(self) -> Merger:
        """Return it with everything kept and λ = 1."""
        return self.model_copy(update={"density": 1.0, "scale": 1.0})
