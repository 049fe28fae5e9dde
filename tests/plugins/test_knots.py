"""KnOTS by hand in a known basis, against sums of deltas, and what must not change its result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import oracles
from stacks import (
    ALL_CASES,
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
from unmerge.elementwise import ElementwiseMerger
from unmerge.errors import ConfigError, NonFiniteError
from unmerge.matrices import Block
from unmerge.merger import Capabilities
from unmerge.registry import default_registry
from unmerge_bundle.encodings import FactorsEncoding
from unmerge_strategies import Average, CoreSpace, Knots, MagnitudePrune, TaskArithmetic, Ties

U = np.asarray([[0.6, -0.8], [0.8, 0.6]])
"""Orthonormal columns: the output directions of the hand-computed deltas."""


def along(*coordinates: list[float]) -> list[list[float]]:
    """Return the delta with these rows in the basis U."""
    rows: list[list[float]] = (U[:, : len(coordinates)] @ np.asarray(coordinates)).tolist()
    return rows


def knots(case: Case, path: str = "m", **fields: Any) -> oracles.Matrix:
    """Return the merged delta in the basis U."""
    merged: oracles.Matrix = U.T @ delta(merge(Knots(**fields), case)[path])
    return merged


def test_adapters_of_their_own_directions_do_not_vote_on_each_other() -> None:
    """Rounding leaves 10⁻¹⁶ where a block is 0; counted as a vote it would halve the mean."""
    case = of_deltas({"m": {"a": along([3, 4]), "b": along([0, 0], [0, 1])}})
    got = knots(case, inner=Ties(density=1.0))
    np.testing.assert_allclose(got, [[3, 4], [0, 1]], atol=1e-14)


def test_ties_by_hand() -> None:
    # One direction; blocks [3, 4] and [−1, 2]. Everything kept: 3, (4 + 2) / 2.
    case = of_deltas({"m": {"a": along([3, 4]), "b": along([-1, 2])}}, {"b": 3.0})
    got = knots(replace(case, weights={}), inner=Ties(density=1.0))
    np.testing.assert_allclose(got, [[3, 3], [0, 0]], atol=1e-14)
    # One of two kept: 4 and 2; b counts three times after the vote: (4 + 6) / 2.
    got = knots(case, inner=Ties(density=0.5))
    np.testing.assert_allclose(got, [[0, 5], [0, 0]], atol=1e-14)
    # In the deltas' own basis it is another rule.
    dense = delta(merge(Ties(density=0.5), case)["m"])
    assert relative(U.T @ dense, np.asarray(got)) > 0.1


def test_one_cut_over_all_modules_by_hand() -> None:
    modules = {"m": {"a": along([3, 4])}, "n": {"a": along([1, 2])}}
    for scope, m, n in (("module", [0, 4], [0, 2]), ("model", [3, 4], [0, 0])):
        inner = Ties.model_validate({"density": 0.5, "scope": scope})
        for path, row in (("m", m), ("n", n)):
            got = knots(of_deltas(modules), path, inner=inner)
            np.testing.assert_allclose(got, [row, [0, 0]], atol=1e-14)


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
@pytest.mark.parametrize("inner", [TaskArithmetic(scale=0.7), Average()], ids=lambda m: m.method)
def test_a_linear_rule_is_what_it_is_on_deltas(inner: Any, case: Case, axis: Any) -> None:
    # Decaying spectra have directions below the default cut-off.
    got = merge(Knots(inner=inner, axis=axis, cutoff=0.0), case)
    for path, encoding in merge(inner, case).items():
        scale = sum(abs(p[3]) * np.linalg.norm(oracles.dense(p)) for p in case.parts(path))
        assert relative(delta(got[path]), delta(encoding), scale=float(scale)) < 1e-12


def transposed(case: Case) -> Case:
    modules = {
        path: {name: Factors(A=f.B.T, B=f.A.T, scaling=f.scaling) for name, f in having.items()}
        for path, having in case.modules.items()
    }
    return replace(case, modules=modules)


@pytest.mark.parametrize("inner", [Ties(density=0.4), Ties(scope="model")], ids=str)
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_the_input_axis_is_the_output_axis_of_the_transpose(case: Case, inner: Any) -> None:
    across = merge(Knots(inner=inner, axis="input"), case)
    along_it = merge(Knots(inner=inner), transposed(case))
    for path, encoding in across.items():
        other = along_it[path]
        assert isinstance(encoding, FactorsEncoding)
        assert isinstance(other, FactorsEncoding)
        assert torch.equal(encoding.A, other.B.T)
        assert torch.equal(encoding.B, other.A.T)


@pytest.mark.parametrize("axis", ["output", "input"])
def test_the_gauge_does_not_matter(axis: Any) -> None:
    case = collection((4, 3, 4), scalings=(2.0, -0.5, 1.0), weights=(1.0, 2.0, 0.5))
    merger = Knots(inner=Ties(density=0.5), axis=axis)
    left, right = (delta(merge(merger, c)["layer.0"]) for c in (case, regauge(case)))
    assert relative(right, left) < 1e-11
    assert merger.capabilities.gauge_invariant


@pytest.mark.parametrize("axis", ["output", "input"])
def test_other_names_in_another_order_change_nothing(axis: Any) -> None:
    """Sorting fixes the order of a merge; the basis does not depend on it in the first place."""
    case = collection((4, 3, 4), weights=(1.0, 2.0, 0.5))
    new = {"a": "z", "b": "y", "c": "x"}
    renamed = Case(
        "renamed",
        {p: {new[n]: f for n, f in having.items()} for p, having in case.modules.items()},
        {new[n]: w for n, w in case.weights.items()},
    )
    merger = Knots(inner=Ties(density=0.5), axis=axis)
    left, right = (delta(merge(merger, c)["layer.0"]) for c in (case, renamed))
    assert relative(right, left) < 1e-11


def test_a_zero_adapter_has_no_vote() -> None:
    case = collection((4, 4), seed=6)
    having = case.modules["layer.0"]
    zero = replace(having["a"], B=torch.zeros_like(having["a"].B))
    with_zero = replace(case, modules={"layer.0": {**having, "z": zero}})
    for axis in ("output", "input"):
        merger = Knots.model_validate({"axis": axis, "inner": {"method": "ties", "density": 1.0}})
        left, right = (delta(merge(merger, c)["layer.0"]) for c in (case, with_zero))
        assert relative(right, left) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_input_that_an_adapter_ignores_is_not_its_vote(dtype: torch.dtype) -> None:
    """A column of zeros of A is one of its block; the mean there is the other adapter's entry."""
    case = collection((3, 3), seed=5, d_in=6)
    case.modules["layer.0"]["a"].A[:, 2] = 0
    merged = delta(merge(Knots(inner=Ties(density=1.0)), case, dtype=dtype)["layer.0"])
    other = oracles.dense(case.parts("layer.0")[1])
    np.testing.assert_allclose(merged[:, 2], other[:, 2], rtol=1e-5)


def test_duplicates_share_their_directions() -> None:
    case = collection((4,), seed=7)
    having = case.modules["layer.0"]
    twice = replace(case, modules={"layer.0": {**having, "b": having["a"]}})
    encoding = merge(Knots(inner=Ties(density=1.0)), twice)["layer.0"]
    assert encoding.facts == {"rank": 4.0}
    assert relative(delta(encoding), oracles.dense(case.parts("layer.0")[0])) < 1e-13


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_the_cutoff_is_relative(size: float) -> None:
    """Singular values 10, 1 and 0.1 of size: a tenth of the largest is 1."""
    rows = size * np.diag([10.0, 1.0, 0.1])
    case = of_deltas({"m": {"a": rows.tolist()}})
    for cutoff, rank in ((0.0, 3), (1e-7, 3), (0.05, 2), (0.5, 1)):
        encoding = merge(Knots(inner=TaskArithmetic(), cutoff=cutoff), case)["m"]
        assert encoding.facts["rank"] == rank
        kept = np.where(np.arange(3) < rank, rows, 0.0)
        np.testing.assert_allclose(delta(encoding), kept, atol=1e-14 * size)


def test_zeros_alone_are_zeros() -> None:
    case = of_deltas({"m": {"a": np.zeros((3, 2)).tolist(), "b": np.zeros((3, 2)).tolist()}})
    for axis in ("output", "input"):
        encoding = merge(Knots.model_validate({"axis": axis}), case)["m"]
        assert not delta(encoding).any()
        assert encoding.facts == {"rank": 1.0}


FIELDS: tuple[dict[str, Any], ...] = (
    {},
    {"axis": "input", "inner": {"method": "ties", "scope": "model", "weigh_votes": True}},
    {"inner": {"method": "dare", "rescale": "norm", "inner": {"method": "ties"}}},
    {"inner": {"method": "magnitude_prune", "scope": "model"}},
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_every_block_height_gives_the_same_bits(fields: dict[str, Any], dtype: torch.dtype) -> None:
    case = collection(
        (30, 25, 20), paths=("m.1", "m.0"), d_out=150, d_in=90, weights=(1.0, 0.3, 2.0)
    )
    merger = Knots.model_validate(fields)
    heights: tuple[Any, ...] = (None, 1, 7, 64)
    first, *others = (merge(merger, case, dtype=dtype, block_rows=h) for h in heights)
    for other in others:
        assert all(same_bits(first[path], other[path]) for path in case.modules)


class Recorder(ElementwiseMerger, frozen=True):
    """Returns the first adapter's values, and checks what a block says of where it is."""

    method = "test.recorder"
    expected: str

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(mixed_ranks=True, sign_equivariant=True)

    def combine(self, block: Block, state: Any) -> torch.Tensor:
        assert (block.space, block.part) == (self.expected, self.expected)
        assert (block.module, block.adapters, block.seed) == ("layer.0", ("a", "b"), 4)
        assert block.weights.tolist() == [2.0, -1.0]
        return block.values[0]


def test_a_rule_is_told_the_space_it_runs_in() -> None:
    """The name of the space is a part of the key of random masks."""
    case = collection((4, 3), weights=(2.0, -1.0))
    for merger in (
        Knots(inner=Recorder(expected="knots")),
        CoreSpace(inner=Recorder(expected="core")),
    ):
        merged = delta(merge(merger, case, seed=4)["layer.0"])
        assert relative(merged, oracles.dense(case.parts("layer.0")[0])) < 1e-13


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ({"method": "rmm"}, '"rmm" is no ElementwiseMerger'),
        ({"method": "knots"}, '"knots" is no ElementwiseMerger'),
        ({"method": "truncate"}, '"truncate" is no ElementwiseMerger'),
        ({"method": "ties", "space": "delta"}, '"ties" runs in the space of the strategy around'),
        (
            {"method": "ties", "zero_vote": "positive"},
            '"ties" with these fields does not turn with the signs .* use zero_vote=drop',
        ),
        ({"method": "ties", "zero_vote": "majority"}, "does not turn with the signs"),
        (
            {"method": "dare", "inner": {"method": "ties", "zero_vote": "positive"}},
            '"dare" with these fields does not turn with the signs',
        ),
        ({"method": "unheard_of"}, "unheard_of"),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["knots", "core_space"])
def test_compositions_that_mean_nothing_are_refused_when_the_recipe_is_read(
    method: str, inner: object, message: str
) -> None:
    with pytest.raises((ValidationError, LookupError), match=message):
        default_registry().build({"method": method, "inner": inner})


@pytest.mark.parametrize("method", ["knots", "core_space"])
def test_a_recipe_is_read_as_it_was_written(method: str) -> None:
    default = default_registry().build({"method": method})
    assert default.recipe()["inner"]["method"] == "ties"
    assert "space" not in default.recipe()["inner"]
    recipe = {"method": method, "inner": {"method": "dare", "inner": {"method": "ties"}}}
    merger = default_registry().build(recipe)
    assert default_registry().build(merger.recipe()) == merger


def test_what_the_inner_rule_refuses_is_refused() -> None:
    case = collection((4, 4), weights=(1.0, -1.0))
    shape = case.stack().module(0).shape
    for inner in (Ties(weigh_votes=True), Average()):
        with pytest.raises(
            ConfigError, match=r"^layer\.0: (weights of both signs|the weights sum)"
        ):
            Knots(inner=inner).check(shape, case.context())


def test_what_is_not_finite_is_an_error() -> None:
    case = of_deltas({"m": {"a": along([3, 4])}})
    case.modules["m"]["a"].B[0, 0] = float("inf")
    with pytest.raises(NonFiniteError):
        merge(Knots(), case)


@pytest.mark.parametrize("axis", ["output", "input"])
def test_the_predicted_size_is_the_most_there_can_be(axis: Any) -> None:
    for case in (collection((2, 5, 3)), collection((9, 9), d_out=4), collection((9, 9), d_in=4)):
        shape = case.stack().module(0).shape
        size = Knots(axis=axis).predict(shape)
        assert size.at_most
        assert stored_elements(merge(Knots(axis=axis), case)["layer.0"]) == size.total
    duplicates = next(case for case in ALL_CASES if case.name == "duplicates")
    size = Knots(axis=axis).predict(duplicates.stack().module(0).shape)
    assert stored_elements(merge(Knots(axis=axis), duplicates)["layer.0"]) < size.total


def test_the_memory_of_either_axis_is_that_of_its_blocks() -> None:
    """The side that gets the basis has at most Σ r_i rows, the other its whole width."""
    shape = collection((2, 2), d_out=300, d_in=40).stack().module(0).shape
    output, across = (
        Knots(inner=TaskArithmetic(), axis=a).workspace_bytes(shape) for a in ("output", "input")
    )
    assert output - across == 24 * 2 * 4 * (40 - 300) + 4 * 4 * (40 - 300)


def test_lossless_settings_keep_one_adapter_whatever_the_cutoff() -> None:
    case = collection((4,), spectrum="decaying")
    merger = Knots(inner=Ties(density=0.1, scale=2.0), cutoff=0.5).lossless()
    assert merger is not None
    exact = oracles.dense(case.parts("layer.0")[0])
    assert relative(delta(merge(merger, case)["layer.0"]), exact) < 1e-13


def test_what_is_declared() -> None:
    declared = Knots().capabilities
    assert declared.mixed_ranks
    assert declared.gauge_invariant
    assert not declared.sign_equivariant
    assert not declared.needs_survey
    assert not declared.stochastic
    assert Knots(inner=Ties(scope="model")).capabilities.needs_survey
    assert Knots(inner=TaskArithmetic()).capabilities.weight_scales_delta
    assert Knots(inner=MagnitudePrune()).capabilities.weight_scales_delta
    assert not Knots(inner=TaskArithmetic()).capabilities.factor_exact
