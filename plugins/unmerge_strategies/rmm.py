"""Reversible Model Merging: a mean and a few basis adapters from which every adapter comes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from unmerge import (
    AffineBasisEncoding,
    Capabilities,
    Encoding,
    FactorStack,
    MergeContext,
    ModuleShape,
    OutputSize,
    ReversibleMerger,
    StackModule,
)
from unmerge.errors import IncompatibleAdaptersError
from unmerge.kernels import affine_basis


class Rmm(ReversibleMerger, frozen=True):
    """The best p-dimensional affine basis of all adapters, per row of B and per column of A.

    At every task-vector position the N adapters are points in r dimensions. RMM keeps their mean,
    the top p right singular vectors W of the centred points, and each adapter's coefficients
    C = X W; an adapter comes back as `C_i Wᵀ + μ`. In factor space this is the optimal affine
    subspace (Theorem 1): the squared factor error is the tail of the squared singular values and
    never grows with p; the error of the delta usually falls too, but need not. At
    p = min(N − 1, r) nothing is lost but rounding, and a larger `basis_size` is cut to that.

    Elements kept, relative to the adapters: `(p (r + N) + r) / (r N)`; from 1 on it saves nothing.

    Weights play no part: every adapter is restored as it was. Not gauge-invariant: `(B G, G⁻¹ A)`
    is the same adapter and has another RMM. The paper says nothing about `alpha / r`; here raw A
    and B are compressed and scalings kept apart, unless `fold_scaling` puts them into B.

    Source: "Towards Reversible Model Merging for Low-rank Weights", section 5 and Algorithm 1 (its
    A is our B and the other way round). Deviation: the mean has its 1/N, as in the text; line 7
    of the algorithm prints the sum.
    """

    method: ClassVar[str] = "rmm"

    basis_size: int = Field(default=2, ge=1, description="p, the number of basis adapters kept")
    fold_scaling: bool = Field(
        default=False,
        description="compress scaling · B instead of B; matters where scalings differ",
    )

    @property
    def capabilities(self) -> Capabilities:
        """Restores factors as they were, whatever the weights; needs one rank per module."""
        return Capabilities(restores="factors", ignores_weights=True)

    def check(self, shape: ModuleShape, context: MergeContext) -> None:  # noqa: ARG002
        """Refuse mixed ranks: positions would be points of different dimension.

        Raises:
            IncompatibleAdaptersError: The adapters' ranks differ on this module.
        """
        if len(set(shape.ranks)) > 1:
            ranks = ", ".join(str(rank) for rank in sorted(set(shape.ranks)))
            raise IncompatibleAdaptersError(
                f"{shape.path}: ranks {ranks} differ; rmm needs one rank per module: select "
                "adapters of one rank, or merge each rank into a bundle of its own"
            )

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        """Fit every module's positions. O((d_out + d_in) N r min(N, r)) each."""
        for module in stack:
            self.check(module.shape, context)
        return [self._fit(module) for module in stack]

    def predict(self, shape: ModuleShape) -> OutputSize:
        """Return p r + r shared elements and N p coefficients a position, d_out + d_in times."""
        rank, count = shape.ranks[0], len(shape.ranks)
        size = self._size(count, rank)
        positions = shape.d_out + shape.d_in
        return OutputSize(
            shared=positions * (size * rank + rank), per_adapter=positions * count * size
        )

    def advise(self, shapes: Sequence[ModuleShape]) -> list[str]:
        """Say where `basis_size` is cut, and which p would be smaller than the adapters."""
        lines = []
        cut = [s for s in shapes if self._size(len(s.ranks), s.ranks[0]) < self.basis_size]
        if cut:
            size = max(self._size(len(s.ranks), s.ranks[0]) for s in cut)
            lines.append(
                f"basis_size {self.basis_size} is cut to {size} or less on {len(cut)} modules: "
                "min(adapters - 1, rank) already restores them exactly"
            )
        kept = sum(s.elements for s in shapes)
        if sum(self.predict(s).total for s in shapes) >= kept:
            largest = max(self._size(len(s.ranks), s.ranks[0]) for s in shapes)
            smaller = [self.model_copy(update={"basis_size": p}) for p in range(1, largest)]
            saving = [
                m.basis_size for m in smaller if sum(m.predict(s).total for s in shapes) < kept
            ]
            lines.append(
                f"basis_size {max(saving)} or less would be smaller than the adapters"
                if saving
                else "no basis_size would be smaller than these adapters; keep them as they are"
            )
        return lines

    def workspace_bytes(self, shape: ModuleShape) -> int:
        """Return float64 points, centred points, Gram matrices and results of the larger side."""
        rank, count = max(shape.ranks), len(shape.ranks)
        gram = min(rank, count) ** 2
        return 8 * max(shape.d_out, shape.d_in) * (4 * count * rank + 3 * gram) + 8 * shape.elements

    def _size(self, count: int, rank: int) -> int:
        return min(self.basis_size, count - 1, rank)

    def _fit(self, module: StackModule) -> AffineBasisEncoding[torch.Tensor]:
        scalings = tuple(f.scaling for f in module.factors)
        folded = [s if self.fold_scaling else 1.0 for s in scalings]
        columns = torch.stack([f.A.T for f in module.factors], dim=1)  # (d_in, N, r)
        rows = torch.stack(
            [f.B.to(torch.float64) * s for f, s in zip(module.factors, folded, strict=True)], dim=1
        )  # (d_out, N, r)
        size = self._size(len(module.adapters), module.factors[0].rank)
        a, b = affine_basis(columns, size), affine_basis(rows, size)
        return AffineBasisEncoding(
            names=module.adapters,
            scalings=(1.0,) * len(scalings) if self.fold_scaling else scalings,
            mean_A=a.mean.T,
            basis_A=a.basis.permute(1, 2, 0),  # (p, r, d_in)
            coefficients_A=a.coefficients.permute(1, 2, 0),  # (N, p, d_in)
            mean_B=b.mean,
            basis_B=b.basis.permute(1, 0, 2),  # (p, d_out, r)
            coefficients_B=b.coefficients.permute(1, 2, 0),  # (N, p, d_out)
        )
