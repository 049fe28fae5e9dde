"""MM-SVD against the dense SVD of the dense sum, its inequality, and by hand."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
    stored_elements,
)
from unmerge.adapter import Factors
from unmerge.errors import CapabilityError, NonFiniteError
from unmerge.merger import Capabilities, MergeContext, Merger, OutputSize
from unmerge.stack import FactorStack, ModuleShape
from unmerge_bundle.encodings import DeltaEncoding, FactorsEncoding
from unmerge_strategies import Average, Knots, MmSvd, Rmm, TaskArithmetic
from unmerge_strategies.truncate import Truncate

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
SPLITS: tuple[Literal["A", "B", "balanced"], ...] = ("A", "B", "balanced")


class ClippedSum(Merger, frozen=True):
    """`Σ w_i Δ_i` with its entries clipped to ± their mean magnitude: dense, of full rank."""

    method = "test.clipped"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(mixed_ranks=True)

    def predict(self, shape: ModuleShape) -> OutputSize:
        return OutputSize(shared=shape.d_out * shape.d_in)

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Result]:
        merged: list[Result] = []
        for module in stack:
            weights = context.weights_of(module.adapters)
            pairs = zip(module.factors, weights, strict=True)
            total = torch.stack([w * f.scaling * (f.B @ f.A) for f, w in pairs]).sum(0)
            bound = float(total.abs().mean())
            merged.append(DeltaEncoding(delta=total.clamp(-bound, bound), facts={"clipped": 3.0}))
        return merged


def factors(encoding: Result) -> tuple[oracles.Matrix, oracles.Matrix]:
    assert isinstance(encoding, FactorsEncoding)
    return np.asarray(encoding.A.double().numpy()), np.asarray(encoding.B.double().numpy())


def diagonal(*adapters: tuple[float, float]) -> Case:
    """Adapters whose deltas are diagonal 2 × 2 matrices."""
    having = {
        chr(ord("a") + n): Factors(A=torch.eye(2), B=torch.diag(torch.tensor(d)), scaling=1.0)
        for n, d in enumerate(adapters)
    }
    return Case("diagonal", {"m": having})


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rank", [1, 3, 50])
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_the_product_is_the_truncated_svd_of_the_sum(
    case: Case, rank: int, dtype: torch.dtype
) -> None:
    merged = merge(MmSvd(rank=rank, inner=TaskArithmetic(scale=0.7)), case, dtype=dtype)
    for path, encoding in merged.items():
        parts = case.parts(path)
        expected = oracles.mm_svd(parts, rank, scale=0.7)
        scale = float(np.linalg.norm(oracles.task_arithmetic(parts, 0.7)))
        assert relative(delta(encoding), expected.delta, scale=scale) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_over_the_average_it_is_the_truncated_svd_of_the_average(case: Case) -> None:
    merger = MmSvd(rank=2, inner=Average(absent="renormalise"))
    for path, encoding in merge(merger, case).items():
        expected = oracles.mm_svd(case.parts(path), 2, inner="average")
        assert relative(delta(encoding), expected.delta) < 1e-10


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("spectrum", ["flat", "decaying"])
def test_each_split_gives_the_oracle_factors_up_to_signs(
    split: Literal["A", "B", "balanced"], spectrum: Literal["flat", "decaying"]
) -> None:
    case = collection(spectrum=spectrum)
    A, B = factors(merge(MmSvd(rank=4, split=split), case)["layer.0"])
    expected = oracles.mm_svd(case.parts("layer.0"), 4, split=split)
    signs = np.sign((B * expected.B).sum(0))
    assert relative(B * signs, expected.B) < 1e-9
    assert relative(A * signs[:, None], expected.A) < 1e-9
    sigma = expected.singular_values[:4]
    of_A, of_B = {
        "A": (sigma**2, np.ones(4)),
        "B": (np.ones(4), sigma**2),
        "balanced": (sigma, sigma),
    }[split]
    np.testing.assert_allclose(A @ A.T, np.diag(of_A), rtol=1e-10, atol=1e-10 * of_A[0])
    np.testing.assert_allclose(B.T @ B, np.diag(of_B), rtol=1e-10, atol=1e-10 * of_B[0])


def test_the_sign_of_a_direction_is_fixed() -> None:
    _, B = factors(merge(MmSvd(rank=4), collection())["layer.0"])
    assert (B[np.abs(B).argmax(0), np.arange(4)] > 0).all()


@pytest.mark.parametrize(
    ("split", "expected_A", "expected_B"),
    [
        ("A", [[4.0, 0.0]], [[1.0], [0.0]]),
        ("B", [[1.0, 0.0]], [[4.0], [0.0]]),
        ("balanced", [[2.0, 0.0]], [[2.0], [0.0]]),
    ],
)
def test_by_hand(split: str, expected_A: Any, expected_B: Any) -> None:
    # diag(3, −2) + diag(1, 3) = diag(4, 1); the nearest rank-1 matrix is diag(4, 0).
    merger = MmSvd.model_validate({"rank": 1, "split": split})
    A, B = factors(merge(merger, diagonal((3.0, -2.0), (1.0, 3.0)))["m"])
    np.testing.assert_allclose(A, expected_A, atol=1e-15)
    np.testing.assert_allclose(B, expected_B, atol=1e-15)


def test_a_negative_direction_by_hand() -> None:
    # diag(0, −5): σ = 5 with u = (0, 1) once its largest entry is positive, so A = (0, −5).
    A, B = factors(merge(MmSvd(rank=1), diagonal((0.0, -5.0)))["m"])
    np.testing.assert_allclose(B, [[0.0], [1.0]], atol=1e-15)
    np.testing.assert_allclose(A, [[0.0, -5.0]], atol=1e-15)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), rank=st.integers(1, 5), count=st.integers(1, 5))
def test_it_is_never_further_from_the_sum_than_direct_merging(
    seed: int, rank: int, count: int
) -> None:
    """Methods, section 5: `‖L_MM − SVD_r(L_MM)‖ ≤ ‖L_MM − L_DM‖` for r ≥ rank(L_DM)."""
    case = collection((rank,) * count, seed=seed, d_out=9, d_in=8)
    parts = case.parts("layer.0")
    total = oracles.task_arithmetic(parts)
    merged = delta(merge(MmSvd(rank=rank), case)["layer.0"])
    distance = np.linalg.norm(total - merged)
    interference = np.linalg.norm(total - oracles.direct_merge(parts))
    assert distance <= interference + 1e-10 * np.linalg.norm(total)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_a_rank_above_that_of_the_sum_loses_nothing(case: Case) -> None:
    for path, encoding in merge(MmSvd(rank=1000), case).items():
        parts = case.parts(path)
        assert relative(delta(encoding), oracles.task_arithmetic(parts)) < 1e-10
        A, B = factors(encoding)
        total = sum(part[0].shape[0] for part in parts)
        assert A.shape[0] == B.shape[1] == min(total, B.shape[0], A.shape[1])


def test_a_tie_at_the_cut_keeps_the_singular_values_and_the_error() -> None:
    # diag(2, 2): every unit vector is a leading direction, the error is 2 for each of them.
    case = diagonal((2.0, 0.0), (0.0, 2.0))
    merged = delta(merge(MmSvd(rank=1), case)["m"])
    np.testing.assert_allclose(np.linalg.svd(merged)[1], [2.0, 0.0], atol=1e-14)
    assert np.linalg.norm(np.diag([2.0, 2.0]) - merged) == pytest.approx(2.0, rel=1e-14)


def test_a_sum_of_zero_adapters_is_zero_with_orthonormal_directions() -> None:
    _, B = factors(merge(MmSvd(rank=2), diagonal((0.0, 0.0), (0.0, 0.0)))["m"])
    np.testing.assert_allclose(B.T @ B, np.eye(2), atol=1e-14)
    np.testing.assert_array_equal(
        delta(merge(MmSvd(), diagonal((0.0, 0.0)))["m"]), np.zeros((2, 2))
    )


def test_adapters_that_cancel_leave_only_rounding() -> None:
    case = collection((4, 4))
    a = case.modules["layer.0"]["a"]
    minus = Factors(A=a.A, B=a.B, scaling=-a.scaling)
    merged = merge(MmSvd(rank=4), Case("", {"m": {"a": a, "b": minus}}))["m"]
    assert np.linalg.norm(delta(merged)) < 1e-13 * float(torch.linalg.norm(a.scaling * a.B @ a.A))


def test_the_default_rank_is_the_largest_of_the_adapters_that_have_the_module() -> None:
    case = collection((2, 5, 3), paths=("m.0", "m.1"))
    having = dict(case.modules["m.1"])
    del having["b"]
    merged = merge(MmSvd(), Case("", {"m.0": case.modules["m.0"], "m.1": having}))
    assert factors(merged["m.0"])[0].shape == (5, 11)
    assert factors(merged["m.1"])[0].shape == (3, 11)


@pytest.mark.parametrize("rank", [None, 1, 4, 12, 99])
def test_the_predicted_size_is_the_size(rank: int | None) -> None:
    case = collection((3, 4, 5))
    merger = MmSvd(rank=rank)
    predicted = merger.predict(case.stack().module(0).shape)
    assert predicted is not None
    assert predicted.total == stored_elements(merge(merger, case)["layer.0"])
    assert not predicted.at_most


def test_a_bound_on_the_inner_rank_is_a_bound_on_the_size() -> None:
    factors = collection((2,)).modules["layer.0"]["a"]
    case = Case("twice", {"layer.0": {"a": factors, "b": factors}})
    merger = MmSvd(rank=4, inner=Knots())
    predicted = merger.predict(case.stack().module(0).shape)
    assert predicted is not None
    assert predicted.at_most
    assert stored_elements(merge(merger, case)["layer.0"]) == predicted.total // 2


def test_inner_is_a_recipe_or_an_object() -> None:
    by_object = MmSvd(rank=2, inner=Average(absent="renormalise"))
    recipe = {"rank": 2, "inner": {"method": "average", "absent": "renormalise"}}
    assert MmSvd.model_validate(recipe) == by_object
    assert MmSvd().inner == TaskArithmetic()


@pytest.mark.parametrize("inner", [Rmm(), Truncate()], ids=lambda m: m.method)
def test_an_inner_rule_that_restores_is_refused_by_name(inner: Merger) -> None:
    with pytest.raises(ValidationError, match=f'"{inner.method}" restores the factors of every'):
        MmSvd(inner=inner)
    with pytest.raises(ValidationError, match="such as task_arithmetic, average or ties"):
        MmSvd(inner=inner)


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_over_a_dense_delta_it_is_its_truncated_svd(case: Case, rank: int) -> None:
    merged = merge(MmSvd(rank=rank, inner=ClippedSum()), case)
    for path, encoding in merge(ClippedSum(), case).items():
        whole = delta(encoding)
        expected = oracles.truncated(whole, rank)
        ours = merged[path]
        assert relative(delta(ours), expected, scale=float(np.linalg.norm(whole))) < 1e-10
        assert ours.facts["rank"] == min(rank, *whole.shape)
        lost = relative(expected, whole)
        assert ours.facts["truncation_error"] == pytest.approx(lost, abs=1e-12)


def test_over_a_large_dense_delta_it_is_its_truncated_svd() -> None:
    # Beyond the size up to which the kernel runs a full SVD.
    case = collection((4, 4, 4), d_out=300, d_in=270)
    whole = delta(merge(ClippedSum(), case)["layer.0"])
    for dtype, tolerance in TOLERANCE.items():
        ours = delta(merge(MmSvd(inner=ClippedSum()), case, dtype=dtype)["layer.0"])
        assert relative(ours, oracles.truncated(whole, 4)) < tolerance


@pytest.mark.parametrize("error", [0.5, 0.1, 1e-3, 0.0])
@pytest.mark.parametrize("inner", [TaskArithmetic(), ClippedSum()], ids=lambda m: m.method)
def test_an_error_bound_is_kept_with_the_fewest_ranks(inner: Merger, error: float) -> None:
    case = collection((6, 6, 6), spectrum="decaying", d_out=25, d_in=22)
    whole = delta(merge(inner, case)["layer.0"])
    encoding = merge(MmSvd(error=error, inner=inner), case)["layer.0"]
    A, _ = factors(encoding)
    if error > 0:
        assert A.shape[0] == oracles.rank_for_error(whole, error)
    assert encoding.facts["rank"] == A.shape[0]
    assert encoding.facts["truncation_error"] <= error + 1e-14
    assert relative(delta(encoding), whole) <= error + 1e-13


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("inner", [TaskArithmetic(), ClippedSum()], ids=lambda m: m.method)
def test_an_energy_is_kept_with_the_fewest_ranks(inner: Merger, energy: float) -> None:
    case = collection((6, 6, 6), spectrum="decaying", d_out=25, d_in=22)
    whole = delta(merge(inner, case)["layer.0"])
    merger = MmSvd(energy=energy, inner=inner)
    A, _ = factors(merge(merger, case)["layer.0"])
    assert A.shape[0] == oracles.rank_for_energy(whole, energy)
    assert merger.predict(case.stack().module(0).shape) is None


@pytest.mark.parametrize(
    "fields",
    [{"rank": 2, "energy": 0.5}, {"rank": 2, "error": 0.5}, {"energy": 0.5, "error": 0.5}],
)
def test_alternatives_are_refused_together(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="give at most one"):
        MmSvd.model_validate(fields)


def test_facts_of_the_inner_rule_are_kept() -> None:
    case = collection((4, 4), d_out=12, d_in=9)
    encoding = merge(MmSvd(rank=1, inner=MmSvd(rank=2, inner=ClippedSum())), case)["layer.0"]
    inner = merge(MmSvd(rank=2, inner=ClippedSum()), case)["layer.0"]
    assert inner.facts["clipped"] == 3.0
    assert encoding.facts["clipped"] == 3.0
    assert encoding.facts["rank"] == 1
    assert encoding.facts["inner_rank"] == 2
    assert encoding.facts["inner_truncation_error"] == inner.facts["truncation_error"]


@pytest.mark.parametrize("rank", [None, 1, 2, 4, 9])
@pytest.mark.parametrize("shape", [(14, 11), (4, 4), (6, 3)])
def test_over_a_delta_a_size_is_predicted_or_left_open(
    rank: int | None, shape: tuple[int, int]
) -> None:
    case = collection((3, 3), d_out=shape[0], d_in=shape[1])
    merger = MmSvd(rank=rank, inner=ClippedSum())
    predicted = merger.predict(case.stack().module(0).shape)
    stored = stored_elements(merge(merger, case)["layer.0"])
    # A delta of 4 × 4 is as large as factors of rank 2: the elements do not tell which.
    ambiguous = shape in ((4, 4), (6, 3)) and min(rank or 3, *shape) > 2
    assert (predicted is None) == ambiguous
    assert predicted is None or predicted.total == stored


def test_claims_are_those_of_the_inner_rule() -> None:
    assert not MmSvd(inner=ClippedSum()).capabilities.gauge_invariant
    for inner in (TaskArithmetic(), Average()):
        ours, theirs = MmSvd(inner=inner).capabilities, inner.capabilities
        assert ours.gauge_invariant == theirs.gauge_invariant
        assert ours.mixed_ranks == theirs.mixed_ranks
    assert MmSvd(inner=ClippedSum()).lossless() is None


def test_without_losses_one_adapter_gives_itself() -> None:
    merger = MmSvd(rank=1, split="B", inner=_Lossless())
    lossless = merger.lossless()
    assert lossless == MmSvd(split="B", inner=TaskArithmetic())
    case = collection((4,))
    [part] = case.parts("layer.0")
    assert relative(delta(merge(lossless, case)["layer.0"]), oracles.dense(part)) < 1e-13


class _Lossless(TaskArithmetic, frozen=True):
    """Task arithmetic that names its lossless settings."""

    method = "test.lossless"

    def lossless(self) -> Merger:
        return TaskArithmetic()


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 2.5}, "rank"),
        ({"split": "C"}, "split"),
        ({"inner": 3}, "inner"),
        ({"inner": {"method": "average", "absnt": "zero"}}, r"inner\.absnt"),
        ({"ranks": 2}, "ranks"),
    ],
)
def test_a_wrong_field_is_refused(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError, match=rf"(?m)^{where}$"):
        MmSvd.model_validate(fields)


class _Liar(Merger, frozen=True):
    """Declares one merged result, returns what restores every adapter."""

    method = "test.liar"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities()

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Result]:
        return Rmm().merge(stack, context)


def test_an_inner_rule_that_breaks_its_word_is_named() -> None:
    with pytest.raises(CapabilityError, match=r'"test\.liar" returned "affine_basis"'):
        merge(MmSvd(inner=_Liar()), collection())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_factor_that_is_not_finite_is_refused(value: float, side: str) -> None:
    case = collection()
    getattr(case.modules["layer.0"]["b"], side)[1, 1] = value
    with pytest.raises(NonFiniteError, match="not finite"):
        merge(MmSvd(), case)


def test_weights_that_overflow_are_refused() -> None:
    case = collection((2, 2), scalings=(1e300, 1.0), weights=(1e300, 1.0))
    with pytest.raises(NonFiniteError, match="check weights and scalings"):
        merge(MmSvd(), case)
