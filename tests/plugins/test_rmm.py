"""RMM against Algorithm 1 run position by position, Theorem 1, its storage formula, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import oracles
from stacks import (
    EQUAL_RANK_CASES,
    MIXED_RANK_CASES,
    Case,
    Result,
    collection,
    merge,
    regauge,
    relative,
    restored,
    stored_elements,
)
from unmerge.adapter import Factors
from unmerge.errors import IncompatibleAdaptersError
from unmerge.stack import ModuleShape
from unmerge_bundle.encodings import AffineBasisEncoding
from unmerge_strategies import Rmm

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def affine(encoding: Result) -> AffineBasisEncoding[torch.Tensor]:
    assert isinstance(encoding, AffineBasisEncoding)
    return encoding


def squared_error(case: Case, path: str, encoding: Result) -> float:
    total = 0.0
    for name, f in case.modules[path].items():
        A, B, _ = restored(encoding, name)
        total += float(((A - f.A.numpy()) ** 2).sum() + ((B - f.B.numpy()) ** 2).sum())
    return total


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("basis_size", [1, 2, 3])
@pytest.mark.parametrize("case", EQUAL_RANK_CASES, ids=str)
def test_restored_factors_are_those_of_algorithm_1(
    case: Case, basis_size: int, dtype: torch.dtype
) -> None:
    for path, encoding in merge(Rmm(basis_size=basis_size), case, dtype=dtype).items():
        names = sorted(case.modules[path])
        having = [case.modules[path][name] for name in names]
        expected = oracles.rmm_restore(
            [f.A.numpy() for f in having], [f.B.numpy() for f in having], basis_size
        )
        for n, name in enumerate(names):
            A, B, scaling = restored(encoding, name)
            assert relative(A, expected.A[n]) < TOLERANCE[dtype]
            # A zero adapter's B comes back to rounding of the others', which share its basis.
            scale = float(np.linalg.norm(expected.B))
            assert relative(B, expected.B[n], scale=scale) < TOLERANCE[dtype]
            assert scaling == having[n].scaling


@pytest.mark.parametrize("case", EQUAL_RANK_CASES, ids=str)
def test_the_largest_useful_basis_restores_every_adapter(case: Case) -> None:
    for path, encoding in merge(Rmm(basis_size=1000), case).items():
        having = case.modules[path]
        rank = next(iter(having.values())).rank
        assert affine(encoding).basis_A.shape[0] == min(len(having) - 1, rank)
        for name, f in having.items():
            A, B, scaling = restored(encoding, name)
            assert relative(A, f.A.numpy()) < 1e-13
            assert relative(B, f.B.numpy(), scale=float(torch.linalg.norm(f.A))) < 1e-13
            assert scaling == f.scaling


@pytest.mark.parametrize("small", [1e-4, 1e-6, 1e-8, 1e-10])
def test_the_largest_useful_basis_restores_directions_of_any_size(small: float) -> None:
    """Directions of size 1, `small` and `small / 2` among four adapters: p = 3 loses none."""
    generator = torch.Generator().manual_seed(5)
    away = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    away = torch.linalg.qr(away - away.mean(0)).Q * torch.tensor([1.0, small, small / 2])
    directions = torch.randn(3, 8, 11, generator=generator, dtype=torch.float64)
    B = torch.randn(9, 8, generator=generator, dtype=torch.float64)
    having = {
        name: Factors(A=torch.einsum("k,krc->rc", away[n], directions), B=B, scaling=1.0)
        for n, name in enumerate("abcd")
    }
    encoding = merge(Rmm(basis_size=3), Case("", {"m": having}))["m"]
    scale = float(torch.linalg.norm(directions))
    for name, f in having.items():
        assert relative(restored(encoding, name)[0], f.A.numpy(), scale=scale) < 1e-13


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 7),
    rank=st.integers(1, 5),
    decaying=st.booleans(),
)
def test_the_factor_error_is_the_tail_and_never_grows(
    seed: int, count: int, rank: int, decaying: bool
) -> None:
    """Theorem 1, over every basis size."""
    spectrum: Any = "decaying" if decaying else "flat"
    case = collection((rank,) * count, seed=seed, d_out=4, d_in=3, spectrum=spectrum)
    having = list(case.modules["layer.0"].values())
    As, Bs = [f.A.numpy() for f in having], [f.B.numpy() for f in having]
    energy = float(sum((A**2).sum() for A in As) + sum((B**2).sum() for B in Bs))
    before = float("inf")
    for basis_size in range(1, max(2, min(count - 1, rank) + 1)):
        error = squared_error(case, "layer.0", merge(Rmm(basis_size=basis_size), case)["layer.0"])
        expected = oracles.rmm_restore(As, Bs, basis_size)
        assert error == pytest.approx(expected.tail_A + expected.tail_B, abs=1e-12 * energy)
        assert error <= before + 1e-12 * energy
        before = error


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 9), rank=st.integers(1, 6), basis_size=st.integers(1, 8))
def test_the_elements_stored_are_those_of_the_formula(
    count: int, rank: int, basis_size: int
) -> None:
    case = collection((rank,) * count, d_out=4, d_in=3)
    merger = Rmm(basis_size=basis_size)
    shape = case.stack().module(0).shape
    stored = stored_elements(merge(merger, case)["layer.0"])
    kept = min(basis_size, count - 1, rank)
    assert merger.predict(shape).total == stored
    assert shape.elements == count * rank * (4 + 3)
    ratio = oracles.rmm_storage_ratio(count, rank, kept)
    assert stored == pytest.approx(ratio * shape.elements, rel=1e-14)


@pytest.mark.parametrize(("count", "rank"), [(3, 8), (8, 8), (9, 8), (12, 2), (2, 1)])
@pytest.mark.parametrize("spectrum", ["flat", "decaying"])
def test_the_basis_is_orthonormal_and_its_signs_are_fixed(
    count: int, rank: int, spectrum: Any
) -> None:
    case = collection((rank,) * count, spectrum=spectrum)
    encoding = affine(merge(Rmm(basis_size=3), case)["layer.0"])
    for basis in (
        encoding.basis_A.permute(2, 0, 1).numpy(),  # (d_in, p, r)
        encoding.basis_B.permute(1, 0, 2).numpy(),  # (d_out, p, r)
    ):
        gram = basis @ basis.transpose(0, 2, 1)
        np.testing.assert_allclose(
            gram, np.broadcast_to(np.eye(basis.shape[1]), gram.shape), atol=1e-6
        )
        peaks = np.take_along_axis(basis, np.abs(basis).argmax(2)[:, :, None], 2)
        assert (peaks > 0).all()


@pytest.mark.parametrize("count", [4, 12], ids=["N <= r", "N > r"])
def test_the_basis_of_duplicates_has_no_direction_twice(count: int) -> None:
    """Rows orthonormal, or zero: what an append projects a new adapter on."""
    case = collection((8,) * 2)
    pair = list(case.modules["layer.0"].values())
    having = {chr(ord("a") + n): pair[n % 2] for n in range(count)}
    encoding = affine(merge(Rmm(basis_size=3), Case("", {"m": having}))["m"])
    for basis in (encoding.basis_A.permute(2, 0, 1), encoding.basis_B.permute(1, 0, 2)):
        gram = (basis @ basis.transpose(1, 2)).numpy()
        lengths = np.diagonal(gram, axis1=1, axis2=2)
        expected = np.eye(gram.shape[1]) * np.where(lengths > 0.5, 1.0, 0.0)[:, None, :]
        np.testing.assert_allclose(gram, expected, atol=1e-6)


def test_by_hand() -> None:
    """Three adapters of rank 2 whose points lie on one line at every position: p = 1 is exact.

    Column 0 of A: points (1, 0), (3, 0), (5, 0); mean (3, 0), direction (1, 0), C = −2, 0, 2.
    Row 0 of B: points (0, 3), (0, 0), (4, 0) have centre (4/3, 1); both directions are needed.
    """
    having = {
        name: Factors(
            A=torch.tensor([[x], [0.0]], dtype=torch.float64),
            B=torch.tensor([y], dtype=torch.float64),
            scaling=1.0,
        )
        for name, x, y in (("a", 1.0, (0.0, 3.0)), ("b", 3.0, (0.0, 0.0)), ("c", 5.0, (4.0, 0.0)))
    }
    encoding = affine(merge(Rmm(basis_size=1), Case("", {"m": having}))["m"])
    np.testing.assert_allclose(encoding.mean_A.numpy(), [[3.0], [0.0]], atol=1e-14)
    np.testing.assert_allclose(encoding.basis_A.numpy(), [[[1.0], [0.0]]], atol=1e-14)
    np.testing.assert_allclose(
        encoding.coefficients_A.numpy(), [[[-2.0]], [[0.0]], [[2.0]]], atol=1e-14
    )
    np.testing.assert_allclose(encoding.mean_B.numpy(), [[4 / 3, 1.0]], atol=1e-14)
    # Scatter of B's points: [[32/3, -4], [-4, 6]], eigenvalues (25 ± √193)/3; p = 1 leaves the
    # smaller one.
    error = squared_error(Case("", {"m": having}), "m", encoding)
    assert error == pytest.approx((25 - 193**0.5) / 3, rel=1e-12)


def test_the_mean_is_a_mean_and_not_the_sum_of_algorithm_1_line_7() -> None:
    case = collection()
    encoding = affine(merge(Rmm(basis_size=1), case)["layer.0"])
    having = case.modules["layer.0"].values()
    np.testing.assert_allclose(
        encoding.mean_A.numpy(), sum(f.A.numpy() for f in having) / 3, rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("basis_size", [1, 2])
def test_folded_scalings_are_compressed_with_B(basis_size: int) -> None:
    case = collection((4, 4, 4), scalings=(4.0, 8.0, -0.25))
    having = list(case.modules["layer.0"].values())
    encoding = merge(Rmm(basis_size=basis_size, fold_scaling=True), case)["layer.0"]
    expected = oracles.rmm_restore(
        [f.A.numpy() for f in having], [f.scaling * f.B.numpy() for f in having], basis_size
    )
    for n, name in enumerate("abc"):
        A, B, scaling = restored(encoding, name)
        assert scaling == 1.0
        assert relative(A, expected.A[n]) < 1e-10
        assert relative(B, expected.B[n]) < 1e-10


def test_folding_matters_only_where_scalings_differ() -> None:
    def deltas(case: Case, fold: bool) -> list[oracles.Matrix]:
        encoding = merge(Rmm(basis_size=1, fold_scaling=fold), case)["layer.0"]
        return [s * (B @ A) for A, B, s in (restored(encoding, name) for name in "abc")]

    same = collection((4, 4, 4), scalings=(2.0, 2.0, 2.0))
    other = collection((4, 4, 4), scalings=(1.0, 2.0, 4.0))
    for kept, folded in zip(deltas(same, False), deltas(same, True), strict=True):
        assert relative(folded, kept) < 1e-12
    for kept, folded in zip(deltas(other, False), deltas(other, True), strict=True):
        assert relative(folded, kept) > 1e-3


def test_weights_play_no_part() -> None:
    case = collection((4, 4, 4))
    weighed = replace(case, weights={"a": 3.0, "b": 0.0, "c": -1.0})
    plain, other = merge(Rmm(), case)["layer.0"], merge(Rmm(), weighed)["layer.0"]
    assert torch.equal(affine(plain).coefficients_A, affine(other).coefficients_A)


def test_an_adapter_is_found_only_where_it_has_the_module() -> None:
    case = collection((4, 4, 4), paths=("m.0", "m.1"))
    having = dict(case.modules["m.1"])
    del having["b"]
    merged = merge(Rmm(), replace(case, modules={"m.0": case.modules["m.0"], "m.1": having}))
    assert merged["m.0"].adapters == ("a", "b", "c")
    assert merged["m.1"].adapters == ("a", "c")


@pytest.mark.parametrize("case", MIXED_RANK_CASES, ids=str)
def test_unequal_ranks_are_refused(case: Case) -> None:
    with pytest.raises(
        IncompatibleAdaptersError, match=r"^layer\.0: ranks .* differ; rmm needs one rank"
    ):
        merge(Rmm(), case)
    with pytest.raises(IncompatibleAdaptersError):
        Rmm().check(case.stack().module(0).shape, case.context())


def test_another_gauge_gives_another_rmm_unless_nothing_is_lost() -> None:
    case = collection((4,) * 6)
    other = regauge(case)

    def distances(basis_size: int) -> list[float]:
        ours, theirs = (merge(Rmm(basis_size=basis_size), c)["layer.0"] for c in (case, other))
        pairs = [(restored(ours, n), restored(theirs, n)) for n in case.adapters]
        return [relative(s2 * (B2 @ A2), s1 * (B1 @ A1)) for (A1, B1, s1), (A2, B2, s2) in pairs]

    assert min(distances(2)) > 1e-2
    assert max(distances(4)) < 1e-10


@pytest.mark.parametrize("fields", [{"basis_size": 0}, {"basis_size": 1.5}, {"basis_size": "two"}])
def test_a_wrong_basis_size_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="basis_size"):
        Rmm.model_validate(fields)


def shape(count: int, rank: int) -> ModuleShape:
    return ModuleShape("m", 10, 20, tuple(f"a{n:02}" for n in range(count)), (rank,) * count)


def test_advice_says_where_the_basis_is_cut() -> None:
    lines = Rmm(basis_size=9).advise([shape(8, 64), shape(20, 64)])
    assert lines[0].startswith("basis_size 9 is cut to 7 or less on 1 modules")
    assert Rmm(basis_size=2).advise([shape(8, 64)]) == []


def test_advice_names_the_largest_basis_that_saves() -> None:
    # r = N = 8: (16p + 8) / 64 is below 1 up to p = 3.
    assert oracles.rmm_storage_ratio(8, 8, 3) < 1 < oracles.rmm_storage_ratio(8, 8, 4)
    [line] = Rmm(basis_size=6).advise([shape(8, 8)])
    assert line == "basis_size 3 or less would be smaller than the adapters"
    assert Rmm(basis_size=3).advise([shape(8, 8)]) == []


def test_advice_says_when_no_basis_saves() -> None:
    # N = 2, r = 1: one basis vector already takes (3 + 1) / 2 of the elements.
    [line] = Rmm(basis_size=1).advise([shape(2, 1)])
    assert line.startswith("no basis_size would be smaller")
