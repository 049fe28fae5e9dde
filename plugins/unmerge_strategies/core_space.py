"""Core Space merging: merge small matrices that hold all of every adapter, by any rule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pydantic import Field

from unmerge import (
    Capabilities,
    Encoding,
    Factors,
    FactorsEncoding,
    FactorStack,
    Matrices,
    MergeContext,
    Merger,
    ModuleShape,
    OutputSize,
    Passes,
    SignEquivariantRule,
    StackModule,
    module_matrices,
)
from unmerge.kernels import shared_basis, svd_of_product

# Singular values up to this fraction of the largest are rounding errors of zeros.
_NOISE = 2.0**-44


@dataclass(frozen=True, slots=True)
class _Cores:
    """Bases `U (d_out, k_out)`, `V (d_in, k_in)`, and each adapter's core as a matrix to merge."""

    U: torch.Tensor
    V: torch.Tensor
    blocks: Matrices


class CoreSpace(Merger, frozen=True):
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

    inner: SignEquivariantRule = Field(
        default={"method": "ties"},
        validate_default=True,
        description="the rule f that merges the cores; elementwise, turning with signs",
    )
    balance: bool = Field(
        default=True, description="bring each adapter to its SVD form first: no dependence on gauge"
    )
    cutoff: float = Field(
        default=1e-7,
        ge=0,
        lt=1,
        description="directions up to this fraction of the largest singular value are left out",
    )

    @property
    def capabilities(self) -> Capabilities:
        """As the inner rule's, for any ranks, in any gauge if balanced; a sign turns the bases."""
        return replace(
            self.inner.capabilities,
            factor_exact=False,
            mixed_ranks=True,
            gauge_invariant=self.balance,
            sign_equivariant=False,
        )

    def check(self, shape: ModuleShape, context: MergeContext) -> None:
        """Refuse what the inner rule refuses."""
        self.inner.check(shape, context)

    def survey(self, passes: Passes, context: MergeContext) -> object:
        """Survey for the inner rule, over the cores of all modules."""

        def matrices() -> Iterator[Matrices]:
            for stack in passes:
                for module in stack:
                    yield self._cores(module, context).blocks

        return self.inner.survey_matrices(matrices, context)

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        """Merge the cores of every module. O((d_out + d_in) R² + R³ + N R²)."""
        merged: list[Encoding[torch.Tensor]] = []
        for module in stack:
            cores = self._cores(module, context)
            core = self.inner.merge_matrices(cores.blocks, context).to(torch.float64)
            rows, columns = core.shape
            # The core goes to the side that keeps the rank small.
            A, B = (core @ cores.V.T, cores.U) if rows <= columns else (cores.V.T, cores.U @ core)
            facts = {"rank_out": float(rows), "rank_in": float(columns)}
            merged.append(FactorsEncoding(A=A, B=B, facts=facts))
        return merged

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

    def lossless(self) -> Merger | None:
        """Return it with every direction kept and a lossless inner rule."""
        inner = self.inner.lossless()
        return None if inner is None else self.model_copy(update={"inner": inner, "cutoff": 0.0})

    def _cores(self, module: StackModule, context: MergeContext) -> _Cores:
        pairs = [_balanced(f) if self.balance else _scaled(f) for f in module.factors]
        left = shared_basis([B for _, B in pairs], self.cutoff)
        right = shared_basis([A.T for A, _ in pairs], self.cutoff)
        factors = tuple(
            Factors(A=b.T.contiguous(), B=a.contiguous(), scaling=1.0)
            for a, b in zip(left.blocks, right.blocks, strict=True)
        )
        cores = StackModule(path=module.path, adapters=module.adapters, factors=factors)
        [matrices] = module_matrices(cores, "delta", context)
        return _Cores(U=left.U, V=right.U, blocks=replace(matrices, part="core", space="core"))


def _scaled(factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A, and B with the scaling inside, float64."""
    return factors.A.to(torch.float64), factors.B.to(torch.float64) * factors.scaling


def _balanced(factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the adapter's SVD form, `√(|s| S) Vᵀ` and `±U √(|s| S)`, the sign that of s."""
    svd = svd_of_product(factors.B, factors.A, factors.rank)
    # The root of a rounding error would be a direction of its own.
    noise = _NOISE * svd.spectrum[0]
    S = torch.where(noise < svd.S, svd.S, 0.0)
    A, B = replace(svd, S=S).factors("balanced")
    root = math.sqrt(abs(factors.scaling))
    return A * root, B * math.copysign(root, factors.scaling)
