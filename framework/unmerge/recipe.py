"""Recipes: a whole pipeline, not only its merger, as validated data."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator

from unmerge.errors import ConfigError
from unmerge.merger import Merger
from unmerge.registry import Registry, default_registry

__all__ = ["Recipe", "explain"]

StoreDtype = Literal["float32", "float16", "bfloat16"]


class Recipe(BaseModel, frozen=True, extra="forbid"):
    """Everything that decides a merge's numbers, apart from the store's version.

    Validated completely before any tensor is read. Device, memory budget and number of workers
    are left out on purpose: they must not change the result.
    """

    recipe_version: Literal[1] = Field(default=1, description="version of this schema")
    merger: Merger = Field(description="the strategy and its fields")
    adapters: tuple[str, ...] | None = Field(
        default=None, description="names of the adapters to merge; all of the store unless given"
    )
    modules: tuple[str, ...] | None = Field(
        default=None, description="glob patterns of module paths; all modules unless given"
    )
    weights: dict[str, float] = Field(
        default_factory=dict, description="weight per adapter; 1 where not given"
    )
    seed: int = Field(default=0, ge=0, description="key of all randomness")
    dtype: StoreDtype | None = Field(
        default=None, description="dtype of stored tensors; the widest input dtype unless given"
    )

    @field_validator("weights")
    @classmethod
    def _weights_are_finite(cls, weights: dict[str, float]) -> dict[str, float]:
        for name, weight in weights.items():
            if not abs(weight) < float("inf"):
                raise ValueError(f'the weight of "{name}" is {weight}, expected a finite number')
        return dict(sorted(weights.items()))

    @field_validator("adapters")
    @classmethod
    def _adapters_are_distinct(cls, adapters: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if adapters is None:
            return None
        if not adapters:
            raise ValueError("the list of adapters is empty; leave it out to merge all")
        for name in adapters:
            if adapters.count(name) > 1:
                raise ValueError(f'adapter "{name}" is listed twice')
        return tuple(sorted(adapters))

    @classmethod
    def from_data(cls, data: Any, *, registry: Registry | None = None) -> Recipe:
        """Build a recipe from plain data.

        Raises:
            ConfigError: A field is unknown, missing or wrong; one line says which.
            UnknownMergerError: No registered strategy has the method's name.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"a recipe is a mapping, not {type(data).__name__}")
        if "method" in data and "merger" not in data:
            raise ConfigError(
                'recipe: the strategy and its fields stand under "merger", as in '
                f"merger: {{method: {data['method']}}}"
            )
        context = {"registry": default_registry() if registry is None else registry}
        try:
            return cls.model_validate(dict(data), context=context)
        except ValidationError as error:
            raise ConfigError(f"recipe: {explain(error)}") from error

    @classmethod
    def load(cls, path: str | Path, *, registry: Registry | None = None) -> Recipe:
        """Read a recipe from a YAML or JSON file.

        Raises:
            ConfigError: The file cannot be read, or holds no valid recipe.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
        try:
            return cls.from_data(parse_yaml(text), registry=registry)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def to_data(self) -> dict[str, Any]:
        """Return the recipe as plain JSON-compatible data; `from_data` gives it back."""
        return self.model_dump(mode="json")

    def to_json(self) -> str:
        """Return the recipe as indented JSON, which is YAML as well."""
        return json.dumps(self.to_data(), indent=2)


def parse_yaml(text: str) -> Any:
    """Return the plain data that YAML or JSON text holds; a key given twice is refused.

    Raises:
        ConfigError: The text is no YAML, in whatever way.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - derives from SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: 2024-99-99 is read as a date, and an integer may have too many digits.
        raise ConfigError(" ".join(str(error).split())) from error


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, and reads `1e-3` as the number it is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} cannot be a key", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1, which PyYAML follows, wants a dot in the mantissa; YAML 1.2 and JSON do not.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def explain(error: ValidationError) -> str:
    """Return a validation error as one line: each field, what is wrong with it, what it got."""
    problems = []
    for problem in error.errors(include_url=False):
        place = ".".join(str(part) for part in problem["loc"]) or "value"
        if problem["type"] == "extra_forbidden":
            problems.append(f"{place}: there is no such field")
        elif problem["type"] == "missing":
            problems.append(f"{place}: is required")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = repr(problem["input"])
            given = given if len(given) <= 80 else f"{given[:77]}…"
            problems.append(f"{place}: {message[:1].lower()}{message[1:]} (got {given})")
    return "; ".join(problems)
