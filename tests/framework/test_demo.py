"""The demo on a part of the shipped zoo: what it measures is what the files hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import unmerge_bundle
from unmerge import AdapterStore, read_adapter
from unmerge.cli import cli
from unmerge.demo import RESTORED, default_zoo, run_demo
from unmerge.errors import ConfigError

TEXTS = 48
ZOO = default_zoo()
DESCRIPTION = json.loads((ZOO / "zoo.json").read_text(encoding="utf-8"))
TASKS = sorted(DESCRIPTION["tasks"])


@pytest.fixture(scope="module")
def small_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of the shipped adapters with the first texts of each."""
    folder = tmp_path_factory.mktemp("zoo")
    chosen = TASKS[:3]
    (folder / "texts").mkdir()
    for name in chosen:
        shutil.copytree(ZOO / "adapters" / name, folder / "adapters" / name)
        lines = (ZOO / "texts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        (folder / "texts" / f"{name}.jsonl").write_text("\n".join(lines[:TEXTS]), encoding="utf-8")
    tasks = {name: DESCRIPTION["tasks"][name] for name in chosen}
    (folder / "zoo.json").write_text(json.dumps({**DESCRIPTION, "tasks": tasks}))
    return folder


@pytest.mark.slow
def test_the_demo_measures_every_variant(small_zoo: Path, tmp_path: Path) -> None:
    phases = set()
    report = run_demo(
        small_zoo, tmp_path / "out", progress=lambda phase, done, total: phases.add(phase)
    )
    assert phases == {"import", "merge", "evaluate"}
    assert [row.name for row in report.rows] == TASKS[:3]
    for row in report.rows:
        assert row.texts == TEXTS
        assert row.accuracy.keys() == {"base", "original", *RESTORED, "merged"}
        assert row.errors.keys() == RESTORED.keys()
        # Three adapters: two basis adapters already hold them exactly but for float16 rounding,
        # which may tip a text that sits on the fence.
        assert abs(row.accuracy["rmm p=2"] - row.accuracy["original"]) <= 1 / TEXTS + 1e-9
        assert row.accuracy["rmm p=3"] == row.accuracy["rmm p=2"]
        assert 0 < row.errors["rmm p=2"] < 2e-3
        assert 0 < row.errors["8 bits"] < row.errors["4 bits"] < 0.2
    mean = {v: sum(r.accuracy[v] for r in report.rows) / 3 for v in ("base", "original", "merged")}
    assert mean["base"] < mean["original"]
    assert mean["merged"] < mean["original"]
    r, N, p = 16, 3, 2
    assert report.element_ratios["rmm p=2"] == pytest.approx((p * (r + N) + r) / (r * N))
    assert report.element_ratios["merged"] == pytest.approx(1 / N)
    assert AdapterStore.open(tmp_path / "out" / "zoo", at="v1").names() == tuple(TASKS[:3])
    assert report.element_ratios["rank 10"] == pytest.approx(10 / r)
    assert report.element_ratios["4 bits"] is None
    assert report.byte_ratios["4 bits"] < report.byte_ratios["8 bits"] < 1
    bundles = sorted((tmp_path / "out" / "bundles").iterdir())
    assert len(bundles) == len(RESTORED) + 1
    for bundle in bundles:
        assert unmerge_bundle.verify(bundle, "reconstruction").ok
    bundle = tmp_path / "out" / "bundles" / "rmm-p2.rmb"
    total = sum(f.stat().st_size for f in bundle.rglob("*") if f.is_file())
    adapters = sum(
        f.stat().st_size for f in (small_zoo / "adapters").rglob("adapter_*") if f.is_file()
    )
    assert report.byte_ratios["rmm p=2"] == pytest.approx(total / adapters)


def test_only_a_demos_own_output_is_replaced(small_zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="mine"):
            run_demo(small_zoo, tmp_path / "mine", overwrite=overwrite)
    (tmp_path / "mine" / "unmerge-demo.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"thesis\.tex is not the demo's"):
        run_demo(small_zoo, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"


def test_a_folder_that_is_no_zoo_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["demo", "--zoo", str(tmp_path), "--out", str(tmp_path / "o")])
    assert result.exit_code == 2
    assert "no zoo" in result.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", TASKS)
def test_the_shipped_adapters_are_what_the_project_promises(name: str) -> None:
    adapter = read_adapter(ZOO / "adapters" / name)
    assert len(adapter.modules) == 36
    assert {factors.rank for factors in adapter.modules.values()} == {16}
    assert adapter.base_model == DESCRIPTION["base_model"]
    weights = ZOO / "adapters" / name / "adapter_model.safetensors"
    assert weights.stat().st_size <= 1_500_000
    lines = (ZOO / "texts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    labels = DESCRIPTION["tasks"][name]["labels"]
    assert len(rows) >= 200
    assert {row["label"] for row in rows} == set(range(len(labels)))
    assert len({row["text"] for row in rows}) == len(rows)
    accuracy = DESCRIPTION["tasks"][name]["accuracy"]
    assert accuracy["adapter"] >= accuracy["base"] + 0.04


def test_the_zoo_has_six_tasks_from_six_seeds_with_their_licences() -> None:
    assert len(TASKS) >= 6
    assert len({task["seed"] for task in DESCRIPTION["tasks"].values()}) == len(TASKS)
    record = (ZOO / "LICENSES.md").read_text(encoding="utf-8")
    for name in TASKS:
        assert name in record
        assert DESCRIPTION["tasks"][name]["license"] in record
