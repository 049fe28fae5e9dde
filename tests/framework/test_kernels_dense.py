"""The leading SVD of a dense matrix against LAPACK's full one, on spectra of every kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unmerge.errors import NonFiniteError
from unmerge.kernels import dense
from unmerge.kernels.dense import leading_svd
from unmerge.kernels.truncation import RankChoice

# Beyond the size up to which the full SVD is used.
ROWS, COLUMNS = 310, 290
SPECTRA = {
    "flat": torch.ones(COLUMNS, dtype=torch.float64) + torch.linspace(0.5, 0, COLUMNS),
    "decaying": 10.0 ** -torch.linspace(0, 14, COLUMNS, dtype=torch.float64),
    "steep": torch.cat([10.0 ** -torch.arange(13, dtype=torch.float64), torch.zeros(COLUMNS - 13)]),
    "rank 5": torch.cat([torch.tensor([9.0, 4, 4, 1, 1e-10]), torch.zeros(COLUMNS - 5)]).double(),
    # Nine values that the Gram matrix cannot tell from nothing, nor from each other.
    "far below": torch.cat(
        [torch.ones(1), torch.linspace(9e-10, 1e-10, 9), torch.zeros(COLUMNS - 10)]
    ).double(),
    "repeated": torch.cat([torch.full((20,), 3.0), torch.ones(COLUMNS - 20)]).double(),
}


def with_spectrum(spectrum: torch.Tensor, *, rows: int = ROWS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    columns = spectrum.shape[0]
    U = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64)).Q
    return (U * spectrum) @ V.T


def product(result: dense.DenseSvd) -> torch.Tensor:
    return result.svd.U * result.svd.S @ result.svd.Vh


@pytest.fixture
def full_svds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the matrices that are decomposed in full."""
    shapes: list[tuple[int, ...]] = []
    whole = dense._full

    def counted(tall: torch.Tensor, choice: RankChoice) -> dense.DenseSvd:
        shapes.append(tuple(tall.shape))
        return whole(tall, choice)

    monkeypatch.setattr(dense, "_full", counted)
    return shapes


@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("rank", [1, 7, 24])
@pytest.mark.parametrize("name", SPECTRA)
def test_it_is_as_near_as_any_matrix_of_that_rank(
    name: str, rank: int, wide: bool, full_svds: list[tuple[int, ...]]
) -> None:
    matrix = with_spectrum(SPECTRA[name])
    matrix = matrix.T.contiguous() if wide else matrix
    result = leading_svd(matrix, RankChoice(rank=rank))
    assert not full_svds
    total = float(matrix.norm())
    best = float(SPECTRA[name].sort(descending=True).values[rank:].norm())
    error = float((matrix - product(result)).norm())
    assert error <= best * (1 + 1e-9) + 1e-13 * total
    assert result.relative_error == pytest.approx(error / total, rel=1e-6, abs=1e-15)
    assert result.svd.S.shape == (rank,)
    eye = torch.eye(rank, dtype=torch.float64)
    assert torch.allclose(result.svd.U.T @ result.svd.U, eye, atol=1e-12)
    assert torch.allclose(result.svd.Vh @ result.svd.Vh.T, eye, atol=1e-12)


@pytest.mark.parametrize("name", ["flat", "decaying", "rank 5"])
def test_singular_values_and_vectors_are_those_of_the_full_svd(name: str) -> None:
    matrix = with_spectrum(SPECTRA[name])
    result = leading_svd(matrix, RankChoice(rank=4))
    U, S, Vt = np.linalg.svd(matrix.numpy())
    np.testing.assert_allclose(result.svd.S, S[:4], rtol=1e-12)
    # Distinct values have directions of their own, as sharp as their distance allows.
    for k in range(1 if name == "rank 5" else 4):
        sign = np.sign(U[:, k] @ result.svd.U[:, k].numpy())
        np.testing.assert_allclose(result.svd.U[:, k] * sign, U[:, k], atol=1e-9)
        np.testing.assert_allclose(result.svd.Vh[k] * sign, Vt[k], atol=1e-9)


@pytest.mark.parametrize("shape", [(310, 290), (290, 310), (9, 4), (4, 9), (5, 5), (1, 3)])
def test_in_each_column_of_U_the_largest_entry_is_positive(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    U = leading_svd(matrix, RankChoice(rank=2)).svd.U
    peaks = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    assert (peaks > 0).all()


def test_a_matrix_of_low_rank_comes_back_to_the_rounding_of_float64() -> None:
    # 1e-10 of the largest: far below what the eigenvalues of the Gram matrix can tell.
    matrix = with_spectrum(SPECTRA["rank 5"])
    result = leading_svd(matrix, RankChoice(rank=5))
    assert float((matrix - product(result)).norm()) < 1e-14 * float(matrix.norm())
    assert float(result.svd.S[4]) == pytest.approx(1e-10, rel=1e-4)


def test_by_hand() -> None:
    result = leading_svd(torch.diag(torch.tensor([3.0, -4.0])), RankChoice(rank=1))
    assert result.svd.S.tolist() == [4.0]
    assert result.svd.U.tolist() == [[0.0], [1.0]]
    assert result.svd.Vh.tolist() == [[0.0, -1.0]]
    assert result.relative_error == pytest.approx(0.6, rel=1e-15)


def test_a_zero_matrix_has_no_error_and_one_direction() -> None:
    for shape in ((310, 290), (3, 2)):
        for choice in (RankChoice(rank=1), RankChoice(error=0.5), RankChoice(energy=1.0)):
            result = leading_svd(torch.zeros(shape), choice)
            assert result.svd.S.tolist() == [0.0]
            assert result.relative_error == 0.0


@pytest.mark.parametrize(
    ("choice", "full"),
    [
        (RankChoice(energy=0.999), False),
        (RankChoice(error=0.02), False),
        (RankChoice(error=2e-4), False),
        (RankChoice(error=2e-6), True),
        (RankChoice(energy=1.0), True),
        (RankChoice(error=0.0), True),
    ],
    ids=str,
)
def test_a_bound_is_kept_with_the_fewest_values(
    choice: RankChoice, full: bool, full_svds: list[tuple[int, ...]]
) -> None:
    matrix = with_spectrum(SPECTRA["steep"])
    result = leading_svd(matrix, choice)
    assert bool(full_svds) == full
    kept = result.svd.S.shape[0]
    S = np.linalg.svd(matrix.numpy(), compute_uv=False)
    tail = choice.tail
    assert tail is not None
    # Without a tail to cut off, rounding noise is.
    allowed = tail * (S**2).sum() + COLUMNS * (ROWS * 2**-52) ** 2
    assert (S[kept:] ** 2).sum() <= allowed
    if tail > 0:
        assert (S[kept - 1 :] ** 2).sum() > allowed
        assert result.relative_error <= tail**0.5


def test_float32_input_is_decomposed_in_float64() -> None:
    matrix = with_spectrum(SPECTRA["flat"]).float()
    result = leading_svd(matrix, RankChoice(rank=3))
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)[:3]
    np.testing.assert_allclose(result.svd.S, expected, rtol=1e-13)


def test_most_of_the_values_are_left_to_the_full_svd(full_svds: list[tuple[int, ...]]) -> None:
    matrix = with_spectrum(SPECTRA["flat"])
    result = leading_svd(matrix, RankChoice(rank=200))
    assert full_svds == [(ROWS, COLUMNS)]
    assert result.svd.S.shape == (200,)
    assert leading_svd(matrix, RankChoice(rank=1000)).svd.S.shape == (COLUMNS,)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    matrix = torch.zeros(3, 4)
    matrix[1, 2] = value
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        leading_svd(matrix, RankChoice(rank=1))


def test_the_input_is_not_written_to() -> None:
    matrix = with_spectrum(SPECTRA["flat"])
    before = matrix.clone()
    leading_svd(matrix, RankChoice(rank=3))
    assert torch.equal(matrix, before)
