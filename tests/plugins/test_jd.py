"""Joint diagonalisation: against the dense oracle, what it stores and restores, and by hand."""

from __future__ import annotations

import itertools
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
    merge,
    regauge,
    relative,
    same_bits,
    stored_elements,
)
from unmerge.adapter import Factors
from unmerge.errors import NonFiniteError
from unmerge.stack import ModuleShape
from unmerge_bundle.encodings import SharedFactorsEncoding
from unmerge_strategies.jd import Jd


def shared(encoding: Result) -> SharedFactorsEncoding[torch.Tensor]:
    assert isinstance(encoding, SharedFactorsEncoding)
    return encoding


def restored(encoding: Result, name: str) -> oracles.Matrix:
    """Return one delta by the encoding's own formula."""
    joint = shared(encoding)
    core = joint.adapter_tensors(name)["core"]
    middle = torch.diag(core) if joint.diagonal else core
    delta: oracles.Matrix = (joint.scaling(name) * (joint.U @ middle @ joint.V)).double().numpy()
    return delta


def originals(case: Case, path: str = "layer.0") -> dict[str, oracles.Matrix]:
    having = case.modules[path]
    return {
        name: oracles.dense((f.A.numpy(), f.B.numpy(), f.scaling, 1.0))
        for name, f in sorted(having.items())
    }


def error(case: Case, encoding: Result, path: str = "layer.0") -> float:
    wanted = originals(case, path)
    lost = sum(float(((restored(encoding, n) - d) ** 2).sum()) for n, d in wanted.items())
    total = sum(float((d**2).sum()) for d in wanted.values())
    return float((lost / total) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_full_cores_fit_as_well_as_those_of_the_dense_oracle(
    case: Case, rank: int, dtype: torch.dtype
) -> None:
    merger = Jd(rank=rank, normalise=False, tolerance=1e-12)
    for path, encoding in merge(merger, case, dtype=dtype).items():
        deltas = list(originals(case, path).values())
        wanted = oracles.joint_full(deltas, rank, 200).squared_error(deltas) ** 0.5
        total = sum(float((d**2).sum()) for d in deltas) ** 0.5
        assert error(case, encoding, path) <= wanted / total * (1 + 1e-3) + 1e-7


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_enough_directions_lose_nothing(case: Case, diagonal: bool) -> None:
    merger = Jd(rank=1, diagonal=diagonal).lossless()
    for path, encoding in merge(merger, case).items():
        scale = max(float(np.linalg.norm(d)) for d in originals(case, path).values())
        for name, wanted in originals(case, path).items():
            assert relative(restored(encoding, name), wanted, scale=scale) < 1e-12


@pytest.mark.parametrize("fields", [{}, {"rank": 2}, {"rank": 5, "diagonal": True}], ids=str)
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_the_elements_stored_are_those_predicted_and_the_error_is_the_one_reported(
    case: Case, fields: dict[str, Any]
) -> None:
    merger = Jd.model_validate({"max_iterations": 20, **fields})
    encodings = merger.merge(case.stack(), case.context())
    for module, encoding in zip(case.stack(), encodings, strict=True):
        assert merger.predict(module.shape).total == stored_elements(encoding)
        assert encoding.facts["relative_error"] == pytest.approx(
            error(case, encoding, module.path), abs=1e-13
        )
        assert 1 <= encoding.facts["iterations"] <= 20
        assert merger.workspace_bytes(module.shape) > 0


def test_one_shared_direction_by_hand() -> None:
    # Deltas 2 e₁e₁ᵀ, −1 e₁e₁ᵀ and 1 e₂e₂ᵀ: at k = 1 the first two are exact and the third is lost.
    def one(scaling: float, index: int) -> Factors:
        e = torch.eye(2, dtype=torch.float64)[index : index + 1]
        return Factors(A=e, B=e.T.clone(), scaling=scaling)

    case = Case("", {"m": {"a": one(2.0, 0), "b": one(-1.0, 0), "c": one(1.0, 1)}})
    for diagonal in (False, True):
        encoding = shared(merge(Jd(rank=1, diagonal=diagonal), case)["m"])
        np.testing.assert_allclose(encoding.U.numpy(), [[1.0], [0.0]], atol=1e-14)
        np.testing.assert_allclose(encoding.V.numpy(), [[1.0, 0.0]], atol=1e-14)
        np.testing.assert_allclose(encoding.cores.flatten().numpy(), [2.0, -1.0, 0.0], atol=1e-14)
        assert encoding.facts["relative_error"] == pytest.approx((1 / 6) ** 0.5)
    np.testing.assert_allclose(
        restored(merge(Jd(rank=2), case)["m"], "c"), np.diag([0.0, 1.0]), atol=1e-14
    )


def test_normalising_makes_small_adapters_count() -> None:
    # Two loud adapters on e₁ against one quiet one on e₂, and three quiet ones on e₂.
    def one(scaling: float, index: int) -> Factors:
        e = torch.eye(3, dtype=torch.float64)[index : index + 1]
        return Factors(A=e, B=e.T.clone(), scaling=scaling)

    having = {"a": one(10.0, 0), "b": one(10.0, 0), **{n: one(0.1, 1) for n in "cde"}}
    case = Case("", {"m": having})
    plain, equal = (merge(Jd(rank=1, normalise=n), case)["m"] for n in (False, True))
    np.testing.assert_allclose(restored(plain, "a"), np.diag([10.0, 0, 0]), atol=1e-12)
    np.testing.assert_allclose(restored(plain, "c"), np.zeros((3, 3)), atol=1e-12)
    np.testing.assert_allclose(restored(equal, "a"), np.zeros((3, 3)), atol=1e-12)
    np.testing.assert_allclose(restored(equal, "c"), np.diag([0, 0.1, 0]), atol=1e-12)


def test_bases_are_orthonormal_with_fixed_signs_and_cores_are_projections() -> None:
    case = collection((4, 3, 2))
    encoding = shared(merge(Jd(rank=3), case)["layer.0"])
    U, V = encoding.U.numpy(), encoding.V.numpy()
    np.testing.assert_allclose(U.T @ U, np.eye(3), atol=1e-13)
    np.testing.assert_allclose(V @ V.T, np.eye(3), atol=1e-13)
    for columns in (U, V.T):
        assert (columns[np.abs(columns).argmax(0), range(3)] > 0).all()
    for n, wanted in enumerate(originals(case).values()):
        np.testing.assert_allclose(encoding.cores[n].numpy(), U.T @ wanted @ V.T, atol=1e-12)


def test_diagonal_cores_are_smaller_and_fit_worse() -> None:
    case = collection((4, 4, 4))
    full, diagonal = (merge(Jd(rank=4, diagonal=d), case)["layer.0"] for d in (False, True))
    assert shared(diagonal).cores.shape == (3, 4)
    assert shared(full).cores.shape == (3, 4, 4)
    assert error(case, diagonal) >= error(case, full)


def test_a_larger_basis_fits_no_worse() -> None:
    case = collection((4, 4, 4))
    errors = [error(case, merge(Jd(rank=k, normalise=False), case)["layer.0"]) for k in range(1, 9)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(errors))


def test_weights_play_no_part() -> None:
    case = collection((4, 4, 4))
    plain = merge(Jd(), case)["layer.0"]
    assert same_bits(plain, merge(Jd(), replace(case, weights={"a": 3.0, "b": 0.0}))["layer.0"])
    assert Jd().capabilities.ignores_weights
    assert Jd().capabilities.restores == "delta"


@pytest.mark.parametrize("diagonal", [False, True])
def test_another_gauge_changes_no_delta_and_another_order_no_bit(diagonal: bool) -> None:
    case = collection((4, 3, 2), scalings=(2.0, 0.5, -1.0))
    merger = Jd(rank=3, diagonal=diagonal, max_iterations=30)
    one, other = (merge(merger, c)["layer.0"] for c in (case, regauge(case)))
    for name, original in originals(case).items():
        scale = float(np.linalg.norm(original))
        assert relative(restored(other, name), restored(one, name), scale=scale) < 1e-8
    [backwards] = merger.merge(case.stack(reverse=True), case.context())
    assert same_bits(backwards, one)


def test_an_adapter_is_found_only_where_it_has_the_module() -> None:
    case = collection((4, 4, 4), paths=("m.0", "m.1"))
    having = {name: f for name, f in case.modules["m.1"].items() if name != "b"}
    merged = merge(Jd(), replace(case, modules={"m.0": case.modules["m.0"], "m.1": having}))
    assert merged["m.0"].adapters == ("a", "b", "c")
    assert merged["m.1"].adapters == ("a", "c")


def test_a_zero_adapter_comes_back_as_zero() -> None:
    case = collection((4, 4))
    having = case.modules["layer.0"]
    zero = replace(having["b"], B=torch.zeros_like(having["b"].B))
    for diagonal in (False, True):
        encoding = merge(
            Jd(diagonal=diagonal), Case("", {"layer.0": {"a": having["a"], "b": zero}})
        )["layer.0"]
        assert float(np.abs(restored(encoding, "b")).max()) < 1e-14
    nothing = merge(Jd(), Case("", {"layer.0": {"b": zero}}))["layer.0"]
    assert nothing.facts["relative_error"] == 0.0


def test_stopping_early_is_said() -> None:
    case = collection((4,) * 6)
    facts = merge(Jd(rank=3, tolerance=0.0, max_iterations=2), case)["layer.0"].facts
    assert (facts["iterations"], facts["converged"]) == (2, 0)
    assert merge(Jd(rank=3), case)["layer.0"].facts["converged"] == 1


def shape(count: int, rank: int) -> ModuleShape:
    return ModuleShape("m", 100, 200, tuple(f"a{n:02}" for n in range(count)), (rank,) * count)


def test_advice_names_the_largest_rank_that_saves() -> None:
    # 8 adapters of rank 4 have 9600 elements: k 300 + 8 k² stays below up to k = 20 (9200).
    [line] = Jd(rank=32).advise([shape(8, 4)])
    assert line == "rank 20 or less would be smaller than the adapters"
    assert Jd(rank=20).advise([shape(8, 4)]) == []
    assert Jd().advise([shape(8, 4)]) == []


def test_advice_says_when_no_rank_saves() -> None:
    [line] = Jd().advise([shape(1, 1)])
    assert line.startswith("no rank would be smaller")


@pytest.mark.parametrize(
    "fields", [{"rank": 0}, {"tolerance": -1.0}, {"max_iterations": 0}, {"diagonal": "yes"}]
)
def test_a_wrong_field_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        Jd.model_validate(fields)


def test_what_is_not_finite_is_refused() -> None:
    case = collection((2, 2))
    case.modules["layer.0"]["a"].B[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="not finite"):
        merge(Jd(), case)
