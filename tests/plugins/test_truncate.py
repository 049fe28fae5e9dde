"""Truncation against the SVD of each dense product, and what it keeps, cuts and predicts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import oracles
from stacks import ALL_CASES, Case, Result, collection, merge, regauge, relative, stored_elements
from unmerge.adapter import Factors
from unmerge.errors import NonFiniteError
from unmerge_bundle.encodings import AdapterFactorsEncoding
from unmerge_strategies.truncate import Truncate


def adapter_factors(encoding: Result) -> AdapterFactorsEncoding[torch.Tensor]:
    assert isinstance(encoding, AdapterFactorsEncoding)
    return encoding


def pair(encoding: Result, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return `(A, B, scaling)` of one adapter."""
    tensors = encoding.adapter_tensors(name)
    return tensors["A"], tensors["B_transposed"].T, encoding.scaling(name)


def restored(encoding: Result, name: str) -> oracles.Matrix:
    A, B, scaling = pair(encoding, name)
    return np.asarray((scaling * (B.double() @ A.double())).numpy())


@pytest.mark.parametrize("rank", [1, 3, 50])
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_every_adapter_is_its_best_approximation(case: Case, rank: int) -> None:
    for path, encoding in merge(Truncate(rank=rank), case).items():
        assert encoding.adapters == tuple(sorted(case.modules[path]))
        worst = 0.0
        for name, part in zip(encoding.adapters, case.parts(path), strict=True):
            expected = oracles.truncate(part, rank)
            whole = oracles.dense(part)
            assert relative(restored(encoding, name), expected, scale=np.linalg.norm(whole)) < 1e-10
            assert encoding.scaling(name) == part[2]
            worst = max(worst, relative(expected, whole) if whole.any() else 0.0)
        assert encoding.facts["truncation_error"] == pytest.approx(worst, abs=1e-12)


@pytest.mark.parametrize("rank", [None, 1, 2, 4, 99])
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_the_predicted_size_is_the_size(case: Case, rank: int | None) -> None:
    merger, stack = Truncate(rank=rank), case.stack()
    for module, encoding in zip(stack, merge(merger, case).values(), strict=True):
        predicted = merger.predict(module.shape)
        assert predicted is not None
        assert (predicted.shared, predicted.packed_bytes) == (0, 0)
        assert predicted.per_adapter == stored_elements(encoding)


def test_by_default_half_of_each_rank_is_kept() -> None:
    encoding = merge(Truncate(), collection((1, 5, 8)))["layer.0"]
    kept = {name: pair(encoding, name)[0].shape[0] for name in encoding.adapters}
    assert kept == {"a": 1, "b": 3, "c": 4}
    assert encoding.facts["largest_rank"] == 4


def test_an_adapter_of_which_nothing_is_cut_is_kept_bit_for_bit() -> None:
    case = collection((2, 6), d_out=9, d_in=7)
    for merger in (Truncate(rank=4), Truncate(error=0.0), Truncate(energy=1.0)):
        encoding = merge(merger, case, dtype=torch.float32)["layer.0"]
        A, B, _ = pair(encoding, "a")
        original = case.modules["layer.0"]["a"]
        assert torch.equal(A, original.A)
        assert torch.equal(B, original.B)


def test_a_rank_above_the_dimensions_goes_down_to_them() -> None:
    # d_out = 3: an adapter of rank 6 has a product of rank 3.
    case = collection((6, 6), d_out=3)
    encoding = merge(Truncate(rank=6), case)["layer.0"]
    for name, part in zip(encoding.adapters, case.parts("layer.0"), strict=True):
        assert pair(encoding, name)[0].shape == (3, 11)
        assert relative(restored(encoding, name), oracles.dense(part)) < 1e-13


@pytest.mark.parametrize("error", [0.9, 0.3, 0.01])
def test_an_error_bound_is_kept_with_the_fewest_ranks(error: float) -> None:
    case = collection((8, 8, 3), spectrum="decaying", d_out=20, d_in=17)
    encoding = merge(Truncate(error=error), case)["layer.0"]
    for name, part in zip(encoding.adapters, case.parts("layer.0"), strict=True):
        whole = oracles.dense(part)
        kept = pair(encoding, name)[0].shape[0]
        assert kept == max(1, oracles.rank_for_error(whole, error))
        assert relative(restored(encoding, name), whole) <= error
    assert encoding.facts["truncation_error"] <= error


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.9999])
def test_an_energy_is_kept_with_the_fewest_ranks(energy: float) -> None:
    case = collection((8, 8, 3), spectrum="decaying", d_out=20, d_in=17)
    encoding = merge(Truncate(energy=energy), case)["layer.0"]
    for name, part in zip(encoding.adapters, case.parts("layer.0"), strict=True):
        assert pair(encoding, name)[0].shape[0] == oracles.rank_for_energy(
            oracles.dense(part), energy
        )
    assert Truncate(energy=energy).predict(case.stack().module(0).shape) is None


def test_by_hand() -> None:
    # diag(9, 4) at rank 1: √9 on both factors; the lost 4 of √97.
    f = Factors(A=torch.eye(2), B=torch.diag(torch.tensor([9.0, 4.0])), scaling=-0.5)
    encoding = merge(Truncate(), Case("", {"m": {"a": f}}))["m"]
    A, B, scaling = pair(encoding, "a")
    np.testing.assert_allclose(A, [[3.0, 0.0]], atol=1e-15)
    np.testing.assert_allclose(B, [[3.0], [0.0]], atol=1e-15)
    assert scaling == -0.5
    assert encoding.facts["truncation_error"] == pytest.approx(4 / 97**0.5, rel=1e-14)


def test_an_adapter_of_zeros_comes_back_as_zeros() -> None:
    f = Factors(A=torch.ones(4, 5), B=torch.zeros(6, 4), scaling=2.0)
    for merger in (Truncate(), Truncate(error=0.1), Truncate(energy=0.5)):
        encoding = merge(merger, Case("", {"m": {"a": f}}))["m"]
        assert not restored(encoding, "a").any()
        assert encoding.facts["truncation_error"] == 0.0


def test_the_scaling_may_be_zero() -> None:
    case = collection((4, 4), scalings=(0.0, 1.0))
    encoding = merge(Truncate(rank=2), case)["layer.0"]
    A, B, scaling = pair(encoding, "a")
    assert scaling == 0.0
    f = case.modules["layer.0"]["a"]
    best = oracles.truncated((f.B @ f.A).double().numpy(), 2)
    np.testing.assert_allclose((B @ A).numpy(), best, atol=1e-12)


@pytest.mark.parametrize("fields", [{}, {"rank": 2}, {"error": 0.2}])
def test_the_product_decides_and_not_its_factors(fields: dict[str, Any]) -> None:
    case = collection((4, 5), spectrum="decaying")
    merger = Truncate.model_validate(fields)
    ours = merge(merger, case)["layer.0"]
    other = merge(merger, regauge(case))["layer.0"]
    for name in ours.adapters:
        assert relative(restored(other, name), restored(ours, name)) < 1e-10


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_without_losses_nothing_is_lost(case: Case) -> None:
    merger = Truncate(rank=1).lossless()
    for path, encoding in merge(merger, case).items():
        for name, part in zip(encoding.adapters, case.parts(path), strict=True):
            whole = oracles.dense(part)
            assert relative(restored(encoding, name), whole) < 1e-13


def test_one_adapter_does_not_depend_on_the_others() -> None:
    case = collection((4, 6, 3))
    alone = replace(case, modules={"layer.0": {"b": case.modules["layer.0"]["b"]}})
    one = merge(Truncate(), alone)["layer.0"]
    all_ = merge(Truncate(), case)["layer.0"]
    for left, right in zip(pair(one, "b"), pair(all_, "b"), strict=True):
        assert torch.equal(torch.as_tensor(left), torch.as_tensor(right))


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 2, "energy": 0.5},
        {"rank": 2, "error": 0.5},
        {"energy": 0.5, "error": 0.5},
    ],
)
def test_alternatives_are_refused_together(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="give at most one"):
        Truncate.model_validate(fields)


@pytest.mark.parametrize(
    "fields", [{"rank": 0}, {"energy": 0.0}, {"energy": 1.1}, {"error": -0.1}, {"error": 1.0}]
)
def test_a_wrong_field_is_refused(fields: dict[str, Any]) -> None:
    [name] = fields
    with pytest.raises(ValidationError, match=rf"(?m)^{name}$"):
        Truncate.model_validate(fields)


def test_a_factor_that_is_not_finite_is_refused() -> None:
    case = collection()
    case.modules["layer.0"]["b"].A[1, 1] = float("nan")
    with pytest.raises(NonFiniteError):
        merge(Truncate(), case)


def test_it_declares_what_it_does() -> None:
    capabilities = Truncate().capabilities
    assert capabilities.restores == "factors"
    assert capabilities.ignores_weights
    assert capabilities.mixed_ranks
    assert Truncate(rank=3).recipe() == {
        "method": "truncate",
        "rank": 3,
        "energy": None,
        "error": None,
    }
