"""Joint decompositions: exactness, optimality against the dense oracle and hand-made families."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import oracles
from unmerge.kernels.joint import Joint, diagonal_cores, joint_bases, joint_rank_ones


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def full_error(matrices: torch.Tensor, joint: Joint) -> float:
    X, Y = joint.left, joint.right
    return float((matrices - X @ (X.T @ matrices @ Y) @ Y.T).norm() / matrices.norm())


def diagonal_error(matrices: torch.Tensor, joint: Joint) -> float:
    cores = diagonal_cores(matrices, joint.left, joint.right)
    return float(
        (matrices - (joint.left * cores[:, None, :]) @ joint.right.T).norm() / matrices.norm()
    )


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_bases_are_as_good_as_those_of_the_dense_oracle(rank: int) -> None:
    matrices = normal(5, 9, 7)
    joint = joint_bases(matrices, rank, tolerance=1e-14, max_iterations=5000)
    wanted = oracles.joint_full([m.numpy() for m in matrices], rank, 3000)
    error = np.sqrt(wanted.squared_error([m.numpy() for m in matrices])) / float(matrices.norm())
    assert joint.converged
    assert full_error(matrices, joint) == pytest.approx(error, rel=1e-6)
    for basis in (joint.left, joint.right):
        np.testing.assert_allclose((basis.T @ basis).numpy(), np.eye(rank), atol=1e-13)


def test_neither_basis_can_be_improved_alone() -> None:
    matrices = normal(5, 9, 7)
    joint = joint_bases(matrices, 3, tolerance=0.0, max_iterations=3000)
    captured = float((joint.left.T @ matrices @ joint.right).square().sum())
    through = torch.cat(list(matrices @ joint.right), dim=1)
    best = float(torch.linalg.svdvals(through)[:3].square().sum())
    assert captured == pytest.approx(best, rel=1e-10)


def test_the_error_never_rises() -> None:
    matrices = normal(5, 9, 7)
    errors = [
        full_error(matrices, joint_bases(matrices, 2, tolerance=0.0, max_iterations=n))
        for n in range(1, 15)
    ]
    assert all(b <= a + 1e-14 for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("small", [1e-3, 1e-9])
def test_a_shared_subspace_is_found_however_weak_a_direction_is(small: float) -> None:
    """Bases of 3 directions, one of size `small`: a Gram matrix would lose it at 1e-9."""
    left, right = torch.linalg.qr(normal(9, 3)).Q, torch.linalg.qr(normal(7, 3, seed=1)).Q
    scale = torch.tensor([1.0, 1.0, small], dtype=torch.float64)
    matrices = left @ (scale[:, None] * normal(4, 3, 3, seed=2) * scale) @ right.T
    joint = joint_bases(matrices, 3, tolerance=1e-12, max_iterations=50)
    assert full_error(matrices, joint) < 1e-14


def test_a_basis_larger_than_the_space_is_the_space() -> None:
    joint = joint_bases(normal(3, 4, 2), 10, tolerance=1e-9, max_iterations=5)
    assert joint.left.shape == (4, 4)
    assert joint.right.shape == (2, 2)
    assert (joint.iterations, joint.converged) == (1, True)
    assert full_error(normal(3, 4, 2), joint) < 1e-14


def test_a_basis_larger_than_what_there_is_to_span_is_completed() -> None:
    joint = joint_bases(normal(1, 4, 2), 3, tolerance=1e-9, max_iterations=5)
    assert joint.left.shape == (4, 3)
    np.testing.assert_allclose((joint.left.T @ joint.left).numpy(), np.eye(3), atol=1e-14)
    assert full_error(normal(1, 4, 2), joint) < 1e-14


def test_jointly_diagonal_matrices_are_found_exactly() -> None:
    """`X diag(c_i) Yᵀ` with three general directions: no orthonormal bases of size 3 are needed."""
    X, Y = normal(6, 3), normal(5, 3, seed=1)
    matrices = (X * normal(8, 3, seed=2)[:, None, :]) @ Y.T
    joint = joint_rank_ones(matrices, 3, tolerance=0.0, max_iterations=500)
    assert diagonal_error(matrices, joint) < 1e-7
    for columns in (joint.left, joint.right):
        np.testing.assert_allclose(columns.norm(dim=0).numpy(), 1.0, rtol=1e-12)


def test_as_many_directions_as_the_matrices_have_lose_nothing() -> None:
    matrices = torch.stack([normal(6, 2, seed=n) @ normal(2, 5, seed=n + 50) for n in range(3)])
    for rank in (6, 15):  # the rest of the fifteen candidates have no size
        joint = joint_rank_ones(matrices, rank, tolerance=1e-9, max_iterations=50)
        assert diagonal_error(matrices, joint) < 1e-13
        assert (joint.iterations, joint.converged) == (1, True)
        # None is taken twice, not even among those without size.
        likeness = ((joint.left.T @ joint.left) * (joint.right.T @ joint.right)).abs()
        assert float((likeness - torch.eye(rank)).max()) < 0.999


def test_a_direction_given_twice_is_taken_once() -> None:
    one, other = (normal(6, 2, seed=n) @ normal(2, 5, seed=n + 50) for n in (1, 2))
    joint = joint_rank_ones(
        torch.stack([one, one, other, one]), 4, tolerance=1e-9, max_iterations=50
    )
    assert diagonal_error(torch.stack([one, one, other, one]), joint) < 1e-13


def test_alternating_improves_on_where_it_starts() -> None:
    matrices = normal(6, 5, 5)
    first, last = (
        diagonal_error(matrices, joint_rank_ones(matrices, 4, tolerance=0.0, max_iterations=n))
        for n in (1, 60)
    )
    assert last < 0.98 * first
    stopped = joint_rank_ones(matrices, 4, tolerance=0.0, max_iterations=3)
    assert (stopped.iterations, stopped.converged) == (3, False)


def test_diagonal_cores_solve_the_least_squares_problem() -> None:
    X, Y, matrices = normal(6, 3), normal(5, 3, seed=1), normal(4, 6, 5, seed=2)
    X, Y = X / X.norm(dim=0), Y / Y.norm(dim=0)
    products = np.stack([np.outer(X[:, k], Y[:, k]).reshape(-1) for k in range(3)], axis=1)
    wanted = np.linalg.lstsq(products, matrices.reshape(4, -1).T.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(diagonal_cores(matrices, X, Y).numpy(), wanted, atol=1e-12)


def test_directions_that_are_nearly_parallel_are_told_apart() -> None:
    X = torch.tensor([[1.0, 1.0], [0.0, 1e-5]], dtype=torch.float64)
    Y = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    X = X / X.norm(dim=0)
    cores = torch.tensor([[3.0, -2.0]], dtype=torch.float64)
    matrices = (X * cores[:, None, :]) @ Y.T
    np.testing.assert_allclose(diagonal_cores(matrices, X, Y), cores, rtol=1e-9)


def test_zeros_and_single_entries_are_fine() -> None:
    zeros = torch.zeros(2, 3, 4, dtype=torch.float64)
    for find in (joint_bases, joint_rank_ones):
        joint = find(zeros, 2, tolerance=1e-9, max_iterations=5)
        assert joint.converged
        assert bool(torch.isfinite(joint.left).all())
    one = joint_rank_ones(normal(3, 1, 2), 3, tolerance=1e-9, max_iterations=5)
    assert diagonal_error(normal(3, 1, 2), one) < 1e-14
