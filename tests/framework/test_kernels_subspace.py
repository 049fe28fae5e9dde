"""Affine bases of many point sets against one SVD per set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracles
from stacks import relative
from unmerge.kernels import AffineBasis, affine_basis


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


def test_a_position_does_not_depend_on_the_others() -> None:
    x = points(7, 4, 6)
    whole = affine_basis(x, 2)
    for n in range(7):
        alone = affine_basis(x[n : n + 1], 2)
        assert torch.equal(alone.basis[0], whole.basis[n])
        assert torch.equal(alone.coefficients[0], whole.coefficients[n])


def test_by_hand() -> None:
    # (0, 0), (2, 2), (4, 4): mean (2, 2), direction (1, 1)/√2, coefficients −2√2, 0, 2√2.
    x = torch.tensor([[[0.0, 0.0], [2.0, 2.0], [4.0, 4.0]]])
    fit = affine_basis(x, 1)
    np.testing.assert_allclose(fit.mean.numpy(), [[2.0, 2.0]])
    np.testing.assert_allclose(fit.basis.numpy(), [[[2**-0.5, 2**-0.5]]], rtol=1e-15)
    np.testing.assert_allclose(
        fit.coefficients.numpy(), [[[-(8**0.5)], [0.0], [8**0.5]]], atol=1e-15
    )
