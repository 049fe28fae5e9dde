"""TSV-M by hand and by its laws; `test_oracle_spectral.py` has the comparison with dense SVDs."""

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
    regauge,
    relative,
    same_bits,
    stored_elements,
)
from unmerge.adapter import Factors
from unmerge.errors import ConfigError, NonFiniteError
from unmerge_bundle.encodings import FactorsEncoding
from unmerge_strategies.tsv import Tsv


def rank_ones(*adapters: tuple[float, tuple[float, float], tuple[float, float]]) -> Case:
    """Adapters `σ u vᵀ` of 2 × 2."""
    having = {
        chr(ord("a") + n): Factors(
            A=torch.tensor([v], dtype=torch.float64),
            B=torch.tensor([[u[0]], [u[1]]], dtype=torch.float64),
            scaling=sigma,
        )
        for n, (sigma, u, v) in enumerate(adapters)
    }
    return Case("rank ones", {"m": having})


def test_orthogonal_adapters_are_summed_by_hand() -> None:
    # diag(3, 0) + diag(0, 2): no direction overlaps, so nothing is decorrelated.
    case = rank_ones((3.0, (1, 0), (1, 0)), (2.0, (0, 1), (0, 1)))
    np.testing.assert_allclose(delta(merge(Tsv(), case)["m"]), np.diag([3.0, 2.0]), atol=1e-15)


def test_overlapping_directions_are_turned_apart_by_hand() -> None:
    # u = (1, 0) and (0.6, 0.8), v = (1, 0) and (0, 1). The polar factor of [[1, .6], [0, .8]] is
    # the rotation by φ with tan φ = (0 − .6) / (1 + .8): its columns are (3, −1) and (1, 3) / √10.
    case = rank_ones((2.0, (1, 0), (1, 0)), (1.0, (0.6, 0.8), (0, 1)))
    expected = np.array([[2 * 3, 1], [2 * -1, 3]]) / 10**0.5
    np.testing.assert_allclose(delta(merge(Tsv(), case)["m"]), expected, atol=1e-14)


def test_an_adapter_given_twice_counts_once_by_hand() -> None:
    # U = [u u] has the polar factor [u u] / √2, so both halves add up to the adapter itself.
    case = rank_ones((3.0, (0.6, 0.8), (0, 1)), (3.0, (0.6, 0.8), (0, 1)))
    expected = 3 * np.outer((0.6, 0.8), (0, 1))
    np.testing.assert_allclose(delta(merge(Tsv(), case)["m"]), expected, atol=1e-14)


def test_weights_multiply_the_adapters_parts() -> None:
    case = rank_ones((2.0, (1, 0), (1, 0)), (1.0, (0.6, 0.8), (0, 1)))
    weighted = replace(case, weights={"a": -1.5, "b": 4.0})
    expected = np.array([[-1.5 * 2 * 3, 4 * 1], [-1.5 * 2 * -1, 4 * 3]]) / 10**0.5
    np.testing.assert_allclose(delta(merge(Tsv(), weighted)["m"]), expected, atol=1e-14)


def test_an_adapter_of_weight_zero_takes_no_directions() -> None:
    case = collection((4, 4, 4))
    without = {name: f for name, f in case.modules["layer.0"].items() if name != "b"}
    merger = Tsv(rank=3)
    left_out = delta(merge(merger, replace(case, weights={"b": 0.0}))["layer.0"])
    assert relative(left_out, delta(merge(merger, Case("", {"layer.0": without}))["layer.0"])) < (
        1e-13
    )


def test_all_weights_zero_give_a_zero_delta() -> None:
    encoding = merge(Tsv(), collection((2, 3), weights=(0.0, 0.0)))["layer.0"]
    np.testing.assert_array_equal(delta(encoding), np.zeros((14, 11)))


def test_the_share_of_directions_is_cut_to_the_ranks_and_to_one_at_least() -> None:
    # min(d_out, d_in) / N = 11 // 3 = 3 of 4; 3 // 7 would be none.
    thirds = merge(Tsv(), collection((4, 4, 4)))["layer.0"]
    assert isinstance(thirds, FactorsEncoding)
    assert thirds.A.shape[0] == 9
    many = collection((2,) * 7, d_out=3)
    expected = oracles.tsv(many.parts("layer.0"), rank=1)
    assert relative(delta(merge(Tsv(), many)["layer.0"]), expected) < 1e-10


def test_the_truncation_error_is_a_fact() -> None:
    case = collection((4, 4, 4), weights=(1.0, -2.0, 0.5))
    lost = total = 0.0
    for part in case.parts("layer.0"):
        spectrum = part[3] * np.linalg.svd(oracles.dense(part), compute_uv=False)
        lost += (spectrum[2:] ** 2).sum()
        total += (spectrum**2).sum()
    facts = merge(Tsv(rank=2), case)["layer.0"].facts
    assert facts["truncation_error"] == pytest.approx((lost / total) ** 0.5, rel=1e-10)
    assert merge(Tsv(rank=4), case)["layer.0"].facts["truncation_error"] < 1e-12


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_no_more_is_stored_than_predicted(case: Case, rank: int | None) -> None:
    merger = Tsv(rank=rank)
    for module, encoding in zip(
        case.stack(), merger.merge(case.stack(), case.context()), strict=True
    ):
        predicted = merger.predict(module.shape)
        assert predicted.at_most
        assert stored_elements(encoding) <= predicted.total
        assert merger.workspace_bytes(module.shape) > 0


def test_absent_adapters_weigh_nothing_or_are_made_up_for() -> None:
    case = collection((4, 4, 4), paths=("m.0", "m.1"), weights=(2.0, 1.0, 1.0))
    lacking = {name: f for name, f in case.modules["m.0"].items() if name != "a"}
    case = replace(case, modules={"m.0": lacking, "m.1": case.modules["m.1"]})
    zero, renormalised = (
        delta(merge(Tsv.model_validate({"absent": absent}), case)["m.0"])
        for absent in ("zero", "renormalise")
    )
    assert relative(renormalised, 2 * zero) < 1e-14


def test_weights_that_cannot_be_renormalised_are_refused() -> None:
    case = collection((2, 2, 2), paths=("m.0", "m.1"), weights=(1.0, 1.0, -1.0))
    lacking = {name: f for name, f in case.modules["m.0"].items() if name != "a"}
    case = replace(case, modules={"m.0": lacking, "m.1": case.modules["m.1"]})
    merger = Tsv(absent="renormalise")
    with pytest.raises(ConfigError, match=r"^m\.0: .* sum to 0"):
        merge(merger, case)
    with pytest.raises(ConfigError, match=r"^m\.0: .* sum to 0"):
        merger.check(case.stack().module(0).shape, case.context())


def test_another_gauge_changes_nothing_and_another_order_no_bit() -> None:
    case = collection((4, 3, 2), scalings=(2.0, 0.5, -1.0))
    one = merge(Tsv(), case)["layer.0"]
    assert relative(delta(merge(Tsv(), regauge(case))["layer.0"]), delta(one)) < 1e-11
    [backwards] = Tsv().merge(case.stack(reverse=True), case.context())
    assert same_bits(backwards, one)


def test_one_adapter_without_truncation_is_itself() -> None:
    case = collection((5,), scalings=(-0.7,))
    merger = Tsv(rank=1, scale=0.3).lossless()
    [part] = case.parts("layer.0")
    assert relative(delta(merge(merger, case)["layer.0"]), oracles.dense(part)) < 1e-13


@pytest.mark.parametrize(
    "fields", [{"rank": 0}, {"rank": 1.5}, {"scale": float("inf")}, {"absent": "skip"}]
)
def test_a_wrong_field_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        Tsv.model_validate(fields)


def test_what_is_not_finite_is_refused() -> None:
    case = collection((2, 2))
    case.modules["layer.0"]["a"].B[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite"):
        merge(Tsv(), case)
