"""Every strategy's bundle has the same bytes however the work was cut, ordered, and by whom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters import make_adapter
from unmerge import AdapterStore, MergePipeline, default_registry
from unmerge.errors import MemoryBudgetError

SHAPES = {
    **{f"layers.{n}.q": (150, 40) for n in range(4)},
    **{f"layers.{n}.up": (70, 90) for n in range(3)},
}
NAMES = ("sql", "chat", "math", "code")
RECIPES: list[dict[str, Any]] = [
    *({"method": method} for method in default_registry()),
    {"method": "ties", "scope": "model", "zero_vote": "majority"},
    {"method": "emr", "scope": "model"},
    {"method": "dare", "rescale": "norm", "inner": {"method": "ties", "scope": "model"}},
    {"method": "knots", "inner": {"method": "dare", "density": 0.5, "inner": {"method": "ties"}}},
    {"method": "mm_svd", "error": 0.2, "inner": {"method": "ties"}},
    {"method": "rmm", "gauge": "aligned"},
    {"method": "lore", "finish": "ties", "max_iterations": 3},
]
IDS = [f"{n}-{recipe['method']}" for n, recipe in enumerate(RECIPES)]

MERGE = """
import json, sys
from pathlib import Path
from unmerge import AdapterStore, MergePipeline
store, out = AdapterStore.open(sys.argv[1]), Path(sys.argv[2])
for number, recipe in enumerate(json.load(sys.stdin)):
    MergePipeline(store, recipe, device="cpu", workers=2, seed=3).run(out / f"{number}.rmb")
"""


def _store(folder: Path, names: tuple[str, ...]) -> AdapterStore:
    store = AdapterStore.create(folder, base_model="org/base")
    for name in names:
        store.add(make_adapter(name, seed=NAMES.index(name), modules=SHAPES))
        store.commit(f"add {name}")
    return store


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[AdapterStore, AdapterStore]:
    """The same adapters, imported in two orders."""
    folder = tmp_path_factory.mktemp("stores")
    return _store(folder / "forward", NAMES), _store(folder / "backward", NAMES[::-1])


@pytest.fixture(scope="module")
def elsewhere(
    stores: tuple[AdapterStore, AdapterStore], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The bundles of all recipes, made in a process of its own with another hash seed."""
    out = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MERGE, stores[0].address, str(out)],
        input=json.dumps(RECIPES),
        env={**os.environ, "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out


def _blobs(bundle: Path) -> dict[str, bytes]:
    # bundle.json alone knows the time; the generation document is a blob.
    return {path.name: path.read_bytes() for path in (bundle / "blobs").iterdir()}


def _smallest_budget(plan: Callable[[int], object]) -> int:
    try:
        plan(1)
    except MemoryBudgetError as error:
        return error.required
    raise AssertionError("one byte was enough")


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_the_bytes_depend_on_the_adapters_the_recipe_and_the_seed_alone(
    recipe: dict[str, Any],
    stores: tuple[AdapterStore, AdapterStore],
    elsewhere: Path,
    tmp_path: Path,
) -> None:
    forward, backward = stores

    def pipeline(store: AdapterStore, budget: int, workers: int) -> MergePipeline:
        return MergePipeline(
            store, recipe, device="cpu", seed=3, memory_budget=budget, workers=workers
        )

    pipeline(forward, 1 << 30, 3).run(tmp_path / "roomy.rmb")
    least = _smallest_budget(lambda budget: pipeline(backward, budget, 1).plan())
    tight = pipeline(backward, least, 1)
    assert len(tight.plan().chunks) > len(pipeline(forward, 1 << 30, 3).plan().chunks)
    tight.run(tmp_path / "tight.rmb")
    expected = _blobs(tmp_path / "roomy.rmb")
    assert _blobs(tmp_path / "tight.rmb") == expected
    assert _blobs(elsewhere / f"{RECIPES.index(recipe)}.rmb") == expected
