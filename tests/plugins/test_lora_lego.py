"""LoRA-LEGO: the units, the clusters they form, both reweightings, and weights, by hand too."""

from __future__ import annotations

import math
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
    Result,
    collection,
    delta,
    merge,
    relative,
    rescaled,
    same_bits,
    stored_elements,
)
from unmerge.adapter import Factors
from unmerge.errors import ConfigError, NonFiniteError
from unmerge_bundle.encodings import FactorsEncoding
from unmerge_strategies.lora_lego import LoraLego

PLAIN = LoraLego(reweight_units="none", reweight_output=False)


def centroids(encoding: Result) -> oracles.Matrix:
    """Return the merged units as the oracle writes them, `[B[:, j], A[j, :]]`."""
    assert isinstance(encoding, FactorsEncoding)
    return np.concatenate([encoding.B.T.double().numpy(), encoding.A.double().numpy()], axis=1)


def adapter(*units: tuple[tuple[float, ...], tuple[float, ...]], scaling: float = 1.0) -> Factors:
    """Return the adapter whose units are these pairs `(a, b)`."""
    A = torch.tensor([a for a, _ in units])
    B = torch.tensor([b for _, b in units]).T
    return Factors(A=A, B=B.contiguous(), scaling=scaling)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("case", [c for c in ALL_CASES if not c.weights], ids=str)
def test_every_unit_is_with_its_nearest_centroid(case: Case, rank: int, seed: int) -> None:
    merger = PLAIN.model_copy(update={"rank": rank})
    for path, encoding in merge(merger, case, seed=seed).items():
        units = oracles.units(case.parts(path))
        ours = centroids(encoding)
        labels = oracles.nearest(units, ours)
        means = oracles.means(units, labels, ours.shape[0])
        scale = float(np.linalg.norm(units))
        assert relative(ours, means, scale=scale) < 1e-12
        expected = oracles.inertia(units, ours) / scale**2 if scale else 0.0
        assert encoding.facts["inertia"] == pytest.approx(expected, abs=1e-12)
        assert encoding.facts["iterations"] < 100


@pytest.mark.parametrize("scaling", [1.0, 2.0, 16 / 8**0.5, -3.0])
@pytest.mark.parametrize("reweight_units", ["norm", "peak", "none"])
@pytest.mark.parametrize("balance", [True, False])
def test_one_adapter_gives_itself(balance: bool, reweight_units: Any, scaling: float) -> None:
    merger = LoraLego(rank=2, balance=balance, reweight_units=reweight_units).lossless()
    case = collection((8,), scalings=(scaling,))
    [part] = case.parts("layer.0")
    assert relative(delta(merge(merger, case)["layer.0"]), oracles.dense(part)) < 1e-13


def test_as_many_clusters_as_units_are_the_concatenation() -> None:
    case = collection((2, 3), weights=(1.0, -1.0))
    merged = delta(merge(PLAIN.model_copy(update={"rank": 5}), case)["layer.0"])
    assert relative(merged, oracles.task_arithmetic(case.parts("layer.0"))) < 1e-13


def test_units_of_one_direction_are_averaged_by_hand() -> None:
    # Units (2, 2) and (4, 4) along one axis, (8, 8) along the other: two clusters.
    a = adapter(((2.0, 0.0), (2.0, 0.0)), ((0.0, 8.0), (0.0, 8.0)))
    b = adapter(((4.0, 0.0), (4.0, 0.0)))
    case = Case("", {"m": {"a": a, "b": b}})
    merged = delta(merge(PLAIN.model_copy(update={"rank": 2}), case)["m"])
    np.testing.assert_allclose(merged, [[9.0, 0.0], [0.0, 64.0]], atol=1e-13)


def test_a_weight_counts_in_the_mean_by_hand() -> None:
    # (1·2 + 3·4) / 4 = 3.5.
    case = Case(
        "",
        {"m": {"a": adapter(((2.0,), (2.0,))), "b": adapter(((4.0,), (4.0,)))}},
        {"a": 1.0, "b": 3.0},
    )
    [[value]] = delta(merge(PLAIN, case)["m"])
    assert value == pytest.approx(3.5**2, rel=1e-14)


def test_a_negative_weight_subtracts_by_hand() -> None:
    # Units (a, b) = (2, 2) and (4, −4): their mean is (3, −1).
    case = Case(
        "",
        {"m": {"a": adapter(((2.0,), (2.0,))), "b": adapter(((4.0,), (4.0,)))}},
        {"a": 1.0, "b": -1.0},
    )
    [[value]] = delta(merge(PLAIN, case)["m"])
    assert value == pytest.approx(-3.0, rel=1e-14)


def test_a_negative_scaling_is_a_negative_delta() -> None:
    case = collection((3, 3), scalings=(-2.0, -2.0))
    positive = collection((3, 3), scalings=(2.0, 2.0))
    left, right = (delta(merge(LoraLego(), c)["layer.0"]) for c in (case, positive))
    np.testing.assert_allclose(left, -right, atol=1e-13)


def test_weights_are_relative() -> None:
    case = collection((4, 4, 4), weights=(1.0, 0.5, -2.0))
    twice = replace(case, weights={name: 2 * w for name, w in case.weights.items()})
    left, right = (delta(merge(LoraLego(), c)["layer.0"]) for c in (case, twice))
    assert relative(left, right) < 1e-13


def test_an_adapter_of_weight_zero_is_left_out() -> None:
    case = collection((4, 4, 4), weights=(1.0, 0.0, 2.0))
    having = {name: f for name, f in case.modules["layer.0"].items() if name != "b"}
    without = Case("", {"layer.0": having}, {"a": 1.0, "c": 2.0})
    left, right = (delta(merge(LoraLego(rank=3), c)["layer.0"]) for c in (case, without))
    np.testing.assert_array_equal(left, right)


def test_all_weights_zero_are_refused() -> None:
    case = collection((4, 4), weights=(0.0, 0.0))
    with pytest.raises(ConfigError, match=r"layer\.0: all of a, b have weight 0"):
        merge(LoraLego(), case)
    with pytest.raises(ConfigError, match="weight 0"):
        LoraLego().check(case.stack().module(0).shape, case.context())


def test_centroids_get_the_mean_length_of_their_members_by_hand() -> None:
    # Units (3, 4 | 3, 4)/… of length √2·5 at a right angle: the mean is shorter by √2.
    a, b = adapter(((5.0, 0.0), (5.0,))), adapter(((0.0, 5.0), (5.0,)))
    case = Case("", {"m": {"a": a, "b": b}})
    plain = delta(merge(PLAIN, case)["m"])
    np.testing.assert_allclose(plain, [[12.5, 12.5]], rtol=1e-14)
    # Mean ((2.5, 2.5) | 5), length √37.5; the members' is √50; the delta grows by its square.
    merger = LoraLego(reweight_output=False)
    np.testing.assert_allclose(delta(merge(merger, case)["m"]), plain * 50 / 37.5, rtol=1e-14)
    # The largest entry is 5 in the mean as in the members: nothing to make up for.
    merger = LoraLego(reweight_units="peak", reweight_output=False)
    np.testing.assert_allclose(delta(merge(merger, case)["m"]), plain, rtol=1e-14)


@pytest.mark.parametrize("rank", [1, 2, 6, 9])
def test_the_output_is_multiplied_with_the_root_of_the_ranks(rank: int) -> None:
    case = collection((2, 4, 3))
    with_, without = (
        delta(merge(LoraLego(rank=rank, reweight_output=on), case)["layer.0"])
        for on in (True, False)
    )
    assert relative(with_, math.sqrt(3 / rank) * without) < 1e-13


def test_what_cancels_stays_zero() -> None:
    # (a, b) and (−a, −b) are one delta but opposite units: their mean has no direction.
    a, b = adapter(((2.0, 1.0), (3.0,))), adapter(((-2.0, -1.0), (-3.0,)))
    merged = delta(merge(LoraLego(), Case("", {"m": {"a": a, "b": b}}))["m"])
    assert np.abs(merged).max() < 1e-25
    # Up to rounding as well: what rounding leaves is not stretched to the members' length.
    f = collection((1,)).modules["layer.0"]["a"]
    opposite = replace(f, A=-f.A * (1 + 2**-52), B=-f.B * (1 - 2**-52))
    merged = delta(merge(LoraLego(), Case("", {"m": {"a": f, "b": opposite}}))["m"])
    assert np.abs(merged).max() < 1e-25


# A shape does not say which adapters have weight 0, and so no units.
@pytest.mark.parametrize("rank", [None, 1, 5, 99])
@pytest.mark.parametrize("case", [c for c in ALL_CASES if all(c.weights.values())], ids=str)
def test_the_predicted_size_is_the_size(case: Case, rank: int | None) -> None:
    merger = LoraLego(rank=rank)
    for module, encoding in zip(case.stack(), merge(merger, case).values(), strict=True):
        assert merger.predict(module.shape).total == stored_elements(encoding)


def test_duplicates_give_one_adapter_and_empty_units() -> None:
    case = collection((3,))
    f = case.modules["layer.0"]["a"]
    copies = Case("", {"layer.0": {"a": f, "b": f, "c": f}})
    [part] = case.parts("layer.0")
    # Three distinct units, three used of five clusters: √(3 / 3) whatever k says.
    merged = merge(LoraLego(rank=5), copies)["layer.0"]
    assert centroids(merged).shape[0] == 5
    assert relative(delta(merged), oracles.dense(part)) < 1e-12
    assert merged.facts["inertia"] < 1e-28


def test_a_unit_without_one_half_is_no_unit() -> None:
    whole = adapter(((2.0,), (2.0,)))
    half = adapter(((2.0,), (2.0,)), ((7.0,), (0.0,)))
    case = Case("", {"m": {"a": half}})
    merged = delta(merge(LoraLego(), case)["m"])
    [[value]] = delta(merge(LoraLego(), Case("", {"m": {"a": whole}}))["m"])
    np.testing.assert_allclose(merged, [[value]], rtol=1e-14)


def test_balanced_units_do_not_depend_on_where_a_size_is_kept() -> None:
    case = collection((4, 4, 4))
    first, *others = [
        delta(merge(LoraLego(rank=5), way)["layer.0"])
        for way in (rescaled(case, scaling=4.0), rescaled(case, B=4.0), rescaled(case, A=4.0))
    ]
    for other in others:
        assert relative(other, first) < 1e-12
    raw = LoraLego(rank=5, balance=False)
    one, two = (delta(merge(raw, way)["layer.0"]) for way in (case, rescaled(case, A=4.0, B=0.25)))
    assert relative(one, two) > 1e-3


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("balance", [True, False])
def test_the_order_of_an_adapters_ranks_means_nothing(balance: bool, seed: int) -> None:
    case = collection((5, 5, 5))
    mixed = [3, 0, 4, 1, 2]
    f = case.modules["layer.0"]["b"]
    shuffled = replace(f, A=f.A[mixed], B=f.B[:, mixed])
    other = Case("", {"layer.0": {**case.modules["layer.0"], "b": shuffled}})
    merger = LoraLego(balance=balance)
    left, right = (delta(merge(merger, c, seed=seed)["layer.0"]) for c in (case, other))
    assert relative(left, right) < 1e-12


def test_the_seed_and_the_module_draw_the_start() -> None:
    case = collection((8, 8, 8), paths=("m.0",), d_out=30, d_in=30)
    other = Case("", {"m.1": case.modules["m.0"]})
    results = [delta(merge(LoraLego(rank=3), case, seed=s)["m.0"]) for s in range(4)]
    assert any(not np.array_equal(results[0], result) for result in results[1:])
    again = merge(LoraLego(rank=3), case, seed=2)["m.0"]
    assert same_bits(again, merge(LoraLego(rank=3), case, seed=2)["m.0"])
    elsewhere = [delta(merge(LoraLego(rank=3), other, seed=s)["m.1"]) for s in range(4)]
    assert any(not np.array_equal(a, b) for a, b in zip(results, elsewhere, strict=True))


def test_rounds_are_bounded() -> None:
    case = collection((16, 16, 16), d_out=40, d_in=40)
    encoding = merge(LoraLego(rank=6, max_iterations=1), case)["layer.0"]
    assert encoding.facts["iterations"] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("balance", [True, False])
def test_a_factor_that_is_not_finite_is_refused(value: float, balance: bool) -> None:
    case = collection()
    case.modules["layer.0"]["b"].A[1, 1] = value
    with pytest.raises(NonFiniteError, match=r"layer\.0: a unit holds NaN or infinity"):
        merge(LoraLego(balance=balance), case)


@pytest.mark.parametrize(
    "fields", [{"rank": 0}, {"reweight_units": "max"}, {"max_iterations": 0}, {"balance": 3}]
)
def test_a_wrong_field_is_refused(fields: dict[str, Any]) -> None:
    [name] = fields
    with pytest.raises(ValidationError, match=rf"(?m)^{name}$"):
        LoraLego.model_validate(fields)


def test_it_declares_what_it_does() -> None:
    capabilities = LoraLego().capabilities
    assert capabilities.mixed_ranks
    assert capabilities.stochastic
    assert capabilities.restores is None
    assert not capabilities.weight_scales_delta
