"""KnOTS: bring all deltas into one singular basis, merge there entry by entry, map back."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from unmerge import (
    BasisMerger,
    Factors,
    InBasis,
    Matrices,
    MergeContext,
    ModuleShape,
    OutputSize,
    StackModule,
)
from unmerge.kernels import shared_basis


class Knots(BasisMerger, frozen=True):
    """A rule f in one singular basis: `Δ = U · f({Σ V_iᵀ})`, `[Δ_1 … Δ_N] = U Σ [V_1ᵀ … V_Nᵀ]`.

    The blocks `Σ V_iᵀ (k × d_in)` are the adapters in one basis, where signs and magnitudes can be
    compared; U maps the merged block back. The result has rank ≤ Σ r_i: an adapter, exactly.
    Nothing of size d_out × d_in is formed: with `A_i = L_i Q_iᵀ` the singular basis is that of
    `[s_i B_i L_i]`, of Σ r_i columns; the block `Uᵀ s_i B_i A_i` is read by rows, and is exactly 0
    wherever A_i has a column of zeros or the adapter nothing of a direction.

    Singular vectors' signs are arbitrary and are fixed here, so f must turn with them: rules that
    give a cancelled vote a sign of its own are refused. Exactly repeated singular values leave
    their vectors open, and with them the result of a rule that is not linear.

    `axis="input"` aligns the deltas' rows instead: the same on `Δ_iᵀ`.

    Source: "Model merging with SVD to tie the Knots", arXiv 2410.19735, section 4. Deviations: the
    cut-off is relative (theirs is 1e-5, absolute), scaling and every weight are applied (their
    code leaves out alpha / r and uses the first weight only), λ is the inner rule's `scale`. Their
    TIES cuts all modules together: `inner={"method": "ties", "scope": "model"}`.
    """

    method: ClassVar[str] = "knots"

    axis: Literal["output", "input"] = Field(
        default="output", description="the side of the deltas that gets the shared basis"
    )

    def predict(self, shape: ModuleShape) -> OutputSize:
        """Return the elements of one adapter whose rank is the most that the blocks can have."""
        total = sum(min(rank, shape.d_out, shape.d_in) for rank in shape.ranks)
        rank = min(total, shape.d_out if self.axis == "output" else shape.d_in)
        return OutputSize(shared=rank * (shape.d_out + shape.d_in), at_most=True)

    def workspace_bytes(self, shape: ModuleShape) -> int:
        """Return float64 factors on both sides, their core, and the inner rule's row blocks."""
        total = sum(shape.ranks)
        sides = (shape.d_out, shape.d_in) if self.axis == "output" else (shape.d_in, shape.d_out)
        rows = min(total, sides[0])
        inner = self.inner.matrix_bytes(len(shape.ranks), rows, sides[1])
        return 8 * (5 * shape.elements + 4 * total * rows) + inner

    def represent(self, module: StackModule, context: MergeContext) -> InBasis:
        """Return the aligned blocks. O((d_out + d_in) R² + R³), and N R d_in to read them all."""
        oriented = [_oriented(f, self.axis) for f in module.factors]
        basis = shared_basis([B @ _triangle(A).T for A, B in oriented], self.cutoff)
        U = basis.U
        factors = []
        for (A, B), block in zip(oriented, basis.blocks, strict=True):
            # Uᵀ B and not the block itself, whose A would be orthonormal rows: a column of zeros
            # of A stays one.
            left = torch.where(block.any(dim=1, keepdim=True), U.T @ B, 0.0)
            factors.append(Factors(A=A, B=left, scaling=1.0))

        def back(merged: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return (merged, U) if self.axis == "output" else (U.T, merged.T)

        return InBasis(
            # Multiplied in float64: in an ill-conditioned gauge the products cancel.
            matrices=Matrices.of_factors(
                factors, module, "knots", context, dtype=module.factors[0].A.dtype
            ),
            factors=back,
            facts={"rank": float(U.shape[1])},
        )


def _oriented(
    factors: Factors, axis: Literal["output", "input"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(A, B)` in float64, of the delta or of its transpose, the scaling in B."""
    A, B = factors.A.to(torch.float64), factors.B.to(torch.float64)
    if axis == "input":
        A, B = B.T.contiguous(), A.T.contiguous()
    return A, B * factors.scaling


def _triangle(A: torch.Tensor) -> torch.Tensor:
    """Return R of `Aᵀ = Q R`, so that `B Rᵀ` has the left singular vectors and values of `B A`."""
    R: torch.Tensor = torch.linalg.qr(A.T, mode="r").R
    return R
