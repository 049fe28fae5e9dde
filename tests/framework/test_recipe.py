"""Recipes of whole pipelines: round trips, files, and every way of being wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from unmerge.errors import ConfigError, UnknownMergerError
from unmerge.plugins import get_plugin_manager
from unmerge.recipe import Recipe
from unmerge.registry import Registry
from unmerge_strategies import Average, MmSvd, Rmm, TaskArithmetic

RECIPES = [
    Recipe(merger=Rmm()),
    Recipe(merger=Average(absent="renormalise"), weights={"b": 0.5, "a": -2.0}),
    Recipe(
        merger=MmSvd(rank=4, inner=TaskArithmetic(scale=0.3), split="B"),
        adapters=("sql", "math"),
        modules=("layers.*.q_proj",),
        seed=2**40,
        dtype="bfloat16",
    ),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: str(r.merger))
def test_a_recipe_survives_json_and_yaml(recipe: Recipe, tmp_path: Path) -> None:
    assert Recipe.from_data(json.loads(recipe.to_json())) == recipe
    assert Recipe.from_data(yaml.safe_load(recipe.to_json())) == recipe
    for name, text in (
        ("recipe.json", recipe.to_json()),
        ("recipe.yaml", yaml.safe_dump(recipe.to_data())),
    ):
        (tmp_path / name).write_text(text)
        assert Recipe.load(tmp_path / name) == recipe


def test_the_data_names_every_method() -> None:
    data = RECIPES[2].to_data()
    assert data["merger"] == {
        "method": "mm_svd",
        "rank": 4,
        "energy": None,
        "error": None,
        "inner": {"method": "task_arithmetic", "space": "delta", "scale": 0.3, "absent": "zero"},
        "split": "B",
    }
    assert data["recipe_version"] == 1
    assert data["adapters"] == ["math", "sql"]


def test_order_is_normalised() -> None:
    one = Recipe(merger=Rmm(), adapters=("b", "a"), weights={"b": 1, "a": 2})
    two = Recipe(merger=Rmm(), adapters=("a", "b"), weights={"a": 2, "b": 1})
    assert one == two
    assert one.to_json() == two.to_json()


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RECIPES[0].seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wieghts": {}}, "recipe: wieghts: there is no such field"),
        ({"merger": {"method": "rmm", "basis": 2}}, r"merger\.basis: there is no such field"),
        ({"merger": {"method": "rmm", "basis_size": 0}}, r"merger\.basis_size: .*\(got 0\)"),
        ({"merger": {"method": "rmm", "basis_size": "x"}}, r"merger\.basis_size: .*\(got 'x'\)"),
        (
            {"merger": {"method": "mm_svd", "inner": {"method": "average", "absent": 1}}},
            r"merger\.inner\.absent: ",
        ),
        (
            {"merger": {"method": "mm_svd", "inner": {"method": "rmm"}}},
            r'merger\.inner: "rmm" restores the factors of every adapter',
        ),
        ({"merger": "rmm"}, "merger: expected a merger or its recipe"),
        ({"merger": None}, "merger: expected a merger or its recipe"),
        ({"weights": {"a": float("nan")}}, 'weights: the weight of "a" is nan, expected a finite'),
        ({"weights": {"a": float("inf")}}, 'the weight of "a" is inf, expected a finite'),
        ({"weights": {"a": -float("inf")}}, 'the weight of "a" is -inf, expected a finite'),
        ({"weights": {"a": "heavy"}}, r"weights\.a: "),
        ({"weights": [1, 2]}, "weights: "),
        ({"adapters": []}, "adapters: the list of adapters is empty"),
        ({"adapters": ["a", "b", "a"]}, 'adapters: adapter "a" is listed twice'),
        ({"adapters": "a"}, "adapters: "),
        ({"seed": -1}, "seed: "),
        ({"seed": 1.5}, "seed: "),
        ({"dtype": "int8"}, "dtype: "),
        ({"recipe_version": 2}, "recipe_version: "),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Recipe.from_data({"merger": {"method": "rmm"}, **changes})
    assert "\n" not in str(caught.value)
    assert "validation error" not in str(caught.value)


def test_all_problems_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"seed: .*; dtype: "):
        Recipe.from_data({"merger": {"method": "rmm"}, "seed": -1, "dtype": "int8"})


def test_a_missing_merger_is_refused() -> None:
    with pytest.raises(ConfigError, match="merger: is required"):
        Recipe.from_data({})


@pytest.mark.parametrize("data", [None, [], "rmm", 3])
def test_what_is_no_mapping_is_refused(data: Any) -> None:
    with pytest.raises(ConfigError, match=f"a recipe is a mapping, not {type(data).__name__}"):
        Recipe.from_data(data)


@pytest.mark.parametrize(
    "merger", [{"method": "tise"}, {"method": "mm_svd", "inner": {"method": "tise"}}]
)
def test_an_unknown_method_is_refused(merger: dict[str, Any]) -> None:
    with pytest.raises(UnknownMergerError, match='no strategy is called "tise"'):
        Recipe.from_data({"merger": merger})


def test_the_registry_decides_which_methods_exist() -> None:
    empty = Registry(get_plugin_manager(load_entry_points=False))
    with pytest.raises(UnknownMergerError, match="rmm"):
        Recipe.from_data({"merger": {"method": "rmm"}}, registry=empty)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merger: {method: rmm}\nseed: 1\nseed: 2\n", "the key 'seed' is given twice"),
        ("merger: {method: rmm, basis_size: 1, basis_size: 2}\n", "'basis_size' is given twice"),
        (
            '{"merger": {"method": "rmm"}, "merger": {"method": "average"}}',
            "'merger' is given twice",
        ),
        ("weights: {a: 1, a: 2}\nmerger: {method: rmm}\n", "'a' is given twice"),
        ("merger: {method: rmm\n", "while parsing"),
        ("merger: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("", "a recipe is a mapping, not NoneType"),
        ("- rmm\n", "a recipe is a mapping, not list"),
        ("merger: {method: rmm}\n? [a, b]\n: 1\n", "recipe.yaml"),
        ("merger: {method: rmm}\nweights: {a: .nan}\n", 'the weight of "a" is nan'),
    ],
)
def test_a_wrong_file_is_refused_by_name_in_one_line(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        Recipe.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        Recipe.load(tmp_path / "recipe.yaml")
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        Recipe.load(tmp_path / "missing.yaml")


def test_the_exponent_form_of_yaml_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("merger: {method: task_arithmetic, scale: 3e-1}\n")
    assert Recipe.load(tmp_path / "recipe.yaml").merger == TaskArithmetic(scale=0.3)
