"""Core Space by hand, against sums of deltas, and what balancing makes it independent of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import oracles
from stacks import (
    ALL_CASES,
    Case,
    collection,
    delta,
    merge,
    regauge,
    relative,
    same_bits,
    stored_elements,
)
from unmerge.adapter import Factors
from unmerge_bundle.encodings import FactorsEncoding
from unmerge_strategies import Average, CoreSpace, TaskArithmetic, Ties

LEFT = torch.tensor([[0.6, -0.8], [0.8, 0.6], [0.0, 0.0]], dtype=torch.float64)
RIGHT = torch.tensor([[0.8, 0.6], [-0.6, 0.8]], dtype=torch.float64)


def adapter(*terms: tuple[float, int, int]) -> Factors:
    """Return `Σ size · LEFT[:, i] RIGHT[j]`."""
    B = torch.stack([size * LEFT[:, i] for size, i, _ in terms], dim=1)
    return Factors(A=torch.stack([RIGHT[j] for _, _, j in terms]), B=B, scaling=1.0)


def core(case: Case, **fields: Any) -> oracles.Matrix:
    """Return the merged delta in the bases LEFT and RIGHT."""
    merged = delta(merge(CoreSpace(**fields), case)["m"])
    coordinates: oracles.Matrix = LEFT.T.numpy() @ merged @ RIGHT.T.numpy()
    return coordinates


@pytest.mark.parametrize("balance", [True, False])
def test_ties_by_hand(balance: bool) -> None:
    # Cores: 6 and −2 at (0, 0), 1 at (1, 1) of b alone, which a's 0 has no vote on.
    case = Case("", {"m": {"a": adapter((6, 0, 0)), "b": adapter((-2, 0, 0), (1, 1, 1))}})
    got = core(case, inner=Ties(density=1.0), balance=balance)
    np.testing.assert_allclose(got, [[6, 0], [0, 1]], atol=1e-14)
    # b alone weighs in where it agrees with itself: (6 + 3) / 2 at (0, 0), −1 at (1, 1).
    case = Case("", {"m": {"a": adapter((6, 0, 0)), "b": adapter((3, 0, 0), (-1, 1, 1))}})
    got = core(case, inner=Ties(density=1.0), balance=balance)
    np.testing.assert_allclose(got, [[4.5, 0], [0, -1]], atol=1e-14)
    # A quarter of four entries: the 6 and the 3.
    got = core(case, inner=Ties(density=0.25), balance=balance)
    np.testing.assert_allclose(got, [[4.5, 0], [0, 0]], atol=1e-14)


def test_a_negative_scaling_is_a_negative_core() -> None:
    a = replace(adapter((3, 0, 0)), scaling=-2.0)
    case = Case("", {"m": {"a": a, "b": adapter((1, 1, 1))}})
    for balance in (True, False):
        got = core(case, inner=Ties(density=1.0), balance=balance)
        np.testing.assert_allclose(got, [[-6, 0], [0, 1]], atol=1e-14)


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
@pytest.mark.parametrize("inner", [TaskArithmetic(scale=0.7), Average()], ids=lambda m: m.method)
def test_a_linear_rule_is_what_it_is_on_deltas(inner: Any, case: Case, balance: bool) -> None:
    got = merge(CoreSpace(inner=inner, balance=balance), case)
    for path, encoding in merge(inner, case).items():
        scale = sum(abs(p[3]) * np.linalg.norm(oracles.dense(p)) for p in case.parts(path))
        assert relative(delta(got[path]), delta(encoding), scale=float(scale)) < 1e-12


def test_the_gauge_matters_unless_balanced() -> None:
    case = collection((4, 3, 4), scalings=(2.0, -0.5, 1.0), weights=(1.0, 2.0, 0.5))
    for balance, distinct in ((True, False), (False, True)):
        merger = CoreSpace(inner=Ties(density=0.5), balance=balance)
        left, right = (delta(merge(merger, c)["layer.0"]) for c in (case, regauge(case)))
        assert (relative(right, left) > 1e-2) == distinct
        assert (relative(right, left) > 1e-11) == distinct
        assert merger.capabilities.gauge_invariant != distinct


@pytest.mark.parametrize("balance", [True, False])
def test_other_names_in_another_order_change_nothing(balance: bool) -> None:
    case = collection((4, 3, 4), weights=(1.0, 2.0, 0.5))
    new = {"a": "z", "b": "y", "c": "x"}
    renamed = Case(
        "renamed",
        {p: {new[n]: f for n, f in having.items()} for p, having in case.modules.items()},
        {new[n]: w for n, w in case.weights.items()},
    )
    merger = CoreSpace(inner=Ties(density=0.5), balance=balance)
    left, right = (delta(merge(merger, c)["layer.0"]) for c in (case, renamed))
    assert relative(right, left) < 1e-11


def test_a_zero_adapter_has_no_vote() -> None:
    case = collection((4, 4), seed=6)
    having = case.modules["layer.0"]
    zero = replace(having["a"], B=torch.zeros_like(having["a"].B))
    with_zero = replace(case, modules={"layer.0": {**having, "z": zero}})
    merger = CoreSpace(inner=Ties(density=1.0))
    left, right = (delta(merge(merger, c)["layer.0"]) for c in (case, with_zero))
    assert relative(right, left) < 1e-13


def test_an_adapter_of_lower_rank_than_it_says_adds_no_directions() -> None:
    case = collection((4, 3), seed=9)
    a = case.modules["layer.0"]["a"]
    # A part of two terms is stored as a fifth: five columns of B, but rank 4.
    part, both = a.B[:, :1].flip(0), a.A[:1] + a.A[1:2]
    B = torch.cat([a.B[:, :2] - part, a.B[:, 2:], part], dim=1)
    padded = Factors(A=torch.cat([a.A, both]), B=B, scaling=2.0)
    wider = replace(case, modules={"layer.0": {**case.modules["layer.0"], "a": padded}})
    # 10⁻¹⁰: the root of what rounding leaves of a singular value is above it.
    merger = CoreSpace(inner=Ties(density=0.5), cutoff=1e-10)
    left, right = (merge(merger, c)["layer.0"] for c in (case, wider))
    assert right.facts == {"rank_out": 7.0, "rank_in": 7.0}
    assert relative(delta(right), delta(left)) < 1e-11


def test_the_smaller_basis_gives_the_rank() -> None:
    for d_out, d_in in ((3, 14), (14, 3)):
        case = collection((4, 4), d_out=d_out, d_in=d_in)
        encoding = merge(CoreSpace(), case)["layer.0"]
        assert isinstance(encoding, FactorsEncoding)
        assert encoding.A.shape == (3, d_in)
        assert encoding.B.shape == (d_out, 3)
        # Each delta has rank 3, so that there are at most six directions on either side.
        assert encoding.facts == {"rank_out": min(d_out, 6), "rank_in": min(d_in, 6)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"balance": False, "inner": {"method": "ties", "scope": "model"}},
        {"inner": {"method": "dare", "rescale": "norm", "inner": {"method": "ties"}}},
    ],
    ids=str,
)
def test_every_block_height_gives_the_same_bits(fields: dict[str, Any], dtype: torch.dtype) -> None:
    case = collection(
        (30, 25, 20), paths=("m.1", "m.0"), d_out=150, d_in=90, weights=(1.0, 0.3, 2.0)
    )
    merger = CoreSpace.model_validate(fields)
    heights: tuple[Any, ...] = (None, 1, 7, 64)
    first, *others = (merge(merger, case, dtype=dtype, block_rows=h) for h in heights)
    for other in others:
        assert all(same_bits(first[path], other[path]) for path in case.modules)


def test_cores_are_float64_whatever_the_adapters() -> None:
    """A rounding of the cores to float32 would show at 10⁻⁸ in a linear rule."""
    case = collection((4, 4))
    got = delta(merge(CoreSpace(inner=TaskArithmetic()), case, dtype=torch.float32)["layer.0"])
    assert relative(got, oracles.task_arithmetic(case.parts("layer.0"))) < 1e-14


def test_the_predicted_size_is_the_most_there_can_be() -> None:
    for case in (collection((2, 5, 3)), collection((9, 9), d_out=6)):
        shape = case.stack().module(0).shape
        size = CoreSpace().predict(shape)
        assert size.at_most
        assert stored_elements(merge(CoreSpace(), case)["layer.0"]) == size.total


def test_lossless_settings_keep_one_adapter_whatever_the_cutoff() -> None:
    case = collection((4,), spectrum="decaying")
    for balance in (True, False):
        merger = CoreSpace(inner=Ties(density=0.1), cutoff=0.5, balance=balance).lossless()
        assert merger is not None
        exact = oracles.dense(case.parts("layer.0")[0])
        assert relative(delta(merge(merger, case)["layer.0"]), exact) < 1e-13


def test_what_is_declared() -> None:
    declared = CoreSpace().capabilities
    assert declared.mixed_ranks
    assert not declared.sign_equivariant
    assert not declared.needs_survey
    assert CoreSpace(inner=Ties(scope="model")).capabilities.needs_survey
    assert CoreSpace(inner=TaskArithmetic()).capabilities.weight_scales_delta
