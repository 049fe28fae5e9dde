"""What a new adapter stores under fixed shared tensors."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from formats.kinds import D_IN, D_OUT, KINDS, SCALINGS, dense, encode, originals
from unmerge_bundle import (
    AffineBasisEncoding,
    Fit,
    MaskedDeltaEncoding,
    NonFiniteError,
    RefitError,
    SharedFactorsEncoding,
    fit_adapter,
    reconstruct,
)
from unmerge_bundle.arrays import FLOAT_DTYPES, FloatDtype
from unmerge_bundle.entry import module_entry

Array = npt.NDArray[Any]


def fit(encoding: Any, factors: tuple[Array, Array], **changes: Any) -> Fit:
    options: dict[str, Any] = {"source_scaling": 1.0, "scaling": 1.0, "store_dtype": "float32"}
    entry = module_entry("layers.0", encoding)
    return fit_adapter(entry, encoding.shared_tensors(), factors, **{**options, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "masked"])
@pytest.mark.parametrize("dtype", list(FLOAT_DTYPES))
def test_what_the_shared_tensors_can_say_is_found_again(kind: str, dtype: FloatDtype) -> None:
    encoding = encode(kind, originals(), dtype)
    for name in ("code", "math"):
        A, B = reconstruct(encoding, name, dtype="float32")  # type: ignore[misc]
        scaling = SCALINGS[name]
        found = fit(encoding, (A, B), source_scaling=scaling, scaling=scaling, store_dtype=dtype)
        assert (found.scaling, found.restored_rank) == (scaling, encoding.restored_rank(name))
        tolerance = {"float32": 2e-5, "float16": 8e-3, "bfloat16": 6e-2}[dtype]
        for tensor, expected in encoding.adapter_tensors(name).items():
            assert found.tensors[tensor].dtype == expected.dtype
            if expected.dtype != np.uint8:
                np.testing.assert_allclose(
                    found.tensors[tensor].astype(np.float64),
                    expected.astype(np.float64),
                    rtol=tolerance,
                    atol=3 * tolerance,
                )


@pytest.mark.parametrize("kind", ["quantised4", "quantised8"])
def test_integers_are_those_the_merge_would_have_made(kind: str) -> None:
    encoding = encode(kind, originals())
    for name, factors in originals().items():
        found = fit(encoding, factors)
        expected = encoding.adapter_tensors(name)
        assert found.tensors.keys() == expected.keys()
        for tensor, values in expected.items():
            assert found.tensors[tensor].tobytes() == values.tobytes()


def error(encoding: Any, tensors: dict[str, Array], delta: Array) -> float:
    own = {
        SharedFactorsEncoding: {"cores": tensors.get("core")},
        MaskedDeltaEncoding: {"masks": tensors.get("mask")},
    }[type(encoding)]
    one = dataclasses.replace(
        encoding, names=("x",), scalings=(1.0,), **{k: v[None] for k, v in own.items()}
    )
    return float(np.linalg.norm(dense(one, "x") - delta))


@pytest.mark.parametrize("kind", ["core", "diagonal", "tall"])
def test_cores_are_the_nearest_there_are(kind: str) -> None:
    encoding = encode(kind, originals())
    A, B = originals(3)["math"]
    core = fit(encoding, (A, B)).tensors["core"]
    delta = B.astype(np.float64) @ A.astype(np.float64)
    least = error(encoding, {"core": core}, delta)
    # An independent solution: one system for all entries of the core at once.
    U, V = (encoding.shared_tensors()[k].astype(np.float64) for k in "UV")
    columns = (
        np.einsum("ik,kj->ijk", U, V).reshape(D_OUT * D_IN, -1)
        if kind == "diagonal"
        else np.einsum("ik,lj->ijkl", U, V).reshape(D_OUT * D_IN, -1)
    )
    solved, residual, *_ = np.linalg.lstsq(columns, delta.reshape(-1), rcond=None)
    np.testing.assert_allclose(core.reshape(-1), solved, rtol=1e-4, atol=1e-5)
    assert least == pytest.approx(float(np.sqrt(residual[0])), rel=1e-5)


def test_coefficients_are_the_nearest_at_every_position() -> None:
    encoding: Any = encode("affine", originals())
    A, B = originals(3)["code"]  # rank 2 in a basis of rank 3
    found = fit(encoding, (A, B), source_scaling=2.0, scaling=2.0)
    padded = np.concatenate([A, np.zeros((1, D_IN))])
    for j in range(D_IN):
        basis = encoding.basis_A[:, :, j].T.astype(np.float64)
        expected, *_ = np.linalg.lstsq(basis, padded[:, j] - encoding.mean_A[:, j], rcond=None)
        np.testing.assert_allclose(found.tensors["coefficients_A"][:, j], expected, rtol=1e-5)
    wide = np.concatenate([B, np.zeros((D_OUT, 1))], axis=1)
    for i in range(D_OUT):
        basis = encoding.basis_B[:, i].T.astype(np.float64)
        expected, *_ = np.linalg.lstsq(basis, wide[i] - encoding.mean_B[i], rcond=None)
        np.testing.assert_allclose(found.tensors["coefficients_B"][:, i], expected, rtol=1e-5)
    assert (found.scaling, found.restored_rank) == (2.0, 3)


def test_folded_scalings_are_folded_again() -> None:
    encoding = encode("affine", originals())
    A, B = originals(3)["math"]
    folded = fit(encoding, (A, B), source_scaling=3.0, scaling=1.0)
    expected = fit(encoding, (A, 3 * B))
    assert folded.scaling == 1.0
    for name, tensor in expected.tensors.items():
        np.testing.assert_allclose(folded.tensors[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_dependent_and_empty_directions_get_no_large_numbers(scale: float) -> None:
    affine: Any = encode("affine", originals())
    basis_A, basis_B = affine.basis_A.copy(), affine.basis_B.copy()
    basis_A[1], basis_B[1] = scale * basis_A[0], 0.0
    spoiled = dataclasses.replace(affine, basis_A=basis_A, basis_B=basis_B)
    found = fit(spoiled, originals(3)["math"])
    assert not found.tensors["coefficients_B"][1].any()
    one: Any = AffineBasisEncoding(
        **{
            **vars(affine),
            "basis_A": basis_A[:1],
            "basis_B": basis_B[:1],
            "coefficients_A": affine.coefficients_A[:, :1],
            "coefficients_B": affine.coefficients_B[:, :1],
        }
    )
    single = fit(one, originals(3)["math"]).tensors["coefficients_A"]
    both = found.tensors["coefficients_A"][0] + scale * found.tensors["coefficients_A"][1]
    np.testing.assert_allclose(both, single[0], rtol=1e-4)

    core: Any = encode("diagonal", originals())
    U = core.U.copy()
    U[:, 1], V = U[:, 0], core.V.copy()
    V[1] = V[0]
    twice = fit(dataclasses.replace(core, U=U, V=V), originals(3)["math"]).tensors["core"]
    assert twice[0] == pytest.approx(twice[1], rel=1e-5)


def test_the_empty_basis_has_no_coefficients() -> None:
    affine: Any = encode("affine", originals())
    empty = AffineBasisEncoding(
        **{
            **vars(affine),
            "basis_A": affine.basis_A[:0],
            "basis_B": affine.basis_B[:0],
            "coefficients_A": affine.coefficients_A[:, :0],
            "coefficients_B": affine.coefficients_B[:, :0],
        }
    )
    found = fit(empty, originals(3)["math"])
    assert found.tensors["coefficients_A"].shape == (0, D_IN)
    assert found.tensors["coefficients_B"].shape == (0, D_OUT)


@pytest.mark.parametrize("piece", [1 << 20, 2 * D_IN])
def test_masks_by_hand(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr("unmerge_bundle.fitting._PIECE", piece)
    encoding = encode("masked", originals())
    A, B = originals(3)["math"]
    found = fit(encoding, (A, B), source_scaling=-2.0, scaling=-2.0)
    delta = -2.0 * B.astype(np.float64) @ A.astype(np.float64)
    unified = encoding.shared_tensors()["unified"]
    agree = np.sign(delta) == np.sign(unified)
    np.testing.assert_array_equal(
        np.unpackbits(found.tensors["mask"], axis=1, count=D_IN, bitorder="little"), agree
    )
    expected = np.abs(delta).sum() / np.abs(unified[agree].astype(np.float64)).sum()
    assert found.scaling == pytest.approx(expected, rel=1e-12)
    assert found.restored_rank is None
    # The L1 norm is that of the original.
    one = dataclasses.replace(
        encoding, names=("x",), scalings=(found.scaling,), masks=found.tensors["mask"][None]
    )
    assert np.abs(dense(one, "x")).sum() == pytest.approx(np.abs(delta).sum(), rel=1e-6)
    nothing = fit(encoding, (0 * A, B))
    assert (nothing.scaling, nothing.tensors["mask"].any()) == (1.0, np.False_)


def test_what_does_not_fit_is_refused() -> None:
    A, B = originals()["math"]
    affine: Any = encode("affine", originals())
    tall = np.concatenate([A, A[:1]]), np.concatenate([B, B[:, :1]], axis=1)
    with pytest.raises(RefitError, match="rank 4, the basis 3") as caught:
        fit(affine, tall)
    assert caught.value.code == "refit"
    for kind in KINDS:
        with pytest.raises(RefitError, match="another base model"):
            fit(encode(kind, originals()), (A[:, 1:], B))
        with pytest.raises(RefitError, match="another base model"):
            fit(encode(kind, originals()), (A, B[1:]))
    # Factors of any rank are fine where they are kept as they are.
    assert fit(encode("own", originals()), tall).restored_rank == 4
    with pytest.raises(NonFiniteError, match="float16"):
        fit(encode("own", originals(), "float16"), (A * 1e6, B), store_dtype="float16")
    with pytest.raises(NonFiniteError, match="coefficients_A"):
        fit(encode("affine", originals(), "float16"), (A * 1e7, B), store_dtype="float16")
