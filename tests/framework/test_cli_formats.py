"""What the command line says of adapter formats, and how one adapter goes through several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from click.testing import CliRunner, Result
from pydantic import Field
from safetensors.torch import load_file

from adapter_files import WRITERS, contents, source
from adapters import make_adapter, write_peft_directory
from checkpoints import delta, distance, gaussian, save_model
from unmerge import (
    Adapter,
    AdapterFormat,
    AdapterStore,
    get_plugin_manager,
    hookimpl,
    read_adapter,
)
from unmerge.cli import cli
from unmerge.cli.options import format_of
from unmerge.formats import CheckpointFormat, Formats, default_formats
from unmerge_bundle.peft import VERBATIM_FILE


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def ok(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_formats_are_listed_with_what_they_look_for() -> None:
    text = " ".join(ok("formats").split())
    for name in (*WRITERS, "checkpoint"):
        assert name in text
    listed = {row["format"]: row for row in json.loads(ok("formats", "--json"))["formats"]}
    assert {name for name, row in listed.items() if row["written"]} == set(WRITERS)
    assert listed["peft"]["looks_for"].startswith("a directory with adapter_config.json")
    assert listed["peft"]["distribution"].startswith("unmerge ")


@pytest.mark.parametrize("name", sorted(default_formats()))
def test_the_options_of_each_format_are_described(name: str) -> None:
    text = ok("formats", name)
    chosen = default_formats()[name].format
    assert ("no options" in text) == (not chosen.model_fields)
    found = json.loads(ok("formats", name, "--json"))
    assert set(found["schema"].get("properties", {})) == set(chosen.model_fields)
    for field, info in chosen.model_fields.items():
        assert field in text
        assert info.description, field


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (["base=path/to: base", "rank=16"], {"base": "path/to: base", "rank": 16}),
        (["revision=1e5", "base_model=007"], {"revision": "1e5", "base_model": "007"}),
        (["energy=1e-1", "modules=[a, 'b.*']"], {"energy": 0.1, "modules": ("a", "b.*")}),
        (["dtype=bfloat16"], {"dtype": "bfloat16"}),
    ],
)
def test_options_are_read_as_what_their_fields_take(
    fields: list[str], expected: dict[str, object]
) -> None:
    assert format_of("checkpoint", fields) == CheckpointFormat.model_validate(expected)


class Shelf(AdapterFormat):
    """Adapters of another tool: a PEFT directory beside a label."""

    format: ClassVar[str] = "acme.shelf"
    looks_for: ClassVar[str] = "a directory with label.txt"

    label: str = Field("none", description="what stands on the label")

    def recognises(self, path: Path) -> bool:
        """Return whether there is a label."""
        return (path / "label.txt").is_file()

    def read(self, path: Path, name: str | None) -> Adapter:
        """Return an adapter named after the label."""
        adapter = make_adapter(name or (path / "label.txt").read_text(), seed=3)
        return Adapter(adapter.name, adapter.modules, format=self.format, config=self.label)

    def write(self, adapter: Adapter, directory: Path) -> None:
        """Write the label."""
        (directory / "label.txt").write_text(adapter.name)

    def reader_of(self, adapter: Adapter) -> Shelf:
        """Return the format with the label it was told."""
        return Shelf(label=adapter.config)


class Plugin:
    """Brings the format, as an installed package would."""

    @hookimpl
    def unmerge_formats(self) -> list[type[AdapterFormat]]:
        """Return the one format."""
        return [Shelf]


def test_a_format_of_a_plugin_is_used_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = get_plugin_manager()
    manager.register(Plugin())
    known = Formats(manager)
    for user in ("cli.formats", "cli.options", "importing", "exporting"):
        monkeypatch.setattr(f"unmerge.{user}.default_formats", lambda: known)
    assert "acme.shelf" in ok("formats")
    assert "what stands on the label" in ok("formats", "acme.shelf")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "label.txt").write_text("sql")
    zoo = tmp_path / "zoo"
    ok("init", zoo)
    ok("add", zoo, tmp_path / "mine")
    ok("rm", zoo, "sql")
    ok("add", zoo, tmp_path / "mine", "--format", "acme.shelf", "--set", "label=007")
    said = ok("export-adapter", zoo, "sql", tmp_path / "out")
    assert "--format acme.shelf --set label=007" in said
    assert contents(tmp_path / "out") == contents(tmp_path / "mine")
    ok("export-adapter", zoo, "sql", tmp_path / "peft", "--format", "peft")
    assert (tmp_path / "peft" / "adapter_config.json").is_file()


def test_one_adapter_through_every_format_and_back(tmp_path: Path) -> None:
    original = write_peft_directory(make_adapter("sql", seed=1), tmp_path / "0" / "sql")
    first = load_file(original / "adapter_model.safetensors")
    # Names with dots do not survive kohya's, so that it comes last.
    chain = ("mlx", "peft_file", "peft", "diffusers", "mlx", "peft")
    place: Path = original
    for step, form in enumerate(chain, start=1):
        zoo = tmp_path / f"zoo{step}"
        ok("init", zoo)
        ok("add", zoo, place, "--name", "sql")
        options = ("--set", "component=transformer") if form == "diffusers" else ()
        ok("export-adapter", zoo, "sql", tmp_path / f"{step}/sql", "--format", form, *options)
        place = tmp_path / f"{step}/sql"
        if form == "peft_file":
            place = place / "sql.safetensors"
    last = load_file(place / "adapter_model.safetensors")
    assert len(last) == len(first)
    for key, tensor in first.items():
        moved = key.replace("base_model.model.", "base_model.model.transformer.")
        assert torch.equal(last[moved], tensor)
    config = json.loads((place / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["r"]) == (8, 4)


def test_a_full_checkpoint_becomes_an_adapter_that_peft_reads(tmp_path: Path) -> None:
    base = {"model.up.weight": gaussian(6, 5), "model.norm.weight": torch.ones(5)}
    change = gaussian(6, 2, seed=1) @ gaussian(2, 5, seed=2)
    tuned = {**base, "model.up.weight": base["model.up.weight"] + change}
    tuned["model.norm.weight"] = torch.full((5,), 1.5)
    save_model(tmp_path / "base", base)
    save_model(tmp_path / "poet", tuned)
    zoo = tmp_path / "zoo"
    ok("init", zoo)
    untold = run("add", zoo, tmp_path / "poet")
    assert untold.exit_code == 2
    assert "--format checkpoint --set base=" in untold.stderr
    told = ("--format", "checkpoint", "--set", f"base={tmp_path / 'base'}", "--set", "rank=2")
    ok("add", zoo, tmp_path / "poet", *told)
    refused = run("export-adapter", zoo, "poet", tmp_path / "out")
    assert refused.exit_code == 1
    assert "choose one of diffusers, kohya, mlx, peft, peft_file" in refused.stderr
    ok("export-adapter", zoo, "poet", tmp_path / "out", "--format", "peft")
    back = read_adapter(tmp_path / "out")
    assert distance(delta(back.modules["model.up"]), change) < 1e-5
    [(key, kept)] = back.verbatim.items()
    assert key == "base_model.model.model.norm.weight"
    assert torch.equal(kept, tuned["model.norm.weight"])


def test_restoring_an_adapter_of_another_format_names_the_way_back(tmp_path: Path) -> None:
    zoo, out = tmp_path / "zoo", tmp_path / "out.rmb"
    ok("init", zoo)
    for seed, name in enumerate(("a", "b")):
        ok("add", zoo, source(tmp_path / name, "kohya", seed, torch.float32), "--name", name)
    ok("merge", zoo, out, "--method", "truncate", "--set", "rank=2")
    said = ok("restore", out, "a", tmp_path / "back")
    assert "note: modules are called as in kohya; a store gives the adapter back" in said


def test_restoring_says_what_peft_does_not_load(tmp_path: Path) -> None:
    zoo, out = tmp_path / "zoo", tmp_path / "out.rmb"
    store = AdapterStore.create(zoo)
    head = {"model.norm.weight": torch.ones(4)}
    for seed, name in enumerate(("a", "b")):
        adapter = make_adapter(name, seed=seed)
        store.add(Adapter(name, adapter.modules, head, config="{}", format="checkpoint"))
    store.commit("two")
    ok("merge", zoo, out, "--method", "truncate", "--set", "rank=2")
    said = ok("restore", out, "a", tmp_path / "a")
    assert "note: PEFT does not load model.norm.weight, which the adapter's own format " in said
    assert f"(checkpoint) keeps whole; they are in {VERBATIM_FILE} beside it" in said
    assert "unmerge export-adapter" not in said  # nothing is written as a checkpoint
    assert load_file(tmp_path / "a" / VERBATIM_FILE).keys() == head.keys()
    found = json.loads(ok("restore", out, "b", tmp_path / "b", "--json"))
    assert found["beside"] == ["model.norm.weight"]


def test_nothing_is_said_where_peft_loads_all(tmp_path: Path) -> None:
    zoo, out = tmp_path / "zoo", tmp_path / "out.rmb"
    ok("init", zoo)
    for seed, name in enumerate(("a", "b")):
        ok("add", zoo, source(tmp_path / name, "peft", seed, torch.float32))
    ok("merge", zoo, out, "--method", "truncate", "--set", "rank=2")
    assert "note:" not in ok("restore", out, "a", tmp_path / "back")
    found = json.loads(ok("restore", out, "b", tmp_path / "b-back", "--json"))
    assert found["beside"] == []
