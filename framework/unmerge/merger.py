"""The Merger interface: what a strategy is, what it is given, and what it declares."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from pydantic import (
    BaseModel,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from unmerge.errors import CapabilityError, ConfigError
from unmerge.stack import FactorStack, ModuleShape
from unmerge_bundle.encodings import Encoding, Restores

__all__ = [
    "Absent",
    "Capabilities",
    "MergeContext",
    "Merger",
    "OutputSize",
    "Passes",
    "ReversibleMerger",
    "Undeclared",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a merger needs and promises. The defaults are the conservative answers.

    Every claim is one that the conformance kit checks; a wrong one yields wrong numbers.

    Attributes:
        needs_activations: Reads `context.activations`.
        needs_base_weights: Reads `context.base_weights`.
        needs_survey: `survey` must see every module before the first `merge`.
        weight_scales_delta: Doubling a weight doubles that adapter's part of the delta.
        factor_exact: Returns factors whose product equals the dense result.
        mixed_ranks: Adapters of one module may differ in rank.
        stochastic: The result depends on the seed.
        ignores_weights: Weights have no effect; giving some is refused.
        gauge_invariant: Equal deltas give equal results, however they are factored.
        sign_equivariant: Flipping the sign of one entry of all adapters flips that entry of the
            result, and changes no other: what an inner rule of `knots` or `core_space` needs.
        restores: `"factors"` or `"delta"` where the originals come back, else `None`.
    """

    needs_activations: bool = False
    needs_base_weights: bool = False
    needs_survey: bool = False
    weight_scales_delta: bool = False
    factor_exact: bool = False
    mixed_ranks: bool = False
    stochastic: bool = False
    ignores_weights: bool = False
    gauge_invariant: bool = False
    sign_equivariant: bool = False
    restores: Restores | None = None


class Undeclared:
    """Stands for an input the merger did not declare; any use of it raises `CapabilityError`."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def _raise(self) -> CapabilityError:
        return CapabilityError(
            f"context.{self._name} was used but not declared; "
            f"return Capabilities(needs_{self._name}=True)"
        )

    def __getattr__(self, attribute: str) -> Any:
        # Dunder look-ups (copy, pickle, inspection) are not uses of the input.
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        raise self._raise()

    def __getitem__(self, key: Any) -> Any:
        raise self._raise()

    def __iter__(self) -> Iterator[Any]:
        raise self._raise()

    def __bool__(self) -> bool:
        raise self._raise()

    def __len__(self) -> int:
        raise self._raise()

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Refuse, as every other use."""
        raise self._raise()


Absent = Literal["zero", "renormalise"]
"""How an adapter that lacks a module counts there: as a zero delta, or not at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeContext:
    """Everything but the tensors that a merge may depend on.

    Attributes:
        weights: The user's weight of every adapter, by name, in sorted-name order.
        seed: Key of all randomness; see `unmerge.kernels.stream_key`.
        block_rows: Height of the row blocks that elementwise rules are given; unless given, one
            that keeps a block near the cache. It must not change the result.
        state: What the merger's `survey` returned; `None` without a survey.
        activations: Statistics of module inputs, where declared.
        base_weights: Base weights by module path, where declared.
    """

    weights: Mapping[str, float]
    seed: int = 0
    block_rows: int | None = None
    state: Any = None
    activations: Any = field(default_factory=lambda: Undeclared("activations"))
    base_weights: Any = field(default_factory=lambda: Undeclared("base_weights"))

    def __post_init__(self) -> None:
        ordered = {name: float(self.weights[name]) for name in sorted(self.weights)}
        for name, weight in ordered.items():
            if not math.isfinite(weight):
                raise ConfigError(f'the weight of "{name}" is {weight}, expected a finite number')
        object.__setattr__(self, "weights", MappingProxyType(ordered))
        if self.block_rows is not None and self.block_rows < 1:
            raise ConfigError(f"block_rows is {self.block_rows}, expected at least 1")

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of all adapters of the merge, sorted."""
        return tuple(self.weights)

    def weights_of(self, names: Sequence[str]) -> list[float]:
        """Return the weights of `names`, in their order; `PartWeights` renormalises them."""
        return [self.weights[name] for name in names]


class Passes(Iterable[FactorStack]):
    """All stacks of a merge, to be iterated as often as a survey needs: one pass each.

    Stacks come in a fixed order and may hold any number of modules; what a survey returns must
    not depend on how many (the conformance kit checks).
    """

    def __init__(self, stacks: Callable[[], Iterable[FactorStack]]) -> None:
        self._stacks = stacks
        self.count = 0

    def __iter__(self) -> Iterator[FactorStack]:
        self.count += 1
        return iter(self._stacks())


@dataclass(frozen=True, slots=True)
class OutputSize:
    """Elements that a module's encoding will hold.

    Attributes:
        shared: Elements that all adapters share.
        per_adapter: Elements of all adapters' own tensors together.
        packed_bytes: Bytes of codes and masks, which are stored as they are whatever the dtype of
            the elements; not counted among them.
        at_most: The data decide, and these are the most that there can be.
    """

    shared: int
    per_adapter: int = 0
    packed_bytes: int = 0
    at_most: bool = False

    @property
    def total(self) -> int:
        """All elements, packed bytes not counted."""
        return self.shared + self.per_adapter


class Merger(BaseModel, ABC, frozen=True, extra="forbid", strict=True):
    """A merging strategy: a frozen model whose fields are its hyperparameters.

    A merger is pure: it does no I/O, chooses no device, draws no global randomness and never
    writes to its inputs. `Ties(density=0.2)` constructs and validates; `model_dump()` is the
    recipe, `{"method": "ties", "density": 0.2}`, and the registry builds the same object back.
    A field of type `Merger` takes a merger or its recipe.

    Class attributes:
        method: The registry name; outsiders use `vendor.name`.
        version: Raised whenever the numbers change.
    """

    method: ClassVar[str]
    version: ClassVar[int] = 1

    @property
    def capabilities(self) -> Capabilities:
        """What this instance needs and promises; depends on its fields."""
        return Capabilities()

    def survey(self, passes: Passes, context: MergeContext) -> Any:  # noqa: ARG002
        """Return facts about all modules, as `context.state` for `merge`. Default: none."""
        return None

    @abstractmethod
    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        """Return one encoding per module of the stack, in its order.

        Merging a stack must equal merging its modules one by one, bit for bit. Tensors may be
        wider than float32; whoever stores them rounds once.
        """

    def check(self, shape: ModuleShape, context: MergeContext) -> None:
        """Refuse, before any tensor is read, a module or weights this merger cannot handle.

        Raises:
            UnmergeError: Names the module and what to do.
        """

    def predict(self, shape: ModuleShape) -> OutputSize | None:  # noqa: ARG002
        """Return how many elements the module's encoding will hold; `None` where unknown."""
        return None

    def advise(self, shapes: Sequence[ModuleShape]) -> list[str]:  # noqa: ARG002
        """Return what a user should know before running, one line each. Default: nothing."""
        return []

    def workspace_bytes(self, shape: ModuleShape) -> int:
        """Return the most bytes that merging one such module needs besides its stack.

        Default: three float64 copies of all factors.
        """
        return 3 * 8 * shape.elements

    def lossless(self) -> Merger | None:
        """Return this strategy with settings under which nothing is lost, or `None`.

        What it returns must turn one adapter at weight 1 into itself; the conformance kit checks.
        Default: `None`, no such settings.
        """
        return None

    def recipe(self) -> dict[str, Any]:
        """Return the merger as plain data, with `method` first."""
        return self.model_dump(mode="json")

    @model_validator(mode="before")
    @classmethod
    def _accept_recipe(cls, data: Any) -> Any:
        """Accept the merger's own recipe, which names the method beside the fields.

        A field that takes a merger and has one by default may be given by that one's fields alone.
        """
        if not isinstance(data, Mapping):
            return data
        name = getattr(cls, "method", None)
        if data.get("method", name) != name:
            raise ValueError(f'the recipe is for method "{data["method"]}", not "{name}"')
        fields = {key: value for key, value in data.items() if key != "method"}
        for key, value in fields.items():
            info = cls.model_fields.get(key)
            usual = info.default if info is not None else None
            if isinstance(value, Mapping) and isinstance(usual, dict) and "method" not in value:
                fields[key] = {**value, "method": usual.get("method")} if value else value
        return fields

    @model_serializer(mode="wrap")
    def _name_method(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"method": self.method, **handler(self)}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if not cls.__abstractmethods__:
            return handler(source)
        # A field of an abstract type takes any registered strategy of that type, by recipe.
        return core_schema.with_info_plain_validator_function(
            lambda value, info: _resolve(cls, value, info),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda merger: merger.recipe()
            ),
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        if not cls.__abstractmethods__:
            return handler(schema)
        # Imported here: the registry is built from plugins, which import this module.
        from unmerge.registry import default_registry

        fitting = [n for n, r in default_registry().items() if issubclass(r.merger, cls)]
        return {
            "type": "object",
            "description": "A merger's recipe: its method and its fields.",
            "properties": {"method": {"type": "string", "enum": fitting}},
            "required": ["method"],
        }


class ReversibleMerger(Merger, frozen=True, extra="forbid"):
    """A merger whose encodings give every adapter back.

    Class attributes:
        restores: `"factors"` (the original A and B, approximately or exactly) or `"delta"`
            (their product only).
    """

    restores: ClassVar[Literal["factors", "delta"]] = "factors"

    @property
    def capabilities(self) -> Capabilities:
        """Declares what the encodings restore."""
        return Capabilities(restores=self.restores)


def _resolve(expected: type[Merger], value: Any, info: ValidationInfo) -> Merger:
    if isinstance(value, Merger):
        merger = value
    elif isinstance(value, Mapping) and isinstance(value.get("method"), str):
        # Imported here: the registry is built from plugins, which import this module.
        from unmerge.registry import default_registry

        registry = (info.context or {}).get("registry")
        if registry is None:
            registry = default_registry()
        merger = registry.merger_type(value["method"]).model_validate(value, context=info.context)
    else:
        raise ValueError('expected a merger or its recipe, such as {"method": "average"}')
    if not isinstance(merger, expected):
        reversible = merger.capabilities.restores is not None
        why = ", it gives every adapter back instead of one result" if reversible else ""
        raise ValueError(f'"{merger.method}" is no {expected.__name__}{why}')
    return merger
