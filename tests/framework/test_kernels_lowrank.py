"""Products of factors against dense numpy, and rows of a delta bit for bit."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from stacks import random_factors, relative
from unmerge.adapter import Factors
from unmerge.errors import NonFiniteError
from unmerge.kernels.lowrank import (
    TILE_ROWS,
    concatenate,
    delta_rows,
    orthonormal_core,
    svd_of_product,
)

# (d_out, R, d_in): tall on both sides, R above either, R above both, vectors.
SHAPES = [
    (14, 4, 11),
    (5, 8, 20),
    (20, 8, 5),
    (5, 9, 6),
    (7, 7, 7),
    (1, 3, 9),
    (9, 3, 1),
    (6, 1, 4),
]


@pytest.mark.parametrize(("rows", "columns"), [(9, 4), (4, 4), (4, 9), (1, 1), (300, 7)])
def test_the_core_is_an_orthonormal_view_of_the_matrix(rows: int, columns: int) -> None:
    matrix = random_factors(3, rank=columns, d_out=rows, d_in=1).B
    basis = orthonormal_core(matrix)
    k = min(rows, columns)
    assert basis.core.shape == (k, columns)
    Q = basis.apply(torch.eye(k, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(Q.T @ Q, np.eye(k), atol=1e-14)
    assert relative(Q @ basis.core.numpy(), matrix.numpy()) < 1e-14
    small = torch.randn(k, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert relative(basis.apply(small).numpy(), Q @ small.numpy()) < 1e-14


def test_the_core_of_a_rank_deficient_matrix_is_still_exact() -> None:
    column = random_factors(4, rank=1, d_out=9, d_in=1).B
    matrix = torch.cat([column, 1e-12 * column, torch.zeros_like(column), 1e12 * column], dim=1)
    basis = orthonormal_core(matrix)
    rebuilt = basis.apply(basis.core).numpy()
    for n in range(4):
        assert relative(rebuilt[:, n], matrix[:, n].numpy()) < 1e-14


@pytest.mark.parametrize("spectrum", ["flat", "decaying"])
@pytest.mark.parametrize("rank", [1, 3, 100])
@pytest.mark.parametrize(("d_out", "R", "d_in"), SHAPES)
def test_svd_of_product_is_the_dense_svd(
    d_out: int, R: int, d_in: int, rank: int, spectrum: Literal["flat", "decaying"]
) -> None:
    f = random_factors(7, rank=R, d_out=d_out, d_in=d_in, spectrum=spectrum)
    product = (f.B @ f.A).numpy()
    U, S, Vt = np.linalg.svd(product, full_matrices=False)
    svd = svd_of_product(f.B, f.A, rank)
    kept, all_of_them = min(rank, R, d_out, d_in), min(R, d_out, d_in)
    assert svd.S.shape == (kept,)
    assert svd.spectrum.shape == (all_of_them,)
    np.testing.assert_allclose(svd.spectrum.numpy(), S[:all_of_them], atol=1e-13 * S[0])
    assert torch.equal(svd.S, svd.spectrum[:kept])
    best = (U[:, :kept] * S[:kept]) @ Vt[:kept]
    ours = (svd.U * svd.S @ svd.Vh).numpy()
    assert relative(ours, best) < 1e-12
    np.testing.assert_allclose((svd.U.T @ svd.U).numpy(), np.eye(kept), atol=1e-13)
    np.testing.assert_allclose((svd.Vh @ svd.Vh.T).numpy(), np.eye(kept), atol=1e-13)
    error = np.linalg.norm(product - best) / np.linalg.norm(product)
    assert svd.relative_error == pytest.approx(error, abs=1e-13)


def test_svd_of_float32_factors_works_in_float64() -> None:
    f = random_factors(8, rank=4, d_out=14, d_in=11)
    single = svd_of_product(f.B.float(), f.A.float(), 4)
    assert single.S.dtype == torch.float64
    assert torch.equal(single.S, svd_of_product(f.B, f.A, 4).S)


def test_a_badly_scaled_product_keeps_its_small_directions() -> None:
    """A factor 1e10 between the two adapters' sizes: Gram matrices would lose the small one."""
    large, small = (random_factors(n, rank=1, d_out=20, d_in=20) for n in (1, 2))
    B = torch.cat([1e5 * large.B, 1e-5 * small.B], dim=1)
    A = torch.cat([large.A, small.A])
    svd = svd_of_product(B, A, 2)
    expected = np.linalg.svd((B @ A).numpy(), compute_uv=False)[:2]
    np.testing.assert_allclose(svd.S.numpy()[0], expected[0], rtol=1e-12)
    # The second singular value is the part of `small` orthogonal to `large` on both sides.
    P = large.B / torch.linalg.norm(large.B)
    Q = large.A / torch.linalg.norm(large.A)
    b = small.B - P @ (P.T @ small.B)
    a = small.A - (small.A @ Q.T) @ Q
    second = 1e-5 * float(torch.linalg.norm(b) * torch.linalg.norm(a))
    np.testing.assert_allclose(svd.S.numpy()[1], second, rtol=1e-4)


def test_the_svd_of_a_zero_product_has_no_error() -> None:
    svd = svd_of_product(torch.zeros(5, 2), torch.ones(2, 4), 1)
    assert svd.S.tolist() == [0.0]
    assert svd.relative_error == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("d_out", "R", "d_in"), [(9, 3, 8), (3, 5, 4)])
def test_a_product_that_is_not_finite_is_refused(d_out: int, R: int, d_in: int, bad: float) -> None:
    f = random_factors(9, rank=R, d_out=d_out, d_in=d_in)
    f.A[1, 2] = bad
    with pytest.raises(NonFiniteError, match="not finite"):
        svd_of_product(f.B, f.A, 1)


def test_concatenated_factors_multiply_to_the_weighted_sum() -> None:
    first = random_factors(1, rank=2, d_out=5, d_in=4, scaling=0.5)
    second = random_factors(2, rank=3, d_out=5, d_in=4, scaling=-3.0)
    A, B = concatenate([first, second], [2.0, 0.25])
    assert A.shape == (5, 4)
    assert B.shape == (5, 5)
    expected = 1.0 * first.B @ first.A - 0.75 * second.B @ second.A
    assert relative((B @ A).numpy(), expected.numpy()) < 1e-14


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
# BLAS adds up 64 products in another order for one row than for many.
@pytest.mark.parametrize("rank", [7, 64])
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 150, 200])
def test_rows_of_a_delta_have_the_same_bits_for_every_block_height(
    rows: int, rank: int, dtype: torch.dtype
) -> None:
    wide = random_factors(11, rank=rank, d_out=rows, d_in=37, scaling=16 / 7**0.5)
    factors = Factors(A=wide.A.to(dtype), B=wide.B.to(dtype), scaling=wide.scaling)
    whole = delta_rows(factors, 0, rows)
    assert whole.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for height in (1, 7, 64, 100, 1000):
        parts = [
            delta_rows(factors, start, min(start + height, rows))
            for start in range(0, rows, height)
        ]
        assert torch.equal(torch.cat(parts), whole)
    dense = factors.scaling * (factors.B.double() @ factors.A.double()).numpy()
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    assert relative(whole.numpy(), dense) < tolerance


def test_rows_are_those_asked_for() -> None:
    rows = 2 * TILE_ROWS + 9
    factors = Factors(
        A=torch.ones(1, 2), B=torch.arange(rows, dtype=torch.float32)[:, None], scaling=2.0
    )
    got = delta_rows(factors, TILE_ROWS - 1, TILE_ROWS + 2)
    assert got.tolist() == [[2.0 * row] * 2 for row in range(TILE_ROWS - 1, TILE_ROWS + 2)]
    assert delta_rows(factors, 5, 5).shape == (0, 2)
