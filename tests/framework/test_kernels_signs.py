"""Sign election against the formula, and what makes it independent of blocks."""

from __future__ import annotations

import pytest
import torch

from unmerge.errors import NonFiniteError
from unmerge.kernels.signs import elected_signs


def test_by_value_and_by_count_by_hand() -> None:
    #        sum: 3 − 1 − 1 = 1   −2   0   0      count: −1   −2   0   0
    values = torch.tensor([[3.0, -2.0, 0.0, 2.0], [-1.0, 0.0, 0.0, -2.0], [-1.0, 0.0, 0.0, 0.0]])
    assert elected_signs(values).tolist() == [1.0, -1.0, 0.0, 0.0]
    assert elected_signs(values, by_count=True).tolist() == [-1.0, -1.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("by_count", [False, True])
def test_the_shape_and_dtype_are_kept_and_nothing_is_written(
    by_count: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 6, 7, generator=generator, dtype=dtype)
    before = values.clone()
    signs = elected_signs(values, by_count=by_count)
    assert torch.equal(values, before)
    assert (signs.dtype, signs.shape) == (dtype, (6, 7))
    total = (values.sign() if by_count else values).double().sum(dim=0)
    assert torch.equal(signs, total.sign().to(dtype))


def test_an_entry_is_summed_by_itself_in_the_order_given() -> None:
    """10¹⁶ + 1 is 10¹⁶ in float64: the vote is what this order of additions gives."""
    values = torch.tensor([[1e16], [-1e16], [1.0]], dtype=torch.float64)
    assert elected_signs(values).tolist() == [1.0]
    assert elected_signs(values[[0, 2, 1]]).tolist() == [0.0]
    # A wide block takes vector instructions, a single entry does not.
    assert torch.equal(elected_signs(values.expand(3, 1000)), torch.ones(1000).double())


def test_one_adapter_elects_its_own_signs() -> None:
    assert elected_signs(torch.tensor([[-0.0, 1e-45, -3.0]])).tolist() == [0.0, 1.0, -1.0]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("by_count", [False, True])
def test_what_is_not_finite_is_no_vote(by_count: bool, wrong: float) -> None:
    values = torch.zeros(3, 4, 5)
    values[1, 2, 3] = wrong
    with pytest.raises(NonFiniteError, match="which is no vote; check the scalings"):
        elected_signs(values, by_count=by_count)
