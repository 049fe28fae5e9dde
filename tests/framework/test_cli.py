"""The command line as a user types it: output, exit codes, one line an error, nothing left over."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from adapters import make_adapter, write_peft_directory
from unmerge import AdapterStore, MergePipeline
from unmerge.cli import cli
from unmerge.cli.merge import doubts
from unmerge_bundle import ModuleErrors
from unmerge_strategies import Rmm

SHAPES = {"layers.0.q": (12, 8), "layers.0.up": (20, 8)}
COMMANDS = sorted(cli.commands)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def ok(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    for seed, name in enumerate(("math", "sql", "chat", "code")):
        head = {"base_model.model.head.weight": torch.full((2, 8), float(seed))}
        adapter = make_adapter(name, seed=seed, modules=SHAPES, verbatim=head)
        write_peft_directory(adapter, folder / name)
    return folder


@pytest.fixture
def zoo(tmp_path: Path, adapters: Path) -> Path:
    zoo = tmp_path / "zoo"
    ok("init", zoo)
    ok("add", zoo, *sorted(adapters.iterdir()), "-m", "first import")
    return zoo


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_json_and_debug(command: str) -> None:
    text = ok(command, "--help")
    assert f"Example: unmerge {command}" in text
    assert "--json" in text
    assert "--debug" in text


def test_the_whole_way(zoo: Path, adapters: Path, tmp_path: Path) -> None:
    listed = json.loads(ok("ls", zoo, "--json"))
    assert [a["name"] for a in listed["adapters"]] == ["chat", "code", "math", "sql"]
    assert listed["base_model"] == "org/base"
    assert ok("tag", zoo, "v1").strip().startswith("v1 is version")
    log = json.loads(ok("log", zoo, "--json"))
    assert log["versions"][0]["message"] == "first import"
    assert log["versions"][0]["tags"] == ["v1"]

    plan = json.loads(
        ok("plan", zoo, "--method", "rmm", "--set", "basis_size=3", "--at", "v1", "--json")
    )
    merge = json.loads(
        ok("merge", zoo, tmp_path / "o.rmb", "--method", "rmm", "--set", "basis_size=3", "--json")
    )
    assert plan["output_elements"] == merge["elements"]
    inspected = json.loads(ok("inspect", tmp_path / "o.rmb", "--json"))
    assert inspected["restores"] == "factors"
    assert inspected["recipe"]["merger"] == Rmm(basis_size=3).recipe()
    assert inspected["errors"] == merge["errors"]
    assert "sound (reconstruction)" in ok("verify", tmp_path / "o.rmb", "--store", zoo)

    ok("restore", tmp_path / "o.rmb", "sql", tmp_path / "sql")
    mine = load_file(tmp_path / "sql" / "adapter_model.safetensors")
    theirs = load_file(adapters / "sql" / "adapter_model.safetensors")
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.allclose(mine[key], tensor, atol=1e-5)
    config = (adapters / "sql" / "adapter_config.json").read_bytes()
    assert (tmp_path / "sql" / "adapter_config.json").read_bytes() == config


def test_a_merged_adapter(zoo: Path, tmp_path: Path) -> None:
    out = ok(
        *("merge", zoo, tmp_path / "m.rmb", "--method", "mm_svd", "--set", "inner.method=average"),
        *("--set", "rank=3", "--weights", "sql=1,math=0.5", "--adapters", "sql,math"),
    )
    assert "head.weight" in out
    assert "unmerge export" in out
    ok("export", tmp_path / "m.rmb", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 3, False)
    assert "holds one merged adapter" in ok("inspect", tmp_path / "m.rmb")


def test_a_recipe_file_and_options_that_add_to_it(zoo: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "merger: {method: mm_svd, rank: 2, inner: {method: average}}\nweights: {sql: 2}\n"
    )
    ok("merge", zoo, tmp_path / "a.rmb", "--recipe", recipe, "--seed", "5")
    used = json.loads(ok("inspect", tmp_path / "a.rmb", "--json"))["recipe"]
    assert used["merger"]["rank"] == 2
    assert used["weights"] == {"sql": 2.0}
    assert used["seed"] == 5


def test_human_output_of_the_listing_commands(zoo: Path, tmp_path: Path) -> None:
    assert "sql" in ok("ls", zoo)
    assert "first import" in ok("log", zoo)
    assert "basis_size" in ok("methods", "rmm")
    assert "task_arithmetic" in ok("methods")
    assert {m["method"] for m in json.loads(ok("methods", "--json"))["methods"]} >= {
        *("average", "mm_svd", "rmm", "task_arithmetic"),
    }
    schema = json.loads(ok("methods", "mm_svd", "--json"))["schema"]
    assert schema["properties"]["rank"]
    assert "125.0% of the adapters' elements" in ok(
        "plan", zoo, "--method", "rmm", "--set", "basis_size=2"
    )
    ok("merge", zoo, tmp_path / "o.rmb", "--method", "rmm")
    assert "restores every adapter" in ok("inspect", tmp_path / "o.rmb")


def truncated(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def with_nan(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[3] = float("nan")
    save_file(tensors, path)


def wrong_shape(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.layers.0.q.lora_B.weight"
    tensors[key] = tensors[key][:, :-1].contiguous()
    save_file(tensors, path)


def missing_factor(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.layers.0.q.lora_B.weight"]
    save_file(tensors, path)


def dora(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))


def other_width(folder: Path) -> None:
    write_peft_directory(make_adapter("new", seed=9, modules={"layers.0.q": (12, 9)}), folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "adapter_model.safetensors"),
        (with_nan, "NaN"),
        (wrong_shape, "layers.0.q"),
        (missing_factor, "layers.0.q"),
        (dora, "use_dora"),
        (other_width, "layers.0.q"),
        (shutil.rmtree, "new"),
    ],
)
def test_a_bad_adapter_is_one_line_and_changes_nothing(
    zoo: Path, adapters: Path, tmp_path: Path, damage, words: str
) -> None:
    good = write_peft_directory(make_adapter("good", seed=8, modules=SHAPES), tmp_path / "good")
    bad = write_peft_directory(make_adapter("new", seed=9, modules=SHAPES), tmp_path / "new")
    damage(bad)
    before = ok("ls", zoo, "--json"), ok("log", zoo, "--json")
    result = run("add", zoo, good, bad)
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("unmerge: ")
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert (ok("ls", zoo, "--json"), ok("log", zoo, "--json")) == before


def test_a_duplicate_name_is_refused(zoo: Path, adapters: Path) -> None:
    before = ok("log", zoo, "--json")
    result = run("add", zoo, adapters / "sql")
    assert result.exit_code == 1
    assert "sql" in result.stderr
    assert ok("log", zoo, "--json") == before
    result = run("add", zoo, adapters / "sql", "--name", "sql-again")
    assert result.exit_code == 1
    assert '"sql-again" is "sql" of store' in result.stderr
    assert ok("log", zoo, "--json") == before


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--method", "rmmm"], 2, "did you mean rmm"),
        (["--method", "rmm", "--set", "basis=3"], 2, "there is no such field"),
        (["--method", "rmm", "--set", "basis_size=0"], 2, "basis_size"),
        (["--method", "rmm", "--set", "basis_size=two"], 2, "basis_size"),
        (["--method", "rmm", "--set", "basis_size"], 2, "FIELD=VALUE"),
        (["--method", "rmm", "--set", "basis_size=1", "--set", "basis_size=2"], 2, "twice"),
        (["--method", "mm_svd", "--set", "inner.method=rmm"], 2, "has no merged result"),
        (["--method", "mm_svd", "--set", "inner.method=nothing"], 2, "nothing"),
        (["--method", "rmm", "--basis-size", "3"], 2, "No such option"),
        ([], 2, "--method"),
        (["--recipe", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["--recipe", "nowhere.yaml", "--method", "rmm"], 2, "--recipe"),
        (["--method", "rmm", "--weights", "sql"], 2, "NAME=NUMBER"),
        (["--method", "rmm", "--weights", "nobody=1"], 1, "nobody"),
        (["--method", "rmm", "--weights", "sql=inf"], 2, "finite"),
        (["--method", "rmm", "--adapters", "sql,nobody"], 1, "nobody"),
        (["--method", "rmm", "--modules", "nothing*"], 1, "nothing*"),
        (["--method", "rmm", "--memory-budget", "lots"], 2, "lots"),
        (["--method", "rmm", "--memory-budget", "1kB"], 1, "smallest budget"),
        (["--method", "rmm", "--device", "toaster"], 2, "toaster"),
        (["--method", "rmm", "--at", "no-such-tag"], 1, "no-such-tag"),
        (["--method", "average", "--weights", "sql=1,math=-1,chat=0,code=0"], 1, "sum to 0"),
        (["--method", "rmm", "--set", "method=average"], 2, "--method"),
        (["--method", "rmm", "--set", "basis_size=true"], 2, "basis_size"),
        (["--method", "rmm", "--set", "basis_size=2024-99-99"], 2, "basis_size=2024-99-99"),
        (["--method", "rmm", "--set", "basis_size=" + "[" * 5000], 2, "basis_size"),
        (["--method", "rmm", "--weights", "sql=5"], 1, "does not use weights"),
        (["--method", "rmm", "--modules", "layers.0.q"], 1, "restores whole adapters"),
        (["--method", "average", "--message", "\udcff"], 1, "message"),
    ],
)
def test_wrong_usage_is_one_line_and_writes_nothing(
    zoo: Path, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    before = tree(zoo)
    result = run("merge", zoo, tmp_path / "out.rmb", *arguments)
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out.rmb").exists()
    assert not list(tmp_path.glob(".*"))
    assert tree(zoo) == before


def test_an_existing_output_is_refused_everywhere(
    zoo: Path, adapters: Path, tmp_path: Path
) -> None:
    ok("merge", zoo, tmp_path / "o.rmb", "--method", "rmm")
    ok("merge", zoo, tmp_path / "m.rmb", "--method", "average")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious.txt").write_text("mine")
    before = tree(tmp_path)
    for arguments in (
        ("merge", zoo, tmp_path / "o.rmb", "--method", "average"),
        ("merge", zoo, tmp_path / "taken", "--method", "average"),
        ("merge", zoo, tmp_path / "taken", "--method", "average", "--overwrite"),
        ("restore", tmp_path / "o.rmb", "sql", tmp_path / "taken"),
        ("restore", tmp_path / "o.rmb", "sql", tmp_path / "taken", "--overwrite"),
        ("export", tmp_path / "m.rmb", tmp_path / "taken"),
        ("init", tmp_path / "taken"),
        ("init", zoo),
    ):
        result = run(*arguments)
        assert result.exit_code == 1, arguments
        assert result.stderr.count("\n") == 1
    assert tree(tmp_path) == before
    ok("merge", zoo, tmp_path / "o.rmb", "--method", "average", "--overwrite")


def test_restore_and_export_name_each_other(zoo: Path, tmp_path: Path) -> None:
    ok("merge", zoo, tmp_path / "o.rmb", "--method", "rmm")
    ok("merge", zoo, tmp_path / "m.rmb", "--method", "average")
    result = run("export", tmp_path / "o.rmb", tmp_path / "x")
    assert result.exit_code == 1
    assert "restore" in result.stderr
    result = run("restore", tmp_path / "m.rmb", "sql", tmp_path / "x")
    assert result.exit_code == 1
    assert "export" in result.stderr
    result = run("restore", tmp_path / "o.rmb", "sq", tmp_path / "x")
    assert result.exit_code == 1
    assert "sql" in result.stderr
    assert not (tmp_path / "x").exists()


def test_verify_finds_a_flipped_bit_and_exits_1(zoo: Path, tmp_path: Path) -> None:
    ok("merge", zoo, tmp_path / "o.rmb", "--method", "rmm")
    blob = max((tmp_path / "o.rmb" / "blobs").glob("*.safetensors"), key=lambda p: p.stat().st_size)
    data = bytearray(blob.read_bytes())
    data[-5] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    result = run("verify", tmp_path / "o.rmb")
    assert result.exit_code == 1
    assert "digest-mismatch" in result.stderr
    report = run("verify", tmp_path / "o.rmb", "--json")
    assert report.exit_code == 1
    assert json.loads(report.stdout)["ok"] is False


def test_verify_says_what_it_compared(zoo: Path, adapters: Path, tmp_path: Path) -> None:
    ok("merge", zoo, tmp_path / "o.rmb", "--method", "rmm")
    ok("merge", zoo, tmp_path / "m.rmb", "--method", "average")
    assert "4 adapters compared with their originals" in ok(
        "verify", tmp_path / "o.rmb", "--store", zoo
    )
    assert "4 sources' digests compared" in ok("verify", tmp_path / "m.rmb", "--store", zoo)
    other = tmp_path / "other"
    ok("init", other)
    ok("add", other, adapters / "sql", "--name", "math")
    for bundle in ("o.rmb", "m.rmb"):
        result = run("verify", tmp_path / bundle, "--store", other)
        assert result.exit_code == 1
        assert "digest-mismatch" in result.stderr
        assert "unknown-source" in result.stderr
    result = run("verify", tmp_path / "o.rmb", "--at", "v1")
    assert result.exit_code == 2
    assert "--store" in result.stderr


def test_a_merge_says_what_rounding_changed(zoo: Path, tmp_path: Path) -> None:
    scale = ("--method", "mm_svd", "--set", "inner.scale=1e-8")
    scale += ("--set", "inner.method=task_arithmetic", "--dtype", "float16")
    report = json.loads(ok("merge", zoo, tmp_path / "bad.rmb", *scale, "--json"))
    assert report["rounding"] > 0.01
    assert "--dtype float32 avoids it" in ok("merge", zoo, tmp_path / "bad2.rmb", *scale)
    report = json.loads(
        ok("merge", zoo, tmp_path / "good.rmb", *scale, "--set", "split=balanced", "--json")
    )
    assert 0 < report["rounding"] < 0.01


def test_a_url_is_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("init", "s3://bucket/zoo")
    assert result.exit_code == 1
    assert "s3:" in result.stderr
    assert not list(tmp_path.iterdir())


def test_what_is_no_store_or_bundle_is_said_so(tmp_path: Path) -> None:
    for arguments in (("ls", tmp_path), ("inspect", tmp_path), ("ls", tmp_path / "nowhere")):
        result = run(*arguments)
        assert result.exit_code == 1
        assert result.stderr.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run("ls", tmp_path / "nowhere", "--debug")
    assert result.exit_code != 0
    assert result.exception is not None
    assert not isinstance(result.exception, SystemExit)


def test_an_adapter_is_appended_and_comes_back_beside_the_others(
    zoo: Path, adapters: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.rmb"
    ok("merge", zoo, out, "--method", "rmm", "--set", "basis_size=1")
    before = json.loads(ok("inspect", out, "--json"))["errors"]
    write_peft_directory(make_adapter("new", seed=77, modules=SHAPES), tmp_path / "new")
    said = ok("append", out, tmp_path / "new", "-m", "one more")
    assert "appended new as generation 2" in said
    after = json.loads(ok("inspect", out, "--json"))
    assert {name: after["errors"][name] for name in before} == before
    assert after["generations"][1]["message"] == "one more"
    mean = sum(e["delta"] for e in after["errors"]["new"].values()) / len(after["errors"]["new"])
    # A basis of one direction, made for other random adapters, holds little of this one.
    assert 0.3 < mean < 1.1
    assert ok("verify", out, "--depth", "reconstruction")
    ok("restore", out, "new", tmp_path / "restored")
    again = run("append", out, tmp_path / "new")
    assert again.exit_code == 1
    assert "holds an adapter 'new' already" in again.stderr
    assert len(json.loads(ok("inspect", out, "--json"))["generations"]) == 2


def test_an_adapter_far_from_the_basis_is_said_to_need_a_new_merge(
    zoo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.rmb"
    ok("merge", zoo, out, "--method", "rmm", "--set", "basis_size=3")
    write_peft_directory(make_adapter("new", seed=77, modules=SHAPES), tmp_path / "new")
    assert "merge again with new" in ok("append", out, tmp_path / "new")


def test_a_merged_bundle_takes_no_more_adapters(zoo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.rmb"
    ok("merge", zoo, out, "--method", "average")
    write_peft_directory(make_adapter("new", seed=77, modules=SHAPES), tmp_path / "new")
    refused = run("append", out, tmp_path / "new")
    assert refused.exit_code == 1
    assert "merge again" in refused.stderr


def test_a_full_rank_result_is_exported_with_a_rank_and_its_error(
    zoo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.rmb"
    said = ok("merge", zoo, out, "--method", "ties", "--set", "density=0.5")
    assert "--rank" in said
    refused = run("export", out, tmp_path / "merged")
    assert refused.exit_code == 1
    assert "rank" in refused.stderr
    saved = json.loads(ok("export", out, tmp_path / "merged", "--rank", 3, "--json"))
    assert 0 < saved["truncation"] < 1
    assert (tmp_path / "merged" / "adapter_model.safetensors").is_file()


def test_what_a_strategy_measured_is_printed_and_kept(zoo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.rmb"
    said = ok("merge", zoo, out, "--method", "mm_svd", "--set", "rank=2")
    assert "truncation error: 0." in said
    modules = json.loads(ok("inspect", out, "--json"))["modules"]
    assert all(0 < module["facts"]["truncation_error"] < 1 for module in modules)


def test_codes_are_measured_in_bytes(zoo: Path, tmp_path: Path) -> None:
    plan = json.loads(ok("plan", zoo, "--method", "quantize", "--set", "bits=4", "--json"))
    assert plan["element_ratio"] is None
    out = tmp_path / "out.rmb"
    report = json.loads(ok("merge", zoo, out, "--method", "quantize", "--set", "bits=4", "--json"))
    assert report["element_ratio"] is None
    assert report["byte_ratio"] == plan["byte_ratio"] < 1


def test_of_several_adapters_appended_the_one_that_fails_is_named(
    zoo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.rmb"
    ok("merge", zoo, out, "--method", "rmm")
    for name, shapes in (("good", SHAPES), ("bad", {**SHAPES, "layers.9.q": (12, 8)})):
        write_peft_directory(make_adapter(name, seed=7, modules=shapes), tmp_path / name)
    refused = run("append", out, tmp_path / "good", tmp_path / "bad")
    assert refused.exit_code == 1
    assert '"bad" cannot be appended' in refused.stderr
    assert "appended before it: good" in refused.stderr


def test_an_inner_rule_is_tuned_by_its_fields_alone(zoo: Path, tmp_path: Path) -> None:
    ok("merge", zoo, tmp_path / "o.rmb", "--method", "knots", "--set", "inner.density=0.5")
    recipe = json.loads(ok("inspect", tmp_path / "o.rmb", "--json"))["recipe"]["merger"]
    assert (recipe["inner"]["method"], recipe["inner"]["density"]) == ("ties", 0.5)


def test_a_recipe_without_its_merger_level_is_explained(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "flat.yaml").write_text("method: ties\n")
    refused = run("merge", zoo, tmp_path / "o.rmb", "--recipe", tmp_path / "flat.yaml")
    assert refused.exit_code == 2
    assert 'stand under "merger", as in merger: {method: ties}' in refused.stderr


def test_what_came_out_badly_is_said(zoo: Path, tmp_path: Path) -> None:
    report = MergePipeline(AdapterStore.open(zoo), Rmm(basis_size=1)).run(tmp_path / "one.rmb")
    far = {"sql": {path: ModuleErrors(factors=1.0, delta=1.1) for path in SHAPES}}
    [line] = doubts(replace(report, errors={**report.errors, **far}))
    assert line == "sql: the error is 1 or more, so that no adapter at all would be nearer"
    assert doubts(report) == []
    options = ("--set", "max_iterations=1", "--set", "mu=1e-6")
    said = ok("merge", zoo, tmp_path / "l.rmb", "--method", "lore", *options)
    assert "had not converged" in said
    said = ok("merge", zoo, tmp_path / "r.rmb", "--method", "rmm", "--set", "error=0.001")
    assert "it saves nothing" in said
