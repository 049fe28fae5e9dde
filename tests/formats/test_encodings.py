from typing import Any

import numpy as np
import pytest

from unmerge_bundle import AffineBasisEncoding, FactorsEncoding


class Counted(str):
    """A name that counts how often it is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def affine(count: int) -> AffineBasisEncoding[Any]:
    return AffineBasisEncoding(
        names=tuple(Counted(f"a{n}") for n in range(count)),
        scalings=(1.0,) * count,
        mean_A=np.zeros((1, 2)),
        basis_A=np.zeros((1, 1, 2)),
        coefficients_A=np.arange(2.0 * count).reshape(count, 1, 2),
        mean_B=np.zeros((3, 1)),
        basis_B=np.zeros((1, 3, 1)),
        coefficients_B=np.arange(3.0 * count).reshape(count, 1, 3),
    )


def test_adapter_tensors_are_found_without_a_search() -> None:
    count = 200
    encoding = affine(count)
    Counted.compared = 0
    for n in range(count):
        tensors = encoding.adapter_tensors(f"a{n}")
        assert tensors["coefficients_A"].tolist() == [[2.0 * n, 2.0 * n + 1]]
        assert tensors["coefficients_B"].tolist() == [[3.0 * n, 3.0 * n + 1, 3.0 * n + 2]]
    assert Counted.compared < 10 * count  # a search compares count² / 2 times


def test_unknown_adapters_have_no_tensors() -> None:
    for encoding in (affine(2), FactorsEncoding[Any](A=np.zeros((1, 2)), B=np.zeros((3, 1)))):
        with pytest.raises(KeyError, match="nobody"):
            encoding.adapter_tensors("nobody")


def test_a_changed_copy_finds_its_own_adapters() -> None:
    encoding = affine(2)
    encoding.adapter_tensors("a1")
    doubled = encoding.map(lambda tensor: 2 * tensor)
    assert doubled.adapter_tensors("a1")["coefficients_A"].tolist() == [[4.0, 6.0]]
