"""The interface's side of the kit: recipes, declarations, purity, and encodings that fit."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from unmerge.errors import CapabilityError, IncompatibleAdaptersError, UnmergeError
from unmerge.merger import Merger, OutputSize, Passes, Undeclared
from unmerge.registry import default_registry
from unmerge.stack import ModuleShape
from unmerge.testing import cases
from unmerge.testing.cases import (
    context_of,
    merge_collection,
    refusal_of,
    result_of,
    surveyed,
)
from unmerge.testing.check import declares, law, needs_no_activations
from unmerge.testing.collections import AdapterCollection
from unmerge.testing.memory import peak_bytes
from unmerge.testing.outcome import Result, Results, all_tensors, deltas
from unmerge.testing.results import Violation
from unmerge_bundle.encodings import Encoding

_FIELD_NO_MERGER_HAS = "no_such_field_of_any_merger"
_UNUSUAL = 1_957_283_641


def _registered(merger: Merger) -> str | None:
    registration = default_registry().get(merger.method)
    if registration is None or registration.merger is not type(merger):
        return f'no installed plugin registers {type(merger).__name__} as "{merger.method}"'
    return None


@law()
def the_name_is_its_own(merger: Merger) -> None:
    """A strategy from outside has a name of the form `vendor.name`."""
    ours = type(merger).__module__.partition(".")[0] == "unmerge_strategies"
    vendor, dot, name = merger.method.partition(".")
    if not ours and not (vendor and dot and name):
        raise Violation("method", 'a name of the form "vendor.name"', f'"{merger.method}"')


@law()
def recipe_survives_json(merger: Merger) -> None:
    """A merger's recipe is plain JSON data that builds an equal merger."""
    recipe = merger.recipe()
    if recipe.get("method") != merger.method:
        raise Violation("recipe()", f'the method "{merger.method}"', repr(recipe.get("method")))
    again = type(merger).model_validate(json.loads(json.dumps(recipe, allow_nan=False)))
    if again != merger:
        raise Violation("recipe(), through JSON", repr(merger), repr(again))


@law(_registered)
def registry_builds_it(merger: Merger) -> None:
    """The registry of installed strategies builds an equal merger from the recipe."""
    again = default_registry().build(json.loads(json.dumps(merger.recipe())))
    if again != merger:
        raise Violation("registry.build(recipe())", repr(merger), repr(again))


@law()
def wrong_recipes_are_refused(merger: Merger) -> None:
    """An unknown field, and another method's recipe, are refused; fields cannot be changed."""
    recipe = merger.recipe()
    wrong: Mapping[str, Mapping[str, Any]] = {
        "a recipe with an unknown field": {**recipe, _FIELD_NO_MERGER_HAS: 1},
        "a recipe of another method": {**recipe, "method": f"not.{merger.method}"},
    }
    for case, data in wrong.items():
        try:
            type(merger).model_validate(data)
        except (ValidationError, UnmergeError):
            continue
        raise Violation(case, "an error", "a merger")
    for name in type(merger).model_fields:
        try:
            setattr(merger, name, getattr(merger, name))
        except (ValidationError, AttributeError):
            continue
        raise Violation(f'assigning to the field "{name}"', "a refusal", "a changed merger")


@law(needs_no_activations)
def encodings_fit(merger: Merger) -> None:
    """Every module gets an encoding of its shape, its adapters and finite floating numbers."""
    for collection in (cases.general(), cases.with_missing_modules()):
        results = result_of(merger, collection)
        check_fit(merger, collection, results)


@law(needs_no_activations)
def edge_cases_give_finite_results(merger: Merger) -> str | None:
    """Zeros, copies, rank 1, one adapter, odd shapes and weights: finite results that fit."""
    refused = []
    for collection in cases.edge_cases():
        reason = refusal_of(merger, collection)
        if reason is not None:
            refused.append(f"{collection.name} ({reason})")
            continue
        check_fit(merger, collection, result_of(merger, collection))
    if len(refused) == len(cases.edge_cases()):
        raise Violation("all edge cases", "a result for some", f"refusals: {refused[0]}")
    return f"check() refuses {'; '.join(refused)}" if refused else None


def check_fit(merger: Merger, collection: AdapterCollection, results: Results) -> None:
    """Raise `Violation` unless every module's encoding is one the module may become."""
    restores = merger.capabilities.restores
    for shape in collection.shapes:
        case = f"{collection.name}, module {shape.path}"
        encoding = results[shape.path]
        if not isinstance(encoding, Encoding):
            raise Violation(case, "an encoding", repr(encoding))
        if encoding.restores != restores:
            raise Violation(
                case, f"an encoding that restores {restores}, as declared", repr(encoding.restores)
            )
        names = shape.adapters if restores is not None else ()
        if encoding.adapters != names:
            raise Violation(case, f"adapters {list(names)}", repr(list(encoding.adapters)))
        if encoding.shape != (shape.d_out, shape.d_in):
            raise Violation(case, f"shape {(shape.d_out, shape.d_in)}", repr(encoding.shape))
        _check_numbers(case, encoding)
        for name, delta in deltas(encoding).items():
            if tuple(delta.shape) != (shape.d_out, shape.d_in):
                raise Violation(
                    f"{case}, delta {name}",
                    f"shape {(shape.d_out, shape.d_in)}",
                    repr(tuple(delta.shape)),
                )


def _check_numbers(case: str, encoding: Result) -> None:
    for name, tensor in all_tensors(encoding).items():
        if not isinstance(tensor, torch.Tensor):
            raise Violation(case, f"{name} as a tensor", type(tensor).__name__)
        # Masks and codes are bytes; everything else is a number of the merge.
        if tensor.dtype != torch.uint8 and not tensor.dtype.is_floating_point:
            raise Violation(case, f"{name} of a real floating dtype", str(tensor.dtype))
        if not bool(torch.isfinite(tensor).all()):
            raise Violation(case, f"{name} of finite numbers", "NaN or infinity")
    for name in encoding.adapters:
        if not math.isfinite(encoding.scaling(name)):
            raise Violation(case, f"a finite scaling of {name}", repr(encoding.scaling(name)))
    for fact, value in encoding.facts.items():
        if not isinstance(fact, str) or not math.isfinite(value):
            raise Violation(case, "facts that are finite numbers by name", f"{fact!r}: {value!r}")


@law(needs_no_activations)
def plan_is_told_the_truth(merger: Merger) -> str | None:
    """`predict` equals or bounds what is stored; `workspace_bytes`, `advise` answer in kind."""
    unknown = 0
    collections = [cases.general(), cases.with_missing_modules()]
    # Zeros and copies too, of which a strategy may store less than of others.
    collections += [c for c in cases.edge_cases() if refusal_of(merger, c) is None]
    if merger.capabilities.mixed_ranks:
        collections.append(cases.mixed())
    for collection in collections:
        results = result_of(merger, collection)
        advice = merger.advise(collection.shapes)
        if not (isinstance(advice, list) and all(isinstance(line, str) for line in advice)):
            raise Violation(f"advise, {collection.name}", "a list of lines", repr(advice))
        for shape in collection.shapes:
            workspace = merger.workspace_bytes(shape)
            if not isinstance(workspace, int) or workspace < 0:
                raise Violation(f"workspace_bytes({shape})", "a number of bytes", repr(workspace))
            predicted = merger.predict(shape)
            if predicted is None:
                unknown += 1
                continue
            _check_prediction(f"{collection.name}, module {shape.path}", predicted, results, shape)
    return f"predict() returns None for {unknown} modules" if unknown else None


@law(needs_no_activations)
def workspace_is_enough(merger: Merger) -> str | None:
    """No more memory is taken than `workspace_bytes` says, besides what any merger is granted.

    Granted are a copy of the module's float32 factors and the result in float64, by which a
    pipeline predicts what a chunk takes. Tensors are counted, not what a library takes inside one
    operation.
    """
    collection = cases.sizeable()
    if (reason := refusal_of(merger, collection)) is not None:
        return f"refuses {collection.name}: {reason}"
    [stack], [shape] = collection.stacks(), collection.shapes
    context = surveyed(merger, [stack], context_of(merger, collection))
    output = merger.predict(shape)
    stored = shape.d_out * shape.d_in if output is None else output.total + output.packed_bytes
    promised = merger.workspace_bytes(shape)
    taken = peak_bytes(lambda: merger.merge(stack, context))
    granted = 4 * shape.elements + 8 * stored
    # Scalars and indices are not worth counting.
    if promised >= 0 and taken > promised + granted + 16_384:
        raise Violation(
            f"workspace_bytes, {collection.name}",
            f"at most {promised} bytes besides {granted} for copy and result",
            f"{taken} bytes of tensors at one time",
        )
    return None


def _check_prediction(
    case: str, predicted: OutputSize, results: Results, shape: ModuleShape
) -> None:
    encoding = results[shape.path]
    shared, _ = _counted(encoding.shared_tensors().values())
    everything, packed = _counted(all_tensors(encoding).values())
    stored = {
        "shared elements": (predicted.shared, shared),
        "elements per adapter": (predicted.per_adapter, everything - shared),
        "packed bytes": (predicted.packed_bytes, packed),
    }
    for what, (promised, found) in stored.items():
        if not (found <= promised if predicted.at_most else found == promised):
            bound = "at most " if predicted.at_most else ""
            raise Violation(f"predict, {case}", f"{bound}{promised} {what}", str(found))


def _counted(tensors: Iterable[torch.Tensor]) -> tuple[int, int]:
    """Return the numbers of elements and of packed bytes."""
    counts = [(t.dtype == torch.uint8, t.numel()) for t in tensors]
    return sum(n for packed, n in counts if not packed), sum(n for packed, n in counts if packed)


class _Watched(Undeclared):
    """An undeclared input that remembers that it was touched, also where the error is caught."""

    __slots__ = ("touched",)

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.touched = False

    def _raise(self) -> CapabilityError:
        self.touched = True
        return super()._raise()


@law(needs_no_activations)
def undeclared_inputs_are_untouched(merger: Merger) -> None:
    """Activations and base weights are used only where declared."""
    capabilities = merger.capabilities
    inputs = {"activations": _Watched("activations")}
    if not capabilities.needs_base_weights:
        inputs["base_weights"] = _Watched("base_weights")
    try:
        merge_collection(merger, cases.general(), changes=dict(inputs))
    except CapabilityError:
        if not any(watched.touched for watched in inputs.values()):
            raise
    for name, watched in inputs.items():
        if watched.touched:
            raise Violation(
                cases.general().name,
                f"context.{name} left alone, or needs_{name} declared",
                f"a use of context.{name}",
            )


def _declared_inputs(merger: Merger) -> list[str]:
    inputs = ("activations", "base_weights")
    return [name for name in inputs if getattr(merger.capabilities, f"needs_{name}")]


def _declares_inputs(merger: Merger) -> str | None:
    if _declared_inputs(merger):
        return None
    return "declares needs_activations=False and needs_base_weights=False"


@law(_declares_inputs)
def declared_inputs_are_needed(merger: Merger) -> None:
    """Activations and base weights are declared only where they are used."""
    for name in _declared_inputs(merger):
        watched = _Watched(name)
        try:
            merge_collection(merger, cases.general(), changes={name: watched})
        except UnmergeError:
            if not watched.touched:
                raise
        if not watched.touched:
            raise Violation(
                cases.general().name, f"a use of context.{name}, which is declared", "none"
            )


@law(declares("needs_survey"), needs_no_activations)
def a_survey_sees_the_modules(merger: Merger) -> None:
    """A declared survey passes over the modules."""
    collection = cases.general()
    passes = Passes(collection.stacks)
    merger.survey(passes, cases.context_of(merger, collection))
    if passes.count == 0:
        raise Violation(collection.name, "at least one pass over all modules", "none")


@law(needs_no_activations)
def inputs_are_not_written_to(merger: Merger) -> None:
    """Survey and merge leave the tensors they are given as they were."""
    for collection in (cases.general(), cases.with_missing_modules()):
        stacks = collection.stacks()
        copies = [[t.clone() for t in (s.A, s.B, s.ranks, s.scalings)] for s in stacks]
        context = cases.surveyed(merger, stacks, cases.context_of(merger, collection))
        for stack, before in zip(stacks, copies, strict=True):
            merger.merge(stack, context)
            after = (stack.A, stack.B, stack.ranks, stack.scalings)
            names = ("A", "B", "ranks", "scalings")
            for name, tensor, copy in zip(names, after, before, strict=True):
                if not torch.equal(tensor, copy):
                    raise Violation(collection.name, f"stack.{name} as it was", "other numbers")


@law(needs_no_activations)
def global_state_is_left_alone(merger: Merger) -> None:
    """No global random generator is drawn from or seeded; torch's settings stay."""
    with _own_generators():
        before = _global_state()
        result_of(merger, cases.general())
        after = _global_state()
    for what, value in before.items():
        if after[what] != value:
            raise Violation(cases.general().name, f"{what} as it was", "a change")


def _global_state() -> dict[str, bytes]:
    generator = np.random.get_state(legacy=False)  # watched, not drawn from
    return {
        "torch's random state": torch.get_rng_state().numpy().tobytes(),
        "numpy's random state": repr(generator).encode(),
        "random's state": repr(random.getstate()).encode(),
        "torch's default dtype": str(torch.get_default_dtype()).encode(),
        "torch's number of threads": str(torch.get_num_threads()).encode(),
        "torch's gradient mode": str(torch.is_grad_enabled()).encode(),
    }


@contextmanager
def _own_generators() -> Iterator[None]:
    """Give all global generators a state that no strategy seeds them with; then put theirs back."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_UNUSUAL)
        np.random.seed(_UNUSUAL)
        random.seed(_UNUSUAL)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


@law(declares("mixed_ranks"), needs_no_activations)
def mixed_ranks_are_merged(merger: Merger) -> None:
    """Adapters of different ranks give results that fit, where `mixed_ranks` is declared."""
    collection = cases.mixed()
    check_fit(merger, collection, result_of(merger, collection))


@law(declares("mixed_ranks", expected=False), needs_no_activations)
def mixed_ranks_are_refused(merger: Merger) -> None:
    """Adapters of different ranks are refused by name, where `mixed_ranks` is not declared."""
    collection = cases.mixed()
    try:
        merge_collection(merger, collection)
    except IncompatibleAdaptersError as error:
        paths = collection.modules
        if not any(path in str(error) for path in paths):
            raise Violation(
                collection.name, f"an error that names the module, {min(paths)}", str(error)
            ) from error
    except Exception as error:
        raise Violation(
            collection.name,
            "IncompatibleAdaptersError from check or merge",
            f"{type(error).__name__}: {error}",
        ) from error
    else:
        raise Violation(
            collection.name,
            "IncompatibleAdaptersError from check or merge, or mixed_ranks declared",
            "a result",
        )


CHECKS = (
    the_name_is_its_own,
    recipe_survives_json,
    registry_builds_it,
    wrong_recipes_are_refused,
    encodings_fit,
    edge_cases_give_finite_results,
    plan_is_told_the_truth,
    workspace_is_enough,
    undeclared_inputs_are_untouched,
    declared_inputs_are_needed,
    a_survey_sees_the_modules,
    inputs_are_not_written_to,
    global_state_is_left_alone,
    mixed_ranks_are_merged,
    mixed_ranks_are_refused,
)
