"""Iso-C: the sum of all deltas with every direction made equally strong."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field

from unmerge import (
    Absent,
    Capabilities,
    Encoding,
    FactorsEncoding,
    FactorStack,
    MergeContext,
    Merger,
    ModuleShape,
    OutputSize,
    PartWeights,
)
from unmerge.kernels import concatenate, svd_of_product
from unmerge.kernels.cores import STORED_PRECISION, compact, numerical_rank


class IsoC(Merger, frozen=True):
    """The weighted sum with a flat spectrum: `Δ = λ s̄ U Vᵀ` where `Σ w_i Δ_i = U S Vᵀ`.

    s̄ is the mean singular value. Mean and directions run over the numerical rank: singular values
    up to 1e-7 of the largest are rounding of stored factors, which this rule would lift to the size
    of the rest. The paper takes min(d_out, d_in) directions, of which a sum of adapters leaves all
    but Σ r_i arbitrary.

    There is no identity law: one adapter comes back with its singular values replaced by their
    mean.

    Source: "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces"
    (arXiv 2502.04959), section 4. Its λ is tuned on validation data; 1 is the default here.
    """

    method: ClassVar[str] = "iso_c"

    scale: float = Field(
        default=1.0, allow_inf_nan=False, description="λ, the factor of the whole delta"
    )
    absent: Absent = Field(
        default="zero",
        description="an adapter that lacks a module counts there as a zero delta, or not at all",
    )

    @property
    def capabilities(self) -> Capabilities:
        """Exact in factors for any ranks and gauges; not linear in any one adapter."""
        return Capabilities(factor_exact=True, mixed_ranks=True, gauge_invariant=True)

    def check(self, shape: ModuleShape, context: MergeContext) -> None:
        """Refuse weights that cannot be renormalised.

        Raises:
            ConfigError: They sum to zero.
        """
        PartWeights.of_deltas(shape, context).renormalised(self.absent)

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        """Flatten the spectrum of every module's sum. O((d_out + d_in) R² + R³), R = Σ r_i.

        Raises:
            ConfigError: The weights cannot be renormalised.
            NonFiniteError: A sum is not finite.
        """
        merged: list[Encoding[torch.Tensor]] = []
        for module in stack:
            A, B = concatenate(
                module.factors,
                PartWeights.of_deltas(module.shape, context).renormalised(self.absent),
            )
            svd = svd_of_product(B, A, min(B.shape[0], *A.shape))
            rank = numerical_rank(svd.spectrum, STORED_PRECISION)
            kept = compact(svd, rank)
            mean = kept.S.mean()
            flat = replace(kept, S=mean.expand_as(kept.S))
            A, B = flat.factors("balanced")
            facts = {"rank": float(rank), "mean_singular_value": float(mean)}
            merged.append(FactorsEncoding(A=A, B=self.scale * B, facts=facts))
        return merged

    def predict(self, shape: ModuleShape) -> OutputSize:
        """Return at most what is stored: the elements of one adapter of rank Σ r_i."""
        rank = min(sum(shape.ranks), shape.d_out, shape.d_in)
        return OutputSize(shared=rank * (shape.d_out + shape.d_in), at_most=True)

    def workspace_bytes(self, shape: ModuleShape) -> int:
        """Return float64 factors, reflectors and results, and the core with its SVD."""
        total = sum(shape.ranks)
        return 8 * (4 * shape.elements + 4 * min(total, shape.d_out) * min(total, shape.d_in))
