"""Core Space merging: merge small matrices that hold all of every adapter, by any rule."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field

from unmerge import (
    BasisMerger,
    Capabilities,
    Factors,
    InBasis,
    Matrices,
    MergeContext,
    ModuleShape,
    OutputSize,
    StackModule,
)
from unmerge.kernels import balanced, shared_basis


class CoreSpace(BasisMerger, frozen=True):
    """A rule f on small cores: `Δ = U · f({M_i}) · Vᵀ` where `Δ_i = U M_i Vᵀ` exactly.

    U and V are the left singular vectors of all `B_i` side by side and of all `A_iᵀ`, so that M_i
    is at most R × R with R = Σ r_i. No adapter loses anything, so a linear rule gives what it gives
    on deltas; a rule that looks at entries gives something else in every basis, which is the point
    of choosing one.

    With `balance` each adapter is first brought to its SVD form, `B_i = U_i √S_i`,
    `A_i = √S_i V_iᵀ`, scaling inside. The bases, and with them the result, then depend on the
    deltas alone; without it they change with the gauge `(B G, G⁻¹ A)`. Signs of singular vectors
    are fixed, and f must turn with them. Exactly repeated singular values leave their vectors
    open, and with them the result of a rule that is not linear.

    Source: "Accurate and Efficient Low-Rank Model Merging in Core Space", arXiv 2509.17786,
    section 4. Deviations: balancing (the paper takes the factors as they are), cutting null
    directions off, and scaling and weights, which are applied here; with `balance=False` the
    scaling is a part of B.
    """

    method: ClassVar[str] = "core_space"

    balance: bool = Field(
        default=True, description="bring each adapter to its SVD form first: no dependence on gauge"
    )

    @property
    def capabilities(self) -> Capabilities:
        """As in any basis; without balancing it depends on the gauge."""
        return replace(super().capabilities, gauge_invariant=self.balance)

    def predict(self, shape: ModuleShape) -> OutputSize:
        """Return the elements of one adapter whose rank is the most that the cores can have."""
        rank = min(sum(shape.ranks), shape.d_out, shape.d_in)
        return OutputSize(shared=rank * (shape.d_out + shape.d_in), at_most=True)

    def workspace_bytes(self, shape: ModuleShape) -> int:
        """Return float64 factors on both sides, bases, cores, and the inner rule's row blocks."""
        rows, columns = (min(sum(shape.ranks), size) for size in (shape.d_out, shape.d_in))
        # Cores are float64.
        inner = 2 * self.inner.matrix_bytes(len(shape.ranks), rows, columns)
        return 8 * (6 * shape.elements + 3 * (rows * rows + columns * columns)) + inner

    def represent(self, module: StackModule, context: MergeContext) -> InBasis:
        """Return the cores. O((d_out + d_in) R² + R³), and N R² to read them all."""
        pairs = [balanced(f) if self.balance else _scaled(f) for f in module.factors]
        left = shared_basis([f.B for f in pairs], self.cutoff)
        right = shared_basis([f.A.T for f in pairs], self.cutoff)
        cores = [
            Factors(A=b.T.contiguous(), B=a.contiguous(), scaling=1.0)
            for a, b in zip(left.blocks, right.blocks, strict=True)
        ]
        U, Vh = left.U, right.U.T

        def back(merged: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            core = merged.to(torch.float64)
            # The core goes to the side that keeps the rank small.
            return (core @ Vh, U) if core.shape[0] <= core.shape[1] else (Vh, U @ core)

        return InBasis(
            matrices=Matrices.of_factors(cores, module, "core", context),
            factors=back,
            facts={"rank_out": float(U.shape[1]), "rank_in": float(Vh.shape[0])},
        )


def _scaled(factors: Factors) -> Factors:
    """Return the factors in float64, the scaling inside B."""
    A, B = factors.A.to(torch.float64), factors.B.to(torch.float64)
    return Factors(A=A, B=B * factors.scaling, scaling=1.0)
