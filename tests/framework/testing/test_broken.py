"""The kit finds what it is for: for every law a merger that breaks it, and that law alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field, ValidationInfo, field_validator

from unmerge import (
    AffineBasisEncoding,
    Block,
    Capabilities,
    DeltaEncoding,
    ElementwiseMerger,
    Encoding,
    FactorsEncoding,
    FactorStack,
    MergeContext,
    Merger,
    ModuleShape,
    OutputSize,
    Passes,
    Registry,
    ReversibleMerger,
    StackModule,
    get_plugin_manager,
    hookimpl,
)
from unmerge.errors import CapabilityError, IncompatibleAdaptersError
from unmerge.testing import all_checks, check_merger, contract

ALL = Capabilities(
    weight_scales_delta=True, mixed_ranks=True, gauge_invariant=True, sign_equivariant=True
)


class Sum(Merger, frozen=True):
    """`λ Σ w_i Δ_i`, multiplied out: keeps every law, and every mistake below is made in it."""

    method = "test.sum"
    claims: ClassVar[Capabilities] = ALL
    is_lossless: ClassVar[bool] = True

    scale: float = 1.0

    @property
    def capabilities(self) -> Capabilities:
        return self.claims

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        return [DeltaEncoding(delta=self.scale * self.merged(module, context)) for module in stack]

    def merged(self, module: StackModule, context: MergeContext) -> torch.Tensor:
        shape = module.shape
        total = torch.zeros(shape.d_out, shape.d_in, dtype=torch.float64)
        weights = context.weights_of(module.adapters)
        for weight, f in zip(weights, module.factors, strict=True):
            total = total + weight * f.scaling * (f.B.double() @ f.A.double())
        return total

    def predict(self, shape: ModuleShape) -> OutputSize | None:
        return OutputSize(shared=shape.d_out * shape.d_in)

    def workspace_bytes(self, shape: ModuleShape) -> int:
        # Enough for the mistakes made below, too: products and sums of all adapters in float64.
        return 8 * (8 + 4 * len(shape.ranks)) * shape.d_out * shape.d_in

    def lossless(self) -> Merger | None:
        return self.model_copy(update={"scale": 1.0}) if self.is_lossless else None


class Keep(ReversibleMerger, frozen=True):
    """Every adapter is a basis adapter of its own: everything comes back exactly."""

    method = "test.keep"
    is_lossless: ClassVar[bool] = True

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(restores="factors", ignores_weights=True)

    def check(self, shape: ModuleShape, context: MergeContext) -> None:
        if len(set(shape.ranks)) > 1:
            raise IncompatibleAdaptersError(f"{shape.path}: ranks {shape.ranks} differ")

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        return [self.kept(module) for module in stack]

    def kept(self, module: StackModule) -> AffineBasisEncoding[torch.Tensor]:
        A = torch.stack([f.A for f in module.factors])
        B = torch.stack([f.B for f in module.factors])
        choice = torch.eye(len(module.adapters))
        return AffineBasisEncoding(
            names=module.adapters,
            scalings=tuple(f.scaling for f in module.factors),
            mean_A=torch.zeros_like(A[0]),
            basis_A=A,
            coefficients_A=choice[:, :, None].expand(-1, -1, A.shape[2]),
            mean_B=torch.zeros_like(B[0]),
            basis_B=B,
            coefficients_B=choice[:, :, None].expand(-1, -1, B.shape[1]),
        )

    def lossless(self) -> Merger | None:
        return self if self.is_lossless else None


BROKEN: list[tuple[str, Merger]] = []


def breaks(law: str, **fields: Any) -> Any:
    """Register a class as the one that breaks `law`."""

    def register(kind: type[Merger]) -> type[Merger]:
        BROKEN.append((law, kind(**fields)))
        return kind

    return register


@breaks("the_name_is_its_own")
class Dotless(Sum, frozen=True):
    """Has a name as those that come with the library have."""

    method = "median"


@breaks("recipe_survives_json")
class ForgetsItsName(Sum, frozen=True):
    def recipe(self) -> dict[str, Any]:
        return {"scale": self.scale}


@breaks("wrong_recipes_are_refused")
class TakesAnything(Sum, frozen=True, extra="ignore"):
    pass


@breaks("wrong_recipes_are_refused")
class TakesAnotherMethod(Sum, frozen=True):
    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Any:
        own = obj if not isinstance(obj, dict) else {**obj, "method": cls.method}
        return super().model_validate(own, **options)


@breaks("edge_cases_give_finite_results")
class DividesByNorms(Sum, frozen=True):
    claims = Capabilities(mixed_ranks=True, gauge_invariant=True)
    is_lossless = False

    def merged(self, module: StackModule, context: MergeContext) -> torch.Tensor:
        total = super().merged(module, context)
        return total.div(float(torch.linalg.vector_norm(total)) or float("nan"))


@breaks("plan_is_told_the_truth")
class PredictsTheInput(Sum, frozen=True):
    def predict(self, shape: ModuleShape) -> OutputSize | None:
        return OutputSize(shared=shape.elements)


@breaks("plan_is_told_the_truth")
class NeedsMinusOneByte(Sum, frozen=True):
    def workspace_bytes(self, shape: ModuleShape) -> int:
        return -1


@breaks("workspace_is_enough")
class NeedsNothing(Sum, frozen=True):
    def workspace_bytes(self, shape: ModuleShape) -> int:
        return 0


@breaks("plan_is_told_the_truth")
class AdvisesInOneString(Sum, frozen=True):
    def advise(self, shapes: Any) -> Any:
        return "use another strategy"


@breaks("undeclared_inputs_are_untouched")
class PeeksAtTheBase(Sum, frozen=True):
    def merged(self, module: StackModule, context: MergeContext) -> torch.Tensor:
        total = super().merged(module, context)
        try:
            return total.add(context.base_weights[module.path], alpha=0.1)
        except CapabilityError:
            return total


@breaks("declared_inputs_are_needed")
class NeedsTheBaseForNothing(Sum, frozen=True):
    claims = replace(ALL, needs_base_weights=True)


@breaks("a_survey_sees_the_modules")
class SurveysNothing(Sum, frozen=True):
    claims = replace(ALL, needs_survey=True)


@breaks("inputs_are_not_written_to")
class WritesToItsInput(Sum, frozen=True):
    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        merged = super().merge(stack, context)
        if len(stack) == 1:
            stack.B.zero_()
        return merged


@breaks("global_state_is_left_alone")
class SeedsTheGlobalGenerator(Sum, frozen=True):
    def merged(self, module: StackModule, context: MergeContext) -> torch.Tensor:
        torch.manual_seed(0)
        return super().merged(module, context)


@breaks("global_state_is_left_alone")
class TakesAllCores(Sum, frozen=True):
    def merged(self, module: StackModule, context: MergeContext) -> torch.Tensor:
        torch.set_num_threads(2)
        return super().merged(module, context)


@breaks("mixed_ranks_are_refused")
class MixesRanksUnsaid(Sum, frozen=True):
    claims = replace(ALL, mixed_ranks=False)


@breaks("mixed_ranks_are_refused")
class RefusesWithoutAName(Keep, frozen=True):
    def check(self, shape: ModuleShape, context: MergeContext) -> None:
        if len(set(shape.ranks)) > 1:
            raise IncompatibleAdaptersError("ranks differ")


@breaks("one_adapter_gives_itself", scale=0.5)
class LosesAndSaysItDoesNot(Sum, frozen=True):
    def lossless(self) -> Merger | None:
        return self


@breaks("one_adapter_gives_itself")
class DropsSmallNumbers(Sum, frozen=True):
    def merged(self, module: StackModule, context: MergeContext) -> torch.Tensor:
        total = super().merged(module, context)
        return torch.where(total.abs() < 1e-5, 0.0, total)


@breaks("one_adapter_gives_itself")
class ForgetsWideColumns(Sum, frozen=True):
    def merged(self, module: StackModule, context: MergeContext) -> torch.Tensor:
        total = super().merged(module, context)
        total[:, 64:] = 0.0
        return total


@breaks("scaling_enters_once")
class LosesTheSignOfScalings(Sum, frozen=True):
    is_lossless = False

    def merged(self, module: StackModule, context: MergeContext) -> torch.Tensor:
        positive = tuple(replace(f, scaling=abs(f.scaling)) for f in module.factors)
        return super().merged(replace(module, factors=positive), context)


@breaks("scaling_enters_once")
class ForgetsTheScaling(Sum, frozen=True):
    is_lossless = False

    def merged(self, module: StackModule, context: MergeContext) -> torch.Tensor:
        unscaled = tuple(replace(f, scaling=1.0) for f in module.factors)
        return super().merged(replace(module, factors=unscaled), context)


@breaks("factoring_is_irrelevant")
class LooksAtTheFactors(Sum, frozen=True):
    is_lossless = False

    def merged(self, module: StackModule, context: MergeContext) -> torch.Tensor:
        weighed = []
        for f in module.factors:
            gram = f.A.double() @ f.A.double().T
            weighed.append(replace(f, scaling=f.scaling * float(gram.norm() / gram.trace())))
        return super().merged(replace(module, factors=tuple(weighed)), context)


@breaks("factors_equal_the_dense_result")
class AddsFactorsApart(Sum, frozen=True):
    claims = Capabilities(factor_exact=True)
    is_lossless = False

    def check(self, shape: ModuleShape, context: MergeContext) -> None:
        if len(set(shape.ranks)) > 1:
            raise IncompatibleAdaptersError(f"{shape.path}: ranks {shape.ranks} differ")

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        merged: list[Encoding[torch.Tensor]] = []
        for module in stack:
            weights = context.weights_of(module.adapters)
            A = sum((f.A.double() for f in module.factors), start=torch.zeros(()))
            B = sum(
                (
                    w * f.scaling * f.B.double()
                    for w, f in zip(weights, module.factors, strict=True)
                ),
                start=torch.zeros(()),
            )
            merged.append(FactorsEncoding(A=A, B=B))
        return merged

    def predict(self, shape: ModuleShape) -> OutputSize | None:
        return OutputSize(shared=shape.ranks[0] * (shape.d_out + shape.d_in))


@breaks("factors_equal_the_dense_result")
class SaysFactorsReturnsADelta(Sum, frozen=True):
    claims = replace(ALL, factor_exact=True)


@breaks("weights_scale_deltas")
class Averages(Sum, frozen=True):
    def merged(self, module: StackModule, context: MergeContext) -> torch.Tensor:
        divisor = sum(abs(weight) for weight in context.weights.values())
        return super().merged(module, context) / divisor


@breaks("ignored_weights_have_no_effect")
class UsesIgnoredWeights(Sum, frozen=True):
    claims = replace(ALL, ignores_weights=True, weight_scales_delta=False)


@breaks("weights_have_an_effect")
class IgnoresWeightsUnsaid(Sum, frozen=True):
    claims = replace(ALL, weight_scales_delta=False)

    def merged(self, module: StackModule, context: MergeContext) -> torch.Tensor:
        return super().merged(module, replace(context, weights=dict.fromkeys(context.weights, 1.0)))


@breaks("order_of_adapters_is_irrelevant")
class ForgetsTheFifth(Sum, frozen=True):
    def merged(self, module: StackModule, context: MergeContext) -> torch.Tensor:
        known = replace(module, adapters=module.adapters[:4], factors=module.factors[:4])
        return super().merged(known, context)


@breaks("order_of_adapters_is_irrelevant")
class CountsTheFirstTwice(Sum, frozen=True):
    is_lossless = False

    def merged(self, module: StackModule, context: MergeContext) -> torch.Tensor:
        first = replace(module.factors[0], scaling=2 * module.factors[0].scaling)
        return super().merged(replace(module, factors=(first, *module.factors[1:])), context)


@breaks("order_of_adapters_is_irrelevant")
class MixesUpAdapters(Keep, frozen=True):
    is_lossless = False

    def kept(self, module: StackModule) -> AffineBasisEncoding[torch.Tensor]:
        shifted = (*module.factors[1:], module.factors[0])
        return super().kept(replace(module, factors=shifted))


@breaks("a_stack_equals_its_modules")
class DividesByTheStack(Sum, frozen=True):
    is_lossless = False

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        return [e.map(lambda t: t.div(len(stack))) for e in super().merge(stack, context)]


@breaks("a_stack_equals_its_modules")
class LooksAtThePadding(Sum, frozen=True):
    is_lossless = False

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        padded = (stack.A[:, 0].abs().sum(dim=-1) == 0).sum(dim=-1)
        merged = zip(super().merge(stack, context), padded.tolist(), strict=True)
        return [encoding.map(partial(torch.mul, 1.0 + rows)) for encoding, rows in merged]


@breaks("block_height_is_irrelevant")
class CentresEachBlock(ElementwiseMerger, frozen=True):
    method = "test.centred"

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, ignores_weights=True)

    def combine(self, block: Block, state: None) -> torch.Tensor:
        total = block.values.sum(dim=0)
        return total - total.mean()


@breaks("chunking_of_a_survey_is_irrelevant")
class CountsStacks(Sum, frozen=True):
    claims = replace(ALL, needs_survey=True)
    is_lossless = False

    def survey(self, passes: Passes, context: MergeContext) -> int:
        return sum(1 for _ in passes)

    def merged(self, module: StackModule, context: MergeContext) -> torch.Tensor:
        return super().merged(module, context).mul(context.state)


@breaks("another_seed_gives_another_result")
class NeverDraws(Sum, frozen=True):
    claims = replace(ALL, stochastic=True)


@breaks("the_seed_is_irrelevant")
class DrawsUnsaid(Sum, frozen=True):
    is_lossless = False

    def merged(self, module: StackModule, context: MergeContext) -> torch.Tensor:
        return super().merged(module, context) * (1 + context.seed)


@breaks("flipped_entries_flip_the_result")
class TakesMagnitudes(Sum, frozen=True):
    claims = replace(ALL, weight_scales_delta=False)
    is_lossless = False

    def merged(self, module: StackModule, context: MergeContext) -> torch.Tensor:
        return super().merged(module, context).abs()


@breaks("flipped_entries_flip_the_result")
class CountsCancelledVotesAsPositive(ElementwiseMerger, frozen=True):
    method = "test.positive"

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, ignores_weights=True, sign_equivariant=True)

    def combine(self, block: Block, state: None) -> torch.Tensor:
        vote = torch.where(block.values.sum(dim=0) < 0, -1.0, 1.0)
        return (block.values * (block.values * vote > 0)).sum(dim=0)


@breaks("nan_never_vanishes")
class CleansUp(Sum, frozen=True):
    def merged(self, module: StackModule, context: MergeContext) -> torch.Tensor:
        return super().merged(module, context).nan_to_num()


@breaks("restored_adapters_are_finite")
class ScalesTwice(Keep, frozen=True):
    is_lossless = False

    def kept(self, module: StackModule) -> AffineBasisEncoding[torch.Tensor]:
        kept = super().kept(module)
        return replace(kept, scalings=tuple(4 * abs(s) for s in kept.scalings))


@breaks("lossless_settings_restore_no_worse")
class CallsTheMeanLossless(Keep, frozen=True):
    mean: bool = False

    def kept(self, module: StackModule) -> AffineBasisEncoding[torch.Tensor]:
        kept = super().kept(module)
        if not self.mean:
            return kept
        return replace(
            kept,
            coefficients_A=torch.full_like(kept.coefficients_A, 1 / len(kept.names)),
            coefficients_B=torch.full_like(kept.coefficients_B, 1 / len(kept.names)),
        )

    def lossless(self) -> Merger | None:
        return self.model_copy(update={"mean": True})


@breaks("a_bundle_gives_everything_back", scale=1e40)
class ExceedsFloat32(Sum, frozen=True):
    pass


def failed(merger: Merger) -> set[str]:
    results = check_merger(merger, on_fail="report")
    assert len(results) == len(all_checks())
    return {result.name for result in results if result.status == "failed"}


@pytest.mark.parametrize("merger", [Sum(), Sum(scale=3.0), Keep()], ids=repr)
def test_what_the_mistakes_are_made_in_breaks_nothing(merger: Merger) -> None:
    assert failed(merger) == set()


@pytest.mark.parametrize(
    ("law", "merger"), [pytest.param(law, m, id=type(m).__name__) for law, m in BROKEN]
)
def test_a_broken_law_is_found_and_no_other(law: str, merger: Merger) -> None:
    assert failed(merger) == {law}


class UnfitEncoding(Sum, frozen=True):
    mistake: str = ""

    def merge(self, stack: FactorStack, context: MergeContext) -> Any:
        merged = super().merge(stack, context)
        return {
            "transposed": [DeltaEncoding(delta=e.shared_tensors()["delta"].T) for e in merged],
            "integers": [e.map(lambda t: t.round().to(torch.int64)) for e in merged],
            "a fact of NaN": [replace(e, facts={"error": float("nan")}) for e in merged],
            "tensors": [e.shared_tensors()["delta"] for e in merged],
            "restoring": Keep().merge(stack, context),
        }[self.mistake]


@pytest.mark.parametrize(
    "mistake", ["transposed", "integers", "a fact of NaN", "tensors", "restoring"]
)
def test_encodings_that_do_not_fit_are_found(mistake: str) -> None:
    found = failed(UnfitEncoding(mistake=mistake))
    # The other laws that look at encodings may stumble over them as well.
    assert {"encodings_fit", "edge_cases_give_finite_results", "mixed_ranks_are_merged"} <= found


class MixesRanksAndCannot(Keep, frozen=True):
    def check(self, shape: ModuleShape, context: MergeContext) -> None:
        pass

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, mixed_ranks=True)


def test_mixed_ranks_that_are_declared_and_fail_are_found() -> None:
    # Predictions are made for mixed ranks too, where they are declared.
    assert failed(MixesRanksAndCannot()) == {"mixed_ranks_are_merged", "plan_is_told_the_truth"}


def test_a_recipe_that_forgets_a_field_is_found() -> None:
    # Local, because another process is given the recipe: that law would find it as well.
    class ForgetsAField(Sum, frozen=True):
        def recipe(self) -> dict[str, Any]:
            return {"method": self.method}

    assert failed(ForgetsAField(scale=2.0)) == {"recipe_survives_json"}


def test_a_result_that_changes_on_repetition_is_found() -> None:
    calls: list[int] = []

    # Local, so that no other process can import it: that law would find it as well.
    class CountsCalls(Sum, frozen=True):
        claims = replace(ALL, stochastic=True)
        is_lossless = False

        def merged(self, module: StackModule, context: MergeContext) -> torch.Tensor:
            if context.seed == 1:
                calls.append(1)
            return super().merged(module, context) * (1 + len(calls) * context.seed)

    assert failed(CountsCalls()) == {"repeating_gives_equal_bytes"}


HASHING = '''
import torch
from unmerge import Capabilities, DeltaEncoding, Merger


class Hashing(Merger, frozen=True):
    """The same in one process, another in the next: Python's hashes of strings differ."""

    method = "test.hashing"

    @property
    def capabilities(self):
        return Capabilities(mixed_ranks=True, ignores_weights=True)

    def merge(self, stack, context):
        return [
            DeltaEncoding(
                delta=sum(f.scaling * (f.B.double() @ f.A.double()) for f in m.factors)
                * float(FACTOR)
            )
            for m in stack
        ]

    def workspace_bytes(self, shape):
        return 8 * 6 * shape.d_out * shape.d_in


FACTOR = EXPRESSION
'''


@pytest.fixture
def hashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that makes a merger in a module of its own, with a factor."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, expression: str) -> Merger:
        program = HASHING.replace("EXPRESSION", expression)
        (tmp_path / f"{name}.py").write_text(program)
        merger: Merger = __import__(name).Hashing()
        return merger

    before = set(sys.modules)
    yield make
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_what_differs_in_another_process_is_found(hashing: Any) -> None:
    unstable = hashing("hashing_mergers", 'hash("unmerge") % 2**31 + 1')
    assert failed(unstable) == {"another_process_gives_equal_bytes"}


def test_an_error_in_another_process_is_reported(hashing: Any) -> None:
    here = f'1 if __import__("os").getpid() == {__import__("os").getpid()} else "no number"'
    [result] = [
        result
        for result in check_merger(hashing("failing_elsewhere", here), on_fail="report")
        if result.status == "failed"
    ]
    assert result.name == "another_process_gives_equal_bytes"
    assert "ValueError: could not convert string to float" in result.reason


class BuiltOtherwiseByTheRegistry(Sum, frozen=True):
    scale: float = Field(default=1.0)

    @field_validator("scale")
    @classmethod
    def _changes(cls, value: float, info: ValidationInfo) -> float:
        return value + 1 if info.context else value


@pytest.mark.parametrize(
    ("kind", "expected"), [(BuiltOtherwiseByTheRegistry, {"registry_builds_it"}), (Sum, set())]
)
def test_a_registered_merger_is_built_by_the_registry(
    kind: type[Sum], expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plugin:
        @staticmethod
        @hookimpl
        def unmerge_mergers() -> list[type[Merger]]:
            return [kind]

    manager = get_plugin_manager(load_entry_points=False)
    manager.register(Plugin())
    monkeypatch.setattr(contract, "default_registry", lambda: Registry(manager))
    results = check_merger(kind(scale=2.0), on_fail="report")
    assert {r.name for r in results if r.status == "failed"} == expected
    [asked] = [r for r in results if r.name == "registry_builds_it"]
    assert asked.status != "skipped"


def test_every_law_has_a_merger_that_breaks_it() -> None:
    elsewhere = {
        "encodings_fit",
        "mixed_ranks_are_merged",
        "repeating_gives_equal_bytes",
        "another_process_gives_equal_bytes",
        "registry_builds_it",
    }
    assert {law for law, _ in BROKEN} | elsewhere == {check.name for check in all_checks()}
