"""MM-SVD: merge the multiplied deltas, then take the best low-rank adapter."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, field_validator

from unmerge import (
    Capabilities,
    Encoding,
    FactorsEncoding,
    FactorStack,
    MergeContext,
    Merger,
    ModuleShape,
    OutputSize,
    Passes,
)
from unmerge.errors import CapabilityError
from unmerge.kernels import svd_of_product
from unmerge.kernels.lowrank import Split


class MmSvd(Merger, frozen=True):
    """`SVD_r(f({Δ_i}))` for a linear rule f: the nearest adapter of rank r to the merged delta.

    `inner` merges first, in factors of rank Σ r_i; their product is decomposed through QR of both
    sides and the SVD of a small core, so no `d_out × d_in` matrix is formed, and the result
    agrees with the SVD of the dense merged delta to the rounding of float64. Where the merged
    delta has rank ≤ r nothing is lost; a tie between singular values at the cut leaves the choice
    of directions open.

    Source: "LoRA Merging with SVD: Understanding Interference and Preserving Performance",
    section 3.4 (ICML 2025 R2-FM workshop); `split="A"` is the paper's `B = U`, `A = Σ Vᵀ`,
    `"B"` is PEFT's. PEFT up to 0.21 applies the scaling twice here; this applies it once.
    """

    method: ClassVar[str] = "mm_svd"

    rank: int | None = Field(
        default=None,
        ge=1,
        description="rank of the result; the largest rank among the adapters unless given",
    )
    inner: Merger = Field(
        default={"method": "task_arithmetic"},
        validate_default=True,
        description="the rule f that merges the deltas; exact in factors",
    )
    split: Split = Field(default="A", description="the factor that takes the singular values")

    @field_validator("inner")
    @classmethod
    def _inner_is_exact_in_factors(cls, inner: Merger) -> Merger:
        if not inner.capabilities.factor_exact:
            raise ValueError(
                f'"{inner.method}" is not exact in factors; mm_svd takes average or '
                "task_arithmetic, or another rule that declares factor_exact"
            )
        return inner

    @property
    def capabilities(self) -> Capabilities:
        """As the inner rule's, but for truncation."""
        inner = self.inner.capabilities
        return Capabilities(
            needs_activations=inner.needs_activations,
            needs_base_weights=inner.needs_base_weights,
            needs_survey=inner.needs_survey,
            mixed_ranks=inner.mixed_ranks,
            stochastic=inner.stochastic,
            ignores_weights=inner.ignores_weights,
        )

    def check(self, shape: ModuleShape, context: MergeContext) -> None:
        """Refuse what the inner rule refuses."""
        self.inner.check(shape, context)

    def survey(self, passes: Passes, context: MergeContext) -> object:
        """Survey for the inner rule."""
        return self.inner.survey(passes, context)

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        """Decompose the inner result of every module. O((d_out + d_in) R² + R³), R = Σ r_i."""
        merged: list[Encoding[torch.Tensor]] = []
        modules = zip(stack, self.inner.merge(stack, context), strict=True)
        for module, encoding in modules:
            if not isinstance(encoding, FactorsEncoding):
                raise CapabilityError(
                    f'"{self.inner.method}" declares factor_exact but returned "{encoding.kind}"'
                )
            svd = svd_of_product(encoding.B, encoding.A, self._rank(module.shape))
            A, B = svd.factors(self.split)
            merged.append(FactorsEncoding(A=A, B=B))
        return merged

    def predict(self, shape: ModuleShape) -> OutputSize | None:
        """Return the elements of one adapter of the chosen rank."""
        inner = self.inner.predict(shape)
        if inner is None:
            return None
        inner_rank = inner.total // (shape.d_out + shape.d_in)
        rank = min(self._rank(shape), inner_rank, shape.d_out, shape.d_in)
        return OutputSize(shared=rank * (shape.d_out + shape.d_in))

    def workspace_bytes(self, shape: ModuleShape) -> int:
        """Return the inner rule's, plus float64 reflectors of both sides and the cores."""
        total = sum(shape.ranks)
        cores = 4 * min(total, shape.d_out) * min(total, shape.d_in)
        return self.inner.workspace_bytes(shape) + 8 * (3 * shape.elements + cores)

    def _rank(self, shape: ModuleShape) -> int:
        return self.rank if self.rank is not None else max(shape.ranks)
