"""The Merger interface: recipes of single mergers, contexts, passes, undeclared inputs."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ValidationError

from stacks import Result, SumRule, collection
from unmerge.errors import CapabilityError, ConfigError, UnknownMergerError
from unmerge.merger import (
    Capabilities,
    MergeContext,
    Merger,
    OutputSize,
    Passes,
    ReversibleMerger,
    Undeclared,
)
from unmerge.registry import default_registry
from unmerge.stack import FactorStack, ModuleShape
from unmerge_strategies import Average, Dare, MmSvd, Rmm, TaskArithmetic

STRATEGIES: list[Merger] = [
    Average(),
    Average(absent="renormalise"),
    TaskArithmetic(),
    TaskArithmetic(scale=0.3),
    MmSvd(),
    MmSvd(rank=16, split="balanced", inner=Average(absent="renormalise")),
    MmSvd(rank=16, inner=TaskArithmetic(scale=-2.5)),
    Rmm(),
    Rmm(basis_size=7, fold_scaling=True),
]


class NeedsActivations(Merger, frozen=True):
    """Reads activations; whether it says so is a field."""

    method = "test.needs_activations"
    declared: bool = False

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(needs_activations=self.declared)

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Result]:
        return [context.activations["m"] for _ in stack]


@pytest.mark.parametrize("merger", STRATEGIES, ids=str)
def test_a_recipe_survives_json(merger: Merger) -> None:
    text = json.dumps(merger.recipe())
    assert text == json.dumps(merger.model_dump(mode="json"))
    assert json.loads(text) == json.loads(merger.model_dump_json())
    assert next(iter(json.loads(text))) == "method"
    built = default_registry().build(json.loads(text))
    assert built == merger
    assert type(built) is type(merger)
    assert built.recipe() == merger.recipe()
    assert type(merger).model_validate_json(text) == merger


def test_a_nested_recipe_keeps_the_method_and_the_fields_of_inner() -> None:
    merger = MmSvd(rank=2, inner=Average(absent="renormalise"))
    assert merger.recipe() == {
        "method": "mm_svd",
        "rank": 2,
        "energy": None,
        "error": None,
        "inner": {"method": "average", "space": "delta", "absent": "renormalise"},
        "split": "A",
    }
    assert merger.model_dump() == merger.recipe()


def test_a_recipe_built_by_the_registry_uses_that_registry() -> None:
    """A strategy that is not registered is refused inside a wrapper as well."""
    with pytest.raises(UnknownMergerError, match=r'no strategy is called "test\.sum"'):
        default_registry().build({"method": "mm_svd", "inner": {"method": "test.sum"}})


@pytest.mark.parametrize("merger", STRATEGIES, ids=str)
def test_mergers_are_frozen_hashable_values(merger: Merger) -> None:
    for name in type(merger).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(merger, name, getattr(merger, name))
    assert hash(merger) == hash(merger.model_copy())
    assert pickle.loads(pickle.dumps(merger)) == merger  # noqa: S301 - our own bytes
    assert copy.deepcopy(merger) == merger


@pytest.mark.parametrize(
    ("kind", "fields", "where"),
    [
        (Rmm, {"basissize": 2}, "basissize"),
        (Rmm, {"basis_size": "many"}, "basis_size"),
        (Rmm, {"basis_size": 0}, "basis_size"),
        (Rmm, {"fold_scaling": "perhaps"}, "fold_scaling"),
        (Average, {"absent": "skip"}, "absent"),
        (TaskArithmetic, {"scale": [1.0]}, "scale"),
        (MmSvd, {"rank": -1}, "rank"),
        (MmSvd, {"inner": {"method": "task_arithmetic", "scale": "x"}}, r"inner\.scale"),
        (SumRule, {"space": "dense"}, "space"),
    ],
)
def test_an_unknown_or_wrong_field_is_refused_by_name(
    kind: type[Merger], fields: dict[str, Any], where: str
) -> None:
    with pytest.raises(ValidationError, match=rf"(?m)^{where}$"):
        kind.model_validate(fields)


def test_a_recipe_for_another_method_is_refused() -> None:
    with pytest.raises(ValidationError, match='the recipe is for method "average", not "rmm"'):
        Rmm.model_validate({"method": "average"})
    with pytest.raises(ValidationError, match='the recipe is for method "None", not "rmm"'):
        Rmm.model_validate({"method": None})


def test_its_own_method_is_accepted() -> None:
    assert Rmm.model_validate({"method": "rmm", "basis_size": 3}) == Rmm(basis_size=3)


@pytest.mark.parametrize("value", [3, "average", {}, {"method": 3}, ["average"], None])
def test_what_is_neither_a_merger_nor_a_recipe_is_refused(value: Any) -> None:
    with pytest.raises(ValidationError, match="expected a merger or its recipe"):
        MmSvd.model_validate({"inner": value})


class Holder(BaseModel):
    """A field that takes reversible strategies only, and one of a concrete type."""

    reversible: ReversibleMerger
    average: Average = Average()


def test_a_field_of_a_narrower_type_takes_only_that() -> None:
    assert Holder.model_validate({"reversible": {"method": "rmm"}}).reversible == Rmm()
    with pytest.raises(ValidationError, match='"average" is no ReversibleMerger \\['):
        Holder.model_validate({"reversible": {"method": "average"}})
    with pytest.raises(ValidationError, match='the recipe is for method "rmm", not "average"'):
        Holder.model_validate({"reversible": Rmm(), "average": {"method": "rmm"}})
    dumped = Holder(reversible=Rmm(basis_size=5)).model_dump(mode="json")
    assert dumped["reversible"] == Rmm(basis_size=5).recipe()


@pytest.mark.parametrize("merger", STRATEGIES, ids=str)
def test_a_json_schema_names_every_field(merger: Merger) -> None:
    schema = type(merger).model_json_schema()
    assert set(schema["properties"]) == set(type(merger).model_fields)
    assert all(field.description for field in type(merger).model_fields.values())
    json.dumps(schema)


def test_the_schema_of_a_wrapper_names_the_strategies_it_takes() -> None:
    inner = Dare.model_json_schema()["properties"]["inner"]
    assert inner["properties"]["method"]["enum"] == [
        *("average", "dare", "magnitude_prune", "task_arithmetic", "ties"),
    ]


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match=r'the weight of "sql" is (nan|inf)'):
        MergeContext(weights={"sql": weight})


def test_an_abstract_merger_cannot_be_built() -> None:
    for kind in (Merger, ReversibleMerger):
        with pytest.raises(TypeError, match="abstract"):
            kind()  # type: ignore[abstract]


def test_a_reversible_merger_declares_what_it_restores() -> None:
    assert Rmm().capabilities == Capabilities(restores="factors", ignores_weights=True)


def test_the_default_answers_are_the_conservative_ones() -> None:
    assert Capabilities() == Capabilities(
        needs_activations=False,
        needs_base_weights=False,
        needs_survey=False,
        weight_scales_delta=False,
        factor_exact=False,
        mixed_ranks=False,
        stochastic=False,
        ignores_weights=False,
        restores=None,
    )
    merger, shape = NeedsActivations(), ModuleShape("m", 3, 4, ("a", "b"), (2, 1))
    assert merger.predict(shape) is None
    assert merger.advise([shape]) == []
    assert merger.workspace_bytes(shape) == 3 * 8 * 3 * (3 + 4)
    assert merger.survey(Passes(list), MergeContext(weights={})) is None


USES: dict[str, Callable[[Any], object]] = {
    "attribute": lambda x: x.keys,
    "item": lambda x: x["m"],
    "iteration": list,
    "truth": bool,
    "membership": lambda x: "m" in x,
    "length": len,
    "call": lambda x: x(),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", ["activations", "base_weights"])
def test_any_use_of_an_undeclared_input_names_the_capability(name: str, use: str) -> None:
    context = MergeContext(weights={"a": 1.0})
    with pytest.raises(
        CapabilityError,
        match=rf"^context\.{name} was used but not declared; .*Capabilities\(needs_{name}=True\)",
    ):
        USES[use](getattr(context, name))


def test_a_merger_that_reads_what_it_did_not_declare_fails() -> None:
    case = collection()
    with pytest.raises(CapabilityError, match="needs_activations=True"):
        NeedsActivations().merge(case.stack(), case.context())


def test_copying_and_pickling_is_no_use_of_an_undeclared_input() -> None:
    inputs = Undeclared("activations")
    for other in (copy.copy(inputs), pickle.loads(pickle.dumps(inputs))):  # noqa: S301
        with pytest.raises(CapabilityError, match="needs_activations"):
            bool(other)


def test_a_context_sorts_its_weights_and_protects_them() -> None:
    weights = {"b": 2, "a": 0.5}
    context = MergeContext(weights=weights)
    assert context.adapters == ("a", "b")
    assert context.weights_of(["b", "a"]) == [2.0, 0.5]
    weights["c"] = 1.0
    assert context.adapters == ("a", "b")
    with pytest.raises(TypeError):
        context.weights["a"] = 1.0  # type: ignore[index]


@pytest.mark.parametrize("rows", [0, -1])
def test_block_rows_below_one_are_refused(rows: int) -> None:
    with pytest.raises(ConfigError, match="expected at least 1"):
        MergeContext(weights={}, block_rows=rows)


def test_passes_start_over_and_are_counted() -> None:
    stack = collection().stack()
    passes = Passes(lambda: [stack, stack])
    assert [len(list(passes)) for _ in range(3)] == [2, 2, 2]
    assert passes.count == 3


def test_an_output_size_is_the_sum_of_its_parts() -> None:
    assert OutputSize(shared=3, per_adapter=4).total == 7
    assert OutputSize(shared=3).total == 3


def test_equal_mergers_give_equal_bits_after_a_round_trip() -> None:
    case = collection()
    merger = MmSvd(rank=2)
    again = default_registry().build(json.loads(json.dumps(merger.recipe())))
    [left], [right] = (m.merge(case.stack(), case.context()) for m in (merger, again))
    for key, tensor in left.shared_tensors().items():
        assert torch.equal(tensor, right.shared_tensors()[key])
