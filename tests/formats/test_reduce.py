from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from unmerge_bundle.reduce import reduce_delta, reduce_factors

Array = npt.NDArray[Any]


def best(delta: Array, rank: int) -> float:
    values = np.linalg.svd(delta, compute_uv=False)
    return float(np.linalg.norm(values[rank:]) / np.linalg.norm(values))


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (1, 5), (5, 1), (6, 6)])
@pytest.mark.parametrize("spectrum", ["flat", "decaying"])
def test_it_is_the_best_approximation(shape: tuple[int, int], spectrum: str) -> None:
    rng = np.random.default_rng(0)
    d_out, d_in = shape
    delta = rng.standard_normal(shape)
    if spectrum == "decaying":
        left, values, right = np.linalg.svd(delta, full_matrices=False)
        delta = (left * 0.1 ** np.arange(len(values))) @ right
    delta = delta.astype(np.float32)
    for rank in range(1, min(shape) + 1):
        reduced = reduce_delta(delta, rank)
        assert (reduced.A.shape, reduced.B.shape) == ((rank, d_in), (d_out, rank))
        assert reduced.A.dtype == reduced.B.dtype == np.float32
        product = reduced.B.astype(np.float64) @ reduced.A.astype(np.float64)
        found = np.linalg.norm(product - delta) / np.linalg.norm(delta)
        assert reduced.error == pytest.approx(found, rel=1e-6, abs=1e-12)
        assert found == pytest.approx(best(delta.astype(np.float64), rank), rel=1e-5, abs=3e-7)
        np.testing.assert_allclose(
            np.linalg.norm(reduced.A, axis=1), np.linalg.norm(reduced.B, axis=0), rtol=1e-4
        )


@pytest.mark.parametrize("shape", [(7, 12), (3, 12), (12, 3)])
def test_factors_are_reduced_without_their_product(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    A, B = rng.standard_normal((5, shape[1])), rng.standard_normal((shape[0], 5))
    for rank in range(1, 6):
        reduced = reduce_factors(A, B, rank)
        product = reduced.B.astype(np.float64) @ reduced.A.astype(np.float64)
        found = np.linalg.norm(product - B @ A) / np.linalg.norm(B @ A)
        assert len(reduced.A) == rank
        assert found == pytest.approx(best(B @ A, rank), rel=1e-5, abs=3e-7)
        assert reduced.error == pytest.approx(found, rel=1e-5, abs=3e-7)


def test_nothing_is_left_of_nothing() -> None:
    for reduced in (
        reduce_delta(np.zeros((3, 4), np.float32), 2),
        reduce_factors(np.zeros((3, 4)), np.ones((2, 3)), 2),
    ):
        assert reduced.error == 0.0
        assert not (reduced.B @ reduced.A).any()


def test_blocks_do_not_change_what_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = np.random.default_rng(2).standard_normal((6, 40))
    whole = reduce_delta(delta, 3)
    monkeypatch.setattr("unmerge_bundle.reduce._PIECE", 6 * 7)
    parts = reduce_delta(delta, 3)
    np.testing.assert_allclose(parts.B @ parts.A, whole.B @ whole.A, atol=1e-5)
    assert parts.error == pytest.approx(whole.error, rel=1e-9)
