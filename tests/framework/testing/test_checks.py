"""The kit's own behaviour: statuses, announced failures, reasons, and what it refuses."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from unmerge import (
    Capabilities,
    DeltaEncoding,
    Encoding,
    FactorStack,
    MergeContext,
    Merger,
    ModuleShape,
)
from unmerge.errors import ConfigError, UnmergeError
from unmerge.testing import CheckFailedError, CheckResult, all_checks, check_merger
from unmerge_strategies import Average


class Halved(Merger, frozen=True):
    """The sum of the deltas, which claims to be lossless at every scale."""

    method: ClassVar[str] = "test.halved"

    scale: float = 0.5
    seeded: bool = False

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(mixed_ranks=True, ignores_weights=True, stochastic=self.seeded)

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        deltas = [
            [f.scaling * (f.B.double() @ f.A.double()) for f in module.factors] for module in stack
        ]
        return [DeltaEncoding(delta=self.scale * torch.stack(d).sum(dim=0)) for d in deltas]

    def workspace_bytes(self, shape: ModuleShape) -> int:
        return 8 * (4 + 2 * len(shape.ranks)) * shape.d_out * shape.d_in

    def lossless(self) -> Merger | None:
        return self


IDENTITY = "one_adapter_gives_itself"


def by_name(results: list[CheckResult]) -> dict[str, CheckResult]:
    return {result.name: result for result in results}


def test_a_failure_is_raised_and_names_everything() -> None:
    with pytest.raises(CheckFailedError, match="expected the adapter's own delta") as caught:
        check_merger(Halved())
    error = caught.value
    assert isinstance(error, AssertionError)
    assert isinstance(error, UnmergeError)
    assert (error.strategy, error.check) == ("test.halved", IDENTITY)
    assert "alpha / r" in error.case
    assert "0.5" in error.got
    for fact in (error.strategy, error.check, error.case, error.expected, error.got):
        assert fact in str(error)


def test_an_error_survives_the_way_between_processes() -> None:
    error = CheckFailedError(strategy="s", check="c", case="i", expected="e", got="g")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert str(again) == str(error)
    assert again.got == "g"


def test_a_report_holds_every_check_once_in_order() -> None:
    results = check_merger(Halved(), on_fail="report")
    assert [result.name for result in results] == [check.name for check in all_checks()]
    assert [result.name for result in results if not result.ok] == [IDENTITY]
    failed = by_name(results)[IDENTITY]
    assert failed.status == "failed"
    assert failed.reason.startswith("test.halved: one_adapter_gives_itself: on one adapter")
    assert all(result.law.endswith(".") for result in results)


def test_undeclared_capabilities_are_skipped_with_a_reason() -> None:
    results = by_name(check_merger(Halved(scale=1.0)))
    for name, reason in {
        "weights_scale_deltas": "declares weight_scales_delta=False",
        "factoring_is_irrelevant": "declares gauge_invariant=False",
        "flipped_entries_flip_the_result": "declares sign_equivariant=False",
        "factors_equal_the_dense_result": "declares factor_exact=False",
        "weights_have_an_effect": "declares ignores_weights=True",
        "mixed_ranks_are_refused": "declares mixed_ranks=True",
        "restored_adapters_are_finite": "declares restores=None",
        "another_seed_gives_another_result": "declares stochastic=False",
    }.items():
        assert (results[name].status, results[name].reason) == ("skipped", reason)
    assert "no installed plugin registers Halved" in results["registry_builds_it"].reason


def test_a_merger_without_lossless_settings_skips_the_identity() -> None:
    class NoLoss(Halved, frozen=True):
        def lossless(self) -> Merger | None:
            return None

    assert by_name(check_merger(NoLoss()))[IDENTITY].reason == "lossless() returns None"


def test_a_class_another_process_cannot_import_is_skipped_there() -> None:
    class Local(Halved, frozen=True):
        pass

    result = by_name(check_merger(Local(scale=1.0)))["another_process_gives_equal_bytes"]
    assert result.status == "skipped"
    assert "cannot import" in result.reason


def test_a_merger_that_needs_activations_is_not_merged() -> None:
    class NeedsActivations(Halved, frozen=True):
        @property
        def capabilities(self) -> Capabilities:
            return replace(super().capabilities, needs_activations=True)

        def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
            return super().merge(stack, context) if context.activations["m"] else []

    results = check_merger(NeedsActivations())
    passed = {result.name for result in results if result.status == "passed"}
    assert passed == {
        "recipe_survives_json",
        "wrong_recipes_are_refused",
        "declared_inputs_are_needed",
        "the_name_is_its_own",
    }
    [reason] = {r.reason for r in results if "activations to give" in r.reason}
    assert reason == "declares needs_activations: the kit has no activations to give"


def test_an_announced_failure_is_reported_with_its_reason() -> None:
    results = check_merger(Halved(), expected_failures={IDENTITY: "halves on purpose"})
    result = by_name(results)[IDENTITY]
    assert (result.status, result.reason, result.ok) == (
        "expected_failure",
        "halves on purpose",
        True,
    )


def test_an_announced_failure_that_does_not_happen_is_a_failure() -> None:
    announced = {IDENTITY: "halves on purpose"}
    with pytest.raises(CheckFailedError, match="remove it from expected_failures"):
        check_merger(Halved(scale=1.0), expected_failures=announced)
    results = check_merger(Halved(scale=1.0), expected_failures=announced, on_fail="report")
    result = by_name(results)[IDENTITY]
    assert result.status == "unexpected_pass"
    assert not result.ok
    assert "halves on purpose" in result.reason


def test_an_announced_failure_of_a_check_that_does_not_apply_stays_skipped() -> None:
    announced = {"weights_scale_deltas": "not linear"}
    results = by_name(check_merger(Average(), expected_failures=announced))
    assert results["weights_scale_deltas"].status == "skipped"


def test_an_unknown_check_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="did you mean one_adapter_gives_itself"):
        check_merger(Average(), expected_failures={"one_adapter_gives_it": "?"})


def test_a_class_instead_of_an_instance_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected an instance"):
        check_merger(Average)  # type: ignore[arg-type]


def test_what_a_merger_raises_is_a_failure_that_names_the_input() -> None:
    class Raises(Halved, frozen=True):
        def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
            raise KeyError("layers")

    result = by_name(check_merger(Raises(), on_fail="report"))["encodings_fit"]
    assert "on three adapters: expected a result, got KeyError: 'layers'" in result.reason


def test_a_lossless_that_changes_its_mind_is_a_failure() -> None:
    answers: list[int] = []

    class Undecided(Halved, frozen=True):
        def lossless(self) -> Merger | None:
            answers.append(1)
            return self if len(answers) % 2 else None

    result = by_name(check_merger(Undecided(), on_fail="report"))[IDENTITY]
    assert "lossless() returned a merger once and None now" in result.reason


def test_refusals_of_edge_cases_are_passed_and_named() -> None:
    class Positive(Halved, frozen=True):
        @property
        def capabilities(self) -> Capabilities:
            return replace(super().capabilities, ignores_weights=False)

        def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
            total = sum(context.weights.values())
            scaled = self.model_copy(update={"scale": total / len(context.weights)})
            return Halved.merge(scaled, stack, context)

        def check(self, shape: object, context: MergeContext) -> None:
            if min(context.weights.values()) <= 0:
                raise ConfigError("weights must be positive")

    result = by_name(check_merger(Positive(scale=1.0)))["edge_cases_give_finite_results"]
    assert result.status == "passed"
    assert "negative and zero weights (weights must be positive)" in result.reason


def test_refusing_every_edge_case_is_a_failure() -> None:
    class Never(Halved, frozen=True):
        def check(self, shape: object, context: MergeContext) -> None:
            raise ConfigError("not today")

    result = by_name(check_merger(Never(), on_fail="report"))["edge_cases_give_finite_results"]
    assert result.status == "failed"
    assert "refusals: zero adapter (not today)" in result.reason


def test_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check_merger(Average())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
