"""The shared basis of matrices side by side: against the SVD, its signs, its exact zeros."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unmerge.errors import NonFiniteError
from unmerge.kernels.alignment import shared_basis


def gaussian(*shapes: tuple[int, int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def orthogonal(size: int, seed: int) -> torch.Tensor:
    [square] = gaussian((size, size), seed=seed)
    Q: torch.Tensor = torch.linalg.qr(square).Q
    return Q


@pytest.mark.parametrize("d", [40, 9, 5], ids=["tall", "square", "wide"])
def test_it_is_the_left_side_of_the_svd(d: int) -> None:
    matrices = gaussian((d, 3), (d, 4), (d, 2))
    basis = shared_basis(matrices, 1e-7)
    U, S, _ = np.linalg.svd(torch.cat(matrices, dim=1).numpy(), full_matrices=False)
    k = min(d, 9)
    np.testing.assert_allclose(basis.S.numpy(), S, rtol=1e-13)
    np.testing.assert_allclose(np.abs(U.T @ basis.U.numpy()), np.eye(k), atol=1e-12)
    np.testing.assert_allclose((basis.U.T @ basis.U).numpy(), np.eye(k), atol=1e-13)
    for matrix, block in zip(matrices, basis.blocks, strict=True):
        np.testing.assert_allclose((basis.U @ block).numpy(), matrix.numpy(), atol=1e-13)
        np.testing.assert_allclose(block.numpy(), (basis.U.T @ matrix).numpy(), atol=1e-13)


def test_the_entry_of_largest_magnitude_is_positive() -> None:
    basis = shared_basis(gaussian((30, 4), (30, 5)), 1e-7)
    for column in basis.U.T:
        assert column[column.abs().argmax()] > 0


@pytest.mark.parametrize("scale", [1.0, -1.0, 1e-12, 1e12])
def test_signs_and_size_of_the_input_do_not_turn_the_basis(scale: float) -> None:
    matrices = gaussian((30, 4), (30, 5))
    first, other = (shared_basis([c * m for m in matrices], 1e-7) for c in (1.0, scale))
    np.testing.assert_allclose(other.U.numpy(), first.U.numpy(), atol=1e-12)
    np.testing.assert_allclose(other.S.numpy(), abs(scale) * first.S.numpy(), rtol=1e-12)


def test_an_orthogonal_matrix_on_the_right_turns_its_block_only() -> None:
    matrices = gaussian((30, 4), (30, 5))
    Q = orthogonal(5, seed=9)
    first, other = shared_basis(matrices, 1e-7), shared_basis([matrices[0], matrices[1] @ Q], 1e-7)
    np.testing.assert_allclose(other.U.numpy(), first.U.numpy(), atol=1e-12)
    np.testing.assert_allclose(other.blocks[0].numpy(), first.blocks[0].numpy(), atol=1e-12)
    np.testing.assert_allclose(other.blocks[1].numpy(), (first.blocks[1] @ Q).numpy(), atol=1e-12)


@pytest.mark.parametrize(("cutoff", "kept"), [(0.0, 3), (0.009, 3), (0.05, 2), (0.1, 1), (0.9, 1)])
def test_directions_up_to_the_cutoff_are_left_out(cutoff: float, kept: int) -> None:
    """Singular values 10, 1 and 0.1; a value equal to the cut-off is left out."""
    U, V = orthogonal(6, seed=1)[:, :3], orthogonal(3, seed=2)
    matrix = U * torch.tensor([10.0, 1 + 1e-9, 0.1 + 1e-9]) @ V
    if cutoff == 0.1:
        matrix = U * torch.tensor([10.0, 1 - 1e-9, 0.1]) @ V
    basis = shared_basis([matrix[:, :2], matrix[:, 2:]], cutoff)
    assert basis.U.shape == (6, kept)
    assert basis.S.shape == (kept,)
    assert [block.shape for block in basis.blocks] == [(kept, 2), (kept, 1)]


def test_zeros_alone_keep_one_direction() -> None:
    basis = shared_basis([torch.zeros(5, 2), torch.zeros(5, 1)], 1e-7)
    assert basis.U.shape == (5, 1)
    assert basis.S.tolist() == [0.0]
    assert not any(block.any() for block in basis.blocks)


@pytest.mark.parametrize("d", [40, 6], ids=["tall", "wide"])
def test_a_zero_matrix_has_a_zero_block(d: int) -> None:
    first, last = gaussian((d, 4), (d, 3))
    basis = shared_basis([first, torch.zeros(d, 2), last], 0.0)
    assert not basis.blocks[1].any()


@pytest.mark.parametrize("d", [40, 6], ids=["tall", "wide"])
def test_a_matrix_has_exactly_nothing_of_a_direction_that_is_not_its_own(d: int) -> None:
    """Orthogonal column spaces, distinct singular values: every row belongs to one matrix."""
    Q = orthogonal(d, seed=3)
    left = Q[:, :2] * torch.tensor([5.0, 2.0])
    right = Q[:, 2:5] * torch.tensor([4.0, 3.0, 1.0]) @ orthogonal(3, seed=4)
    basis = shared_basis([left, right], 1e-7)
    rows = torch.stack([block.any(dim=1) for block in basis.blocks])
    assert rows.tolist() == [[True, False, False, True, False], [False, True, True, False, True]]


def test_a_small_matrix_is_not_noise() -> None:
    """Nine orders of magnitude below its neighbour a matrix still has its directions."""
    first, second = gaussian((30, 2), (30, 2))
    basis = shared_basis([first, 1e-9 * second], 0.0)
    np.testing.assert_allclose(1e9 * (basis.U @ basis.blocks[1]).numpy(), second, atol=1e-3)


def test_float32_is_widened() -> None:
    matrices = [m.float() for m in gaussian((30, 4), (30, 5))]
    basis = shared_basis(matrices, 1e-7)
    assert {t.dtype for t in (basis.U, basis.S, *basis.blocks)} == {torch.float64}
    exact = shared_basis([m.double() for m in matrices], 1e-7)
    assert torch.equal(basis.U, exact.U)


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="side by side are not finite; check the scalings"):
        shared_basis([torch.tensor([[1.0], [float("inf")]])], 1e-7)
