import math
import sys
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmerge_bundle import compare, relative_errors
from unmerge_bundle.measure import delta_error

Array = npt.NDArray[Any]


def draw(
    seed: int, d_out: int, d_in: int, rank: int, dtype: Any = np.float32
) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((rank, d_in)).astype(dtype),
        rng.standard_normal((d_out, rank)).astype(dtype),
    )


def dense(factors: tuple[Array, Array], scaling: float) -> Array:
    A, B = (factor.astype(np.float64) for factor in factors)
    return scaling * (B @ A)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 99),
    st.integers(1, 7),
    st.integers(1, 7),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([1e-6, 1e-2, 1.0]),
    st.sampled_from([(1.0, 1.0), (2.0, 2.0), (1.0, 0.5), (-1.0, 3.0)]),
)
def test_agrees_with_the_dense_definition(
    seed: int, d_out: int, d_in: int, r: int, r_hat: int, size: float, scalings: tuple[float, float]
) -> None:
    source, restored = scalings
    A, B = draw(seed, d_out, d_in, r)
    A_hat, B_hat = draw(seed + 1, d_out, d_in, r_hat)
    both = min(r, r_hat)
    A_hat, B_hat = size * A_hat, size * B_hat
    A_hat[:both] += A[:both]
    B_hat[:, :both] += B[:, :both]
    errors = relative_errors((A, B), (A_hat, B_hat), source_scaling=source, scaling=restored)
    original = dense((A, B), source)
    difference = dense((A_hat, B_hat), restored) - original
    expected = np.linalg.norm(difference) / np.linalg.norm(original)
    assert errors.delta == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_factor_error_by_hand() -> None:
    A, B = np.array([[3.0, 0.0]]), np.array([[4.0]])
    errors = relative_errors((A, B), (np.array([[3.0, 0.3]]), np.array([[4.4]])))
    assert errors.factors == pytest.approx(0.5 / 5)
    # Different scalings: each B counts with its own, so a folded scaling is no error.
    assert relative_errors((A, B), (A, 2 * B), source_scaling=2.0) == relative_errors(
        (A, B), (A, B)
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_exact_restoration_has_error_exactly_zero(dtype: Any) -> None:
    factors = draw(3, 30, 20, 4, dtype)
    errors = relative_errors(factors, factors, source_scaling=1.7, scaling=1.7)
    assert (errors.factors, errors.delta) == (0.0, 0.0)


def test_small_errors_do_not_cancel() -> None:
    A, B = draw(0, 50, 40, 4, np.float64)
    shift = 1e-12
    errors = relative_errors((A, B), (A * (1 + shift), B))
    assert errors.delta == pytest.approx(shift, rel=1e-2)


@pytest.mark.parametrize("rank", [4, 9])
def test_another_form_of_the_same_delta_is_near_to_it(rank: int) -> None:
    A, B = draw(0, 50, 40, 4, np.float64)
    rng = np.random.default_rng(1)
    gauge = rng.standard_normal((4, rank))
    A_hat, B_hat = np.linalg.pinv(gauge) @ A, B @ gauge
    if rank == 4:
        assert relative_errors((A, B), (A_hat, B_hat)).factors > 0.1  # type: ignore[operator]
    else:
        A_hat, B_hat = np.linalg.pinv(gauge.T @ gauge) @ gauge.T @ A, B @ gauge
    # Gram matrices alone would leave 1e-8 here.
    assert relative_errors((A, B), (A_hat, B_hat)).delta < 1e-12
    shifted = relative_errors((A, B), (A_hat * (1 + 1e-9), B_hat))
    assert shifted.delta == pytest.approx(1e-9, rel=1e-4)


@pytest.mark.parametrize("piece", [1 << 20, 50, 1])
@pytest.mark.parametrize("scaling", [2.0, -0.5, 0.0])
def test_dense_deltas_are_compared_in_row_blocks(
    monkeypatch: pytest.MonkeyPatch, piece: int, scaling: float
) -> None:
    monkeypatch.setattr(sys.modules[delta_error.__module__], "_PIECE", piece)
    A, B = draw(0, 30, 20, 3)
    delta = dense(draw(1, 30, 20, 5), 1.0).astype(np.float32)
    original = dense((A, B), scaling)
    errors = delta_error((A, B), delta, source_scaling=scaling)
    if scaling:
        expected = np.linalg.norm(delta - original) / np.linalg.norm(original)
        assert errors.delta == pytest.approx(expected, rel=1e-12)
    else:
        assert errors.delta == math.inf
    assert errors.factors is None
    assert delta_error((A, B), original, source_scaling=scaling).delta == 0.0
    half = original.astype(ml_dtypes.bfloat16)
    rounded = delta_error((A, B), half, source_scaling=scaling).delta
    assert rounded < 4e-3


def test_only_factors_that_stand_for_the_originals_have_an_error() -> None:
    A, B = draw(0, 5, 4, 2)
    for restores in ("factors", "delta"):
        errors = compare((A, B), (A, B), restores=restores, source_scaling=1.0, scaling=1.0)  # type: ignore[arg-type]
        assert errors.factors == (0.0 if restores == "factors" else None)
    with pytest.raises(ValueError, match="does not fit"):
        delta_error((A, B), B @ A[:, :3])


def test_zero_originals() -> None:
    A, B = np.ones((1, 2)), np.zeros((2, 1))
    same = relative_errors((A, B), (A, B))
    assert (same.factors, same.delta) == (0.0, 0.0)
    other = relative_errors((A, B), (A, B + 1))
    assert other.factors == pytest.approx(1.0)
    assert other.delta == math.inf
    nothing = relative_errors((0 * A, B), (A, B + 1))
    assert (nothing.factors, nothing.delta) == (math.inf, math.inf)
    silent = relative_errors((A, B + 1), (A, B + 2), source_scaling=0.0, scaling=0.0)
    assert silent.delta == 0.0


def test_shapes_must_fit() -> None:
    A, B = draw(0, 3, 4, 2)
    with pytest.raises(ValueError, match="do not fit"):
        relative_errors((A, B), (A[:, :3], B))
    with pytest.raises(ValueError, match="expected A"):
        relative_errors((A, B[:, :1]), (A, B))
