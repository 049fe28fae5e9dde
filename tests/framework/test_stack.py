"""FactorStack: order, padding, presence, refusals, and what a module looks like."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stacks import collection, random_factors
from unmerge.adapter import Factors
from unmerge.errors import IncompatibleAdaptersError
from unmerge.stack import FactorStack, ModuleShape


def factors(seed: int = 0, rank: int = 2, d_out: int = 3, d_in: int = 4) -> Factors:
    return random_factors(seed, rank=rank, d_out=d_out, d_in=d_in, scaling=1.0 + seed)


def test_adapters_and_modules_are_sorted() -> None:
    a, b = factors(1), factors(2)
    stack = FactorStack.build(
        [("m.1", [("z", a), ("b", b)]), ("m.0", [("b", a), ("z", b)])],
        ["z", "b"],
        dtype=torch.float64,
    )
    assert stack.modules == ("m.0", "m.1")
    assert stack.adapters == ("b", "z")
    assert torch.equal(stack.A[0, 0], a.A)
    assert torch.equal(stack.A[1, 0], b.A)
    assert stack.scalings.tolist() == [[2.0, 3.0], [3.0, 2.0]]


def test_padding_and_absence_are_zeros_that_no_module_shows() -> None:
    small, large = factors(1, rank=1), factors(2, rank=3)
    stack = FactorStack.build(
        [("m.0", [("a", small), ("c", large)]), ("m.1", [("b", small)])], ["a", "b", "c"]
    )
    assert stack.A.shape == (2, 3, 3, 4)
    assert stack.B.shape == (2, 3, 3, 3)
    assert (len(stack), stack.d_out, stack.d_in) == (2, 3, 4)
    assert stack.ranks.tolist() == [[1, 0, 3], [0, 1, 0]]
    assert stack.present.tolist() == [[True, False, True], [False, True, False]]
    assert not stack.A[0, 0, 1:].any()
    assert not stack.B[0, 0, :, 1:].any()
    assert not stack.A[0, 1].any()
    first, second = stack
    assert first.adapters == ("a", "c")
    assert [f.A.shape for f in first.factors] == [(1, 4), (3, 4)]
    assert [f.B.shape for f in first.factors] == [(3, 1), (3, 3)]
    assert first.shape == ModuleShape("m.0", 3, 4, first.adapters, (1, 3))
    assert first.shape.elements == 4 * (3 + 4)
    assert second.adapters == ("b",)
    assert [name for name, _ in first] == ["a", "c"]


def test_a_module_gives_the_factors_back_bit_for_bit() -> None:
    case = collection((2, 5, 3), scalings=(0.1, 16 / 5**0.5, -2.0))
    for dtype in (torch.float32, torch.float64):
        for name, f in case.stack(dtype).module(0):
            original = case.modules["layer.0"][name]
            assert torch.equal(f.A, original.A.to(dtype))
            assert torch.equal(f.B, original.B.to(dtype))
            assert f.scaling == original.scaling
            assert f.A.is_contiguous()
            assert f.B.is_contiguous()


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_stored_dtypes_widen_without_loss(stored: torch.dtype) -> None:
    f = factors()
    narrow = Factors(A=f.A.to(stored), B=f.B.to(stored), scaling=1.0)
    [module] = FactorStack.build([("m", [("a", narrow)])], ["a"])
    assert module.factors[0].A.dtype == torch.float32
    assert torch.equal(module.factors[0].A.to(stored), narrow.A)


def test_writing_to_a_module_leaves_the_stack_alone() -> None:
    stack = collection().stack()
    before = stack.A.clone()
    module = stack.module(0)
    module.factors[0].A.fill_(7.0)
    module.factors[0].B.fill_(7.0)
    assert torch.equal(stack.A, before)


def test_narrowing_keeps_everything_of_one_module() -> None:
    case = collection((2, 5, 3), paths=("m.0", "m.1", "m.2"))
    stack = case.stack()
    one = stack.narrow(1)
    assert one.modules == ("m.1",)
    assert one.adapters == stack.adapters
    assert torch.equal(one.A, stack.A[1:2])
    assert torch.equal(one.ranks, stack.ranks[1:2])
    assert torch.equal(one.scalings, stack.scalings[1:2])
    assert one.A.data_ptr() == stack.A[1].data_ptr()


def of_kind(kind: str, seed: int = 0) -> Factors:
    return dataclasses.replace(factors(seed), kind=kind)


def test_modules_of_one_shape_may_be_layers_of_several_kinds() -> None:
    stack = FactorStack.build(
        [
            ("m.2", [("a", of_kind("embedding"))]),
            ("m.0", [("a", of_kind("conv2d:2x2", 1)), ("b", of_kind("conv2d:2x2", 2))]),
            ("m.1", [("b", factors())]),
        ],
        ["a", "b"],
    )
    assert stack.kinds == ("conv2d:2x2", "linear", "embedding")
    assert [module.shape.kind for module in stack] == list(stack.kinds)
    assert [f.kind for f in stack.module(0).factors] == ["conv2d:2x2", "conv2d:2x2"]
    assert stack.narrow(2).kinds == ("embedding",)
    assert stack.narrow(2).module(0).shape == stack.module(2).shape


def test_adapters_that_disagree_on_the_kind_are_refused_by_name() -> None:
    pairs = [("a", factors()), ("b", of_kind("conv2d:2x2")), ("c", of_kind("conv2d:2x2"))]
    with pytest.raises(
        IncompatibleAdaptersError,
        match=r'^m: adapters disagree on the kind of layer: conv2d:2x2 in "b", linear in "a"; ',
    ):
        FactorStack.build([("m", pairs)], ["a", "b", "c"])


def test_a_stack_without_any_adapter_is_refused() -> None:
    with pytest.raises(IncompatibleAdaptersError, match="at least one adapter"):
        FactorStack.build([], ["a"])
    with pytest.raises(IncompatibleAdaptersError, match="at least one adapter"):
        FactorStack.build([("m", [])], ["a"])


def test_another_shape_is_refused_by_name() -> None:
    with pytest.raises(
        IncompatibleAdaptersError,
        match=r'^m: adapter "b" has shape \(3, 5\), expected \(3, 4\); .* same base model',
    ):
        FactorStack.build([("m", [("a", factors()), ("b", factors(d_in=5))])], ["a", "b"])


def test_an_adapter_that_is_not_selected_is_refused() -> None:
    with pytest.raises(IncompatibleAdaptersError, match=r'^m: adapter "b" is not selected'):
        FactorStack.build([("m", [("b", factors())])], ["a"])


def test_an_adapter_named_twice_is_refused() -> None:
    """Otherwise the second silently replaces the first."""
    with pytest.raises(IncompatibleAdaptersError, match='"a"'):
        FactorStack.build([("m", [("a", factors(1)), ("a", factors(2))])], ["a"])
    with pytest.raises(IncompatibleAdaptersError, match='"a"'):
        FactorStack.build([("m", [("a", factors(1))])], ["a", "a"])


def test_a_module_named_twice_is_refused() -> None:
    pairs = [("a", factors())]
    with pytest.raises(IncompatibleAdaptersError, match="m"):
        FactorStack.build([("m", pairs), ("m", pairs)], ["a"])
