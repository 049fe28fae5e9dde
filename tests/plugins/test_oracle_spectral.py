"""MM-SVD, TSV-M, Iso-C and LoRE against full dense SVDs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import oracles
from oracles.compare import (
    TOLERANCE,
    assert_close,
    build,
    dense_delta,
    equal_weights,
    in_each_dtype,
)
from stacks import ALL_CASES, Case, collection, merge
from unmerge_bundle.encodings import FactorsEncoding

SUM = {"method": "task_arithmetic"}


def size(case: Case, path: str) -> float:
    """Return `Σ |w_i| ‖Δ_i‖`: what cancellation makes a rounding error relative to."""
    return float(sum(abs(p[3]) * np.linalg.norm(oracles.dense(p)) for p in case.parts(path)))


def summed(case: Case, path: str) -> oracles.Matrix:
    return oracles.task_arithmetic(case.parts(path))


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_mm_svd_keeps_the_largest_rank(case: Case) -> None:
    for dtype, path, encoding in in_each_dtype(build("mm_svd", inner=SUM), case):
        rank = max(f.rank for f in case.modules[path].values())
        wanted = oracles.truncated(summed(case, path), rank)
        assert_close(dense_delta(encoding), wanted, TOLERANCE[dtype], scale=size(case, path))


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_mm_svd_by_energy_and_by_error(case: Case) -> None:
    for field, choose, bounds in (
        ("energy", oracles.rank_for_energy, (0.5, 0.9, 0.999)),
        ("error", oracles.rank_for_error, (0.7, 0.2, 0.01)),
    ):
        for bound in bounds:
            merger = build("mm_svd", inner=SUM, **{field: bound})
            for dtype, path, encoding in in_each_dtype(merger, case):
                total = summed(case, path)
                rank = choose(total, bound)
                assert isinstance(encoding, FactorsEncoding)
                assert encoding.A.shape[0] == max(rank, 1), (path, field, bound)
                wanted = oracles.truncated(total, rank)
                assert_close(
                    dense_delta(encoding), wanted, TOLERANCE[dtype], scale=size(case, path)
                )


@pytest.mark.parametrize("split", ["A", "B", "balanced"])
def test_mm_svd_splits_the_singular_values(split: str) -> None:
    case = collection((4, 4))
    encoding = merge(build("mm_svd", rank=3, split=split, inner=SUM), case)["layer.0"]
    assert isinstance(encoding, FactorsEncoding)
    wanted = oracles.mm_svd(case.parts("layer.0"), 3, split=split)
    got_A, got_B = encoding.A.double().numpy(), encoding.B.double().numpy()
    # Up to the sign of each singular pair.
    assert_close(np.abs(got_A), np.abs(wanted.A), 1e-10)
    assert_close(np.abs(got_B), np.abs(wanted.B), 1e-10)


@pytest.mark.parametrize(
    "inner",
    [{"method": "ties", "density": 0.5}, {"method": "magnitude_prune", "density": 0.3}],
    ids=lambda inner: inner["method"],
)
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_mm_svd_of_a_dense_rule(case: Case, inner: dict[str, Any]) -> None:
    """The inner rule has its own oracle; here it is only cut to the rank."""
    dense = merge(build(**inner), case)
    for path, encoding in merge(build("mm_svd", rank=3, inner=inner), case).items():
        full = dense_delta(dense[path])
        # A gap in the spectrum, or the leading directions are not determined.
        S = np.linalg.svd(full, compute_uv=False)
        gap = S[2] - S[3] if S.size > 3 else 1.0
        if gap > 1e-3 * S[0]:
            assert_close(dense_delta(encoding), oracles.truncated(full, 3), 1e-9)
        assert (
            np.linalg.norm(full - dense_delta(encoding))
            <= (1 + 1e-9) * np.linalg.norm(S[3:]) + 1e-12
        )


@pytest.mark.parametrize("rank", [None, 1, 2])
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_tsv(case: Case, rank: int | None) -> None:
    for dtype, path, encoding in in_each_dtype(build("tsv", rank=rank, scale=0.7), case):
        wanted = oracles.tsv(case.parts(path), rank=rank, scale=0.7)
        assert_close(dense_delta(encoding), wanted, TOLERANCE[dtype], scale=size(case, path))


@pytest.mark.parametrize("method", ["tsv", "iso_c"])
def test_an_absent_adapter_does_not_count_when_renormalised(method: str) -> None:
    case = next(case for case in ALL_CASES if case.name == "missing modules")
    everyone = [case.weight(name) for name in case.adapters]
    for path, encoding in merge(build(method, absent="renormalise"), case).items():
        parts = oracles.renormalised(case.parts(path), everyone)
        wanted = oracles.tsv(parts) if method == "tsv" else oracles.iso_c(parts)
        assert_close(dense_delta(encoding), wanted, 1e-10)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_iso_c(case: Case) -> None:
    for dtype, path, encoding in in_each_dtype(build("iso_c", scale=0.7), case):
        wanted = oracles.iso_c(case.parts(path), scale=0.7)
        assert_close(dense_delta(encoding), wanted, 10 * TOLERANCE[dtype], scale=size(case, path))


def test_iso_c_has_equal_singular_values() -> None:
    case = collection((3, 4))
    got = dense_delta(merge(build("iso_c"), case)["layer.0"])
    S = np.linalg.svd(got, compute_uv=False)
    mean = np.linalg.svd(summed(case, "layer.0"), compute_uv=False)[:7].mean()
    np.testing.assert_allclose(S[:7], mean, rtol=1e-10)
    assert S[7] < 1e-10


LORE_FIELDS: tuple[dict[str, Any], ...] = (
    {},
    {"finish": "mean", "scale": 0.5},
    {"rank_ratio": 0.2, "warmup": 2},
    {"rank_ratio": 0.3},
)


@pytest.mark.parametrize("fields", LORE_FIELDS, ids=str)
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_lore(case: Case, fields: dict[str, Any]) -> None:
    """Equal numbers of rounds: which quantity the tolerance is measured on is not compared."""
    case = equal_weights(case)
    for iterations, share in ((1, 0.3), (5, 0.05)):
        mu = share * max(
            float(np.linalg.norm(oracles.dense(p), 2))
            for path in case.modules
            for p in case.parts(path)
        )
        merger = build(
            "lore", mu=mu, tolerance=1e-300, max_iterations=iterations, absent="zero", **fields
        )
        for dtype, path, encoding in in_each_dtype(merger, case):
            parts = case.parts(path, absent_as_zero=True)
            wanted = oracles.lore(parts, mu=mu, iterations=iterations, **fields)
            assert_close(dense_delta(encoding), wanted, TOLERANCE[dtype], scale=size(case, path))


def test_lore_renormalised_leaves_an_absent_adapter_out() -> None:
    case = equal_weights(next(case for case in ALL_CASES if case.name == "missing modules"))
    merger = build("lore", mu=3.0, tolerance=1e-300, max_iterations=3, absent="renormalise")
    for path, encoding in merge(merger, case).items():
        wanted = oracles.lore(case.parts(path), mu=3.0, iterations=3)
        assert_close(dense_delta(encoding), wanted, 1e-10)


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_lore_finished_by_ties(density: float) -> None:
    for case in (collection((4, 4, 4)), collection((3, 3), d_out=6, d_in=9, seed=5)):
        merger = build(
            "lore", mu=2.0, tolerance=1e-300, max_iterations=4, finish="ties", density=density
        )
        parts = case.parts("layer.0")
        wanted = oracles.lore(parts, mu=2.0, iterations=4, finish="ties", density=density)
        assert_close(dense_delta(merge(merger, case)["layer.0"]), wanted, 1e-9)


def test_lore_at_the_ends_of_mu() -> None:
    """μ → ∞ is the plain average; where every θ_i is the same, so is the result, whatever μ."""
    case = equal_weights(collection((4, 4, 4)))
    parts = case.parts("layer.0")
    got = dense_delta(merge(build("lore", mu=1e9), case)["layer.0"])
    assert_close(got, oracles.average(parts), 1e-10)
    same = Case("same", {"m": dict.fromkeys("abc", case.modules["layer.0"]["a"])})
    assert_close(
        dense_delta(merge(build("lore", mu=0.1), same)["m"]), oracles.dense(parts[0]), 1e-10
    )


def test_lore_descends_its_objective() -> None:
    """The oracle's own iteration never rises, and ends where the strategy does."""
    case = equal_weights(collection((4, 4, 4)))
    thetas = [oracles.dense(p) for p in case.parts("layer.0")]
    mu = 5.0
    objectives = [
        oracles.low_rank_estimate(thetas, mu, n).objective(thetas, mu) for n in range(1, 40)
    ]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(objectives))
    far = oracles.lore(case.parts("layer.0"), mu=mu, iterations=400)
    merger = build("lore", mu=mu, tolerance=1e-12, max_iterations=5000)
    assert_close(dense_delta(merge(merger, case)["layer.0"]), far, 1e-7)


def test_lore_scales_with_the_adapters_when_mu_is_relative() -> None:
    """Relative μ has no unit: adapters four times as large merge to four times the result."""
    case = collection((4, 4, 4))
    merger = build("lore", mu=0.2, mu_unit="relative", max_iterations=5, tolerance=1e-300)
    larger = collection((4, 4, 4), scalings=(8.0, 8.0, 8.0))
    got, scaled = (dense_delta(merge(merger, c)["layer.0"]) for c in (case, larger))
    assert_close(scaled, 4 * got, 1e-10)
