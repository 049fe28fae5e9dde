"""LoRE by hand and by its laws; `test_oracle_spectral.py` has the comparison with Algorithm 1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import oracles
from stacks import Case, Result, collection, delta, merge, regauge, relative, same_bits
from unmerge.adapter import Factors
from unmerge.errors import ConfigError, NonFiniteError
from unmerge.merger import OutputSize
from unmerge_bundle.encodings import DeltaEncoding, FactorsEncoding
from unmerge_strategies.lore import Lore


def diagonal(*adapters: tuple[float, ...], weights: tuple[float, ...] = ()) -> Case:
    """Adapters whose deltas are diagonal matrices; LoRE then runs on each entry apart."""
    size = len(adapters[0])
    names = [chr(ord("a") + n) for n in range(len(adapters))]
    having = {
        name: Factors(
            A=torch.eye(size, dtype=torch.float64),
            B=torch.diag(torch.tensor(d, dtype=torch.float64)),
            scaling=1.0,
        )
        for name, d in zip(names, adapters, strict=True)
    }
    return Case("diagonal", {"m": having}, dict(zip(names, weights, strict=False)))


def merged_diagonal(case: Case, **fields: Any) -> list[float]:
    result = delta(merge(Lore.model_validate(fields), case)["m"])
    assert np.abs(result - np.diag(np.diag(result))).max() < 1e-14
    return [float(x) for x in np.diag(result)]


def test_one_iteration_by_hand() -> None:
    # Means (3, 0, 1); differences (±3, ±1, ∓0.5), at μ = 1: rests (±2, 0, 0).
    case = diagonal((6.0, 1.0, 0.5), (0.0, -1.0, 1.5), (3.0, 0.0, 1.0))
    sums = merged_diagonal(case, mu=1.0, max_iterations=1)
    # The rests of a and b cancel and c has none.
    assert sums == pytest.approx([3.0, 0.0, 1.0])


def test_the_sum_and_the_mean_of_uneven_rests_by_hand() -> None:
    # θ = 9, 0, 0, 0: mean 2.25; differences 6.75, −2.25 (3 times); μ = 1: rests 5.75, −1.25.
    # Sum 5.75 − 3.75 = 2, mean 0.5.
    case = diagonal((9.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    assert merged_diagonal(case, mu=1.0, max_iterations=1)[0] == pytest.approx(4.25)
    assert merged_diagonal(case, mu=1.0, max_iterations=1, finish="mean")[0] == pytest.approx(2.75)
    halved = merged_diagonal(case, mu=1.0, max_iterations=1, scale=0.5)[0]
    assert halved == pytest.approx(3.25)


def test_two_iterations_by_hand() -> None:
    # As above; then θ_0 = (9 − 5.75 + 3·1.25) / 4 = 1.75, rests 6.25 and −0.75: sum 4.
    case = diagonal((9.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    encoding = merge(Lore(mu=1.0, max_iterations=2), case)["m"]
    assert delta(encoding)[0, 0] == pytest.approx(1.75 + 4.0)
    # ½ (1 + 3) + (6.25 + 3·0.75); nothing remains of the second entry.
    assert encoding.facts["objective"] == pytest.approx(0.5 * (1 + 3 * 1) + 8.5)
    assert encoding.facts["iterations"] == 2
    assert encoding.facts["converged"] == 0
    assert encoding.facts["rest_rank"] == 1
    assert encoding.facts["mu"] == 1.0


def test_the_ties_finish_by_hand() -> None:
    # As above: rests 5.75 against three of −1.25; the sum elects +, whose mean is 5.75.
    case = diagonal((9.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    fields = {"mu": 1.0, "max_iterations": 1, "finish": "ties", "density": 1.0}
    assert merged_diagonal(case, **fields)[0] == pytest.approx(2.25 + 5.75)
    assert merged_diagonal(case, **fields, scale=2.0)[0] == pytest.approx(2.25 + 11.5)


def test_the_ties_finish_trims_by_hand() -> None:
    # Rests from the mean (1, 1): (8, −1), (−1, 2), (−7, −1). Untrimmed, both entries sum to 0: a
    # tie. One of four entries each keeps 8, 2 and −7: 8 wins over −7, 2 is alone.
    case = diagonal((9.0, 0.0), (0.0, 3.0), (-6.0, 0.0))
    fields = {"mu": 0.0, "max_iterations": 1, "finish": "ties"}
    assert merged_diagonal(case, **fields, density=1.0) == pytest.approx([1.0, 1.0])
    assert merged_diagonal(case, **fields, density=0.25) == pytest.approx([9.0, 3.0])


def test_a_tied_vote_elects_nobody() -> None:
    """Two adapters of one weight have opposite rests: rounding must not decide."""
    case = collection((4, 4))
    average = oracles.average(case.parts("layer.0"))
    for density in (0.2, 1.0):
        merger = Lore(mu=0.5, max_iterations=10, finish="ties", density=density)
        assert relative(delta(merge(merger, case)["layer.0"]), average) < 1e-12


@pytest.mark.parametrize("finish", ["sum", "mean", "ties"])
def test_a_weight_is_a_number_of_copies(finish: str) -> None:
    case = collection((4, 3, 2))
    having = case.modules["layer.0"]
    copies = replace(case, modules={"layer.0": {**having, "d": having["b"], "e": having["b"]}})
    fields = {"mu": 2.0, "max_iterations": 15, "finish": finish, "density": 0.5}
    merger = Lore.model_validate(fields)
    weighted = delta(merge(merger, replace(case, weights={"b": 3.0}))["layer.0"])
    assert relative(delta(merge(merger, copies)["layer.0"]), weighted) < 1e-10


@pytest.mark.parametrize("finish", ["sum", "mean", "ties"])
def test_an_adapter_of_weight_zero_is_left_out_bit_for_bit(finish: str) -> None:
    case = collection((4, 3, 2))
    having = {name: f for name, f in case.modules["layer.0"].items() if name != "b"}
    merger = Lore.model_validate({"mu": 2.0, "max_iterations": 5, "finish": finish})
    without = merge(merger, replace(case, weights={"b": 0.0}))["layer.0"]
    assert same_bits(without, merge(merger, Case("", {"layer.0": having}))["layer.0"])


@pytest.mark.parametrize("finish", ["sum", "mean", "ties"])
def test_an_absent_adapter_is_a_zero_delta_or_none(finish: str) -> None:
    case = collection((4, 4, 4), paths=("m.0", "m.1"), weights=(2.0, 1.0, 0.5))
    zero = replace(case.modules["m.0"]["a"], B=torch.zeros(14, 4, dtype=torch.float64))
    lacking = {name: f for name, f in case.modules["m.0"].items() if name != "a"}
    other = case.modules["m.1"]
    absent = replace(case, modules={"m.0": lacking, "m.1": other})
    fields = {"mu": 2.0, "max_iterations": 15, "finish": finish, "density": 0.5}
    as_zero = merge(Lore.model_validate(fields), absent)["m.0"]
    expected = replace(case, modules={"m.0": {**lacking, "a": zero}, "m.1": other})
    wanted = merge(Lore.model_validate(fields), expected)["m.0"]
    assert relative(delta(as_zero), delta(wanted)) < 1e-10

    merger = Lore.model_validate({**fields, "absent": "renormalise"})
    alone = Case("", {"m.0": lacking}, {"b": 1.0 * 3.5 / 1.5, "c": 0.5 * 3.5 / 1.5})
    assert relative(delta(merge(merger, absent)["m.0"]), delta(merge(merger, alone)["m.0"])) < 1e-12


def test_only_absent_adapters_weigh() -> None:
    case = collection((4, 4), paths=("m.0", "m.1"), weights=(0.0, 1.0))
    lacking = {"a": case.modules["m.0"]["a"]}
    absent = replace(case, modules={"m.0": lacking, "m.1": case.modules["m.1"]})
    for finish in ("sum", "ties"):
        result = merge(Lore.model_validate({"finish": finish}), absent)["m.0"]
        assert float(np.abs(delta(result)).max()) == 0.0


@pytest.mark.parametrize(
    ("weights", "fields", "message"),
    [
        ((1.0, -0.5), {}, r'^layer\.0: adapter "b" has weight -0\.5; .*task_arithmetic'),
        ((0.0, 0.0), {}, r"^layer\.0: all weights are 0"),
        ((0.0, 0.0), {"absent": "renormalise"}, r"^layer\.0: all weights are 0"),
    ],
)
def test_weights_without_meaning_are_refused(
    weights: tuple[float, ...], fields: dict[str, Any], message: str
) -> None:
    case = collection((2, 2), weights=weights)
    merger = Lore.model_validate(fields)
    with pytest.raises(ConfigError, match=message):
        merge(merger, case)
    with pytest.raises(ConfigError, match=message):
        merger.check(case.stack().module(0).shape, case.context())


def test_facts_say_how_it_went() -> None:
    case = collection((4, 4, 4))
    facts = merge(Lore(mu=8.0), case)["layer.0"].facts
    assert facts["converged"] == 1
    assert facts["change"] <= 1e-6
    assert 1 < facts["iterations"] < 1000
    assert facts["rest_rank"] <= 11
    once = merge(Lore(mu=8.0, max_iterations=1), case)["layer.0"].facts
    assert once["converged"] == 0
    assert once["objective"] > facts["objective"]
    relative_mu = merge(Lore(mu=0.5, mu_unit="relative"), case)["layer.0"].facts["mu"]
    thetas = np.stack([oracles.dense(part) for part in case.parts("layer.0")])
    largest = max(np.linalg.norm(theta - thetas.mean(0), 2) for theta in thetas)
    assert relative_mu == pytest.approx(0.5 * largest)


def test_the_sum_is_factors_and_the_selection_a_delta() -> None:
    case = collection((2, 3))
    shape = case.stack().module(0).shape
    encoding = merge(Lore(mu=0.5, max_iterations=9), case)["layer.0"]
    assert isinstance(encoding, FactorsEncoding)
    assert encoding.A.shape == (5, 11)
    assert Lore().predict(shape) == OutputSize(shared=5 * (11 + 14), at_most=True)
    assert Lore().capabilities.factor_exact
    dense = merge(Lore(mu=0.5, max_iterations=9, finish="ties"), case)["layer.0"]
    assert isinstance(dense, DeltaEncoding)
    assert Lore(finish="ties").predict(shape) == OutputSize(shared=11 * 14)
    assert not Lore(finish="ties").capabilities.factor_exact
    assert Lore(finish="ties").workspace_bytes(shape) > Lore().workspace_bytes(shape) > 0


@pytest.mark.parametrize("finish", ["sum", "ties"])
def test_another_gauge_changes_nothing(finish: str) -> None:
    case = collection((4, 3, 2), scalings=(2.0, 0.5, -1.0))
    merger = Lore.model_validate({"mu": 2.0, "max_iterations": 20, "finish": finish})
    one, other = (delta(merge(merger, c)["layer.0"]) for c in (case, regauge(case)))
    assert relative(other, one) < 1e-10


def test_blocks_of_any_height_give_equal_bits() -> None:
    case = collection((4, 3, 4), d_out=150, d_in=9)
    merger = Lore(mu=2.0, max_iterations=3, finish="ties", density=0.37)
    whole: Result = merge(merger, case, block_rows=1000)["layer.0"]
    for height in (1, 7, 64, 149):
        assert same_bits(merge(merger, case, block_rows=height)["layer.0"], whole)


def test_it_is_its_own_lossless_setting() -> None:
    case = collection((5,), scalings=(-0.7,))
    for fields in ({}, {"finish": "ties"}, {"rank_ratio": 0.1, "warmup": 2}, {"scale": 3.0}):
        merger = Lore.model_validate(fields).lossless()
        [part] = case.parts("layer.0")
        assert relative(delta(merge(merger, case)["layer.0"]), oracles.dense(part)) < 1e-13


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"mu": -0.1}, "mu"),
        ({"mu": float("inf")}, "mu"),
        ({"mu_unit": "percent"}, "mu_unit"),
        ({"scale": float("nan")}, "scale"),
        ({"finish": "median"}, "finish"),
        ({"density": 0.0}, "density"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"rank_ratio": 0.0}, "rank_ratio"),
        ({"warmup": 3}, "warmup 3 delays rank_ratio"),
    ],
)
def test_a_wrong_field_is_refused(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError, match=where):
        Lore.model_validate(fields)


def test_an_adapter_that_is_not_finite_is_refused() -> None:
    case = collection((2, 2))
    case.modules["layer.0"]["a"].A[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite"):
        merge(Lore(), case)
