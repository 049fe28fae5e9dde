"""`unmerge analyze` as a user types it: tables, JSON, plots, and what is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from adapters import make_adapter, random_collection
from unmerge import Adapter, AdapterStore
from unmerge.cli import cli
from unmerge.diagnostics import analyze, plot_analysis

SHAPES = {"layers.0.q": (12, 8), "layers.0.up": (20, 8)}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["analyze", *(str(a) for a in arguments)])


def ok(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object, code: int) -> str:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("unmerge: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    return result.stderr


def store_of(path: Path, adapters: list[Adapter]) -> AdapterStore:
    store = AdapterStore.create(path)
    for adapter in adapters:
        store.add(adapter, allow_duplicates=True)
    store.commit("all")
    return store


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    adapters = [
        make_adapter(name, seed=seed, modules=SHAPES)
        for seed, name in enumerate(("chat", "math", "sql"))
    ]
    store_of(tmp_path / "zoo", [*adapters, replace(adapters[0], name="twin")])
    return tmp_path / "zoo"


def test_the_tables_name_adapters_twins_and_modules(zoo: Path) -> None:
    text = ok(zoo)
    assert "layers.0.up" in text
    assert "20 × 8" in text
    assert "+1.000" in text
    twin = next(line for line in text.splitlines() if line.lstrip("│ ").startswith("twin"))
    assert twin.count("chat") == 2  # the closest, and what it lies inside
    assert "100.0%" in twin
    assert "direct merging" in text


def test_json_is_the_whole_analysis(zoo: Path) -> None:
    data = json.loads(ok(zoo, "--json"))
    assert data.pop("plot") is None
    assert data == json.loads(json.dumps(analyze(AdapterStore.open(zoo)).to_data()))
    assert data["cosines"][0][3] == pytest.approx(1)


def test_a_selection_and_an_older_version(zoo: Path) -> None:
    store = AdapterStore.open(zoo)
    store.tag("v1")
    store.add(make_adapter("later", seed=9, modules=SHAPES))
    store.commit("later")
    data = json.loads(ok(zoo, "--json", "--adapters", "sql, later", "--modules", "*.q"))
    assert data["adapters"] == ["later", "sql"]
    assert [module["module"] for module in data["modules"]] == ["layers.0.q"]
    assert len(json.loads(ok(zoo, "--json", "--at", "v1"))["adapters"]) == 4
    assert "later" in refused(zoo, "--at", "v1", "--adapters", "later", code=1)


def test_many_adapters_are_shown_by_their_closest_pairs(tmp_path: Path) -> None:
    store_of(tmp_path / "zoo", random_collection(12, modules=SHAPES))
    text = ok(tmp_path / "zoo")
    assert "the 12 largest cosines of 66 pairs" in text
    assert "adapter-11" in text


def test_one_adapter_unequal_ranks_and_a_zero_one(tmp_path: Path) -> None:
    one = make_adapter("one", seed=1, modules=SHAPES)
    store = store_of(tmp_path / "zoo", [one])
    text = ok(Path(store.address))
    assert "one" in text
    assert "–" in text
    zero = make_adapter("zero", seed=2, modules=SHAPES, rank=2)
    modules = {p: replace(f, B=torch.zeros_like(f.B)) for p, f in zero.modules.items()}
    store.add(replace(zero, modules=modules), allow_duplicates=True)
    store.commit("zero")
    text = ok(Path(store.address))
    assert "2 modules cannot be merged directly: ranks 2, 4 differ" in text
    assert "nan" not in text
    assert "nan" not in ok(Path(store.address), "--json").lower()


@pytest.mark.parametrize(
    ("name", "magic"), [("zoo.png", b"\x89PNG"), ("zoo.svg", b"<?xml"), ("ZOO.PNG", b"\x89PNG")]
)
def test_a_plot_is_written_and_the_same_every_time(
    zoo: Path, tmp_path: Path, name: str, magic: bytes
) -> None:
    assert f"wrote {tmp_path / name}" in ok(zoo, "--plot", tmp_path / name)
    first = (tmp_path / name).read_bytes()
    assert first.startswith(magic)
    data = json.loads(ok(zoo, "--plot", tmp_path / name, "--overwrite", "--json"))
    assert data["plot"] == str(tmp_path / name)
    assert (tmp_path / name).read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "zoo"])


def test_the_svg_names_adapters_and_modules(zoo: Path, tmp_path: Path) -> None:
    ok(zoo, "--plot", tmp_path / "zoo.svg")
    text = (tmp_path / "zoo.svg").read_text()
    for word in ("chat", "twin", "layers.0.up", "cosine between adapters"):
        assert word in text


def test_a_plot_of_missing_modules_many_adapters_and_no_interference(tmp_path: Path) -> None:
    some = [
        *random_collection(70, modules={"a.$q$": (3, 2)}, rank=1),
        make_adapter("other", seed=1, modules={"b": (3, 2)}, rank=1),
    ]
    found = analyze(store_of(tmp_path / "zoo", some))
    plot_analysis(found, tmp_path / "many.svg")
    assert ">a.$q$</text>" in (tmp_path / "many.svg").read_text()
    one = analyze(store_of(tmp_path / "one", some[-1:]))
    plot_analysis(one, tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000


def test_an_existing_plot_is_kept(zoo: Path, tmp_path: Path) -> None:
    plot = tmp_path / "zoo.png"
    plot.write_bytes(b"mine")
    line = refused(zoo, "--plot", plot, code=1)
    assert "--overwrite" in line
    assert plot.read_bytes() == b"mine"
    (tmp_path / "folder.png").mkdir()
    assert "is a directory" in refused(
        zoo, "--plot", tmp_path / "folder.png", "--overwrite", code=1
    )


def test_a_plot_that_appears_meanwhile_is_kept(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unmerge.diagnostics import plot

    target = tmp_path / "zoo.png"
    draw = plot._draw

    def slow(*arguments: object) -> bytes:
        target.write_bytes(b"theirs")
        return draw(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(plot, "_draw", slow)
    assert "exists" in refused(zoo, "--plot", target, code=1)
    assert target.read_bytes() == b"theirs"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["zoo", "zoo.png"]


def test_plots_that_cannot_be_drawn_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = tmp_path / "no-store"
    assert ".svg" in refused(nowhere, "--plot", "zoo.pdf", code=2)
    assert "no directory" in refused(nowhere, "--plot", tmp_path / "no" / "zoo.png", code=2)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'unmerge[plots]'" in refused(
        nowhere, "--plot", tmp_path / "zoo.png", code=2
    )


def test_matplotlib_is_needed_for_plots_only(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "layers.0.up" in ok(zoo)


def test_wrong_names_are_one_line(zoo: Path, tmp_path: Path) -> None:
    assert "law" in refused(zoo, "--adapters", "law", code=1)
    assert "*.nothing" in refused(zoo, "--modules", "*.nothing", code=1)
    assert "twice" in refused(zoo, "--adapters", "sql,sql", code=2)
    assert "no-store" in refused(tmp_path / "no-store", code=1)
