"""Installs a package by somebody else and uses its strategy like a built-in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent

MERGE = """
import json
import sys
from pathlib import Path

import numpy as np
import torch

import unmerge_bundle
from unmerge import Adapter, AdapterStore, Factors, MergePipeline

folder = Path(sys.argv[1])
store = AdapterStore.create(folder / "zoo", base_model="org/base")
deltas = []
for seed, name in enumerate(("chat", "math", "sql")):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(2, 5, generator=generator)
    B = torch.randn(70, 2, generator=generator)
    deltas.append(4.0 * (B.double() @ A.double()).numpy())
    store.add(Adapter(name=name, modules={"layer": Factors(A=A, B=B, scaling=4.0)}))
store.commit("three adapters")
expected = np.min(deltas, axis=0) + np.max(deltas, axis=0)

report = {}
for space in ("delta", "factors"):
    recipe = {"method": "acme.midrange", "space": space, "scale": 2.0}
    MergePipeline(store, recipe, device="cpu").run(folder / f"{space}.rmb")
    bundle = unmerge_bundle.open(folder / f"{space}.rmb")
    difference = bundle.merged().delta("layer") - expected
    report[space] = {
        "difference": float(np.linalg.norm(difference) / np.linalg.norm(expected)),
        "recipe": bundle.generation.recipe["merger"],
        "distribution": bundle.generation.strategy.distribution,
    }
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the package installed."""
    target = tmp_path_factory.mktemp("site")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-input"),
            *("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"),
            *("--target", str(target), str(PACKAGE)),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    inherited = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(part for part in (str(target), inherited) if part)
    return {**os.environ, "PYTHONPATH": path}


def run(environment: dict[str, str], *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def unmerge(environment: dict[str, str], *arguments: str) -> str:
    return run(environment, "-c", "from unmerge.cli import main; main()", *arguments)


@pytest.fixture(scope="module")
def bundles(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundles that `MERGE` wrote, and what it reported as `report.json`."""
    folder = tmp_path_factory.mktemp("bundles")
    output = run(environment, "-W", "error", "-c", MERGE, str(folder))
    (folder / "report.json").write_text(output)
    return folder


def test_the_command_line_lists_the_strategy_and_where_it_comes_from(
    environment: dict[str, str],
) -> None:
    listed = json.loads(unmerge(environment, "methods", "--json"))["methods"]
    by_name = {row["method"]: row for row in listed}
    assert by_name["acme.midrange"]["distribution"] == "acme-mergers 2.0"
    assert by_name["acme.midrange"]["summary"].startswith("The middle between")
    assert by_name["rmm"]["distribution"].startswith("unmerge ")


def test_the_command_line_shows_its_fields(environment: dict[str, str]) -> None:
    shown = unmerge(environment, "methods", "acme.midrange")
    assert "acme-mergers 2.0" in shown
    assert "where the rule is applied" in shown
    assert "applied to the result" in shown


def test_it_merges_into_a_bundle(bundles: Path) -> None:
    report = json.loads((bundles / "report.json").read_text())["delta"]
    assert report["difference"] < 1e-6
    assert report["distribution"] == "acme-mergers 2.0"
    assert report["recipe"] == {"method": "acme.midrange", "space": "delta", "scale": 2.0}


def test_in_factor_space_it_is_another_rule(bundles: Path) -> None:
    assert json.loads((bundles / "report.json").read_text())["factors"]["difference"] > 1e-2


def test_a_bundle_needs_the_plugin_to_be_made_but_not_to_be_read(bundles: Path) -> None:
    read = (
        "import importlib.util, sys, unmerge_bundle\n"
        "assert importlib.util.find_spec('acme_mergers') is None\n"
        "print(unmerge_bundle.open(sys.argv[1]).merged().delta('layer').shape)\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert run(dict(os.environ), "-c", read, str(bundles / "delta.rmb")).strip() == "(70, 5)"


def test_the_package_is_as_small_as_promised() -> None:
    assert len((PACKAGE / "acme_mergers.py").read_text().splitlines()) <= 40
