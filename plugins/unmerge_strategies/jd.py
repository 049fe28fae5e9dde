"""Joint diagonalisation: two bases that all adapters share, and a small core of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from unmerge import (
    Capabilities,
    Encoding,
    FactorStack,
    MergeContext,
    ModuleShape,
    OutputSize,
    ReversibleMerger,
    SharedFactorsEncoding,
    StackModule,
)
from unmerge.kernels.cores import core_stack
from unmerge.kernels.joint import diagonal_cores, joint_bases, joint_rank_ones
from unmerge.kernels.lowrank import column_signs


class Jd(ReversibleMerger, frozen=True):
    """Two bases for all adapters and a small core C_i of each: `Δ_i ≈ U C_i V`; all come back.

    With full cores U and V have orthonormal columns and rows, `C_i = Uᵀ Δ_i Vᵀ`, and U and V are
    found in turn, each the best for the other: the leading directions of all `Δ_i Vᵀ`, and of all
    `Δ_iᵀ U`. From k = Σ r_i on nothing is lost. With `diagonal` cores, `Δ_i ≈ Σ_j c_ij u_j v_jᵀ`
    with any k rank-one directions, found by alternating least squares: k numbers an adapter
    instead of k², and a larger error at the same k. All of it happens in an orthonormal frame of
    the adapters, without a delta; it depends on the deltas alone, whatever their factors.

    Weights play no part: every adapter comes back as it was. Elements kept with full cores:
    `k (d_out + d_in) + N k²`, against `Σ r_i (d_out + d_in)` of the adapters. Facts: the relative
    error over all adapters, `iterations`, and whether they `converged` (0 or 1).

    Source: "Compress then Serve: Serving Thousands of LoRA Adapters with Little Overhead" (arXiv
    2407.00066), section 3, JD-Full and JD-Diag. Both descend to a local optimum; the paper starts
    at random, this from the best bases for one side alone (full) and from the adapters' own
    singular directions, chosen by pivoting (diagonal), so that the result is determined.
    """

    method: ClassVar[str] = "jd"
    restores: ClassVar[Literal["factors", "delta"]] = "delta"

    rank: int | None = Field(
        default=None,
        ge=1,
        description="k, the size of the shared bases; the largest rank among the adapters unless "
        "given",
    )
    diagonal: bool = Field(
        default=False, description="keep the diagonals of the cores only (JD-Diag)"
    )
    normalise: bool = Field(
        default=True,
        description="fit every adapter scaled to norm 1, so that small ones count as much as "
        "large ones; each comes back in its own size",
    )
    tolerance: float = Field(
        default=1e-6,
        ge=0,
        allow_inf_nan=False,
        description="stop once the squared relative error falls by less in one iteration",
    )
    max_iterations: int = Field(
        default=1000, ge=1, description="stop after so many iterations, converged or not"
    )

    @property
    def capabilities(self) -> Capabilities:
        """Restores deltas of any rank and gauge, whatever the weights."""
        return Capabilities(
            restores="delta", ignores_weights=True, mixed_ranks=True, gauge_invariant=True
        )

    def lossless(self) -> ReversibleMerger:
        """Return it with a rank that is cut to Σ r_i, where nothing is lost."""
        return self.model_copy(update={"rank": 1 << 20})

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:  # noqa: ARG002
        """Fit every module. O((d_out + d_in) R² + iterations · N R² k), R = Σ r_i.

        Raises:
            NonFiniteError: A delta is not finite.
        """
        return [self._fit(module) for module in stack]

    def predict(self, shape: ModuleShape) -> OutputSize:
        """Return the elements of both bases, and of all cores."""
        left, right = self._sizes(shape)
        core = left if self.diagonal else left * right
        return OutputSize(
            shared=left * shape.d_out + right * shape.d_in, per_adapter=len(shape.ranks) * core
        )

    def advise(self, shapes: Sequence[ModuleShape]) -> list[str]:
        """Say which k would be smaller than the adapters, where this one is not."""
        kept = sum(shape.elements for shape in shapes)
        if sum(self.predict(shape).total for shape in shapes) < kept:
            return []
        largest = max(max(self._sizes(shape)) for shape in shapes)
        for rank in range(largest - 1, 0, -1):
            smaller = self.model_copy(update={"rank": rank})
            if sum(smaller.predict(shape).total for shape in shapes) < kept:
                return [f"rank {rank} or less would be smaller than the adapters"]
        return ["no rank would be smaller than these adapters; keep them as they are"]

    def workspace_bytes(self, shape: ModuleShape) -> int:
        """Return float64 frames, results, and several copies of the cores."""
        total, count = sum(shape.ranks), len(shape.ranks)
        core = min(total, shape.d_out) * min(total, shape.d_in)
        candidates = count * min(total, shape.d_out, shape.d_in) if self.diagonal else 0
        directions = max(self._sizes(shape)) * (core + candidates) if self.diagonal else 0
        return 8 * (4 * shape.elements + 8 * count * core + 3 * directions)

    def _sizes(self, shape: ModuleShape) -> tuple[int, int]:
        """Return the number of columns of U and of rows of V."""
        rank, total = self.rank or max(shape.ranks), sum(shape.ranks)
        if self.diagonal:
            smallest = min(shape.d_out, shape.d_in)
            size = min(rank, sum(min(r, smallest) for r in shape.ranks))
            return size, size
        return min(rank, total, shape.d_out), min(rank, total, shape.d_in)

    def _fit(self, module: StackModule) -> SharedFactorsEncoding[torch.Tensor]:
        frame = core_stack(module.factors)
        norms = torch.linalg.vector_norm(frame.cores, dim=(1, 2), keepdim=True)
        fitted = frame.cores
        if self.normalise:
            fitted = frame.cores / torch.where(norms > 0, norms, 1.0)
        size = self._sizes(module.shape)
        find = joint_rank_ones if self.diagonal else joint_bases
        joint = find(
            fitted, max(size), tolerance=self.tolerance, max_iterations=self.max_iterations
        )
        if self.diagonal:
            cores = diagonal_cores(frame.cores, joint.left, joint.right)
            restored = (joint.left * cores[:, None, :]) @ joint.right.T
        else:
            cores = joint.left.T @ frame.cores @ joint.right
            restored = joint.left @ cores @ joint.right.T
        U, V = frame.left.apply(joint.left), frame.right.apply(joint.right)
        of_U, of_V = column_signs(U), column_signs(V)
        signs = of_U * of_V if self.diagonal else of_U[:, None] * of_V
        total = torch.linalg.vector_norm(norms)
        lost = torch.linalg.vector_norm(frame.cores - restored)
        return SharedFactorsEncoding(
            names=module.adapters,
            scalings=(1.0,) * len(module.adapters),
            U=U * of_U,
            V=(V * of_V).T,
            cores=cores * signs,
            facts={
                "relative_error": float(lost / total) if total > 0 else 0.0,
                "iterations": float(joint.iterations),
                "converged": float(joint.converged),
            },
        )
