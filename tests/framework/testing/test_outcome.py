"""What encodings mean: the kit's formulas against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from unmerge import (
    AdapterFactorsEncoding,
    AffineBasisEncoding,
    DeltaEncoding,
    FactorsEncoding,
    MaskedDeltaEncoding,
    QuantisedMatrix,
    SharedFactorsEncoding,
)
from unmerge.testing import deltas
from unmerge.testing.outcome import bits, check_close, check_same_bits
from unmerge.testing.results import Violation


def t(*rows: object, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(list(rows), dtype=dtype)


def test_merged_encodings() -> None:
    factors = FactorsEncoding(A=t([1, 2]), B=t([3], [4]))
    assert deltas(factors)[""].tolist() == [[3, 6], [4, 8]]
    delta = DeltaEncoding(delta=t([1, 2]))
    assert deltas(delta)[""].dtype == torch.float64
    assert deltas(delta)[""].tolist() == [[1, 2]]


def test_an_affine_basis() -> None:
    encoding = AffineBasisEncoding(
        names=("a", "b"),
        scalings=(2.0, 1.0),
        mean_A=t([1, 1]),
        basis_A=t([[1, 0]]),
        coefficients_A=t([[3, 9]], [[0, 0]]),
        mean_B=t([1], [0]),
        basis_B=t([[0], [1]]),
        coefficients_B=t([[7, 5]], [[0, 0]]),
    )
    # A of a is [1 + 3·1, 1 + 9·0], B is [1 + 7·0, 0 + 5·1].
    assert deltas(encoding)["a"].tolist() == [[8, 2], [40, 10]]
    assert deltas(encoding)["b"].tolist() == [[1, 1], [0, 0]]


def test_shared_factors_with_full_and_diagonal_cores() -> None:
    full = SharedFactorsEncoding(
        names=("a",),
        scalings=(0.5,),
        U=t([1, 0], [0, 2]),
        V=t([1, 0], [0, 1]),
        cores=t([[1, 2], [3, 4]]),
    )
    assert deltas(full)["a"].tolist() == [[0.5, 1], [3, 4]]
    assert deltas(replace(full, cores=t([2, 4])))["a"].tolist() == [[1, 0], [0, 4]]


def test_a_masked_delta() -> None:
    encoding = MaskedDeltaEncoding(
        names=("a",),
        scalings=(2.0,),
        unified=t(list(range(1, 10)), [1] * 9),
        # Columns 0 and 2, and column 8, which is the first of the second byte.
        masks=t([[0b101, 0b1], [0, 0]], dtype=torch.uint8),
    )
    assert deltas(encoding)["a"].tolist() == [[2, 0, 6, 0, 0, 0, 0, 0, 18], [0] * 9]


def test_adapters_factors_raw_and_quantised() -> None:
    raw = AdapterFactorsEncoding(
        names=("a",),
        scalings=(2.0,),
        A=(t([1, 2, 3]),),
        B_transposed=(t([1, 10]),),
        d_out=2,
        d_in=3,
    )
    assert deltas(raw)["a"].tolist() == [[2, 4, 6], [20, 40, 60]]
    # Codes 9, 7, 15 in halves of bytes, low one first: 1, −1, 7 times their group's scale.
    A = QuantisedMatrix(
        codes=t([0x79, 0x0F], dtype=torch.uint8),
        scales=t([0.5, 2]),
        bits=4,
        group_size=2,
        columns=3,
    )
    B_transposed = QuantisedMatrix(
        codes=t([129, 127], dtype=torch.uint8), scales=t([3]), bits=8, group_size=64, columns=2
    )
    quantised = replace(raw, A=(A,), B_transposed=(B_transposed,))
    assert deltas(quantised)["a"].tolist() == [[3, -3, 84], [-3, 3, -84]]


def test_bits_see_everything() -> None:
    one = DeltaEncoding(delta=t([0.0, 1.0]))
    others = [
        DeltaEncoding(delta=t([-0.0, 1.0])),
        DeltaEncoding(delta=t([0.0, 1.0]).double()),
        DeltaEncoding(delta=t([0.0], [1.0])),
        DeltaEncoding(delta=t([0.0, 1.0]), facts={"steps": 3.0}),
        FactorsEncoding(A=t([0.0, 1.0]), B=t([1.0])),
    ]
    assert bits(one) == bits(DeltaEncoding(delta=t([0.0, 1.0])))
    assert len({bits(encoding) for encoding in (one, *others)}) == 6
    with pytest.raises(Violation):
        check_same_bits("here", {"m": one}, {"m": others[0]}, "the same")


def test_distances_are_relative_to_what_went_in() -> None:
    small, off = DeltaEncoding(delta=t([1e-6])), DeltaEncoding(delta=t([2e-6]))
    with pytest.raises(Violation) as caught:
        check_close("here", {"m": small}, {"m": off}, "the same", tolerance=1e-5)
    assert caught.value.case == "here, module m"
    check_close("here", {"m": small}, {"m": off}, "the same", tolerance=1e-5, scale=1.0)


@pytest.mark.parametrize("wrong", [t([float("nan")]), t([1.0, 1.0])], ids=["NaN", "another shape"])
def test_nan_and_other_shapes_are_never_close(wrong: torch.Tensor) -> None:
    one = {"m": DeltaEncoding(delta=t([1.0]))}
    with pytest.raises(Violation):
        check_close("here", one, {"m": DeltaEncoding(delta=wrong)}, "the same", tolerance=1e9)


def test_other_adapters_are_never_close() -> None:
    kept = AdapterFactorsEncoding(
        names=("a",), scalings=(1.0,), A=(t([1.0]),), B_transposed=(t([1.0]),), d_out=1, d_in=1
    )
    with pytest.raises(Violation):
        check_close(
            "here", {"m": kept}, {"m": replace(kept, names=("b",))}, "the same", tolerance=1e9
        )
