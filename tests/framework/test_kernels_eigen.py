"""Eigenvectors of many small matrices against LAPACK's of each, hard ones among them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmerge.errors import NonFiniteError
from unmerge.kernels import eigen, leading_eigenvectors
from unmerge.kernels.positions import BLOCK, dot, orthonormalise, positions_first, positions_last

F64 = torch.float64


def random_grams(P: int, n: int, *, rank: int | None = None, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(P, n, rank or n + 3, generator=generator, dtype=F64)
    return x @ x.transpose(1, 2)


def with_spectrum(values: list[float], P: int = 5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    Q = torch.linalg.qr(torch.randn(P, n, n, generator=generator, dtype=F64)).Q
    gram: torch.Tensor = (Q * torch.tensor(values, dtype=F64)) @ Q.transpose(1, 2)
    return (gram + gram.transpose(1, 2)) / 2


def check(gram: torch.Tensor, size: int) -> torch.Tensor:
    """Orthonormal, and each column an eigenvector of the eigenvalue whose turn it is."""
    vectors = leading_eigenvectors(gram, size)
    assert vectors.shape == (*gram.shape[:2], size)
    assert vectors.dtype == F64
    wide = gram.to(F64)
    gap = vectors.transpose(1, 2) @ vectors - torch.eye(size, dtype=F64)
    assert float(gap.abs().max()) < 1e-13
    values = torch.linalg.eigvalsh(wide).flip(-1)[:, :size]
    residual = torch.linalg.matrix_norm(wide @ vectors - vectors * values[:, None])
    assert bool((residual <= 1e-12 * torch.linalg.matrix_norm(wide)).all())
    return vectors


def proven(gram: torch.Tensor, size: int) -> float:
    """Return the fraction of positions that need no LAPACK."""
    found = eigen._vectorised(positions_last(gram), size)[1][: len(gram)]
    return float(found.double().mean())


@pytest.mark.parametrize(
    ("n", "size"), [(1, 1), (2, 1), (2, 2), (3, 1), (7, 3), (7, 6), (16, 3), (16, 8), (32, 5)]
)
def test_random_matrices(n: int, size: int) -> None:
    gram = random_grams(150, n)
    vectors = check(gram, size)
    expected = torch.linalg.eigh(gram).eigenvectors.flip(-1)[..., :size]
    overlap = (vectors * expected).sum(1).abs()
    assert float((overlap - 1).abs().max()) < 1e-9


@pytest.mark.parametrize(("n", "size"), [(2, 1), (7, 3), (16, 3), (16, 8), (31, 3)])
def test_nearly_all_random_matrices_are_done_together(n: int, size: int) -> None:
    """What the speed rests on."""
    assert proven(random_grams(1000, n), size) > 0.97


def test_a_decaying_spectrum_needs_no_lapack_either() -> None:
    assert proven(with_spectrum([2.0**-k for k in range(12)], P=200), 3) > 0.97


@pytest.mark.parametrize(
    "values",
    [
        [1.0] * 8,
        [2.0, 2.0, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0],
        [3.0, 1.0, 1.0, 1.0 - 1e-15, 1e-3, 1e-8, 0.0, 0.0],
        [1.0, 1.0 - 1e-6, 1.0 - 2e-6, 1.0 - 3e-6, 0.1, 0.1, 0.1, 0.1],
        [1.0, 0.5, 0.25, 0.25 - 1e-9, 0.2, 0.1, 0.0, 0.0],
        [1.0, 1e-10, 1e-20, 1e-30, 0.0, 0.0, 0.0, 0.0],
        [1.0] + [0.0] * 7,
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_repeated_and_crowded_eigenvalues(values: list[float], size: int) -> None:
    check(with_spectrum(values), size)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_next_eigenvalue_is_never_taken_for_the_last_one(size: int) -> None:
    """Gaps between a tenth and a hundred thousandth, after the last eigenvalue that is wanted."""
    grams = []
    for step in range(120):
        values = [*[4.0, 3.0, 2.0][-size:], 0.5, 0.4, 0.3, 0.2, 0.1]
        values[size] = 2.0 - 10.0 ** (-1 - step / 30)
        grams.append(with_spectrum(values, P=4, seed=step))
    check(torch.cat(grams), size)


def test_the_span_does_not_mix_across_a_clear_gap() -> None:
    """Repeated inside, isolated as a whole: any basis will do, but of the right subspace."""
    gram = with_spectrum([2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 0.1, 0.0], P=40)
    vectors = check(gram, 3)
    expected = torch.linalg.eigh(gram).eigenvectors[..., -3:]
    inside = expected.transpose(1, 2) @ vectors
    assert float((inside.transpose(1, 2) @ inside - torch.eye(3, dtype=F64)).abs().max()) < 1e-12


@pytest.mark.parametrize("size", [1, 2, 4])
def test_matrices_that_fall_apart(size: int) -> None:
    n = 8
    zero = torch.zeros(n, n, dtype=F64)
    diagonal = torch.diag(torch.arange(1.0, n + 1, dtype=F64))
    blocks = zero.clone()
    blocks[:4, :4] = blocks[4:, 4:] = random_grams(1, 4)[0]
    one = torch.ones(n, n, dtype=F64)
    spike = zero.clone()
    spike[5, 5] = 1.0
    check(torch.stack([zero, torch.eye(n, dtype=F64), diagonal, blocks, one, spike]), size)


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e-30, 1e30, 1e150, 1e300])
def test_any_size_of_numbers(scale: float) -> None:
    gram = random_grams(30, 7)
    plain, scaled = leading_eigenvectors(gram, 3), leading_eigenvectors(scale * gram, 3)
    assert float(((plain * scaled).sum(1).abs() - 1).abs().max()) < 1e-9


def test_points_of_a_lower_rank() -> None:
    check(random_grams(50, 10, rank=2), 3)
    check(random_grams(50, 10, rank=1), 5)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 20),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 10_000),
    exponents=st.lists(st.integers(-14, 0), min_size=20, max_size=20),
)
def test_any_spectrum(n: int, share: float, seed: int, exponents: list[int]) -> None:
    """Powers of ten, many of them equal."""
    gram = with_spectrum([10.0**e for e in exponents[:n]], P=4, seed=seed)
    check(gram, max(1, int(share * n)))


@pytest.mark.parametrize(("n", "size"), [(3, 1), (7, 3), (16, 3), (16, 7), (12, 12), (40, 3)])
def test_a_matrix_does_not_depend_on_the_others(n: int, size: int) -> None:
    gram = random_grams(201, n)
    gram[17] = 0.0
    gram[100] = torch.eye(n, dtype=F64)
    whole = leading_eigenvectors(gram, size)
    order = torch.randperm(201, generator=torch.Generator().manual_seed(1))
    assert torch.equal(leading_eigenvectors(gram[order], size), whole[order])
    for start, stop in ((0, 1), (17, 18), (3, 68), (90, 154), (200, 201)):
        assert torch.equal(leading_eigenvectors(gram[start:stop], size), whole[start:stop])


def test_more_positions_than_a_block() -> None:
    gram = random_grams(BLOCK + 70, 4)
    whole = leading_eigenvectors(gram, 2)
    assert torch.equal(whole[BLOCK:], leading_eigenvectors(gram[BLOCK:], 2))
    assert torch.equal(whole[:BLOCK], leading_eigenvectors(gram[:BLOCK], 2))


def test_no_vectors_and_no_matrices() -> None:
    assert leading_eigenvectors(random_grams(3, 4), 0).shape == (3, 4, 0)
    assert leading_eigenvectors(torch.zeros(0, 4, 4), 2).shape == (0, 4, 2)


def test_the_input_is_left_alone_and_may_be_float32() -> None:
    gram = random_grams(10, 7).float()
    before = gram.clone()
    check(gram, 3)
    assert torch.equal(gram, before)
    wide = gram.double()
    before = wide.clone()
    leading_eigenvectors(wide, 3)
    assert torch.equal(wide, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [1, 6])
def test_what_is_not_finite_is_refused(value: float, size: int) -> None:
    gram = random_grams(5, 6)
    gram[3, 2, 2] = value
    with pytest.raises(NonFiniteError, match="not finite"):
        leading_eigenvectors(gram, size)


def test_by_hand() -> None:
    # [[2, 1], [1, 2]]: eigenvalues 3 and 1, the first along (1, 1)/√2.
    [vector] = leading_eigenvectors(torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]), 1)
    np.testing.assert_allclose(vector.abs().numpy(), [[2**-0.5], [2**-0.5]], rtol=1e-15)
    assert float(vector[0] * vector[1]) > 0


def test_positions_are_moved_and_filled_up() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    last = positions_last(x)
    assert last.shape == (3, 4, 64)
    assert torch.equal(last[:, :, :2], x.permute(1, 2, 0))
    assert not last[:, :, 2:].any()
    assert torch.equal(positions_first(last[:, :, :2]), x)
    full = torch.randn(64, 2, 2)
    assert positions_last(full).data_ptr() != full.data_ptr()


def test_what_cannot_be_orthonormalised_is_told() -> None:
    x = torch.zeros(3, 2, 4, dtype=F64)  # (n, size, positions)
    x[:, :, 0] = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    x[:, :, 1] = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]])  # twice one direction
    x[:, 0, 2] = 1.0  # no second direction
    assert orthonormalise(x).tolist() == [True, False, False, False]
    assert float(dot(x[:, 0].unbind(0), x[:, 1].unbind(0))[0]) == pytest.approx(0.0, abs=1e-15)
