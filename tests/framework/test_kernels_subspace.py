"""Affine bases of many point sets against one SVD per set; adapters as points; their gauges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracles
from stacks import relative
from unmerge.adapter import Factors
from unmerge.kernels import AffineBasis, affine_basis, aligned, balanced, factor_positions
from unmerge.kernels.positions import BLOCK


def points(P: int, N: int, r: int, *, spread: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(P, N, r, generator=generator, dtype=torch.float64)
    return x * spread ** torch.arange(r, dtype=torch.float64) + 3.0


def rebuilt(fit: AffineBasis) -> torch.Tensor:
    return fit.mean[:, None] + fit.coefficients @ fit.basis


SIZES = [(2, 8), (5, 8), (8, 8), (9, 8), (20, 3), (4, 1), (1, 4)]


@pytest.mark.parametrize("spread", [1.0, 0.3])
@pytest.mark.parametrize(("N", "r"), SIZES)
def test_every_position_is_fitted_as_the_oracle_fits_it(N: int, r: int, spread: float) -> None:
    x = points(6, N, r, spread=spread)
    for size in range(min(N - 1, r) + 1):
        fit = affine_basis(x, size)
        assert fit.mean.shape == (6, r)
        assert fit.basis.shape == (6, size, r)
        assert fit.coefficients.shape == (6, N, size)
        for n, position in enumerate(x.numpy()):
            expected = oracles.rmm_position(position, size)
            assert relative(fit.mean[n].numpy(), expected.mean) < 1e-13
            assert relative(rebuilt(fit)[n].numpy(), expected.restored) < 1e-10
            # The basis itself up to signs, where singular values differ.
            overlap = np.abs(np.diag(fit.basis[n].numpy() @ expected.basis))
            np.testing.assert_allclose(overlap, np.ones(size), atol=1e-7)
            got = np.abs(fit.coefficients[n].numpy())
            np.testing.assert_allclose(got, np.abs(expected.coefficients), atol=1e-7)


@pytest.mark.parametrize(("N", "r"), SIZES)
def test_the_basis_is_orthonormal_with_fixed_signs(N: int, r: int) -> None:
    size = min(N - 1, r)
    basis = affine_basis(points(50, N, r), size).basis
    gram = basis @ basis.transpose(1, 2)
    assert torch.allclose(gram, torch.eye(size, dtype=torch.float64).expand_as(gram), atol=1e-9)
    if size:
        peaks = basis.gather(2, basis.abs().argmax(2, keepdim=True))
        assert bool((peaks > 0).all())


@pytest.mark.parametrize(("N", "r"), SIZES)
def test_the_coefficients_are_the_projections(N: int, r: int) -> None:
    """C = X W: what an appended adapter gets too."""
    x = points(20, N, r)
    fit = affine_basis(x, min(N - 1, r))
    projected = (x - fit.mean[:, None]) @ fit.basis.transpose(1, 2)
    assert torch.allclose(projected, fit.coefficients, atol=1e-9)


def test_equal_points_are_their_mean() -> None:
    x = points(3, 1, 5).expand(3, 4, 5)
    fit = affine_basis(x, 3)
    assert torch.isfinite(fit.basis).all()
    assert float((rebuilt(fit) - x).abs().max()) < 1e-14


@pytest.mark.parametrize("small", [1e-4, 1e-6, 1e-8, 1e-12])
def test_directions_of_very_different_sizes_stay_orthonormal(small: float) -> None:
    generator = torch.Generator().manual_seed(1)
    contrasts = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    contrasts = torch.linalg.qr(contrasts - contrasts.mean(0)).Q
    directions = torch.linalg.qr(torch.randn(8, 3, generator=generator, dtype=torch.float64)).Q
    x = (contrasts * torch.tensor([1.0, small, small / 2])) @ directions.T
    fit = affine_basis(x[None], 3)
    gram = fit.basis[0] @ fit.basis[0].T
    assert float((gram - torch.eye(3)).abs().max()) < 1e-6
    assert relative(rebuilt(fit)[0].numpy(), x.numpy()) < 1e-13


def test_float32_points_are_fitted_in_float64() -> None:
    x = points(4, 3, 6).float()
    fit = affine_basis(x, 2)
    assert fit.mean.dtype == fit.basis.dtype == fit.coefficients.dtype == torch.float64
    assert torch.equal(fit.mean, affine_basis(x.double(), 2).mean)


@pytest.mark.parametrize(("N", "r", "size"), [(4, 6, 2), (8, 16, 3), (8, 5, 2), (20, 7, 3)])
def test_a_position_does_not_depend_on_the_others(N: int, r: int, size: int) -> None:
    x = points(131, N, r)
    x[5] = 0.0
    whole = affine_basis(x, size)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    shuffled = affine_basis(x[order], size)
    assert torch.equal(shuffled.mean, whole.mean[order])
    assert torch.equal(shuffled.basis, whole.basis[order])
    assert torch.equal(shuffled.coefficients, whole.coefficients[order])
    for n in (0, 5, 64, 130):
        alone = affine_basis(x[n : n + 1], size)
        assert torch.equal(alone.basis[0], whole.basis[n])
        assert torch.equal(alone.coefficients[0], whole.coefficients[n])


def test_more_positions_than_a_block() -> None:
    x = points(BLOCK + 5, 3, 2)
    whole, rest = affine_basis(x, 1), affine_basis(x[BLOCK:], 1)
    assert whole.basis.shape == (BLOCK + 5, 1, 2)
    assert torch.equal(whole.basis[BLOCK:], rest.basis)
    assert torch.equal(whole.coefficients[BLOCK:], rest.coefficients)
    assert torch.equal(whole.mean[BLOCK:], rest.mean)
    assert whole.energy == pytest.approx(float(x.square().sum()), rel=1e-12)


@pytest.mark.parametrize(("N", "r"), SIZES)
def test_energy_and_residual_are_sums_of_squares(N: int, r: int) -> None:
    x = points(9, N, r)
    for size in range(min(N - 1, r) + 1):
        fit = affine_basis(x, size)
        assert fit.energy == pytest.approx(float(x.square().sum()), rel=1e-13)
        residual = float((rebuilt(fit) - x).square().sum())
        assert fit.residual == pytest.approx(residual, abs=1e-13 * fit.energy)


@pytest.mark.parametrize("N", [4, 12], ids=["N <= r", "N > r"])
@pytest.mark.parametrize("size", [1, 3])
def test_directions_that_vanish_leave_an_orthonormal_basis(N: int, size: int) -> None:
    x = points(6, N, 8)
    x[0] = 0.0
    x[1] = x[1, :1]
    x[2, 1:] = x[2, 1:2]  # one direction
    fit = affine_basis(x, size)
    gram = fit.basis @ fit.basis.transpose(1, 2)
    assert torch.allclose(gram, torch.eye(size, dtype=torch.float64).expand_as(gram), atol=1e-12)
    assert float((rebuilt(fit) - x)[:3].abs().max()) < 1e-13


def test_by_hand() -> None:
    # (0, 0), (2, 2), (4, 4): mean (2, 2), direction (1, 1)/√2, coefficients −2√2, 0, 2√2.
    x = torch.tensor([[[0.0, 0.0], [2.0, 2.0], [4.0, 4.0]]])
    fit = affine_basis(x, 1)
    np.testing.assert_allclose(fit.mean.numpy(), [[2.0, 2.0]])
    np.testing.assert_allclose(fit.basis.numpy(), [[[2**-0.5, 2**-0.5]]], rtol=1e-15)
    np.testing.assert_allclose(
        fit.coefficients.numpy(), [[[-(8**0.5)], [0.0], [8**0.5]]], atol=1e-15
    )


def random_factors(seed: int, rank: int, *, d_out: int = 9, d_in: int = 7) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, d_in, generator=generator, dtype=torch.float64)
    B = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
    return Factors(A=A, B=B, scaling=-0.5)


def delta(f: Factors) -> torch.Tensor:
    product: torch.Tensor = f.scaling * (f.B @ f.A)
    return product


def test_positions_are_columns_of_A_then_rows_of_B() -> None:
    one, two = random_factors(1, 3), random_factors(2, 2)
    points = factor_positions([one, two], 3)
    assert points.shape == (7 + 9, 2, 3)
    for column in range(7):
        assert torch.equal(points[column, 0], one.A[:, column])
        assert torch.equal(points[column, 1, :2], two.A[:, column])
    for row in range(9):
        assert torch.equal(points[7 + row, 0], one.B[row])
        assert torch.equal(points[7 + row, 1, :2], two.B[row])
    assert not points[:, 1, 2].any()


@pytest.mark.parametrize("rank", [1, 4, 9, 12])
def test_balanced_factors_are_the_svd_of_the_delta(rank: int) -> None:
    f = random_factors(3, rank)
    b = balanced(f)
    assert b.scaling == 1.0
    assert b.rank == min(rank, 7)
    assert relative(delta(b).numpy(), delta(f).numpy()) < 1e-13
    spectrum = torch.linalg.svdvals(delta(f))[: b.rank]
    for gram in (b.A @ b.A.T, b.B.T @ b.B):
        assert float((gram - torch.diag(spectrum)).abs().max() / spectrum[0]) < 1e-13


def test_balanced_factors_leave_out_what_is_rounding() -> None:
    f = random_factors(4, 2)
    # Rank 2 written with rank 5: a null direction's root would be of size 1e-8.
    mix = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wide = Factors(A=torch.linalg.pinv(mix) @ f.A, B=f.B @ mix, scaling=f.scaling)
    assert balanced(wide).rank == 2
    assert relative(balanced(wide).A.numpy(), balanced(f).A.numpy()) < 1e-12
    assert balanced(Factors(A=f.A, B=0 * f.B, scaling=1.0)).rank == 0


def test_aligned_factors_have_the_same_deltas() -> None:
    factors = [random_factors(seed, rank) for seed, rank in ((5, 4), (6, 2), (7, 3))]
    for before, after in zip(factors, aligned(factors, 4), strict=True):
        assert after.rank == 4
        assert after.scaling == before.scaling
        assert relative(delta(after).numpy(), delta(before).numpy()) < 1e-13


def test_alignment_undoes_rotations() -> None:
    """Adapters that differ by a rotation only become one, and nearly equal ones come together."""
    one = random_factors(8, 4)
    turned = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        Q = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
        turned.append(Factors(A=Q.T @ one.A, B=one.B @ Q, scaling=one.scaling))
    together = aligned(turned, 4)
    for f in together[1:]:
        assert relative(f.A.numpy(), together[0].A.numpy()) < 1e-12
        assert relative(f.B.numpy(), together[0].B.numpy()) < 1e-12


def test_alignment_does_not_depend_on_the_order() -> None:
    factors = [random_factors(seed, 3) for seed in (9, 10, 11, 12)]
    forward, backward = aligned(factors, 3), aligned(factors[::-1], 3)[::-1]
    for one, two in zip(forward, backward, strict=True):
        assert relative(one.A.numpy(), two.A.numpy()) < 1e-12
