"""TIES: trim each adapter, elect a sign per entry, merge those that agree with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from unmerge import (
    Block,
    Blocks,
    Capabilities,
    MergeContext,
    Merger,
    ModuleShape,
    TrimmingMerger,
)
from unmerge.errors import ConfigError
from unmerge.kernels import Cut, elected_signs


@dataclass(frozen=True, slots=True)
class _Facts:
    """What an entry's merge needs to know of all entries: the cuts, and the majority's sign."""

    cuts: Mapping[str, Cut]
    majority: float


class Ties(TrimmingMerger, frozen=True):
    """Trim, elect sign, disjoint merge: `λ · Σ_{i agrees} w_i τ_i / #{i agrees}` per entry.

    Trim: of each adapter's vector the `density` fraction of largest magnitude is kept, exactly
    `⌊density · numel⌋` entries. Elect: `σ = sign(Σ_i τ_i)`. Merge: the mean of the kept entries
    whose sign is σ; an entry of 0 never agrees, so an adapter that lacks a module has no vote.

    By default weights enter after the vote (PEFT): a zero weight still votes and is counted, and a
    negative one subtracts an adapter that agrees. With `weigh_votes` they enter before it and the
    divisor is the sum of the agreeing weights (mergekit's `normalize`), so equal weights cancel.

    Where published implementations disagree, by field:

    * `scope`: one cut over all modules (TIES paper, KnOTS, FusionBench) or per tensor (PEFT,
      mergekit). `"module"` is the default because it streams; `"model"` is exact as well.
    * `vote`: by the sum of values (paper, PEFT `total`), or of signs (PEFT `frequency`).
    * `zero_vote`: an entry whose vote is 0 is dropped (the paper's formula), positive (PEFT,
      mergekit), or takes the sign of the majority of all elected signs (KnOTS, FusionBench; where
      that is 0 too, their code keeps the negative entries, and so does this).
    * `reduce`: mean (paper, PEFT), sum (FusionBench's default), or the entry of largest magnitude.
    * KnOTS and FusionBench keep `⌊density · numel⌋ + 1` entries and all that equal the last;
      this and PEFT keep `⌊density · numel⌋`.

    Source: "TIES-Merging", arXiv 2306.01708, sections 4.1 and 4.2; λ is `scale`.
    """

    method: ClassVar[str] = "ties"
    bytes_per_value: ClassVar[int] = 28

    scale: float = Field(default=1.0, allow_inf_nan=False, description="λ, applied to the result")
    vote: Literal["value", "count"] = Field(
        default="value", description="elect by the sum of values, or of signs"
    )
    weigh_votes: bool = Field(
        default=False, description="weights enter before the vote, and into the divisor"
    )
    zero_vote: Literal["drop", "positive", "majority"] = Field(
        default="drop", description="the sign where the votes cancel"
    )
    reduce: Literal["mean", "sum", "max"] = Field(
        default="mean", description="how the agreeing entries are merged"
    )

    @property
    def capabilities(self) -> Capabilities:
        """Sign-equivariant unless a cancelled vote is given a sign of its own."""
        return replace(super().capabilities, sign_equivariant=self.zero_vote == "drop")

    def check(self, shape: ModuleShape, context: MergeContext) -> None:
        """Refuse a mean of weighted votes with weights of both signs: its divisor can be 0.

        Raises:
            ConfigError: The weights of the adapters that have the module have both signs.
        """
        super().check(shape, context)
        weights = [context.weights[name] for name in shape.adapters]
        if self.weigh_votes and self.reduce == "mean" and min(weights) < 0 < max(weights):
            raise ConfigError(
                f"{shape.path}: weights of both signs cannot be the divisor of a mean; use "
                "weigh_votes=false, reduce=sum, or weights of one sign"
            )

    def measure(self, blocks: Blocks, context: MergeContext) -> _Facts:  # noqa: ARG002
        """Return the cuts, and the sign of the majority where a cancelled vote takes it."""
        cuts = self.cuts(blocks)
        majority = 0
        if self.zero_vote == "majority":
            for block in blocks:
                signs = elected_signs(self._voters(block, cuts), by_count=self.vote == "count")
                majority += int((signs > 0).sum()) - int((signs < 0).sum())
        return _Facts(cuts=cuts, majority=1.0 if majority > 0 else -1.0)

    def combine(self, block: Block, state: _Facts) -> torch.Tensor:
        """Return the merged rows. O(N) operations an entry."""
        voters = self._voters(block, state.cuts)
        signs = elected_signs(voters, by_count=self.vote == "count")
        if self.zero_vote != "drop":
            tie = 1.0 if self.zero_vote == "positive" else state.majority
            signs.masked_fill_(signs == 0, tie)
        total, divisor = torch.zeros_like(signs), torch.zeros_like(signs)
        for values, weight in zip(voters, block.part_weights.values, strict=True):
            # The magnitude where the entry agrees, 0 where it does not.
            agreeing = (values * signs).clamp_(min=0)
            if self.reduce == "mean":
                counted = agreeing.sign()
                divisor += counted * weight if self.weigh_votes else counted
            if not self.weigh_votes:
                agreeing *= weight
            if self.reduce == "max":
                total = torch.where(agreeing.abs() > total.abs(), agreeing, total)
            else:
                total += agreeing
        if self.reduce == "mean":
            # A quotient of two zeros where nobody agrees.
            total /= divisor.masked_fill_(divisor == 0, 1)
        return total * signs * block.part_weights.scale(self.scale)

    def lossless(self) -> Merger:
        """Return it with everything kept and λ = 1."""
        return self.model_copy(update={"density": 1.0, "scale": 1.0})

    def _voters(self, block: Block, cuts: Mapping[str, Cut]) -> torch.Tensor:
        values = self.trimmed(block, cuts)
        if not self.weigh_votes:
            return values
        return values * block.weights.to(values.dtype)[:, None, None]
