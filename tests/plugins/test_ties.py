"""TIES by hand, field by field, with the arithmetic beside it; and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from stacks import (
    Case,
    collection,
    delta,
    merge,
    of_deltas,
    regauge,
    relative,
    same_bits,
    stored_elements,
)
from unmerge.adapter import Factors
from unmerge.errors import ConfigError, NonFiniteError
from unmerge.stack import ModuleShape
from unmerge_bundle.encodings import FactorsEncoding
from unmerge_strategies import Ties

#    entry   0     1     2       3    4     5
A = [[3.0, -2.0, 4.0], [0.0, 1.0, 2.0]]
B = [[1.0, -4.0, -4.0], [5.0, 1.0, -1.0]]
C = [[-2.0, 3.0, 0.0], [1.0, -2.0, -1.0]]
# Sums:      2    −3    0       6    0     0
# Counts:   +1    −1    0      +2   +1    −1


def case(*weights: float) -> Case:
    return of_deltas({"m": {"a": A, "b": B, "c": C}}, dict(zip("abc", weights, strict=False)))


def ties(merging: Case, path: str = "m", **fields: Any) -> list[list[float]]:
    rows: list[list[float]] = delta(merge(Ties(**fields), merging)[path]).tolist()
    return rows


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # (3 + 1) / 2, −(2 + 4) / 2, dropped, (5 + 1) / 2, dropped, dropped.
        ({}, [[2, -3, 0], [3, 0, 0]]),
        ({"scale": -0.5}, [[-1, 1.5, 0], [-1.5, 0, 0]]),
        ({"reduce": "sum"}, [[4, -6, 0], [6, 0, 0]]),
        ({"reduce": "max"}, [[3, -4, 0], [5, 0, 0]]),
        # By count entry 2 is a draw, 4 has two of three for +, 5 two of three for −.
        ({"vote": "count"}, [[2, -3, 0], [3, 1, -1]]),
        # Draws are +: 4; (1 + 1) / 2; 2.
        ({"zero_vote": "positive"}, [[2, -3, 4], [3, 1, 2]]),
        # Elected: + − 0 + 0 0, so the majority is +.
        ({"zero_vote": "majority"}, [[2, -3, 4], [3, 1, 2]]),
        # Elected by count: + − 0 + + −, so the majority is +.
        ({"zero_vote": "majority", "vote": "count"}, [[2, -3, 4], [3, 1, -1]]),
    ],
    ids=str,
)
def test_everything_kept(fields: dict[str, Any], expected: list[list[float]]) -> None:
    assert ties(case(), density=1.0, **fields) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [[-2, 3, 0], [-3, 0, 0]]),
        # Draws are + again: 4 of b; 2 of c; (1 + 1) / 2 of b and c.
        ({"zero_vote": "positive"}, [[-2, 3, 4], [-3, 2, 1]]),
        # The majority is − now.
        ({"zero_vote": "majority"}, [[-2, 3, -4], [-3, -1, -2]]),
    ],
    ids=str,
)
def test_everything_negated(fields: dict[str, Any], expected: list[list[float]]) -> None:
    negated = of_deltas(
        {"m": {n: (-np.asarray(rows)).tolist() for n, rows in (("a", A), ("b", B), ("c", C))}}
    )
    assert ties(negated, density=1.0, **fields) == expected


def test_a_majority_that_is_a_draw_itself_keeps_the_negative_entries() -> None:
    # Elected: +, −, 0: one each, so − where the votes cancel.
    drawn = of_deltas({"m": {"a": [[1.0, -1.0, 2.0]], "b": [[0.0, 0.0, -2.0]]}})
    assert ties(drawn, density=1.0, zero_vote="majority") == [[1, -1, -2]]


def test_the_majority_is_that_of_everything_one_cut_covers() -> None:
    modules = {"m": {"a": [[1.0, 2.0]], "b": [[1.0, -2.0]]}, "n": {"a": [[-1.0, -1.0]]}}
    # Over m alone: one +, so a draw is +. Over both: one + and two −.
    assert ties(of_deltas(modules), density=1.0, zero_vote="majority") == [[1, 2]]
    assert ties(of_deltas(modules), density=1.0, zero_vote="majority", scope="model") == [[1, -2]]


@pytest.mark.parametrize(
    ("weights", "fields", "expected"),
    [
        # The same entries as without weights: (2·3 + 1) / 2, −(2·2 + 4) / 2, (5 − 1) / 2.
        ((2, 1, -1), {}, [[3.5, -4, 0], [2, 0, 0]]),
        ((2, 1, -1), {"reduce": "sum"}, [[7, -8, 0], [4, 0, 0]]),
        ((2, 1, -1), {"reduce": "max"}, [[6, -4, 0], [5, 0, 0]]),
        # A zero weight votes and is counted.
        ((0, 1, 1), {}, [[0.5, -2, 0], [3, 0, 0]]),
    ],
    ids=str,
)
def test_weights_enter_after_the_vote(
    weights: tuple[float, ...], fields: dict[str, Any], expected: list[list[float]]
) -> None:
    assert ties(case(*weights), density=1.0, **fields) == expected


@pytest.mark.parametrize(
    ("weights", "fields", "expected"),
    [
        # a counts twice: 6 −4 8 0 2 4. Sums 5 −5 4 6 1 2: + − + + + +.
        # (6 + 1) / 3, −(4 + 4) / 3, 8 / 2, (5 + 1) / 2, (2 + 1) / 3, 4 / 2.
        ((2, 1, 1), {}, [[7 / 3, -8 / 3, 4], [3, 1, 2]]),
        ((2, 1, 1), {"reduce": "sum"}, [[7, -8, 8], [6, 3, 4]]),
        ((2, 1, 1), {"reduce": "max"}, [[6, -4, 8], [5, 2, 4]]),
        # Equal weights cancel in the mean.
        ((3, 3, 3), {}, [[2, -3, 0], [3, 0, 0]]),
        ((-1, -1, -1), {}, [[2, -3, 0], [3, 0, 0]]),
        ((3, 3, 3), {"reduce": "sum"}, [[12, -18, 0], [18, 0, 0]]),
        # A zero weight has no vote and is not counted: sums −1 −1 −4 6 −1 −2.
        ((0, 1, 1), {}, [[-2, -4, -4], [3, -2, -1]]),
        # A negative weight turns that adapter's vote: −C is 2 −3 0 −1 2 1, sums 6 −9 0 4 4 2.
        ((1, 1, -1), {"reduce": "sum"}, [[6, -9, 0], [5, 4, 3]]),
    ],
    ids=str,
)
def test_weights_enter_before_the_vote(
    weights: tuple[float, ...], fields: dict[str, Any], expected: list[list[float]]
) -> None:
    got = ties(case(*weights), density=1.0, weigh_votes=True, **fields)
    np.testing.assert_allclose(got, expected, rtol=1e-15)


def test_trimmed() -> None:
    # Three of six each; of equal ones the first. a: 3 −2 4; b: −4 −4 5; c: −2 3 −2 (of entry 4).
    # Sums: 1, −3, 0, 5, −2, 0.
    assert ties(case(), density=0.5) == [[3, -3, 0], [5, -2, 0]]
    # One of six: 4, −4 (the first), 3: entry 1 is −4 + 3, entry 2 is 4, and b's 5 is the largest.
    assert ties(case(), density=0.2) == [[0, 3, 4], [5, 0, 0]]


def test_one_cut_over_all_modules() -> None:
    merging = of_deltas(
        {"m.1": {"a": [[3.0, -4.0]], "b": [[1.0, 1.0]]}, "m.0": {"a": [[1.0, 2.0]]}}
    )
    assert ties(merging, "m.0", density=0.5, scope="model") == [[0, 0]]
    # a keeps 3 and −4; b, which has this module only, the first of its two.
    assert ties(merging, "m.1", density=0.5, scope="model") == [[2, -4]]


def test_of_factors() -> None:
    # A: [1, −2] and [3, 1]: 4 / 2 and −2. B: [3, 1] and [−1, 2]: 3 and 3 / 2. λ = 4 is 2 and 2.
    a = Factors(A=torch.tensor([[1.0, -2.0]]), B=torch.tensor([[3.0], [1.0]]), scaling=1.0)
    b = Factors(A=torch.tensor([[3.0, 1.0]]), B=torch.tensor([[-1.0], [2.0]]), scaling=1.0)
    merger = Ties(density=1.0, space="factors", scale=4.0)
    encoding = merge(merger, Case("", {"m": {"a": a, "b": b}}))["m"]
    assert isinstance(encoding, FactorsEncoding)
    assert encoding.A.tolist() == [[4.0, -4.0]]
    assert encoding.B.tolist() == [[6.0], [3.0]]


def test_an_adapter_that_lacks_a_module_has_no_vote_there() -> None:
    merging = of_deltas({"m": {"a": A, "b": B, "c": C}, "n": {"b": B}}, {"b": 2.0})
    assert ties(merging, "n", density=1.0) == (2 * np.asarray(B)).tolist()
    assert ties(merging, "n", density=1.0, weigh_votes=True) == B


def test_a_zero_adapter_changes_nothing() -> None:
    zero = np.zeros((2, 3)).tolist()
    merging = of_deltas({"m": {"a": A, "b": B, "c": C, "z": zero}})
    for fields in ({}, {"vote": "count"}, {"zero_vote": "majority"}, {"weigh_votes": True}):
        assert ties(merging, density=0.5, **fields) == ties(case(), density=0.5, **fields)


def test_the_small_bits_of_a_float64_weight_are_kept() -> None:
    """The divisor of weighted votes is not a float32 sum."""
    merging = of_deltas({"m": {"a": [[3.0]], "b": [[1.0]]}}, {"a": 0.1, "b": 0.3})
    [[got]] = ties(merging, density=1.0, weigh_votes=True)
    assert abs(got - 0.6 / 0.4) < 1e-15


def test_a_mean_of_weighted_votes_needs_weights_of_one_sign() -> None:
    mixed = of_deltas({"m": {"a": A, "b": B}, "n": {"a": A}}, {"a": 1.0, "b": -1.0})
    merger = Ties(weigh_votes=True)
    shapes = {module.path: module.shape for module in mixed.stack()}
    with pytest.raises(
        ConfigError, match=r"^m: weights of both signs .*weigh_votes=false, reduce=sum"
    ):
        merger.check(shapes["m"], mixed.context())
    merger.check(shapes["n"], mixed.context())  # which only one of them has
    for allowed in (Ties(), Ties(weigh_votes=True, reduce="sum")):
        allowed.check(shapes["m"], mixed.context())
    merger.check(shapes["m"], case(0.0, 1.0).context())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
@pytest.mark.parametrize("vote", ["value", "count"])
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_what_is_not_finite_is_an_error(
    density: float, vote: Any, reduce: Any, wrong: float
) -> None:
    rows = [[1.0, 2.0], [3.0, 4.0]]
    merging = of_deltas({"m": {"a": rows, "b": rows}})
    merging.modules["m"]["b"].B[1, 0] = wrong
    with pytest.raises(NonFiniteError):
        merge(Ties(density=density, vote=vote, reduce=reduce), merging)


FIELDS: tuple[dict[str, Any], ...] = (
    {},
    {"scope": "model", "zero_vote": "majority"},
    {"space": "factors", "vote": "count"},
    {"space": "factors", "scope": "model"},
    {"weigh_votes": True, "density": 0.7},
    {"reduce": "max", "zero_vote": "positive"},
    {"reduce": "sum", "density": 1.0, "zero_vote": "majority"},
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_every_block_height_gives_the_same_bits(fields: dict[str, Any], dtype: torch.dtype) -> None:
    merging = collection((5, 5, 5), paths=("m.1", "m.0"), d_out=70, d_in=9, weights=(1.0, 0.3, 2.0))
    heights: tuple[Any, ...] = (None, 1, 7, 64)
    first, *others = (merge(Ties(**fields), merging, dtype=dtype, block_rows=h) for h in heights)
    for other in others:
        assert all(same_bits(first[path], other[path]) for path in merging.modules)


def test_the_gauge_matters_to_factors_only() -> None:
    merging = collection((4, 4, 4))
    for space, distinct in (("delta", False), ("factors", True)):
        merger = Ties(density=0.5, space=space)
        left, right = (delta(merge(merger, c)["layer.0"]) for c in (merging, regauge(merging)))
        assert (relative(right, left) > 1e-2) == distinct
        assert (relative(right, left) > 1e-12) == distinct
        assert merger.capabilities.gauge_invariant != distinct


@pytest.mark.parametrize("fields", [{}, {"vote": "count"}, {"reduce": "max"}], ids=str)
def test_it_turns_with_the_signs_where_it_says_so(fields: dict[str, Any]) -> None:
    """Flipping one entry of every adapter flips that entry of the result and no other."""
    flips = np.asarray([[1, -1, -1], [-1, -1, 1]])
    flipped = of_deltas({"m": {n: (flips * x).tolist() for n, x in (("a", A), ("b", B), ("c", C))}})
    for zero_vote, turns in (("drop", True), ("positive", False), ("majority", False)):
        merger = Ties(density=0.9, zero_vote=zero_vote, **fields)
        assert merger.capabilities.sign_equivariant == turns
        options = {"density": 0.9, "zero_vote": zero_vote, **fields}
        turned = np.asarray(ties(flipped, **options))
        assert np.array_equal(turned, flips * np.asarray(ties(case(), **options))) == turns


def test_what_is_declared() -> None:
    declared = Ties().capabilities
    assert declared.mixed_ranks
    assert not declared.weight_scales_delta
    assert not declared.needs_survey
    assert Ties(scope="model").capabilities.needs_survey
    assert not Ties(space="factors").capabilities.mixed_ranks


def test_lossless_settings_keep_one_adapter() -> None:
    alone = of_deltas({"m": {"a": A}})
    merger = Ties(density=0.1, scale=3.0, zero_vote="positive")
    assert delta(merge(merger.lossless(), alone)["m"]).tolist() == A


@pytest.mark.parametrize(
    "fields",
    [{"scope": "layer"}, {"vote": "frequency"}, {"zero_vote": "keep"}, {"reduce": "median"},
     {"density": 0.0}, {"scale": float("inf")}, {"weigh_votes": 1}, {"lambda": 1.0}],
    ids=str,
)  # fmt: skip
def test_fields_that_mean_nothing_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        Ties.model_validate(fields)


def test_the_predicted_size_is_the_size() -> None:
    merging = collection((2, 2))
    shape = merging.stack().module(0).shape
    for merger in (Ties(), Ties(space="factors")):
        stored = stored_elements(merge(merger, merging)["layer.0"])
        assert merger.predict(shape).total == stored


def test_a_density_that_keeps_nothing_is_pointed_out() -> None:
    small, large = ModuleShape("m.0", 2, 2, ("a",), (1,)), ModuleShape("m.1", 9, 9, ("a",), (1,))
    [line] = Ties(density=0.2).advise([small, large])
    assert line == "density 0.2 keeps no entry of 1 modules, such as m.0: their result is zero"
    assert Ties(density=0.25).advise([small, large]) == []
    assert Ties(density=0.2, scope="model").advise([small, large]) == []
