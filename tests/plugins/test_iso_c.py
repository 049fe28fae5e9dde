"""Iso-C by hand and by its laws; `test_oracle_spectral.py` has the comparison with dense SVDs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

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
from unmerge_strategies.iso_c import IsoC


def diagonal(*adapters: tuple[float, float]) -> Case:
    having = {
        chr(ord("a") + n): Factors(
            A=torch.eye(2, dtype=torch.float64),
            B=torch.diag(torch.tensor(d, dtype=torch.float64)),
            scaling=1.0,
        )
        for n, d in enumerate(adapters)
    }
    return Case("diagonal", {"m": having})


def test_by_hand() -> None:
    # diag(3, −1) + diag(1, −3) = diag(4, −4); with weights 1 and 2 diag(5, −7), of mean 6.
    case = diagonal((3.0, -1.0), (1.0, -3.0))
    np.testing.assert_allclose(delta(merge(IsoC(), case)["m"]), np.diag([4.0, -4.0]), atol=1e-14)
    weighted = replace(case, weights={"b": 2.0})
    np.testing.assert_allclose(
        delta(merge(IsoC(scale=-0.5), weighted)["m"]), np.diag([-3.0, 3.0]), atol=1e-14
    )


def test_null_directions_stay_null_by_hand() -> None:
    # diag(5, 0): the mean over the one direction there is, not over two.
    encoding = merge(IsoC(), diagonal((2.0, 0.0), (3.0, 0.0)))["m"]
    np.testing.assert_allclose(delta(encoding), np.diag([5.0, 0.0]), atol=1e-14)
    assert encoding.facts == {"rank": 1.0, "mean_singular_value": pytest.approx(5.0)}


@pytest.mark.parametrize(("small", "rank"), [(1e-5, 2), (1e-8, 1)])
def test_rounding_of_stored_factors_is_not_lifted(small: float, rank: int) -> None:
    encoding = merge(IsoC(), diagonal((1.0, small)))["m"]
    assert encoding.facts["rank"] == rank
    assert (delta(encoding)[1, 1] > 0.4) == (rank == 2)


def test_all_directions_are_equally_strong() -> None:
    case = collection((3, 4, 2), scalings=(2.0, 0.1, -1.0))
    spectrum = np.linalg.svd(delta(merge(IsoC(), case)["layer.0"]), compute_uv=False)
    np.testing.assert_allclose(spectrum[:9], spectrum[0], rtol=1e-10)
    np.testing.assert_allclose(spectrum[9:], 0.0, atol=1e-10)


def test_adapters_that_cancel_give_a_zero_delta() -> None:
    case = diagonal((2.0, 1.0), (2.0, 1.0))
    encoding = merge(IsoC(), replace(case, weights={"b": -1.0}))["m"]
    np.testing.assert_array_equal(delta(encoding), np.zeros((2, 2)))
    assert encoding.facts == {"rank": 0.0, "mean_singular_value": 0.0}


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_no_more_is_stored_than_predicted(case: Case) -> None:
    for module, encoding in zip(
        case.stack(), IsoC().merge(case.stack(), case.context()), strict=True
    ):
        assert isinstance(encoding, FactorsEncoding)
        predicted = IsoC().predict(module.shape)
        assert predicted.at_most
        assert stored_elements(encoding) <= predicted.total
        assert IsoC().workspace_bytes(module.shape) > 0


def test_doubling_all_weights_doubles_the_delta() -> None:
    case = collection((3, 4), weights=(1.0, -0.5))
    double = replace(case, weights={"a": 2.0, "b": -1.0})
    once, twice = (delta(merge(IsoC(), c)["layer.0"]) for c in (case, double))
    assert relative(twice, 2 * once) < 1e-12


def test_absent_adapters_weigh_nothing_or_are_made_up_for() -> None:
    case = collection((4, 4, 4), paths=("m.0", "m.1"), weights=(2.0, 1.0, 1.0))
    lacking = {name: f for name, f in case.modules["m.0"].items() if name != "a"}
    case = replace(case, modules={"m.0": lacking, "m.1": case.modules["m.1"]})
    zero, renormalised = (
        delta(merge(IsoC.model_validate({"absent": absent}), case)["m.0"])
        for absent in ("zero", "renormalise")
    )
    assert relative(renormalised, 2 * zero) < 1e-13


def test_weights_that_cannot_be_renormalised_are_refused() -> None:
    case = collection((2, 2, 2), paths=("m.0", "m.1"), weights=(1.0, 1.0, -1.0))
    lacking = {name: f for name, f in case.modules["m.0"].items() if name != "a"}
    case = replace(case, modules={"m.0": lacking, "m.1": case.modules["m.1"]})
    merger = IsoC(absent="renormalise")
    with pytest.raises(ConfigError, match=r"^m\.0: .* sum to 0"):
        merge(merger, case)
    with pytest.raises(ConfigError, match=r"^m\.0: .* sum to 0"):
        merger.check(case.stack().module(0).shape, case.context())


def test_another_gauge_changes_nothing_and_another_order_no_bit() -> None:
    case = collection((4, 3, 2), scalings=(2.0, 0.5, -1.0))
    one = merge(IsoC(), case)["layer.0"]
    assert relative(delta(merge(IsoC(), regauge(case))["layer.0"]), delta(one)) < 1e-11
    [backwards] = IsoC().merge(case.stack(reverse=True), case.context())
    assert same_bits(backwards, one)


def test_it_has_no_lossless_settings() -> None:
    assert IsoC().lossless() is None


@pytest.mark.parametrize("fields", [{"scale": float("nan")}, {"absent": "skip"}, {"rank": 3}])
def test_a_wrong_field_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        IsoC.model_validate(fields)


def test_what_is_not_finite_is_refused() -> None:
    case = collection((2, 2))
    case.modules["layer.0"]["a"].B[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite"):
        merge(IsoC(), case)
