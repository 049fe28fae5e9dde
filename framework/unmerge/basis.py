"""BasisMerger: strategies that merge entry by entry in a basis of their own and map back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from pydantic import Field

from unmerge.elementwise import SignEquivariantRule
from unmerge.matrices import Matrices
from unmerge.merger import Capabilities, MergeContext, Merger, Passes
from unmerge.stack import FactorStack, ModuleShape, StackModule
from unmerge_bundle.encodings import Encoding, FactorsEncoding

__all__ = ["BasisMerger", "InBasis"]


@dataclass(frozen=True, slots=True)
class InBasis:
    """A module's adapters in a basis.

    Attributes:
        matrices: Each adapter as a matrix in that basis: what the rule merges.
        factors: Returns A `(k, d_in)` and B `(d_out, k)` of the merged matrix.
        facts: What the strategy has to say about the module.
    """

    matrices: Matrices
    factors: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    facts: Mapping[str, float] = field(default_factory=dict)


class BasisMerger(Merger, frozen=True, extra="forbid"):
    """`Δ = back(f({X_i}))`: a rule f on the adapters X_i in a basis, whose result is an adapter.

    A basis of singular vectors has arbitrary signs, so f must turn with them; rules that do not
    are refused when the recipe is read. A rule that surveys all modules does so in the basis.
    """

    inner: SignEquivariantRule = Field(
        default={"method": "ties"},
        validate_default=True,
        description="the rule f that merges in the basis; elementwise, turning with signs",
    )
    cutoff: float = Field(
        default=1e-7,
        ge=0,
        lt=1,
        description="directions up to this fraction of the largest singular value are left out",
    )

    @abstractmethod
    def represent(self, module: StackModule, context: MergeContext) -> InBasis:
        """Return a module's adapters in the basis."""

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
        """Survey for the inner rule, over all modules in their bases."""

        def matrices() -> Iterator[Matrices]:
            for stack in passes:
                for module in stack:
                    yield self.represent(module, context).matrices

        return self.inner.survey_matrices(matrices, context)

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        """Merge every module in its basis and map the result back."""
        merged: list[Encoding[torch.Tensor]] = []
        for module in stack:
            basis = self.represent(module, context)
            A, B = basis.factors(self.inner.merge_matrices(basis.matrices, context))
            merged.append(FactorsEncoding(A=A, B=B, facts=basis.facts))
        return merged

    def workspace_bytes(self, shape: ModuleShape) -> int:
        """Return enough for most bases: float64 factors, cores of R × R, and the rule's blocks.

        R is Σ r_i; the matrices in the basis are taken to have R rows of the larger side.
        """
        total, side = sum(shape.ranks), max(shape.d_out, shape.d_in)
        rule = 2 * self.inner.matrix_bytes(len(shape.ranks), min(total, side), side)
        return 8 * (6 * shape.elements + 4 * total * total) + rule

    def lossless(self) -> Self | None:
        """Return it with every direction kept and a lossless inner rule."""
        inner = self.inner.lossless()
        return None if inner is None else self.model_copy(update={"inner": inner, "cutoff": 0.0})
