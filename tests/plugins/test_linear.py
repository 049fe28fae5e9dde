"""Average and task arithmetic against their dense oracles and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import oracles
from stacks import (
    ALL_CASES,
    EQUAL_RANK_CASES,
    Case,
    collection,
    delta,
    merge,
    relative,
    stored_elements,
)
from unmerge.adapter import Factors
from unmerge.errors import ConfigError
from unmerge.matrices import module_matrices
from unmerge.merger import Merger
from unmerge.stack import FactorStack
from unmerge_bundle.encodings import FactorsEncoding
from unmerge_strategies import Average, TaskArithmetic

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def by_hand(weights: dict[str, float]) -> Case:
    """Two rank-1 adapters: `a` is 2·[1,3]ᵀ[1,2], `b` is −0.5·[2,0]ᵀ[4,1]."""
    a = Factors(A=torch.tensor([[1.0, 2.0]]), B=torch.tensor([[1.0], [3.0]]), scaling=2.0)
    b = Factors(A=torch.tensor([[4.0, 1.0]]), B=torch.tensor([[2.0], [0.0]]), scaling=-0.5)
    return Case("by hand", {"m": {"a": a, "b": b}}, weights)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_task_arithmetic_equals_the_dense_sum(case: Case, dtype: torch.dtype) -> None:
    for path, encoding in merge(TaskArithmetic(scale=0.3), case, dtype=dtype).items():
        expected = oracles.task_arithmetic(case.parts(path), scale=0.3)
        assert relative(delta(encoding), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_average_counts_an_absent_adapter_as_zero(case: Case, dtype: torch.dtype) -> None:
    for path, encoding in merge(Average(), case, dtype=dtype).items():
        expected = oracles.average(case.parts(path, absent_as_zero=True))
        assert relative(delta(encoding), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_average_renormalised_leaves_an_absent_adapter_out(case: Case) -> None:
    for path, encoding in merge(Average(absent="renormalise"), case).items():
        assert relative(delta(encoding), oracles.average(case.parts(path))) < 1e-10


def test_task_arithmetic_by_hand() -> None:
    # a = [[2, 4], [6, 12]], b = [[-4, -1], [0, 0]]; 3a − 2b = [[6+8, 12+2], [18, 36]], halved.
    merged = merge(TaskArithmetic(scale=0.5), by_hand({"a": 3.0, "b": -2.0}))["m"]
    np.testing.assert_array_equal(delta(merged), [[7.0, 7.0], [9.0, 18.0]])


def test_average_by_hand() -> None:
    # (3a + 1b) / 4 = ([[6, 12], [18, 36]] + [[-4, -1], [0, 0]]) / 4.
    merged = merge(Average(), by_hand({"a": 3.0, "b": 1.0}))["m"]
    np.testing.assert_array_equal(delta(merged), [[0.5, 2.75], [4.5, 9.0]])


def test_average_of_a_module_one_adapter_lacks_by_hand() -> None:
    case = by_hand({"a": 1.0, "b": 3.0})
    b = case.modules["m"]["b"]
    case = Case("", {"m": case.modules["m"], "n": {"b": b}}, case.weights)
    # b = [[-4, -1], [0, 0]] with 3 of 4 of the weight.
    np.testing.assert_array_equal(delta(merge(Average(), case)["n"]), [[-3.0, -0.75], [0, 0]])
    alone = merge(Average(absent="renormalise"), case)["n"]
    np.testing.assert_array_equal(delta(alone), [[-4.0, -1.0], [0.0, 0.0]])


@pytest.mark.parametrize("absent", ["zero", "renormalise"])
def test_an_average_with_weights_that_sum_to_zero_is_refused(absent: str) -> None:
    case = by_hand({"a": 1.0, "b": -1.0})
    with pytest.raises(ConfigError, match=r"^m: the weights sum to 0.*task_arithmetic"):
        merge(Average.model_validate({"absent": absent}), case)


def test_an_absent_adapter_decides_whether_the_weights_sum_to_zero() -> None:
    both = by_hand({"a": 1.0, "b": -1.0}).modules["m"]
    case = Case("", {"m": {"a": both["a"]}, "n": both}, {"a": 1.0, "b": -1.0})
    stack, context = case.only("m").stack(), case.context()
    np.testing.assert_array_equal(
        delta(Average(absent="renormalise").merge(stack, context)[0]), [[2.0, 4.0], [6.0, 12.0]]
    )
    with pytest.raises(ConfigError, match="sum to 0"):
        Average().merge(stack, context)


@pytest.mark.parametrize("merger", [Average(), TaskArithmetic()], ids=lambda m: m.method)
def test_the_predicted_size_is_the_size(merger: Average | TaskArithmetic) -> None:
    case = collection((2, 5, 3))
    module = case.stack().module(0)
    encoding = merge(merger, case)["layer.0"]
    assert merger.predict(module.shape).total == stored_elements(encoding) == 10 * (14 + 11)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "large", None])
def test_a_scale_that_is_no_finite_number_is_refused(scale: object) -> None:
    with pytest.raises(ValidationError, match="scale"):
        TaskArithmetic.model_validate({"scale": scale})


def test_the_small_bits_of_a_large_weight_are_kept() -> None:
    """The weight times the scaling is one float64 number, not two float32 roundings."""
    one = Factors(A=torch.ones(1, 1), B=torch.ones(1, 1), scaling=1 + 2.0**-40)
    stack = FactorStack.build([("m", [("a", one)])], ["a"])
    case = Case("", {"m": {"a": one}}, {"a": 1 - 2.0**-40})
    [encoding] = TaskArithmetic().merge(stack, case.context())
    assert delta(encoding)[0, 0] == (1 + 2.0**-40) * (1 - 2.0**-40)


def factors_of(merger: Merger, case: Case, path: str = "m") -> tuple[object, object]:
    encoding = merge(merger, case)[path]
    assert isinstance(encoding, FactorsEncoding)
    return encoding.A.tolist(), encoding.B.tolist()


def in_factors(weights: dict[str, float]) -> Case:
    """As `by_hand`, with scalings 4 and 1, whose roots are 2 and 1."""
    case = by_hand(weights)
    a, b = case.modules["m"]["a"], case.modules["m"]["b"]
    return Case("", {"m": {"a": Factors(a.A, a.B, 4.0), "b": Factors(b.A, b.B, 1.0)}}, weights)


def test_task_arithmetic_of_factors_by_hand() -> None:
    # A: 2 [1, 2] − [4, 1] = [−2, 3]; B: 2 [1, 3] + [2, 0] = [4, 6]: the sign of a weight is on A.
    case = in_factors({"a": 1.0, "b": -1.0})
    A, B = factors_of(TaskArithmetic(space="factors"), case)
    assert (A, B) == ([[-2.0, 3.0]], [[4.0], [6.0]])
    # λ = −4: −2 on A and 2 on B.
    A, B = factors_of(TaskArithmetic(space="factors", scale=-4.0), case)
    assert (A, B) == ([[4.0, -6.0]], [[8.0], [12.0]])


def test_average_of_factors_by_hand() -> None:
    # Roots of the weights: 2 and 1. A: (2 · 2 [1, 2] + [4, 1]) / 3; B: (2 · 2 [1, 3] + [2, 0]) / 3.
    A, B = factors_of(Average(space="factors"), in_factors({"a": 4.0, "b": 1.0}))
    np.testing.assert_allclose(np.asarray(A), [[8 / 3, 3.0]], rtol=1e-15)
    np.testing.assert_allclose(np.asarray(B), [[2.0], [4.0]], rtol=1e-15)


def test_task_arithmetic_renormalised_by_hand() -> None:
    both = by_hand({}).modules["m"]
    case = Case("", {"m": both, "n": {"b": both["b"]}}, {"a": 1.0, "b": 3.0})
    # b = [[-4, -1], [0, 0]] with its weight 3, or with that of all, 4.
    np.testing.assert_array_equal(delta(merge(TaskArithmetic(), case)["n"]), [[-12, -3], [0, 0]])
    scaled = merge(TaskArithmetic(absent="renormalise"), case)
    np.testing.assert_array_equal(delta(scaled["n"]), [[-16, -4], [0, 0]])
    # Where nobody is absent nothing changes: a + 3b.
    np.testing.assert_array_equal(delta(scaled["m"]), [[-10, 1], [6, 12]])


@pytest.mark.parametrize("space", ["delta", "factors"])
def test_weights_that_cannot_be_renormalised_are_refused_before_reading(space: str) -> None:
    both = by_hand({}).modules["m"]
    modules = {"m": {**both, "c": both["a"]}, "n": both}
    case = Case("", modules, {"a": 1.0, "b": -1.0, "c": 2.0})
    merger = TaskArithmetic.model_validate({"space": space, "absent": "renormalise"})
    shapes = {module.path: module.shape for module in case.stack()}
    merger.check(shapes["m"], case.context())
    message = r"^n: the weights of the adapters that have it sum to 0 .*; use absent=zero"
    with pytest.raises(ConfigError, match=message):
        merger.check(shapes["n"], case.context())
    with pytest.raises(ConfigError, match=message):
        merge(merger, case)


@pytest.mark.parametrize("merger", [Average(), TaskArithmetic(scale=-0.7)], ids=lambda m: m.method)
@pytest.mark.parametrize("case", EQUAL_RANK_CASES, ids=str)
def test_entry_by_entry_it_is_what_concatenation_gives(
    merger: Average | TaskArithmetic, case: Case
) -> None:
    """The rule that wrappers run on matrices, against the shortcut that deltas take."""
    for module in case.stack():
        [matrices] = module_matrices(module, "delta", case.context())
        dense = merger.merge_matrices(matrices, case.context()).numpy()
        short = delta(merge(merger, case)[module.path])
        scale = sum(float(np.linalg.norm(oracles.dense(part))) for part in case.parts(module.path))
        assert relative(dense, short, scale=scale) < 1e-13


def test_what_is_declared() -> None:
    for merger, exact, scales in (
        (TaskArithmetic(), True, True),
        (TaskArithmetic(absent="renormalise"), True, False),
        (TaskArithmetic(space="factors"), False, False),
        (Average(), True, False),
        (Average(space="factors"), False, False),
    ):
        declared = merger.capabilities
        assert declared.factor_exact == declared.mixed_ranks == declared.gauge_invariant == exact
        assert declared.weight_scales_delta == scales
        assert declared.sign_equivariant
