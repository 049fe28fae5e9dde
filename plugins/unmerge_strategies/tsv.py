"""TSV-M: the leading directions of every delta, decorrelated between adapters, then summed."""

from __future__ import annotations

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
    StackModule,
)
from unmerge.kernels import concatenate, orthonormal_core, svd_of_product
from unmerge.kernels.cores import STORED_PRECISION, compact, numerical_rank


class Tsv(Merger, frozen=True):
    """The singular vectors of all adapters, made orthonormal: `Δ = λ U⊥ Σ V⊥ᵀ`.

    Of every delta the leading k singular triplets are kept. `U = [U_1 … U_N]` and `V` likewise are
    replaced by their polar factors, the nearest matrices with orthonormal columns, so that no
    adapter's directions overlap another's; `Σ = diag(w_1 Σ_1, …, w_N Σ_N)`. Everything happens in
    factors, with cores of size Σ k_i.

    Each `Δ_i` is taken times its weight: a negative one subtracts, and an adapter with weight 0,
    or without the module, has no directions that others would have to avoid. Singular values up to
    1e-7 of a delta's largest, and null directions of U and V (adapters given twice), carry no
    direction at float32 and are left out; public code completes them arbitrarily.

    Source: "Task Singular Vectors: Reducing Task Interference in Model Merging" (arXiv
    2412.00081), TSV-Merge, Algorithm 1. k there is ⌊min(d_out, d_in) / N⌋, made for full
    fine-tuning; here N counts the adapters that have the module, and k is at most r_i and at least
    1.
    """

    method: ClassVar[str] = "tsv"

    rank: int | None = Field(
        default=None,
        ge=1,
        description="k, directions kept of each adapter; unless given, its rank, or "
        "min(d_out, d_in) / adapters where that is less",
    )
    scale: float = Field(
        default=1.0, allow_inf_nan=False, description="λ, the factor of the whole delta"
    )
    absent: Absent = Field(
        default="zero",
        description="an adapter that lacks a module counts there as a zero delta, or not at all",
    )

    @property
    def capabilities(self) -> Capabilities:
        """Exact in factors for any ranks and gauges; with a weight 0, others' parts change."""
        return Capabilities(factor_exact=True, mixed_ranks=True, gauge_invariant=True)

    def lossless(self) -> Merger:
        """Return it without truncation and scale: one adapter's directions are orthonormal."""
        return self.model_copy(update={"rank": None, "scale": 1.0})

    def check(self, shape: ModuleShape, context: MergeContext) -> None:
        """Refuse weights that cannot be renormalised.

        Raises:
            ConfigError: They sum to zero.
        """
        PartWeights.of_deltas(shape, context).renormalised(self.absent)

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        """Decorrelate every module's directions. O((d_out + d_in) K²), K = Σ k_i.

        Raises:
            ConfigError: The weights cannot be renormalised.
            NonFiniteError: A delta or the result is not finite.
        """
        return [self._merge_module(module, context) for module in stack]

    def predict(self, shape: ModuleShape) -> OutputSize:
        """Return at most what is stored: the elements of one adapter of rank Σ k_i."""
        kept = sum(self._kept(shape, rank) for rank in shape.ranks)
        rank = min(kept, shape.d_out, shape.d_in)
        return OutputSize(shared=rank * (shape.d_out + shape.d_in), at_most=True)

    def workspace_bytes(self, shape: ModuleShape) -> int:
        """Return float64 directions with their reflectors and polar factors, and the cores."""
        total = sum(shape.ranks)
        return 8 * (6 * shape.elements + 6 * total * total)

    def _kept(self, shape: ModuleShape, rank: int) -> int:
        share = max(1, min(shape.d_out, shape.d_in) // len(shape.ranks))
        return min(rank, share if self.rank is None else self.rank)

    def _merge_module(
        self, module: StackModule, context: MergeContext
    ) -> FactorsEncoding[torch.Tensor]:
        shape = module.shape
        weights = PartWeights.of_deltas(shape, context).renormalised(self.absent)
        left, values, right = [], [], []
        total = lost = 0.0
        for factors, weight in zip(module.factors, weights, strict=True):
            A, B = concatenate([factors], [weight])
            svd = svd_of_product(B, A, self._kept(shape, factors.rank))
            rank = min(svd.S.shape[0], numerical_rank(svd.spectrum, STORED_PRECISION))
            left.append(svd.U[:, :rank])
            values.append(svd.S[:rank])
            right.append(svd.Vh[:rank].T)
            total += float(svd.spectrum.square().sum())
            lost += float(svd.spectrum[rank:].square().sum())
        U, sigma, V = torch.cat(left, dim=1), torch.cat(values), torch.cat(right, dim=1)
        facts = {"truncation_error": (lost / total) ** 0.5 if total else 0.0}
        if sigma.numel() == 0:
            return FactorsEncoding(
                A=U.new_zeros(1, shape.d_in), B=U.new_zeros(shape.d_out, 1), facts=facts
            )
        merged = svd_of_product(_polar(U) * (self.scale * sigma), _polar(V).T, sigma.numel())
        A, B = compact(merged, numerical_rank(merged.spectrum)).factors("balanced")
        return FactorsEncoding(A=A, B=B, facts=facts)


def _polar(directions: torch.Tensor) -> torch.Tensor:
    """Return the polar factor of `(d, K)` over its numerical rank: the nearest isometry."""
    basis = orthonormal_core(directions)
    P, D, Qh = torch.linalg.svd(basis.core, full_matrices=False)
    rank = numerical_rank(D, STORED_PRECISION)
    return basis.apply(P[:, :rank] @ Qh[:rank])
