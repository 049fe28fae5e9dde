"""MM-SVD: merge the multiplied deltas, then take the best low-rank adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field, field_validator, model_validator

from unmerge import (
    Capabilities,
    DeltaEncoding,
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
from unmerge.kernels.dense import DenseSvd, leading_svd
from unmerge.kernels.lowrank import Split, svd_of_product
from unmerge.kernels.truncation import RankChoice


class MmSvd(Merger, frozen=True):
    """The nearest adapter of rank r to what a rule f makes of the deltas: `SVD_r(f({Δ_i}))`.

    `inner` merges first. Where it returns factors (`average`, `task_arithmetic`, `knots`), their
    product is decomposed through QR of both sides and the SVD of a small core, so no
    `d_out × d_in` matrix is formed and the result agrees with the SVD of the dense delta to the
    rounding of float64. Where it returns a dense delta (`ties`, `dare`, `magnitude_prune` on
    deltas), its leading singular vectors come from the smaller Gram matrix and a Rayleigh–Ritz
    step on the delta itself (`unmerge.kernels.dense`, with its accuracy).

    r is `rank`, or the fewest singular values that keep the fraction `energy` of the squared
    norm or leave at most the relative Frobenius `error`; without any, the largest rank among the
    adapters. Where the merged delta has rank ≤ r nothing is lost; a tie between singular values
    at the cut leaves the choice of directions open. Facts: the `rank` kept and the relative
    `truncation_error`, beside the inner rule's own.

    Source: "LoRA Merging with SVD: Understanding Interference and Preserving Performance",
    section 3.4 (ICML 2025 R2-FM workshop); `split="A"` is the paper's `B = U`, `A = Σ Vᵀ`,
    `"B"` is PEFT's. Scaling is applied once, as PEFT 0.21.2 does; earlier releases are reported to
    apply it twice. The paper fixes r; `energy` and `error` are ours.
    """

    method: ClassVar[str] = "mm_svd"

    rank: int | None = Field(
        default=None,
        ge=1,
        description="rank of the result; the largest among the adapters unless one of three is set",
    )
    energy: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="fraction of the merged delta's squared norm that must stay, instead of a rank",
    )
    error: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="largest relative Frobenius error of the truncation, instead of a rank",
    )
    inner: Merger = Field(
        default={"method": "task_arithmetic"},
        validate_default=True,
        description="the rule f that merges the deltas; any that returns one merged result",
    )
    split: Split = Field(default="A", description="the factor that takes the singular values")

    @field_validator("inner")
    @classmethod
    def _inner_merges(cls, inner: Merger) -> Merger:
        restores = inner.capabilities.restores
        if restores is not None:
            raise ValueError(
                f'"{inner.method}" restores the {restores} of every adapter and has no merged '
                "result to truncate; mm_svd takes rules such as task_arithmetic, average or ties"
            )
        return inner

    @model_validator(mode="after")
    def _one_choice(self) -> MmSvd:
        RankChoice(rank=self.rank, energy=self.energy, error=self.error)
        return self

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
            gauge_invariant=inner.gauge_invariant,
        )

    def check(self, shape: ModuleShape, context: MergeContext) -> None:
        """Refuse what the inner rule refuses."""
        self.inner.check(shape, context)

    def survey(self, passes: Passes, context: MergeContext) -> object:
        """Survey for the inner rule."""
        return self.inner.survey(passes, context)

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        """Decompose the inner result of every module.

        O((d_out + d_in) R² + R³) for factors of rank R, R = Σ r_i for a linear rule;
        O(n m² + m³) for a dense delta, m the smaller of d_out and d_in and n the larger.

        Raises:
            CapabilityError: The inner rule returned something else than factors or a delta.
            NonFiniteError: Its result is not finite.
        """
        merged: list[Encoding[torch.Tensor]] = []
        # Not `for module in stack`: that would copy all factors a second time.
        largest: list[int] = stack.ranks.amax(dim=1).tolist()
        for rank, encoding in zip(largest, self.inner.merge(stack, context), strict=True):
            result = self._decompose(encoding, self._choice(rank))
            A, B = result.svd.factors(self.split)
            own = {"rank": result.svd.S.shape[0], "truncation_error": result.relative_error}
            merged.append(FactorsEncoding(A=A, B=B, facts=_beside(encoding.facts, own)))
        return merged

    def predict(self, shape: ModuleShape) -> OutputSize | None:
        """Return the elements of one adapter of the chosen rank; `None` where a spectrum decides.

        Also where the inner rule does not say whether its result is a delta or factors, and that
        makes a difference. At most that many where the inner rule's rank is a bound.
        """
        inner = self.inner.predict(shape)
        wanted = self._choice(max(shape.ranks)).rank
        if inner is None or wanted is None:
            return None
        sides, smaller = shape.d_out + shape.d_in, min(shape.d_out, shape.d_in)
        possible = {inner.total // sides} if inner.total % sides == 0 else set[int]()
        if inner.total == shape.d_out * shape.d_in and not self.inner.capabilities.factor_exact:
            possible.add(smaller)
        ranks = {min(wanted, rank, smaller) for rank in possible}
        if len(ranks) > 1:
            return None
        return OutputSize(shared=ranks.pop() * sides, at_most=inner.at_most)

    def advise(self, shapes: Sequence[ModuleShape]) -> list[str]:
        """Pass on what the inner rule says."""
        return self.inner.advise(shapes)

    def workspace_bytes(self, shape: ModuleShape) -> int:
        """Return the inner rule's, plus reflectors and cores, or the dense decomposition's."""
        total, smaller = sum(shape.ranks), min(shape.d_out, shape.d_in)
        cores = 4 * min(total, shape.d_out) * min(total, shape.d_in)
        of_factors = 3 * shape.elements + cores
        # The delta in float64 and the Gram matrix, its eigenvectors and LAPACK's workspace.
        of_delta = 2 * shape.d_out * shape.d_in + 4 * smaller**2
        size = self.inner.predict(shape)
        dense = size is None or size.total == shape.d_out * shape.d_in
        dense = dense and not self.inner.capabilities.factor_exact
        return self.inner.workspace_bytes(shape) + 8 * (of_delta if dense else of_factors)

    def lossless(self) -> MmSvd | None:
        """Return the strategy at the adapters' own rank over the inner rule without losses."""
        inner = self.inner.lossless()
        return None if inner is None else MmSvd(inner=inner, split=self.split)

    def _choice(self, largest: int) -> RankChoice:
        """Return how much is kept, where the adapters' largest rank is `largest`."""
        if self.energy is None and self.error is None:
            return RankChoice(rank=self.rank if self.rank is not None else largest)
        return RankChoice(energy=self.energy, error=self.error)

    def _decompose(self, encoding: Encoding[torch.Tensor], choice: RankChoice) -> DenseSvd:
        if isinstance(encoding, DeltaEncoding):
            return leading_svd(encoding.delta, choice)
        if not isinstance(encoding, FactorsEncoding):
            raise CapabilityError(
                f'"{self.inner.method}" returned "{encoding.kind}", expected one merged result as '
                '"factors" or "delta"; see capabilities.restores'
            )
        most = encoding.A.shape[0] if choice.rank is None else choice.rank
        svd = svd_of_product(encoding.B, encoding.A, most)
        kept = choice.keep(svd.spectrum, dimension=max(encoding.shape))
        svd = replace(svd, U=svd.U[:, :kept], S=svd.S[:kept], Vh=svd.Vh[:kept])
        return DenseSvd(svd=svd, relative_error=svd.relative_error)


def _beside(inner: Mapping[str, float], own: Mapping[str, float]) -> dict[str, float]:
    """Return both, the inner rule's under `inner_…` where the names clash."""
    return {**{f"inner_{k}" if k in own else k: v for k, v in inner.items()}, **own}
