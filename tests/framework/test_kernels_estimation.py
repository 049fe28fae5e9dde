"""Singular-value thresholding and low-rank estimation: closed forms, laws, and the dense oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import oracles
from unmerge.errors import NonFiniteError
from unmerge.kernels.estimation import low_rank_estimation, svt


def matrices(count: int = 4, a: int = 9, b: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, a, b, generator=generator, dtype=torch.float64)


def orthonormal(size: int, columns: int, seed: int) -> torch.Tensor:
    Q: torch.Tensor = torch.linalg.qr(matrices(1, size, columns, seed)[0]).Q
    return Q


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mu", [1e-6, 0.3, 2.0])  # the first through the SVD, the others not
def test_svt_is_that_of_the_dense_svd(mu: float, transposed: bool) -> None:
    values = matrices().mT.contiguous() if transposed else matrices()
    result = svt(values, mu)
    for n, matrix in enumerate(values):
        expected = oracles.svt(matrix.numpy(), mu)
        assert np.linalg.norm(result.matrices[n].numpy() - expected) < 1e-13 * 10
        left = np.maximum(np.linalg.svd(matrix.numpy(), compute_uv=False) - mu, 0)
        assert float(result.nuclear_norms[n]) == pytest.approx(left.sum(), rel=1e-12)
        assert int(result.ranks[n]) == (left > 0).sum()


def test_both_ways_of_thresholding_agree_where_they_meet() -> None:
    """A spectrum of 1 to 1e-4 with a threshold in its midst, just above and below the switch."""
    left, right = orthonormal(9, 6, 1), orthonormal(7, 6, 2)
    sigma = torch.logspace(0, -4, 6, dtype=torch.float64)
    values = ((left * sigma) @ right.T)[None]
    for mu in (5e-4, 2e-3):
        shrunk = (left * (sigma - mu).clamp(min=0)) @ right.T
        assert float((svt(values, mu).matrices[0] - shrunk).norm()) < 1e-12


def test_a_threshold_too_small_for_gram_matrices_is_exact() -> None:
    """σ = 1 and 2e-7 at μ = 1e-7: the square of the second is lost beside that of the first."""
    left, right = orthonormal(9, 2, 1), orthonormal(7, 2, 2)
    sigma = torch.tensor([1.0, 2e-7], dtype=torch.float64)
    values = ((left * sigma) @ right.T)[None]
    shrunk = (left * (sigma - 1e-7)) @ right.T
    assert float((svt(values, 1e-7).matrices[0] - shrunk).norm()) < 1e-14


def test_svt_by_hand() -> None:
    values = torch.diag(torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64))[None]
    assert torch.allclose(svt(values, 1.0).matrices[0].diagonal(), values.new_tensor([2, -1, 0]))
    capped = svt(values, 1.0, max_rank=1)
    assert torch.allclose(capped.matrices[0].diagonal(), values.new_tensor([2, 0, 0]))
    assert capped.ranks.tolist() == [1]
    assert capped.nuclear_norms.tolist() == pytest.approx([2.0])
    without = svt(values, 0.0, max_rank=2)
    assert torch.allclose(without.matrices[0].diagonal(), values.new_tensor([3, -2, 0]))


def test_svt_of_zero_is_the_identity_bit_for_bit() -> None:
    assert torch.equal(svt(matrices(), 0.0).matrices, matrices())


def test_svt_of_zeros_is_zero() -> None:
    for mu in (0.0, 0.5):
        result = svt(torch.zeros(2, 4, 3, dtype=torch.float64), mu)
        assert float(result.matrices.abs().max()) == 0.0
        assert result.ranks.tolist() == [0, 0]


def test_float32_keeps_its_dtype_and_precision() -> None:
    expected = svt(matrices(), 0.3).matrices
    got = svt(matrices().float(), 0.3).matrices
    assert got.dtype == torch.float32
    assert distance(got.double(), expected) < 1e-6


@pytest.mark.parametrize("mu", [0.02, 0.4, 2.0])
@pytest.mark.parametrize("iterations", [1, 2, 25])
def test_the_iteration_is_algorithm_1(mu: float, iterations: int) -> None:
    thetas = matrices()
    got = low_rank_estimation(thetas, [1.0] * 4, mu=mu, tolerance=0.0, max_iterations=iterations)
    expected = oracles.low_rank_estimate([t.numpy() for t in thetas], mu, iterations)
    assert np.linalg.norm(got.base.numpy() - expected.base) < 1e-12
    for delta, wanted in zip(got.deltas, expected.deltas, strict=True):
        assert np.linalg.norm(delta.numpy() - wanted) < 1e-12
    objective = expected.objective([t.numpy() for t in thetas], mu)
    assert got.objective == pytest.approx(objective, rel=1e-10)


def test_the_objective_never_rises() -> None:
    objectives = [
        low_rank_estimation(
            matrices(), [1.0, 2.0, 0.5, 3.0], mu=0.5, tolerance=0.0, max_iterations=n
        ).objective
        for n in range(1, 30)
    ]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(objectives))


def test_it_ends_in_a_fixed_point() -> None:
    thetas = matrices()
    got = low_rank_estimation(thetas, [1.0] * 4, mu=0.5, tolerance=1e-12, max_iterations=5000)
    assert got.converged
    again = svt(thetas - (thetas - got.deltas).mean(dim=0), 0.5).matrices
    assert distance(again, got.deltas) < 1e-10


def test_dense_matrices_and_cores_are_one_iteration() -> None:
    left, right = orthonormal(40, 9, 1), orthonormal(30, 6, 2)
    small = low_rank_estimation(matrices(), [1.0] * 4, mu=0.3, max_iterations=20)
    large = low_rank_estimation(left @ matrices() @ right.T, [1.0] * 4, mu=0.3, max_iterations=20)
    assert distance(large.base, left @ small.base @ right.T) < 1e-12
    assert distance(large.deltas, left @ small.deltas @ right.T) < 1e-12
    assert small.iterations == large.iterations
    assert small.ranks == large.ranks


def test_what_all_share_passes_through_the_base() -> None:
    """A base model a thousand times the deltas: the rests are the same, no digit is lost to it."""
    shared = 1e3 * matrices(1, seed=9)[0]
    plain = low_rank_estimation(matrices(), [1.0] * 4, mu=0.3, max_iterations=20)
    full = low_rank_estimation(matrices() + shared, [1.0] * 4, mu=0.3, max_iterations=20)
    assert distance(full.deltas, plain.deltas) < 1e-12
    assert distance(full.base, plain.base + shared) < 1e-13
    assert full.iterations == plain.iterations


def test_a_weight_is_a_number_of_copies() -> None:
    thetas = matrices()
    repeated = torch.cat([thetas, thetas[:1], thetas[:1]])
    weighted = low_rank_estimation(thetas, [3.0, 1.0, 1.0, 1.0], mu=0.4, max_iterations=40)
    copies = low_rank_estimation(repeated, [1.0] * 6, mu=0.4, max_iterations=40)
    assert distance(weighted.base, copies.base) < 1e-12
    assert distance(weighted.deltas, copies.deltas[:4]) < 1e-12
    assert weighted.iterations == copies.iterations
    assert weighted.objective == pytest.approx(copies.objective, rel=1e-12)


def test_a_weight_of_zero_is_no_matrix() -> None:
    some = low_rank_estimation(matrices(), [1.0, 0.0, 2.0, 0.0], mu=0.4, max_iterations=40)
    rest = low_rank_estimation(matrices()[[0, 2]], [1.0, 2.0], mu=0.4, max_iterations=40)
    assert distance(some.base, rest.base) < 1e-12


def test_without_a_threshold_the_base_is_the_mean() -> None:
    got = low_rank_estimation(matrices(), [1.0] * 4, mu=0.0)
    assert got.converged
    assert distance(got.base, matrices().mean(dim=0)) < 1e-13
    assert distance(got.deltas, matrices() - matrices().mean(dim=0)) < 1e-13


@pytest.mark.parametrize(("mu", "relative"), [(1e9, False), (1.0 + 1e-12, True), (50.0, True)])
def test_a_large_threshold_leaves_the_plain_average(mu: float, relative: bool) -> None:
    weights = [1.0, 2.0, 0.0, 1.0]
    got = low_rank_estimation(matrices(), weights, mu=mu, relative=relative)
    mean = torch.einsum("n,nab->ab", matrices().new_tensor(weights), matrices()) / 4
    assert distance(got.base, mean) < 1e-13
    assert got.ranks == (0, 0, 0, 0)
    assert (got.iterations, got.converged, got.change) == (1, True, 0.0)


def test_a_relative_threshold_is_a_fraction_of_the_largest_difference() -> None:
    thetas = matrices()
    largest = float(torch.linalg.matrix_norm(thetas - thetas.mean(dim=0), ord=2).max())
    relative = low_rank_estimation(thetas, [1.0] * 4, mu=0.1, relative=True, max_iterations=9)
    absolute = low_rank_estimation(thetas, [1.0] * 4, mu=0.1 * largest, max_iterations=9)
    assert relative.mu == pytest.approx(0.1 * largest, rel=1e-13)
    assert distance(relative.deltas, absolute.deltas) < 1e-12


@pytest.mark.parametrize("factor", [2.0**-600, 2.0**-20, 2.0**500])
def test_sizes_far_from_one_cost_no_digits(factor: float) -> None:
    plain = low_rank_estimation(matrices(), [1.0] * 4, mu=0.25, max_iterations=9)
    scaled = low_rank_estimation(matrices() * factor, [1.0] * 4, mu=0.25 * factor, max_iterations=9)
    assert torch.equal(scaled.deltas, plain.deltas * factor)
    assert scaled.iterations == plain.iterations


def test_one_matrix_or_equal_ones_have_no_rest() -> None:
    for count in (1, 3):
        got = low_rank_estimation(matrices(1).expand(count, -1, -1), [1.0] * count, mu=0.1)
        assert distance(got.base, matrices(1)[0]) < 1e-14
        assert float(got.deltas.abs().max()) < 1e-14


def test_ranks_are_capped_after_the_warm_up() -> None:
    def run(iterations: int) -> tuple[int, ...]:
        return low_rank_estimation(
            matrices(),
            [1.0] * 4,
            mu=0.01,
            tolerance=1e6,
            max_iterations=iterations,
            warmup=3,
            max_rank=2,
        ).ranks

    assert min(run(3)) > 2
    # The tolerance is met from the first iteration on, but nothing stops before the cap holds.
    assert run(50) == (2, 2, 2, 2)


def test_where_it_stops_is_said() -> None:
    stopped = low_rank_estimation(matrices(), [1.0] * 4, mu=0.01, max_iterations=3)
    assert (stopped.iterations, stopped.converged) == (3, False)
    assert stopped.change > 1e-6
    finished = low_rank_estimation(matrices(), [1.0] * 4, mu=0.5, tolerance=1e-3)
    assert finished.converged
    assert finished.change <= 1e-3
    one_less = low_rank_estimation(
        matrices(), [1.0] * 4, mu=0.5, tolerance=1e-3, max_iterations=finished.iterations - 1
    )
    assert not one_less.converged


def test_what_is_not_finite_is_refused() -> None:
    thetas = matrices()
    thetas[1, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite"):
        low_rank_estimation(thetas, [1.0] * 4, mu=0.1)
