"""Cores against the dense deltas they stand for: products, inner products, ranks, edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracles
from stacks import ALL_CASES, Case, collection, random_factors, relative
from unmerge.adapter import Factors
from unmerge.errors import NonFiniteError
from unmerge.kernels.cores import compact, core_stack, numerical_rank
from unmerge.kernels.lowrank import svd_of_product


def having(case: Case) -> list[Factors]:
    return list(next(iter(case.stack())).factors)


def deltas(case: Case) -> list[oracles.Matrix]:
    return [oracles.dense((f.A.numpy(), f.B.numpy(), f.scaling, 1.0)) for f in having(case)]


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_every_delta_comes_back_from_its_core(case: Case) -> None:
    frame = core_stack(having(case))
    scale = max(float(np.linalg.norm(delta)) for delta in deltas(case))
    for core, delta in zip(frame.cores, deltas(case), strict=True):
        A, B = frame.factors(core)
        assert relative((B @ A).numpy(), delta, scale=scale) < 1e-13


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_the_cores_are_as_small_as_the_ranks_allow(case: Case) -> None:
    factors = having(case)
    total = sum(f.rank for f in factors)
    expected = (len(factors), min(total, factors[0].d_out), min(total, factors[0].d_in))
    frame = core_stack(factors)
    assert tuple(frame.cores.shape) == expected
    assert frame.cores.dtype == torch.float64


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_sums_and_singular_values_are_those_of_the_deltas(case: Case) -> None:
    frame = core_stack(having(case))
    total = np.sum(deltas(case), axis=0)
    scale = sum(float(np.linalg.norm(delta)) for delta in deltas(case))
    core = frame.cores.sum(dim=0)
    A, B = frame.factors(core)
    assert relative((B @ A).numpy(), total, scale=scale) < 1e-13
    kept = min(core.shape)
    got = torch.linalg.svdvals(core).numpy()
    np.testing.assert_allclose(
        got, np.linalg.svd(total, compute_uv=False)[:kept], rtol=1e-11, atol=1e-13 * scale
    )


def test_factors_have_the_numerical_rank_and_fixed_signs() -> None:
    f = random_factors(3, rank=2, d_out=9, d_in=7)
    frame = core_stack([f, f, random_factors(4, rank=3, d_out=9, d_in=7)])
    A, B = frame.factors(frame.cores[0])
    assert A.shape == (2, 7)
    assert B.shape == (9, 2)
    # Balanced: A and B share the singular values evenly.
    np.testing.assert_allclose((A @ A.T).numpy(), (B.T @ B).numpy(), atol=1e-12)
    peaks = B.gather(0, B.abs().argmax(dim=0, keepdim=True))
    assert bool((peaks > 0).all())


def test_a_zero_core_keeps_one_zero_direction() -> None:
    frame = core_stack([random_factors(5, rank=2, d_out=6, d_in=5)])
    A, B = frame.factors(torch.zeros_like(frame.cores[0]))
    assert A.shape == (1, 5)
    assert B.shape == (6, 1)
    assert float((B @ A).abs().max()) == 0.0


@pytest.mark.parametrize(
    ("values", "cutoff", "rank"),
    [
        ([4.0, 2.0, 1e-17], None, 2),
        ([4.0, 2.0, 1e-9], None, 3),
        ([4.0, 2.0, 1e-9], 1e-7, 2),
        ([0.0, 0.0], None, 0),
        ([0.0, 0.0], 1e-7, 0),
        ([], None, 0),
    ],
)
def test_numerical_rank(values: list[float], cutoff: float | None, rank: int) -> None:
    assert numerical_rank(torch.tensor(values, dtype=torch.float64), cutoff) == rank


def test_compact_keeps_the_leading_directions_and_the_spectrum() -> None:
    f = random_factors(6, rank=4, d_out=8, d_in=8)
    svd = svd_of_product(f.B, f.A, 4)
    two = compact(svd, 2)
    assert torch.equal(two.S, svd.S[:2])
    assert two.U.shape == (8, 2)
    assert two.Vh.shape == (2, 8)
    assert torch.equal(two.spectrum, svd.spectrum)
    assert compact(svd, 0).S.shape == (1,)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["A", "B"])
def test_what_is_not_finite_is_refused(value: float, side: str) -> None:
    factors = having(collection())
    getattr(factors[1], side)[0, 0] = value
    with pytest.raises(NonFiniteError, match="a delta is not finite"):
        core_stack(factors)
