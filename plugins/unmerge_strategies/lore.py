"""LoRE: estimate what adapters have in common and a low-rank rest of each, then recombine."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from unmerge import (
    Absent,
    Capabilities,
    DeltaEncoding,
    Encoding,
    Factors,
    FactorsEncoding,
    FactorStack,
    MergeContext,
    Merger,
    ModuleShape,
    OutputSize,
    PartWeights,
    StackModule,
)
from unmerge.errors import ConfigError
from unmerge.kernels import delta_rows, largest_magnitudes
from unmerge.kernels.cores import CoreStack, core_stack
from unmerge.kernels.estimation import LowRankEstimate, low_rank_estimation

# Rows of the dense result computed at a time in the TIES finish, unless the context says.
_BLOCK_ROWS = 256
# Votes closer than this, relative to the votes cast, are ties: rests of two adapters of one weight
# are opposite everywhere, and rounding must not elect one of them.
_TIE = 1e-9


class Lore(Merger, frozen=True):
    """A common part and a low-rank rest of each adapter, fitted by descent: `θ* = θ_0 + λ τ`.

    From `δ_i = 0`: `θ_0 = Σ w_i (θ_i − δ_i) / Σ w_i`, `δ_i = SVT(θ_i − θ_0; μ)`, until nothing
    moves. Then τ is the sum of the δ_i (`finish="sum"`), their mean, or a TIES selection among
    them. The models are `θ_i = W + Δ_i`; W passes through θ_0 unchanged, so no base model is
    needed, and the whole iteration runs on cores in an orthonormal frame of all adapters: exact,
    without a `d_out × d_in` matrix. TIES compares entries, so there the δ_i are multiplied out by
    row blocks and the result is a dense delta.

    A weight is a number of copies: 2 gives the adapter twice, 0 leaves it out, all 1 is the paper.
    Negative ones are refused: the descent has no meaning for them. An adapter that lacks a module
    takes part as a zero delta, or with `absent="renormalise"` not at all.

    An iteration that stops at `max_iterations` is no error; the encoding's facts say `converged`
    (0 or 1), `iterations`, the last relative `change`, the `objective`, the absolute threshold
    `mu` and the largest rank among the δ_i, `rest_rank`.

    Source: "LoRE-Merging", equation 2 and Algorithm 1. Equation 1 prints ‖δ‖_*² without ½, which
    the update does not minimise; the algorithm is followed, with `½ ‖·‖² + μ ‖δ‖_*`. The text
    finishes by averaging, the algorithm by the sum (the default here). The algorithm's TIES trims
    nothing (`density=1`); 0.2 is what TIES itself and the paper's baseline use. Weights, the
    stopping rule and `mu_unit="relative"` are this library's.
    """

    method: ClassVar[str] = "lore"

    mu: float = Field(
        default=0.01,
        ge=0,
        allow_inf_nan=False,
        description="μ, what thresholding takes off every singular value of a rest",
    )
    mu_unit: Literal["absolute", "relative"] = Field(
        default="absolute",
        description="μ as it is, or as a fraction of the largest singular value of any adapter's "
        "difference from the average, in each module",
    )
    scale: float = Field(
        default=1.0, allow_inf_nan=False, description="λ, the factor of the recombined rests"
    )
    finish: Literal["sum", "mean", "ties"] = Field(
        default="sum", description="how the rests are recombined"
    )
    density: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="fraction of each rest's entries kept before the vote of finish=ties",
    )
    tolerance: float = Field(
        default=1e-6,
        ge=0,
        allow_inf_nan=False,
        description="stop once the rests change by less, relative to the adapters' spread",
    )
    max_iterations: int = Field(
        default=1000, ge=1, description="stop after so many iterations, converged or not"
    )
    warmup: int = Field(default=0, ge=0, description="iterations before rank_ratio holds")
    rank_ratio: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="cut each rest to this fraction of min(d_out, d_in), rounded up",
    )
    absent: Absent = Field(
        default="zero",
        description="an adapter that lacks a module counts there as a zero delta, or not at all",
    )

    @model_validator(mode="after")
    def _warmup_precedes_a_cut(self) -> Lore:
        if self.warmup and self.rank_ratio is None:
            raise ValueError(f"warmup {self.warmup} delays rank_ratio, which is not given")
        return self

    @property
    def capabilities(self) -> Capabilities:
        """Any ranks and gauges; factors unless entries are compared."""
        return Capabilities(
            mixed_ranks=True, gauge_invariant=True, factor_exact=self.finish != "ties"
        )

    def lossless(self) -> Merger:
        """Return itself: one adapter is its own base, without a rest."""
        return self

    def check(self, shape: ModuleShape, context: MergeContext) -> None:
        """Refuse negative weights, and weights of which none is positive.

        Raises:
            ConfigError: Names the adapter.
        """
        for name, weight in context.weights.items():
            if weight < 0:
                raise ConfigError(
                    f'{shape.path}: adapter "{name}" has weight {weight:g}; lore takes a weight as '
                    "a number of copies, at least 0; task_arithmetic subtracts adapters"
                )
        names = context.adapters if self.absent == "zero" else shape.adapters
        if not any(context.weights_of(names)):
            raise ConfigError(
                f"{shape.path}: all weights are 0, so there is nothing to fit; give some adapter "
                "a positive weight"
            )

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        """Fit every module. O((d_out + d_in) R² + iterations · N R³), R = Σ r_i.

        Raises:
            ConfigError: Weights are negative, or none is positive.
            NonFiniteError: A delta or the result is not finite.
        """
        return [self._merge_module(module, context) for module in stack]

    def predict(self, shape: ModuleShape) -> OutputSize:
        """Return the elements of a dense delta, or at most those of factors of rank Σ r_i."""
        if self.finish == "ties":
            return OutputSize(shared=shape.d_out * shape.d_in)
        rank = min(sum(shape.ranks), shape.d_out, shape.d_in)
        return OutputSize(shared=rank * (shape.d_out + shape.d_in), at_most=True)

    def workspace_bytes(self, shape: ModuleShape) -> int:
        """Return float64 frames and about eight copies of the cores; for TIES, rests and rows."""
        total, count = sum(shape.ranks), len(shape.ranks) + 1
        core = min(total, shape.d_out) * min(total, shape.d_in)
        size = 3 * shape.elements + 8 * count * core
        if self.finish == "ties":
            rank = min(total, shape.d_out, shape.d_in)
            size += count * rank * (shape.d_out + shape.d_in)
            size += 6 * count * min(_BLOCK_ROWS, shape.d_out) * shape.d_in
        return 8 * size

    def _merge_module(self, module: StackModule, context: MergeContext) -> Encoding[torch.Tensor]:
        shape = module.shape
        self.check(shape, context)
        given = PartWeights.of(shape.path, shape.adapters, "delta", context)
        present = given.renormalised(self.absent)
        # Adapters without weight or module would only blow up the frame.
        weighted = [(f, w) for f, w in zip(module.factors, present, strict=True) if w > 0]
        weights = [w for _, w in weighted]
        frame = core_stack([f for f, _ in weighted] or module.factors[:1])
        thetas = frame.cores[: len(weights)]
        lacking = [w for name, w in context.weights.items() if name not in module.adapters]
        if self.absent == "zero" and any(lacking):
            # Zero deltas are equal, so one with the weights of all stands for them.
            thetas = torch.cat([thetas, torch.zeros_like(frame.cores[:1])])
            weights.append(math.fsum(lacking))
        cap = None
        if self.rank_ratio is not None:
            cap = math.ceil(self.rank_ratio * min(shape.d_out, shape.d_in))
        estimate = low_rank_estimation(
            thetas,
            weights,
            mu=self.mu,
            relative=self.mu_unit == "relative",
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            warmup=self.warmup,
            max_rank=cap,
        )
        facts = {
            "iterations": float(estimate.iterations),
            "converged": float(estimate.converged),
            "change": estimate.change,
            "objective": estimate.objective,
            "mu": estimate.mu,
            "rest_rank": float(max(estimate.ranks)),
        }
        if self.finish == "ties":
            delta = self._select(frame, estimate, weights, shape, context)
            return DeltaEncoding(delta=delta, facts=facts)
        total = 1.0 if self.finish == "sum" else math.fsum(weights)
        shares = thetas.new_tensor([w / total for w in weights])
        rests = (shares[:, None, None] * estimate.deltas).sum(dim=0)
        A, B = frame.factors(estimate.base + self.scale * rests)
        return FactorsEncoding(A=A, B=B, facts=facts)

    def _select(
        self,
        frame: CoreStack,
        estimate: LowRankEstimate,
        weights: list[float],
        shape: ModuleShape,
        context: MergeContext,
    ) -> torch.Tensor:
        """Return `θ_0 + λ τ` with τ by TIES: trim, elect by sum, mean of those that agree."""
        base = _as_factors(frame, estimate.base)
        rests = [_as_factors(frame, core) for core in estimate.deltas]
        height = context.block_rows or _BLOCK_ROWS
        blocks = [(row, min(row + height, shape.d_out)) for row in range(0, shape.d_out, height)]
        cuts = largest_magnitudes(
            lambda: (
                (
                    shape.path,
                    start * shape.d_in,
                    {str(n): delta_rows(rest, start, stop) for n, rest in enumerate(rests)},
                )
                for start, stop in blocks
            ),
            self.density,
        )
        merged = base.A.new_empty(shape.d_out, shape.d_in)
        for start, stop in blocks:
            kept = [delta_rows(rest, start, stop) for rest in rests]
            for n, values in enumerate(kept):
                dropped = ~cuts[str(n)].keep(shape.path, start * shape.d_in, values)
                values.masked_fill_(dropped, 0.0)
            tau = _elected_mean(kept, weights)
            merged[start:stop] = delta_rows(base, start, stop) + self.scale * tau
        return merged


def _elected_mean(rests: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """Return, per entry, the weighted mean of the values whose sign the weighted sum has."""
    # One after the other: a row's bits must not depend on the height of its block.
    total, size = torch.zeros_like(rests[0]), torch.zeros_like(rests[0])
    for values, weight in zip(rests, weights, strict=True):
        total += weight * values
        size += weight * values.abs()
    signs = torch.where(total.abs() > _TIE * size, total.sign(), 0.0)
    merged, counted = torch.zeros_like(total), torch.zeros_like(total)
    for values, weight in zip(rests, weights, strict=True):
        agree = values * signs > 0
        merged += torch.where(agree, weight * values, 0.0)
        counted += torch.where(agree, weight, 0.0)
    return merged / torch.where(counted > 0, counted, 1.0)


def _as_factors(frame: CoreStack, core: torch.Tensor) -> Factors:
    A, B = frame.factors(core)
    return Factors(A=A, B=B, scaling=1.0)
