"""Strategies as outsiders write them pass the kit: of every kind the interface has."""

from __future__ import annotations

import doctest
import math
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field

import unmerge.testing
from unmerge import (
    Block,
    Blocks,
    Capabilities,
    DeltaEncoding,
    ElementwiseMerger,
    Encoding,
    FactorStack,
    MergeContext,
    Merger,
    ModuleShape,
    Passes,
)
from unmerge.kernels import concatenate
from unmerge.testing import check_merger
from unmerge_bundle import FactorsEncoding


class Midrange(ElementwiseMerger, frozen=True):
    """The middle between the smallest and the largest adapter, entry by entry."""

    method: ClassVar[str] = "acme.midrange"

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, ignores_weights=True)

    def combine(self, block: Block, state: None) -> torch.Tensor:
        low, high = block.values.aminmax(dim=0)
        return (low + high) / 2

    def lossless(self) -> Merger | None:
        return self


class Clipped(ElementwiseMerger, frozen=True):
    """The sum of what is left when every entry is cut at a fraction of the largest of all."""

    method: ClassVar[str] = "acme.clipped"

    limit: float = Field(default=0.5, gt=0, le=1)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            needs_survey=True,
            mixed_ranks=True,
            ignores_weights=True,
            gauge_invariant=True,
            sign_equivariant=True,
        )

    def measure(self, blocks: Blocks, context: MergeContext) -> float:
        peaks = [float(block.values.abs().max()) for block in blocks]
        return math.nan if any(map(math.isnan, peaks)) else self.limit * max(peaks)

    def combine(self, block: Block, state: float) -> torch.Tensor:
        return block.values.clamp(-state, state).sum(dim=0)

    def lossless(self) -> Merger | None:
        return self.model_copy(update={"limit": 1.0})


class Whitened(Merger, frozen=True):
    """All deltas divided by the root of the mean of all squared norms, of all modules."""

    method: ClassVar[str] = "acme.whitened"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(needs_survey=True, factor_exact=True, mixed_ranks=True)

    def survey(self, passes: Passes, context: MergeContext) -> float:
        squares = [
            f.scaling**2 * float(torch.linalg.vector_norm(f.B.double() @ f.A.double())) ** 2
            for stack in passes
            for module in stack
            for f in module.factors
        ]
        # fsum: the same bits however the modules come.
        return math.sqrt(math.fsum(squares) / len(squares)) or 1.0

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        merged: list[Encoding[torch.Tensor]] = []
        for module in stack:
            weights = context.weights_of(module.adapters)
            A, B = concatenate(module.factors, [w / context.state for w in weights])
            merged.append(FactorsEncoding(A=A, B=B, facts={"norm": context.state}))
        return merged


class Projected(Merger, frozen=True):
    """The sum of the deltas less its part along the base weights."""

    method: ClassVar[str] = "acme.projected"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            needs_base_weights=True,
            mixed_ranks=True,
            gauge_invariant=True,
            weight_scales_delta=True,
        )

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        merged: list[Encoding[torch.Tensor]] = []
        for module in stack:
            base = context.base_weights[module.path].double()
            A, B = concatenate(module.factors, context.weights_of(module.adapters))
            total = B @ A
            along = (total * base).sum() / (base * base).sum()
            merged.append(DeltaEncoding(delta=total - along * base))
        return merged

    def workspace_bytes(self, shape: ModuleShape) -> int:
        """Three dense float64 matrices besides the concatenated factors."""
        return 3 * 8 * (shape.d_out * shape.d_in + shape.elements)


class Noisy(ElementwiseMerger, frozen=True):
    """A random adapter's entry, entry by entry, drawn by the library's counter."""

    method: ClassVar[str] = "acme.noisy"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            mixed_ranks=True,
            ignores_weights=True,
            stochastic=True,
            gauge_invariant=True,
            sign_equivariant=True,
        )

    def combine(self, block: Block, state: None) -> torch.Tensor:
        chosen = block.uniform("choice").argmax(dim=0, keepdim=True)
        return block.values.gather(0, chosen)[0]


def passed(merger: Merger) -> set[str]:
    return {result.name for result in check_merger(merger) if result.status == "passed"}


def test_an_elementwise_rule_in_both_spaces() -> None:
    assert {"block_height_is_irrelevant", "factoring_is_irrelevant"} <= passed(Midrange())
    assert "mixed_ranks_are_refused" in passed(Midrange(space="factors"))


def test_an_elementwise_rule_with_facts_of_all_modules() -> None:
    assert {
        "a_survey_sees_the_modules",
        "chunking_of_a_survey_is_irrelevant",
        "flipped_entries_flip_the_result",
        "one_adapter_gives_itself",
    } <= passed(Clipped())


def test_a_layerwise_merger_with_a_survey() -> None:
    assert {
        "a_survey_sees_the_modules",
        "chunking_of_a_survey_is_irrelevant",
        "factors_equal_the_dense_result",
    } <= passed(Whitened())


def test_a_merger_that_needs_base_weights_gets_some() -> None:
    assert {"declared_inputs_are_needed", "weights_scale_deltas"} <= passed(Projected())


def test_a_random_rule() -> None:
    names = passed(Noisy())
    assert "another_seed_gives_another_result" in names
    assert "the_seed_is_irrelevant" not in names


def test_the_example_of_the_package_runs() -> None:
    failed, tried = doctest.testmod(unmerge.testing)
    assert tried == 6
    assert failed == 0


class Wrapped(Merger, frozen=True):
    """Whatever the inner rule returns."""

    method: ClassVar[str] = "acme.wrapped"

    inner: Merger

    @property
    def capabilities(self) -> Capabilities:
        return self.inner.capabilities

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        return self.inner.merge(stack, context)

    def workspace_bytes(self, shape: ModuleShape) -> int:
        return self.inner.workspace_bytes(shape)


def test_a_wrapper_around_what_only_this_process_knows_is_skipped_elsewhere() -> None:
    merger = Wrapped(inner=Projected())
    # By instance it works; by recipe nobody knows "acme.projected", here or elsewhere.
    results = {r.name: r for r in check_merger(merger, on_fail="report")}
    assert [r.name for r in results.values() if not r.ok] == ["recipe_survives_json"]
    assert results["another_process_gives_equal_bytes"].status == "skipped"
