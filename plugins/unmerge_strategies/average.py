"""The weighted average of all adapters, exact in factor space."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from unmerge import Absent, LinearMerger, Merger, PartWeights
from unmerge.errors import ConfigError


class Average(LinearMerger, frozen=True):
    """The weighted average `Δ = Σ w_i Δ_i / Σ w_i`, as one adapter of rank Σ r_i.

    A module that some adapters lack gets nothing from them; whether their weights still count in
    the divisor is the field `absent`. `space="factors"` averages A and B apart, which is another
    rule: it has cross terms between adapters (MM-SVD paper, equation 3).

    Source: the averaging baseline of all four papers, on deltas.
    """

    method: ClassVar[str] = "average"

    absent: Absent = Field(
        default="zero",
        description="an adapter that lacks a module counts there as a zero delta, or not at all",
    )

    def coefficients(self, weights: PartWeights) -> list[float]:
        """Return `w_i / Σ w`.

        Raises:
            ConfigError: The weights sum to zero.
        """
        divisor = weights.total if self.absent == "zero" else sum(weights.values)
        # Relative: weights such as 0.1, 0.2, -0.3 sum to rounding noise, not to 0.
        if abs(divisor) <= 1e-12 * sum(abs(w) for w in weights.values):
            raise ConfigError(
                f"{weights.module}: the weights sum to 0, so there is no average; "
                "use task_arithmetic, which does not divide by them"
            )
        return [w / divisor for w in weights.values]

    def lossless(self) -> Merger:
        """Return itself: the average of one adapter is that adapter."""
        return self
