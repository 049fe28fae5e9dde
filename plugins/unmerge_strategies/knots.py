"""KnOTS: bring all deltas into one singular basis, merge there entry by entry, map back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

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
from unmerge.kernels import shared_basis


@dataclass(frozen=True, slots=True)
class _Aligned:
    """The shared basis `U (d, k)`, and each adapter's block in it as a matrix to merge."""

    U: torch.Tensor
    blocks: Matrices


class Knots(Merger, frozen=True):
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

    inner: SignEquivariantRule = Field(
        default={"method": "ties"},
        validate_default=True,
        description="the rule f that merges the aligned blocks; elementwise, turning with signs",
    )
    axis: Literal["output", "input"] = Field(
        default="output", description="the side of the deltas that gets the shared basis"
    )
    cutoff: float = Field(
        default=1e-7,
        ge=0,
        lt=1,
        description="directions up to this fraction of the largest singular value are left out",
    )

    @property
    def capabilities(self) -> Capabilities:
        """As the inner rule's, for any ranks and any gauge; a sign turns the whole basis."""
        return replace(
            self.inner.capabilities,
            factor_exact=False,
            mixed_ranks=True,
            gauge_invariant=True,
            sign_equivariant=False,
        )

    def check(self, shape: ModuleShape, context: MergeContext) -> None:
        """Refuse what the inner rule refuses."""
        self.inner.check(shape, context)

    def survey(self, passes: Passes, context: MergeContext) -> object:
        """Survey for the inner rule, over the aligned blocks of all modules."""

        def matrices() -> Iterator[Matrices]:
            for stack in passes:
                for module in stack:
                    yield self._align(module, context).blocks

        return self.inner.survey_matrices(matrices, context)

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        """Align and merge every module. O((d_out + d_in) R² + R³ + N R d_in), R = Σ r_i."""
        merged: list[Encoding[torch.Tensor]] = []
        for module in stack:
            aligned = self._align(module, context)
            block = self.inner.merge_matrices(aligned.blocks, context)
            A, B = (block, aligned.U) if self.axis == "output" else (aligned.U.T, block.T)
            merged.append(FactorsEncoding(A=A, B=B, facts={"rank": float(aligned.U.shape[1])}))
        return merged

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

    def lossless(self) -> Merger | None:
        """Return it with every direction kept and a lossless inner rule."""
        inner = self.inner.lossless()
        return None if inner is None else self.model_copy(update={"inner": inner, "cutoff": 0.0})

    def _align(self, module: StackModule, context: MergeContext) -> _Aligned:
        oriented = [_oriented(f, self.axis) for f in module.factors]
        basis = shared_basis([B @ _triangle(A).T for A, B in oriented], self.cutoff)
        dtype = module.factors[0].A.dtype
        factors = []
        for (A, B), block in zip(oriented, basis.blocks, strict=True):
            # Uᵀ B and not the block itself, whose A would be orthonormal rows: a column of zeros
            # of A stays one.
            left = torch.where(block.any(dim=1, keepdim=True), basis.U.T @ B, 0.0)
            factors.append(Factors(A=A.to(dtype), B=left.to(dtype), scaling=1.0))
        aligned = StackModule(path=module.path, adapters=module.adapters, factors=tuple(factors))
        [matrices] = module_matrices(aligned, "delta", context)
        return _Aligned(U=basis.U, blocks=replace(matrices, part="knots", space="knots"))


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
