"""Truncation: every adapter on its own, cut to its best approximation of a lower rank."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field, model_validator

from unmerge import (
    AdapterFactorsEncoding,
    Capabilities,
    Encoding,
    Factors,
    FactorStack,
    MergeContext,
    ModuleShape,
    OutputSize,
    ReversibleMerger,
    StackModule,
)
from unmerge.kernels.lowrank import svd_of_product
from unmerge.kernels.truncation import RankChoice


class Truncate(ReversibleMerger, frozen=True):
    """Every adapter alone, cut to its best rank k: what a shared basis has to beat.

    Each product is cut to its k leading singular values, which is its nearest matrix of rank k
    (Eckart and Young), and kept as `A = √S Vᵀ`, `B = U √S`; nothing is shared between adapters.
    Scalings stay apart and as they were. An adapter of which nothing would be cut is kept as it
    is, bit for bit.

    `rank` is one k for all; `energy` and `error` choose a k per adapter and module; without any of
    them k is half the adapter's own rank, rounded up. Weights play no part.

    The restored factors are in SVD form, so they need not resemble the original A and B entry by
    entry: what is approximated, as well as a rank k can, is the product.

    Source: Eckart and Young (1936); the per-adapter baseline of the RMM paper's comparison in
    size, and PT-SVD (its section 6) applied to an adapter instead of a checkpoint.
    """

    method: ClassVar[str] = "truncate"

    rank: int | None = Field(
        default=None,
        ge=1,
        description="rank kept; half of each adapter's, rounded up, unless one of the three is set",
    )
    energy: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="fraction of the squared Frobenius norm that must stay, instead of a rank",
    )
    error: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="largest relative Frobenius error of a product, instead of a rank",
    )

    @model_validator(mode="after")
    def _one_choice(self) -> Truncate:
        RankChoice(rank=self.rank, energy=self.energy, error=self.error)
        return self

    @property
    def capabilities(self) -> Capabilities:
        """Restores factors of the same product, whatever the weights, ranks and gauge."""
        return Capabilities(
            restores="factors", ignores_weights=True, mixed_ranks=True, gauge_invariant=True
        )

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:  # noqa: ARG002
        """Cut every adapter of every module. O((d_out + d_in) r² + r³) each."""
        return [self._truncate(module) for module in stack]

    def predict(self, shape: ModuleShape) -> OutputSize | None:
        """Return the elements of all cut factors; `None` where the spectra decide."""
        if self._choice(1).rank is None:
            return None
        kept = sum(
            min(self._choice(rank).rank or rank, rank, shape.d_out, shape.d_in)
            for rank in shape.ranks
        )
        return OutputSize(shared=0, per_adapter=kept * (shape.d_out + shape.d_in))

    def workspace_bytes(self, shape: ModuleShape) -> int:
        """Return all results, and of one adapter float64 reflectors, bases and cores."""
        largest = max(shape.ranks)
        one = 4 * largest * (shape.d_out + shape.d_in) + 6 * largest**2
        return 8 * (shape.elements + one)

    def lossless(self) -> Truncate:
        """Return the strategy that cuts off rounding noise only."""
        return Truncate(error=0.0)

    def _choice(self, rank: int) -> RankChoice:
        """Return where an adapter of rank `rank` is cut."""
        if self.energy is None and self.error is None:
            return RankChoice(rank=self.rank if self.rank is not None else (rank + 1) // 2)
        return RankChoice(energy=self.energy, error=self.error)

    def _truncate(self, module: StackModule) -> AdapterFactorsEncoding[torch.Tensor]:
        cut = [_truncate(factors, self._choice(factors.rank)) for factors in module.factors]
        shape = module.shape
        return AdapterFactorsEncoding(
            names=module.adapters,
            scalings=tuple(f.scaling for f in module.factors),
            A=tuple(A for A, _, _ in cut),
            B_transposed=tuple(B.T.contiguous() for _, B, _ in cut),
            d_out=shape.d_out,
            d_in=shape.d_in,
            facts={
                "largest_rank": max(A.shape[0] for A, _, _ in cut),
                "truncation_error": max(error for _, _, error in cut),
            },
        )


def _truncate(factors: Factors, choice: RankChoice) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return A and B as they are kept, and the relative error of their product."""
    uncut = factors.A, factors.B, 0.0
    if choice.rank is not None and choice.rank >= factors.rank <= min(factors.d_out, factors.d_in):
        return uncut
    svd = svd_of_product(factors.B, factors.A, factors.rank)
    kept = choice.keep(svd.spectrum, dimension=max(factors.d_out, factors.d_in))
    if kept == factors.rank:
        return uncut
    svd = replace(svd, U=svd.U[:, :kept], S=svd.S[:kept], Vh=svd.Vh[:kept])
    return *svd.factors("balanced"), svd.relative_error
