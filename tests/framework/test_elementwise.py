"""ElementwiseMerger: four rules, each against a dense reference, at every block height."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import oracles
from stacks import (
    ALL_CASES,
    EQUAL_RANK_CASES,
    MIXED_RANK_CASES,
    Case,
    SumRule,
    collection,
    delta,
    merge,
    regauge,
    relative,
    rescaled,
    same_bits,
    stored_elements,
)
from unmerge.adapter import Factors
from unmerge.elementwise import ElementwiseMerger
from unmerge.errors import CapabilityError, ConfigError, IncompatibleAdaptersError
from unmerge.kernels import stream_key
from unmerge.matrices import Block, Blocks, PartWeights
from unmerge.merger import Capabilities, MergeContext, Passes
from unmerge_bundle.encodings import DeltaEncoding, FactorsEncoding

HEIGHTS = (1, 7, 64, 100, 1000)
Arrays = dict[str, oracles.Matrix]


class Trim(ElementwiseMerger, frozen=True):
    """Keep entries of at least `share` of the adapter's largest; divide by how many were kept.

    Needs two passes: the largest magnitude first, then the count above the cut.
    """

    method = "test.trim"
    share: float = 0.5

    def measure(self, blocks: Blocks, context: MergeContext) -> dict[str, tuple[float, int]]:
        largest: dict[str, float] = {}
        for block in blocks:
            for name, values in zip(block.adapters, block.values, strict=True):
                largest[name] = max(largest.get(name, 0.0), float(values.abs().max()))
        kept = dict.fromkeys(largest, 0)
        for block in blocks:
            for name, values in zip(block.adapters, block.values, strict=True):
                kept[name] += int((values.abs() >= self.share * largest[name]).sum())
        return {name: (self.share * largest[name], kept[name]) for name in largest}

    def combine(self, block: Block, state: dict[str, tuple[float, int]]) -> torch.Tensor:
        total = torch.zeros_like(block.values[0])
        for n, name in enumerate(block.adapters):
            cut, kept = state[name]
            values = block.values[n]
            total = total + values * (values.abs() >= cut) * (float(block.weights[n]) / kept)
        return total


class GlobalMax(ElementwiseMerger, frozen=True):
    """Divide each adapter by its largest magnitude over all modules, then sum."""

    method = "test.global_max"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(needs_survey=True)

    def measure(self, blocks: Blocks, context: MergeContext) -> dict[str, float]:
        largest = dict.fromkeys(context.adapters, 0.0)
        for block in blocks:
            for name, values in zip(block.adapters, block.values, strict=True):
                largest[name] = max(largest[name], float(values.abs().max()))
        return largest

    def combine(self, block: Block, state: dict[str, float]) -> torch.Tensor:
        total = torch.zeros_like(block.values[0])
        for n, name in enumerate(block.adapters):
            total = total + block.values[n] * (float(block.weights[n]) / (state[name] or 1.0))
        return total


class Drop(ElementwiseMerger, frozen=True):
    """Drop entries at random, rescale the survivors, sum."""

    method = "test.drop"
    density: float = 0.4

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(stochastic=True)

    def combine(self, block: Block, state: Any) -> torch.Tensor:
        kept = block.uniform("drop") < self.density
        total = torch.zeros_like(block.values[0])
        for values, weight, mask in zip(block.values, block.weights.tolist(), kept, strict=True):
            total = total + values * mask * (weight / self.density)
        return total


def matrices(case: Case, path: str, part: str) -> Arrays:
    """Return the dense matrix a rule sees, by adapter."""
    result = {}
    for name, f in sorted(case.modules[path].items()):
        A, B = f.A.numpy(), f.B.numpy()
        root = np.sqrt(abs(f.scaling))
        result[name] = {
            "delta": f.scaling * (B @ A),
            "A": np.sign(f.scaling) * root * A,
            "B": root * B,
        }[part]
    return result


def weight(case: Case, name: str, part: str) -> float:
    """Return a weight as the matrix takes it: of two factors each takes the root, A the sign."""
    w = case.weight(name)
    return float({"delta": w, "A": np.sign(w) * np.sqrt(abs(w)), "B": np.sqrt(abs(w))}[part])


def dense_sum(case: Case, path: str, part: str) -> oracles.Matrix:
    return np.asarray(
        sum(weight(case, name, part) * x for name, x in matrices(case, path, part).items())
    )


def dense_trim(case: Case, path: str, part: str) -> oracles.Matrix:
    total = np.zeros(1)
    for name, x in matrices(case, path, part).items():
        kept = np.abs(x) >= 0.5 * np.abs(x).max()
        total = total + weight(case, name, part) * x * kept / kept.sum()
    return total


def dense_global_max(case: Case, path: str, part: str) -> oracles.Matrix:
    parts = ["delta"] if part == "delta" else ["A", "B"]
    total = np.zeros(1)
    for name, x in matrices(case, path, part).items():
        everywhere = [
            np.abs(matrices(case, p, q)[name]).max()
            for p, having in case.modules.items()
            if name in having
            for q in parts
        ]
        total = total + weight(case, name, part) * x / (max(everywhere) or 1.0)
    return total


def dense_drop(case: Case, path: str, part: str) -> oracles.Matrix:
    total = np.zeros(1)
    for name, x in matrices(case, path, part).items():
        key = stream_key(11, "drop", name, path, part)
        draws = np.array([(b >> 11) / 2**53 for b in oracles.splitmix64(key, x.size)])
        total = total + weight(case, name, part) * x * (draws.reshape(x.shape) < 0.4) / 0.4
    return total


Reference = Callable[[Case, str, str], oracles.Matrix]
RULES: list[tuple[type[ElementwiseMerger], Reference]] = [
    (SumRule, dense_sum),
    (Trim, dense_trim),
    (GlobalMax, dense_global_max),
    (Drop, dense_drop),
]
RULE_IDS = [rule.__name__ for rule, _ in RULES]


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
@pytest.mark.parametrize(("rule", "reference"), RULES, ids=RULE_IDS)
def test_in_delta_space_a_rule_sees_the_deltas(
    rule: type[ElementwiseMerger], reference: Reference, case: Case
) -> None:
    for path, encoding in merge(rule(), case, seed=11).items():
        assert isinstance(encoding, DeltaEncoding)
        assert relative(delta(encoding), reference(case, path, "delta")) < 1e-12


@pytest.mark.parametrize("case", EQUAL_RANK_CASES, ids=str)
@pytest.mark.parametrize(("rule", "reference"), RULES, ids=RULE_IDS)
def test_in_factor_space_a_rule_sees_each_factor_with_the_root_of_the_scaling(
    rule: type[ElementwiseMerger], reference: Reference, case: Case
) -> None:
    for path, encoding in merge(rule(space="factors"), case, seed=11).items():
        assert isinstance(encoding, FactorsEncoding)
        assert relative(encoding.A.numpy(), reference(case, path, "A")) < 1e-12
        assert relative(encoding.B.numpy(), reference(case, path, "B")) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("space", ["delta", "factors"])
@pytest.mark.parametrize("rule", [rule for rule, _ in RULES], ids=RULE_IDS)
def test_every_block_height_gives_the_same_bits(
    rule: type[ElementwiseMerger], space: Any, dtype: torch.dtype
) -> None:
    case = collection((5, 5, 5), paths=("m.0", "m.1"), d_out=150, d_in=9, weights=(1.0, -0.3, 2.0))
    first, *others = [
        merge(rule(space=space), case, dtype=dtype, seed=11, block_rows=rows) for rows in HEIGHTS
    ]
    for other in others:
        for path in case.modules:
            assert same_bits(first[path], other[path])


@pytest.mark.parametrize("space", ["delta", "factors"])
@pytest.mark.parametrize("rule", [rule for rule, _ in RULES], ids=RULE_IDS)
def test_a_stack_is_its_modules_one_by_one(rule: type[ElementwiseMerger], space: Any) -> None:
    case = collection((5, 5, 5), paths=("m.1", "m.0", "m.2"), d_out=70, d_in=9)
    merger = rule(space=space)
    stack = case.stack(torch.float32)
    state = merger.survey(Passes(lambda: [stack]), case.context())
    one_by_one = merger.survey(Passes(lambda: map(stack.narrow, range(3))), case.context())
    assert state == one_by_one
    context = case.context(state=state)
    together = merger.merge(stack, context)
    for index in range(3):
        [alone] = merger.merge(stack.narrow(index), context)
        assert same_bits(alone, together[index])


@pytest.mark.parametrize("space", ["delta", "factors"])
@pytest.mark.parametrize("rule", [rule for rule, _ in RULES], ids=RULE_IDS)
def test_the_order_of_the_adapters_is_irrelevant_bit_for_bit(
    rule: type[ElementwiseMerger], space: Any
) -> None:
    case, merger = collection((5, 5, 5)), rule(space=space)
    results = []
    for reverse in (False, True):
        stack = case.stack(torch.float32, reverse=reverse)
        context = case.context(state=merger.survey(Passes(lambda s=stack: [s]), case.context()))  # type: ignore[misc]
        results.append(merger.merge(stack, context)[0])
    assert same_bits(*results)


@pytest.mark.parametrize("rule", [rule for rule, _ in RULES], ids=RULE_IDS)
def test_it_does_not_matter_which_factor_holds_a_number(rule: type[ElementwiseMerger]) -> None:
    case = collection((4, 4, 4))
    ways = [rescaled(case, scaling=2.0), rescaled(case, A=2.0), rescaled(case, B=2.0)]
    first, *others = [delta(merge(rule(), way, seed=11)["layer.0"]) for way in ways]
    for other in others:
        assert np.array_equal(other, first)


def test_in_delta_space_the_gauge_is_irrelevant_and_in_factor_space_it_is_not() -> None:
    case = collection((4, 4, 4))
    other = regauge(case)
    for rule, distinct in ((SumRule(), False), (SumRule(space="factors"), True)):
        left, right = (delta(merge(rule, c)["layer.0"]) for c in (case, other))
        assert (relative(right, left) > 1e-2) == distinct
        assert (relative(right, left) > 1e-12) == distinct


def test_factor_space_has_the_cross_terms_of_direct_merging() -> None:
    case = collection((4, 4, 4), weights=(1.0, 1.0, 1.0), scalings=(2.0, 0.5, 1.0))
    direct = delta(merge(SumRule(space="factors"), case)["layer.0"])
    assert relative(direct, oracles.direct_merge(case.parts("layer.0"))) < 1e-12


def test_a_negative_scaling_keeps_its_sign_in_factor_space() -> None:
    case = collection((4,), scalings=(-3.0,))
    merged = delta(merge(SumRule(space="factors"), case)["layer.0"])
    assert relative(merged, oracles.dense(case.parts("layer.0")[0])) < 1e-12


class Present(ElementwiseMerger, frozen=True):
    """The number of adapters that a block shows."""

    method = "test.present"

    def combine(self, block: Block, state: Any) -> torch.Tensor:
        assert block.values.shape[0] == len(block.adapters) == len(block.weights)
        return torch.full_like(block.values[0], block.values.shape[0])


def test_an_absent_adapter_is_never_counted() -> None:
    [case] = [c for c in EQUAL_RANK_CASES if c.name == "missing modules"]
    merged = merge(Present(), case)
    assert {path: float(delta(e).max()) for path, e in merged.items()} == {
        "m.0": 2.0,
        "m.1": 1.0,
        "m.2": 3.0,
    }


class Recorder(ElementwiseMerger, frozen=True):
    """Returns a block's own coordinates as values, and checks everything it is told."""

    method = "test.recorder"

    def combine(self, block: Block, state: Any) -> torch.Tensor:
        assert block.adapters == ("a", "b")
        assert block.module == "layer.0"
        assert block.weights.dtype == torch.float64
        roots = {"delta": [2.0, -1.0], "A": [2**0.5, -1.0], "B": [2**0.5, 1.0]}
        assert block.weights.tolist() == roots[block.part]
        assert block.space == self.space
        assert block.seed == 5
        rows, cols = {"delta": (14, 11), "A": (4, 11), "B": (14, 4)}[block.part]
        assert block.shape == (rows, cols)
        height = block.values.shape[1]
        assert block.values.shape == (2, height, cols)
        index = torch.arange(height * cols, dtype=torch.float64) + block.row * cols
        return index.reshape(height, cols)


@pytest.mark.parametrize("rows", [1, 5, 14, 99])
@pytest.mark.parametrize("space", ["delta", "factors"])
def test_a_block_knows_where_it_is(space: Any, rows: int) -> None:
    case = collection((4, 4), weights=(2.0, -1.0))
    encoding = merge(Recorder(space=space), case, seed=5, block_rows=rows)["layer.0"]
    for tensor in encoding.shared_tensors().values():
        assert torch.equal(tensor.flatten(), torch.arange(tensor.numel(), dtype=torch.float64))


@pytest.mark.parametrize("case", MIXED_RANK_CASES, ids=str)
def test_mixed_ranks_are_refused_in_factor_space_only(case: Case) -> None:
    shape = case.stack().module(0).shape
    SumRule().check(shape, case.context())
    with pytest.raises(
        IncompatibleAdaptersError,
        match=r"^layer\.0: ranks .* differ; test\.sum with space=factors needs equal ranks",
    ):
        merge(SumRule(space="factors"), case)
    with pytest.raises(IncompatibleAdaptersError):
        SumRule(space="factors").check(shape, case.context())


@pytest.mark.parametrize("space", ["delta", "factors"])
def test_the_predicted_size_is_the_size(space: Any) -> None:
    case = collection((4, 4))
    merger = SumRule(space=space)
    predicted = merger.predict(case.stack().module(0).shape)
    assert predicted.total == stored_elements(merge(merger, case)["layer.0"])


def test_draws_differ_by_seed_label_adapter_module_and_part() -> None:
    def block(**changes: Any) -> torch.Tensor:
        fields: dict[str, Any] = {
            "values": torch.zeros(1, 3, 4),
            "part_weights": PartWeights(values=(1.0,), total=1.0, part="delta", module="m"),
            "adapters": ("a",),
            "module": "m",
            "part": "delta",
            "row": 0,
            "shape": (3, 4),
            "space": "delta",
            "seed": 0,
        }
        label = changes.pop("label", "")
        return Block(**{**fields, **changes}).uniform(label)

    draws = [
        block(),
        block(seed=1),
        block(label="drop"),
        block(adapters=("b",)),
        block(module="n"),
        block(part="A"),
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)
    assert torch.equal(block(row=2)[0, 0], block(values=torch.zeros(1, 9, 4))[0, 2])


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    case = collection((4, 4))
    first, again, other = (merge(Drop(), case, seed=seed)["layer.0"] for seed in (3, 3, 4))
    assert same_bits(first, again)
    assert not same_bits(first, other)


class Misshapen(ElementwiseMerger, frozen=True):
    """Forgets to reduce over the adapters."""

    method = "test.misshapen"

    def combine(self, block: Block, state: Any) -> torch.Tensor:
        return block.values


def test_a_result_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(
        CapabilityError, match=r"test\.misshapen\.combine returned shape \(2, 14, 11\) .*\(14, 11\)"
    ):
        merge(Misshapen(), collection((4, 4)))


def test_a_rule_without_a_survey_is_not_surveyed() -> None:
    passes = Passes(lambda: [collection().stack()])
    assert Trim().survey(passes, collection().context()) is None
    assert passes.count == 0


def test_a_space_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValidationError, match="space"):
        SumRule.model_validate({"space": "core"})


def test_a_block_of_no_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="block_rows is 0, expected at least 1"):
        collection().context(block_rows=0)


def test_inputs_are_not_written_to() -> None:
    stack = collection((4, 4)).stack(torch.float32)
    before = stack.A.clone(), stack.B.clone()
    for rule, _ in RULES:
        for space in ("delta", "factors"):
            merger = rule.model_validate({"space": space})
            context = collection((4, 4)).context()
            state = merger.survey(Passes(lambda: [stack]), context)
            merger.merge(stack, collection((4, 4)).context(state=state))
    assert torch.equal(stack.A, before[0])
    assert torch.equal(stack.B, before[1])


def test_by_hand() -> None:
    # a = 2·[1, 3]ᵀ[1, 2] = [[2, 4], [6, 12]]; the trim at half of 12 keeps 6 and 12, over 2.
    # b = −[2, 0]ᵀ[4, 1] = [[−8, −2], [0, 0]]; the trim at half of 8 keeps −8, over 1.
    a = Factors(A=torch.tensor([[1.0, 2.0]]), B=torch.tensor([[1.0], [3.0]]), scaling=2.0)
    b = Factors(A=torch.tensor([[4.0, 1.0]]), B=torch.tensor([[2.0], [0.0]]), scaling=-1.0)
    merged = merge(Trim(), Case("", {"m": {"a": a, "b": b}}, {"a": 1.0, "b": 0.5}))["m"]
    np.testing.assert_array_equal(delta(merged), [[-4.0, 0.0], [3.0, 6.0]])
