"""The laws of all built-in strategies: identity, scaling, order, stacking, gauge, purity."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from stacks import (
    ALL_CASES,
    EQUAL_RANK_CASES,
    Case,
    Result,
    collection,
    delta,
    merge,
    regauge,
    relative,
    rescaled,
    restored,
    same_bits,
)
from unmerge.merger import Merger
from unmerge_strategies import Average, MmSvd, Rmm, TaskArithmetic

MERGING: tuple[Merger, ...] = (
    TaskArithmetic(scale=0.7),
    Average(),
    MmSvd(rank=3),
    MmSvd(rank=2, inner=Average(), split="balanced"),
)
STRATEGIES: tuple[Merger, ...] = (*MERGING, Rmm(basis_size=2), Rmm(basis_size=1, fold_scaling=True))


def cases(merger: Merger) -> tuple[Case, ...]:
    return ALL_CASES if merger.capabilities.mixed_ranks else EQUAL_RANK_CASES


def pairs(mergers: tuple[Merger, ...]) -> list[object]:
    return [
        pytest.param(merger, case, id=f"{merger.method}-{n}-{case}")
        for n, merger in enumerate(mergers)
        for case in cases(merger)
    ]


def deltas(encoding: Result) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    """Return the merged delta, or every restored one."""
    if not encoding.adapters:
        return [delta(encoding)]
    parts = [restored(encoding, name) for name in encoding.adapters]
    return [scaling * (B @ A) for A, B, scaling in parts]


@pytest.mark.parametrize("merger", [TaskArithmetic(), Average(), MmSvd(), Rmm()], ids=str)
@pytest.mark.parametrize("scaling", [1.0, 16 / 8, 16 / 8**0.5, -3.0])
def test_one_adapter_gives_itself(merger: Merger, scaling: float) -> None:
    case = collection((8,), scalings=(scaling,))
    [f] = case.modules["layer.0"].values()
    [merged] = deltas(merge(merger, case)["layer.0"])
    assert relative(merged, scaling * (f.B @ f.A).numpy()) < 1e-13


@pytest.mark.parametrize(("merger", "case"), pairs(MERGING))
def test_it_does_not_matter_which_factor_holds_a_number(merger: Merger, case: Case) -> None:
    """`(B, A, 2s)`, `(2B, A, s)` and `(B, 2A, s)` are one adapter."""
    ways = [
        merge(merger, way)
        for way in (rescaled(case, scaling=2.0), rescaled(case, B=2.0), rescaled(case, A=2.0))
    ]
    for path in case.modules:
        first, *others = [delta(way[path]) for way in ways]
        for other in others:
            assert relative(other, first) < 1e-12


@pytest.mark.parametrize("merger", MERGING, ids=str)
def test_doubling_a_weight_doubles_that_part_where_declared(merger: Merger) -> None:
    case = collection((4, 4, 4), weights=(1.0, 0.5, -3.0))
    heavier = replace(case, weights={**case.weights, "b": 1.0})
    alone = replace(case, weights={"a": 0.0, "b": 0.5, "c": 0.0})

    def merged(c: Case) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return delta(merge(merger, c)["layer.0"])

    linear = relative(merged(heavier) - merged(case), merged(alone)) < 1e-12
    assert linear == merger.capabilities.weight_scales_delta


@pytest.mark.parametrize("merger", [MmSvd(rank=2), MmSvd(rank=2, inner=TaskArithmetic(scale=3.0))])
def test_doubling_all_weights_doubles_the_truncated_sum(merger: Merger) -> None:
    case = collection((4, 4), weights=(1.0, 0.5))
    double = replace(case, weights={"a": 2.0, "b": 1.0})
    once, twice = (delta(merge(merger, c)["layer.0"]) for c in (case, double))
    assert relative(twice, 2 * once) < 1e-12


@pytest.mark.parametrize(("merger", "case"), pairs(STRATEGIES))
def test_the_order_of_the_adapters_is_irrelevant_bit_for_bit(merger: Merger, case: Case) -> None:
    backwards = replace(case, weights=dict(sorted(case.weights.items(), reverse=True)))
    forward = merger.merge(case.stack(torch.float32), case.context())
    reverse = merger.merge(case.stack(torch.float32, reverse=True), backwards.context())
    assert len(forward) == len(reverse) == len(case.modules)
    for left, right in zip(forward, reverse, strict=True):
        assert same_bits(left, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("merger", STRATEGIES, ids=str)
def test_a_stack_is_merged_as_its_modules_one_by_one_bit_for_bit(
    merger: Merger, dtype: torch.dtype
) -> None:
    # Ranks differ from module to module, so that the shared stack pads some of them.
    paths = ("m.3", "m.1", "m.0", "m.2")
    case = collection((5, 5, 5), paths=paths, d_out=33, d_in=17)
    smaller = collection((2, 2, 2), paths=("m.1",), d_out=33, d_in=17, seed=8)
    lacking = {name: f for name, f in case.modules["m.3"].items() if name != "b"}
    case = replace(case, modules={**case.modules, **smaller.modules, "m.3": lacking})
    stack, context = case.stack(dtype), case.context()
    together = merger.merge(stack, context)
    for index, path in enumerate(stack.modules):
        [narrowed] = merger.merge(stack.narrow(index), context)
        [rebuilt] = merger.merge(replace(case.only(path)).stack(dtype), context)
        assert same_bits(narrowed, together[index])
        assert same_bits(rebuilt, together[index])


@pytest.mark.parametrize("merger", MERGING, ids=str)
@pytest.mark.parametrize("case", [c for c in ALL_CASES if "above" not in c.name], ids=str)
def test_merged_deltas_do_not_depend_on_the_gauge(merger: Merger, case: Case) -> None:
    other = merge(merger, regauge(case))
    for path, encoding in merge(merger, case).items():
        parts = case.parts(path)
        scale = sum(abs(s * w) * float(np.linalg.norm(B @ A)) for A, B, s, w in parts)
        assert relative(delta(other[path]), delta(encoding), scale=scale) < 1e-10


@pytest.mark.parametrize(("merger", "case"), pairs(STRATEGIES))
def test_inputs_are_not_written_to(merger: Merger, case: Case) -> None:
    stack = case.stack(torch.float32)
    before = [t.clone() for t in (stack.A, stack.B, stack.ranks, stack.scalings)]
    merger.merge(stack, case.context())
    for tensor, copy in zip((stack.A, stack.B, stack.ranks, stack.scalings), before, strict=True):
        assert torch.equal(tensor, copy)
