from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from unmerge_bundle import AffineBasisEncoding, NonFiniteError, reconstruct
from unmerge_bundle.arrays import FLOAT_DTYPES, FloatDtype

Array = npt.NDArray[Any]


def hand_made(dtype: Any = np.float32) -> AffineBasisEncoding[Array]:
    """Rank 1, d_in 2, d_out 2, basis of 2: small enough to restore with a pencil."""

    def a(values: object) -> Array:
        return np.array(values, dtype=dtype)

    return AffineBasisEncoding(
        names=("x", "y"),
        scalings=(1.0, 1.0),
        mean_A=a([[1, 2]]),
        basis_A=a([[[1, 0]], [[0.5, 4]]]),
        coefficients_A=a([[[2, 7], [4, 0.25]], [[0, 0], [0, 0]]]),
        mean_B=a([[1], [-1]]),
        basis_B=a([[[2], [3]], [[1], [1]]]),
        coefficients_B=a([[[1, 2], [-1, 0.5]], [[0, 0], [0, 0]]]),
    )


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", list(FLOAT_DTYPES))
def test_hand_computed_case_in_every_dtype(stored: Any, dtype: FloatDtype) -> None:
    A, B = reconstruct(hand_made(stored), "x", dtype=dtype)
    # A[0,0] = 1 + 2·1 + 4·0.5, A[0,1] = 2 + 7·0 + 0.25·4
    assert A.astype(np.float32).tolist() == [[5.0, 3.0]]
    # B[0,0] = 1 + 1·2 − 1·1, B[1,0] = −1 + 2·3 + 0.5·1
    assert B.astype(np.float32).tolist() == [[2.0], [5.5]]
    assert A.dtype == B.dtype == FLOAT_DTYPES[dtype]
    mean_A, mean_B = reconstruct(hand_made(stored), "y", dtype=dtype)
    assert mean_A.astype(np.float32).tolist() == [[1.0, 2.0]]
    assert mean_B.astype(np.float32).tolist() == [[1.0], [-1.0]]


def test_terms_are_added_in_ascending_order_without_fusing() -> None:
    rng = np.random.default_rng(1)
    p, r, d = 5, 3, 40
    mean = rng.standard_normal((r, d)).astype(np.float32)
    basis = rng.standard_normal((p, r, d)).astype(np.float32)
    coefficients = rng.standard_normal((1, p, d)).astype(np.float32)
    encoding = AffineBasisEncoding[Array](
        names=("x",),
        scalings=(1.0,),
        mean_A=mean,
        basis_A=basis,
        coefficients_A=coefficients,
        mean_B=mean.T.copy(),
        basis_B=basis.transpose(0, 2, 1).copy(),
        coefficients_B=coefficients,
    )
    expected = np.empty((r, d), dtype=np.float32)
    for i in range(r):
        for j in range(d):
            value = mean[i, j]
            for k in range(p):
                value = np.float32(value + np.float32(coefficients[0, k, j] * basis[k, i, j]))
            expected[i, j] = value
    A, B = reconstruct(encoding, "x", dtype="float32")
    assert A.tobytes() == expected.tobytes()
    assert B.tobytes() == expected.T.tobytes()
    # One rounding at the end, from float32.
    half, _ = reconstruct(encoding, "x", dtype="bfloat16")
    assert half.tobytes() == expected.astype(ml_dtypes.bfloat16).tobytes()


def test_inputs_stay_unchanged_and_results_are_copies() -> None:
    encoding = hand_made()
    before = {name: t.copy() for name, t in encoding.shared_tensors().items()}
    A, _ = reconstruct(encoding, "x", dtype="float32")
    A[...] = 99
    for name, tensor in encoding.shared_tensors().items():
        np.testing.assert_array_equal(tensor, before[name])


@pytest.mark.parametrize(
    ("dtype", "value"), [("float16", 70000.0), ("bfloat16", 3.4e38), ("float32", 3e38)]
)
def test_overflow_is_an_error(dtype: FloatDtype, value: float) -> None:
    encoding = hand_made()
    encoding.mean_A[0, 0] = value
    encoding.coefficients_A[0, 0, 0] = value if dtype == "float32" else 0.0
    encoding.basis_A[0, 0, 0] = 2.0
    with pytest.raises(NonFiniteError, match=f"finite in {dtype}") as caught:
        reconstruct(encoding, "x", dtype=dtype, path="layers.0")
    assert "layers.0" in caught.value.path
    assert "'x'" in caught.value.path


def test_empty_basis_gives_the_mean() -> None:
    full = hand_made()
    encoding = AffineBasisEncoding[Array](
        names=("x",),
        scalings=(1.0,),
        mean_A=full.mean_A,
        basis_A=full.basis_A[:0],
        coefficients_A=full.coefficients_A[:1, :0],
        mean_B=full.mean_B,
        basis_B=full.basis_B[:0],
        coefficients_B=full.coefficients_B[:1, :0],
    )
    A, B = reconstruct(encoding, "x", dtype="float32")
    assert (A.tolist(), B.tolist()) == ([[1.0, 2.0]], [[1.0], [-1.0]])


def test_unknown_adapter() -> None:
    with pytest.raises(KeyError):
        reconstruct(hand_made(), "z", dtype="float32")
