"""The archive as a user types it: import, look, compare, take out, give back space."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from huggingface_hub import constants

import s3
from adapter_files import contents, source
from adapters import make_adapter, write_peft_directory
from hub_server import Hub, serve
from unmerge import AdapterStore
from unmerge.cli import cli

SHAPES = {"layers.0.q": (12, 8), "layers.0.up": (20, 8)}
NAMES = ["chat", "math", "sql"]


def run(*arguments: object, typed: str | None = None) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments], input=typed)


def ok(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def data(*arguments: object) -> dict:
    return json.loads(ok(*arguments, "--json"))


def refused(*arguments: object, code: int = 1) -> str:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert all(line.startswith("unmerge: ") for line in result.stderr.splitlines())
    return result.stderr


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three adapters in `adapters/`, seen from the working directory."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(NAMES):
        head = {"base_model.model.head.weight": torch.full((2, 8), float(seed))}
        adapter = make_adapter(name, seed=seed, modules=SHAPES, rank=2 + seed, verbatim=head)
        write_peft_directory(adapter, Path("adapters") / name)
    return Path("adapters")


@pytest.fixture
def zoo(adapters: Path) -> str:
    """A store with them, tagged v1."""
    ok("init", "zoo")
    ok("add", "zoo", *sorted(adapters.iterdir()), "--note", "from the start", "--meta", "team=a")
    ok("tag", "zoo", "v1")
    return "zoo"


def damage(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def test_the_whole_way(zoo: str, adapters: Path) -> None:
    assert "removed math, sql" in ok("rm", zoo, "math", "sql", "-m", "not used")
    write_peft_directory(make_adapter("chat", seed=9, modules=SHAPES), Path("newer/chat"))
    assert "replaced chat" in ok("add", zoo, "newer/chat", "--replace")
    assert "noted chat" in ok("note", zoo, "chat", "--note", "retrained", "--meta", "owner=ana")
    found = data("diff", zoo, "v1")
    assert (found["added"], found["removed"], found["unchanged"]) == ([], ["math", "sql"], 0)
    assert set(found["changed"]["chat"]["fields"]) >= {"digest", "note", "metadata"}
    assert set(found["changed"]["chat"]["modules"]) == set(SHAPES)
    assert "every bit" in ok("verify", zoo)
    done = data("gc", zoo, "--forget-before", "0h", "--yes")
    assert len(done["forgotten"]) >= 3
    assert done["objects"] > 0
    assert [v["tags"] for v in data("log", zoo)["versions"]] == [[]]
    assert list(data("log", zoo)["tags_elsewhere"]) == ["v1"]
    assert "not in this history, and readable with --at: v1 (" in ok("log", zoo)
    assert data("log", zoo, "--at", "v1")["tags_elsewhere"] == {}
    for name in NAMES:
        ok("export-adapter", zoo, name, f"back/{name}", "--at", "v1")
        assert contents(Path("back") / name) == contents(adapters / name)
    assert contents(Path("newer/chat")) != contents(adapters / "chat")
    ok("export-adapter", zoo, "chat", "back/newest")
    assert contents(Path("back/newest")) == contents(Path("newer/chat"))


def test_ls_shows_what_every_filter_lets_through(zoo: str, adapters: Path) -> None:
    source(Path("more/style"), "kohya", 4, torch.float16)
    ok("add", zoo, "more/style", "--meta", "team=b", "--meta", "owner=ana")
    ok("note", zoo, "sql", "--meta", "owner=ana")

    def listed(*filters: str) -> list[str]:
        return [adapter["name"] for adapter in data("ls", zoo, *filters)["adapters"]]

    assert listed() == [*NAMES, "style"]
    assert listed("--name", "*l*") == ["sql", "style"]
    assert listed("--meta", "team=a") == NAMES
    assert listed("--meta", "team=a", "--meta", "owner=ana") == ["sql"]
    assert listed("--format", "kohya") == ["style"]
    assert listed("--rank", "3") == ["math", "style"]
    assert listed("--module", "layers.*.up") == NAMES
    assert listed("--module", "layers.*.up", "--rank", "3") == ["math"]
    assert listed("--name", "nothing") == []
    assert listed("--at", "v1", "--format", "kohya") == []
    text = ok("ls", zoo, "--name", "s*", "--long")
    assert "2 of 4 adapters" in text
    assert "team=b" in text
    assert "from the start" in text
    assert "kohya" in text
    assert data("show", zoo, "sql")["adapter"]["digest"][7:19] in text


def test_show_says_all_that_is_known(zoo: str, adapters: Path) -> None:
    text = ok("show", zoo, "math")
    config = (adapters / "math" / "adapter_config.json").read_text()
    for words in (
        *("adapters/math", "org/base", "from the start", "team=a", "layers.0.up", "linear"),
        *("base_model.model.head.weight", "2 × 8", '"lora_alpha": 8'),
    ):
        assert words in text
    found = data("show", zoo, "math", "--at", "v1")["adapter"]
    assert found["config"] == config
    assert found["digest"] in text
    assert found["modules"]["layers.0.q"] == {
        "rank": 3,
        "d_out": 12,
        "d_in": 8,
        "kind": "linear",
        "dtype": "float32",
        "scaling": 8 / 3,
    }
    assert found["verbatim"] == {
        "base_model.model.head.weight": {"dtype": "float32", "shape": [2, 8]}
    }
    assert "no adapter" in refused("show", zoo, "nobody")


def test_add_reports_every_bad_source_and_writes_nothing(adapters: Path) -> None:
    ok("init", "zoo")
    damage(adapters / "chat")
    (adapters / "README.md").write_text("notes")
    before = tree(Path("zoo"))
    lines = refused("add", "zoo", *sorted(adapters.iterdir())).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("unmerge: adapters/README.md: no adapter here, found a file")
    assert lines[1].startswith("unmerge: adapters/chat/adapter_model.safetensors: ")
    assert lines[2] == (
        "unmerge: 2 of 4 adapters cannot be added, so that none was; --skip-bad adds the others"
    )
    result = run("add", "zoo", *sorted(adapters.iterdir()), "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["version"], found["added"]) == (None, [])
    assert [bad["source"] for bad in found["refused"]] == ["adapters/README.md", "adapters/chat"]
    assert "truncated" in found["refused"][1]["reason"]
    assert tree(Path("zoo")) == before


def test_add_skips_bad_ones_when_told_to(adapters: Path) -> None:
    ok("init", "zoo")
    damage(adapters / "chat")
    result = run("add", "zoo", *sorted(adapters.iterdir()), "--skip-bad")
    assert result.exit_code == 0
    assert "added math, sql as version" in result.stdout
    [line] = result.stderr.splitlines()
    assert line.startswith("unmerge: skipped adapters/chat/adapter_model.safetensors: ")
    assert data("ls", "zoo")["adapters"][0]["name"] == "math"
    result = run("add", "zoo", "adapters/chat", "--skip-bad", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["version"] == data("log", "zoo")["versions"][0]["id"]
    assert len(found["refused"]) == 1


def test_twenty_bad_sources_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ok("init", "zoo")
    lines = refused("add", "zoo", *(f"no-{n:02d}" for n in range(25))).splitlines()
    assert len(lines) == 22
    assert lines[-2:] == [
        "unmerge: and 5 more",
        "unmerge: 25 of 25 adapters cannot be added, so that none was",
    ]


def test_a_folder_of_adapters_suggests_what_is_in_it(adapters: Path) -> None:
    ok("init", "zoo")
    assert "pass adapters/* or one of: chat, math, sql" in refused("add", "zoo", "adapters")


def test_repeating_an_import_changes_nothing(zoo: str, adapters: Path) -> None:
    before = data("log", zoo)
    assert ok("add", zoo, *sorted(adapters.iterdir()), "--replace").startswith("unchanged: chat, ")
    found = data("add", zoo, *sorted(adapters.iterdir()), "--replace")
    assert (found["unchanged"], found["added"], found["replaced"]) == (NAMES, [], [])
    assert data("log", zoo) == before


def test_a_linked_adapter_comes_back_until_its_file_changes(zoo: str) -> None:
    before = sum(len(content) for content in tree(Path(zoo) / "chunks").values())
    big = {"layers.9.up": (3000, 500)}
    file = write_peft_directory(make_adapter("big", seed=5, modules=big), Path("big"))
    file /= "adapter_model.safetensors"
    ok("add", zoo, "big", "--link")
    grown = sum(len(content) for content in tree(Path(zoo) / "chunks").values()) - before
    assert grown < file.stat().st_size / 10
    assert f"linked to   {file.resolve()}" in ok("show", zoo, "big")
    assert ok("add", zoo, "big", "--link", "--replace").startswith("unchanged: big")
    ok("export-adapter", zoo, "big", "out")
    assert contents(Path("out")) == contents(Path("big"))
    assert data("verify", zoo)["adapters"] == 4
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    for command in (["export-adapter", zoo, "big", "out2"], ["verify", zoo]):
        assert str(file.resolve()) in refused(*command)
    assert not Path("out2").exists()
    ok("export-adapter", zoo, "sql", "out2")


def test_duplicates_need_to_be_allowed(zoo: str, adapters: Path) -> None:
    assert "--allow-duplicates" in refused("add", zoo, "adapters/sql", "--name", "again")
    ok("add", zoo, "adapters/sql", "--name", "again", "--allow-duplicates")


def test_a_format_and_its_options(adapters: Path) -> None:
    source(Path("plain"), "mlx", 3, torch.float32)
    Path("plain/adapter_config.json").unlink()
    ok("init", "zoo")
    assert 'option "scale"' in refused("add", "zoo", "plain")
    ok("add", "zoo", "plain", "--format", "mlx", "--set", "scale=12.5")
    scaling = data("show", "zoo", "plain")["adapter"]["modules"]["m.q"]["scaling"]
    assert scaling == 12.5
    told = ok("export-adapter", "zoo", "plain", "out")
    assert "--format mlx --set scale=12.5" in told
    assert contents(Path("out")) == contents(Path("plain"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["add", "zoo", "adapters/sql", "--format", "pefft"], "did you mean peft"),
        (["add", "zoo", "adapters/sql", "--set", "alpha=1"], "name it with --format"),
        (["add", "zoo", "adapters/sql", "--format", "peft", "--set", "x=1"], "no such field"),
        (["add", "zoo", "adapters/sql", "--format", "mlx", "--set", "scale=much"], "scale"),
        (["add", "zoo", "adapters/sql", "--format", "mlx", "--set", "scale"], "KEY=VALUE"),
        (["add", "zoo", "adapters/sql", "--format", "mlx", "--set", "scale={"], "scale={"),
        (["add", "zoo", "adapters/sql", "--meta", "a"], "--meta takes KEY=VALUE"),
        (["add", "zoo", "adapters/sql", "--meta", "a=1", "--meta", "a=2"], '"a" twice'),
        (["add", "zoo", "adapters/sql", "adapters/chat", "--name", "x"], "--name"),
        (["add", "zoo", "adapters/sql", "--revision", "v1"], "is a local path"),
        (["add", "zoo"], "SOURCES"),
        (["ls", "zoo", "--meta", "a"], "--meta takes KEY=VALUE"),
        (["ls", "zoo", "--rank", "0"], "--rank"),
        (["note", "zoo", "sql"], "nothing to change"),
        (["note", "zoo", "sql", "--drop-meta", "nothing"], 'no metadata "nothing"; it has team'),
        (["note", "zoo", "sql", "--meta", "a=1", "--drop-meta", "a"], "set and taken away"),
        (["tag", "zoo", "--at", "v1"], "give the tag's name"),
        (["formats", "pefft"], "did you mean peft"),
        (["export-adapter", "zoo", "sql", "out", "--format", "pefft"], "did you mean peft"),
        (["gc", "zoo", "--forget-before", "yesterday"], "2026-01-31"),
        (["gc", "zoo", "--forget-before", "3x"], "such as 30d"),
        (["verify", "zoo", "--depth", "digests"], "are for bundles"),
        (["verify", "out.rmb", "--at", "v1"], "give --store"),
    ],
)
def test_wrong_usage_exits_2_and_writes_nothing(zoo: str, arguments: list[str], words: str) -> None:
    before = tree(Path("zoo"))
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert tree(Path("zoo")) == before
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rm", "zoo", "sql", "nobody"], "nobody"),
        (["note", "zoo", "nobody", "--note", "x"], "nobody"),
        (["show", "zoo", "sql", "--at", "v9"], "v9"),
        (["diff", "zoo", "v1", "v9"], "v9"),
        (["export-adapter", "zoo", "nobody", "out"], "nobody"),
        (["export-adapter", "zoo", "sql", "out", "--format", "kohya"], "head.weight"),
        (["export-adapter", "zoo", "sql", "out", "--format", "checkpoint"], "peft"),
        (["export-adapter", "zoo", "sql", "adapters/sql"], "--overwrite"),
        (["export-adapter", "zoo", "sql", ".."], "no name of its own"),
        (["tag", "zoo", "no spaces"], "no spaces"),
        (["log", "nowhere"], "does not exist"),
        (["gc", "nowhere"], "does not exist"),
        (["verify", "nowhere"], "nowhere"),
        (["verify", "adapters"], "adapters"),
    ],
)
def test_other_errors_are_one_line_and_exit_1(zoo: str, arguments: list[str], words: str) -> None:
    before = tree(Path())
    [line] = refused(*arguments).splitlines()
    assert words in line
    assert tree(Path()) == before


def test_notes_and_metadata(zoo: str) -> None:
    found = data("note", zoo, "sql", "--meta", "a=1=2", "--meta", "b=", "-m", "by hand")
    assert found["metadata"] == {"a": "1=2", "b": "", "team": "a"}
    assert found["note"] == "from the start"
    assert data("log", zoo)["versions"][0]["message"] == "by hand"
    found = data("note", zoo, "sql", "--note", "", "--drop-meta", "a", "--drop-meta", "team")
    assert (found["note"], found["metadata"]) == ("", {"b": ""})
    before = data("show", zoo, "sql", "--at", "v1")["adapter"]
    assert (before["note"], before["metadata"]) == ("from the start", {"team": "a"})


def test_rm_says_where_they_still_are(zoo: str) -> None:
    version = data("log", zoo)["versions"][0]["id"]
    assert f"--at {version} still has them" in ok("rm", zoo, "sql", "sql")
    assert [a["name"] for a in data("ls", zoo)["adapters"]] == NAMES[:2]
    assert [a["name"] for a in data("ls", zoo, "--at", version)["adapters"]] == NAMES


def test_a_tag_is_deleted(zoo: str) -> None:
    ok("tag", zoo, "v1")
    assert run("tag", zoo, "--delete").exit_code == 2
    assert run("tag", zoo, "v1", "--delete", "--at", "v1").exit_code == 2
    assert json.loads(ok("tag", zoo, "v1", "--delete", "--json"))["deleted"] is True
    assert json.loads(ok("tag", zoo, "--json"))["tags"] == {}
    result = run("tag", zoo, "v1", "--delete")
    assert (result.exit_code, 'no tag "v1"' in result.stderr) == (1, True)


def test_log_and_tag(zoo: str) -> None:
    ok("rm", zoo, "sql", "-m", "second")
    assert len(data("log", zoo)["versions"]) == 3
    assert [v["message"] for v in data("log", zoo, "--limit", "1")["versions"]] == ["second"]
    assert data("log", zoo, "--at", "v1")["versions"][0]["tags"] == ["v1"]
    ok("tag", zoo, "v0", "--at", "v1")
    assert list(data("tag", zoo)["tags"]) == ["v0", "v1"]
    assert "v0" in ok("tag", zoo)


def test_diff_for_people_and_without_modules(zoo: str) -> None:
    ok("rm", zoo, "sql")
    write_peft_directory(make_adapter("chat", seed=9, modules=SHAPES), Path("newer/chat"))
    write_peft_directory(make_adapter("new", seed=8, modules=SHAPES), Path("newer/new"))
    ok("add", zoo, "newer/chat", "newer/new", "--replace")
    text = ok("diff", zoo, "v1")
    assert "1 added, 1 removed, 1 changed, 1 unchanged" in text
    assert "added: new" in text
    assert "removed: sql" in text
    assert "layers.0.up" in text
    assert "base_model.model.head.weight removed" in text
    assert "layers.0.up" not in ok("diff", zoo, "v1", "--brief")
    found = data("diff", zoo, "v1")["changed"]["chat"]["modules"]["layers.0.q"]
    store = AdapterStore.open(zoo)
    deltas = []
    for version in ("v1", None):
        at = store if version is None else store.checkout(version)
        [(_, factors)] = at.read_module("layers.0.q", ["chat"])
        deltas.append(factors.scaling * (factors.B.double() @ factors.A.double()))
    assert found["norm_before"] == pytest.approx(float(deltas[0].norm()))
    assert found["norm_after"] == pytest.approx(float(deltas[1].norm()))
    relative = float((deltas[1] - deltas[0]).norm() / deltas[0].norm())
    assert found["difference"] == pytest.approx(relative)
    assert "0 added, 0 removed, 0 changed, 3 unchanged" in ok("diff", zoo, "v1", "v1")


def flip_a_bit(store: Path) -> None:
    chunk = max((store / "chunks").iterdir(), key=lambda p: p.stat().st_size)
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 16
    chunk.write_bytes(content)


def test_verify_a_store(zoo: str) -> None:
    assert "3 adapters, every bit" in ok("verify", zoo)
    found = data("verify", zoo, "--at", "v1")
    assert (found["ok"], found["adapters"], found["problems"]) == (True, 3, [])
    ok("rm", zoo, "sql")
    assert "of no adapter any more" in ok("verify", zoo)
    flip_a_bit(Path(zoo))
    lines = refused("verify", zoo, "--at", "v1").splitlines()
    assert "problems; " in lines[-1]
    result = run("verify", zoo, "--at", "v1", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert not found["ok"]
    assert set(found["problems"][0]["adapters"]) <= set(NAMES)


def test_collecting_forgets_nothing_unless_told_to(zoo: str) -> None:
    ok("rm", zoo, "sql")
    before = data("log", zoo)
    assert "nothing to delete" in ok("gc", zoo)
    leftover = Path(zoo) / "chunks" / "00000000000000000000"
    leftover.write_bytes(b"of an import that was killed")
    done = data("gc", zoo)
    assert (done["objects"], done["forgotten"]) == (1, [])
    assert not leftover.exists()
    assert data("log", zoo) == before
    assert data("gc", zoo, "--forget-before", "1d")["forgotten"] == []
    assert data("log", zoo) == before


def test_forgetting_asks_first(zoo: str) -> None:
    ok("rm", zoo, "sql")
    before = tree(Path(zoo))
    assert "give --yes" in refused("gc", zoo, "--forget-before", "0h", code=2)
    assert "would forget 2 versions" in ok("gc", zoo, "--forget-before", "0h", "--dry-run")
    assert data("gc", zoo, "--forget-before", "0h", "--dry-run")["dry_run"] is True
    assert tree(Path(zoo)) == before
    text = ok("gc", zoo, "--forget-before", "0h", "--yes")
    assert "forgot 2 versions" in text
    assert "has the same adapters without" in text
    assert "the store had" in text
    assert [a["name"] for a in data("ls", zoo)["adapters"]] == NAMES[:2]
    assert [a["name"] for a in data("ls", zoo, "--at", "v1")["adapters"]] == NAMES


@pytest.fixture
def in_tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nine hours ahead of UTC."""
    monkeypatch.setenv("TZ", "JST-9")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_forgetting_by_date(in_tokyo: None, zoo: str) -> None:
    ok("rm", zoo, "sql")
    later = datetime.now(UTC) + timedelta(hours=1)
    for text, count in (
        ("2020-01-31", 0),
        (f"{later:%Y-%m-%dT%H:%M}", 2),
        (later.astimezone().isoformat(), 2),
    ):
        planned = data("gc", zoo, "--forget-before", text, "--dry-run")
        assert len(planned["forgotten"]) == count, text


def test_a_person_is_asked(zoo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ok("rm", zoo, "sql")
    before = tree(Path(zoo))
    monkeypatch.setattr("unmerge.cli.versions._somebody_answers", lambda: True)
    result = run("gc", zoo, "--forget-before", "0h", typed="n\n")
    assert result.exit_code == 1
    assert "Forget 2 versions for ever? [y/N]" in result.stderr
    assert tree(Path(zoo)) == before
    result = run("gc", zoo, "--forget-before", "0h", "--json", typed="y\n")
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)["forgotten"]) == 2


def test_an_adapter_from_the_hub(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {p.name: p.read_bytes() for p in (adapters / "sql").iterdir()}
    hub = Hub()
    commit = hub.push("acme/sql-lora", files, "main", "v1")
    with serve(hub) as endpoint:
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(Path("cache").absolute()))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        ok("init", "zoo")
        ok("add", "zoo", "acme/sql-lora@v1")
    found = data("show", "zoo", "sql-lora")["adapter"]
    assert found["source"] == f"acme/sql-lora@{commit}"
    ok("export-adapter", "zoo", "sql-lora", "out")
    assert contents(Path("out")) == contents(adapters / "sql")


SLOW = """
import time
from unmerge import AdapterStore
from unmerge.cli import main

commit = AdapterStore.commit

def slow(self, message, *, progress):
    def report(done, total):
        progress(done, total)
        if done == total - 1:
            print("writing", flush=True)
            time.sleep(60)

    return commit(self, message, progress=report)

AdapterStore.commit = slow
main()
"""


def test_ctrl_c_leaves_the_store_as_it_was(adapters: Path) -> None:
    ok("init", "zoo")
    ok("add", "zoo", "adapters/sql")
    before = tree(Path("zoo"))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "add", "zoo", "adapters/chat", "adapters/math"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said == "unmerge: interrupted; store and output are as they were\n"
    assert [a["name"] for a in data("ls", "zoo")["adapters"]] == ["sql"]
    left = tree(Path("zoo"))
    assert before.items() <= left.items()
    assert not [name for name in left.keys() - before.keys() if "tmp" in name]
    ok("gc", "zoo")
    assert tree(Path("zoo")).keys() <= before.keys() | {"unmerge.lock"}
    ok("add", "zoo", "adapters/chat", "adapters/math")
    assert data("verify", "zoo")["adapters"] == 3


def test_ctrl_c_after_the_commit_does_not_deny_it(
    zoo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = AdapterStore.commit

    def interrupted(self: AdapterStore, message: str) -> str:
        commit(self, message)
        raise KeyboardInterrupt

    monkeypatch.setattr(AdapterStore, "commit", interrupted)
    result = run("rm", zoo, "sql")
    assert result.exit_code == 130
    newest = data("log", zoo)["versions"][0]
    assert newest["message"] == "remove sql"
    assert f"the store has a new version {newest['id']}" in result.stderr


def test_ctrl_c_in_gc_does_not_deny_what_is_forgotten(
    zoo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok("rm", zoo, "sql")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("unmerge.store.repository.StoreRepository.collect_garbage", interrupted)
        result = run("gc", zoo, "--forget-before", "0h", "--yes")
    assert result.exit_code == 130
    assert "as they were" not in result.stderr
    assert "versions may be forgotten already" in result.stderr
    assert len(data("log", zoo)["versions"]) == 1
    assert data("verify", zoo)["ok"]


def test_what_strangers_wrote_cannot_command_the_terminal(zoo: str) -> None:
    evil = "\x1b]0;x\x07\x9b2J\rb"
    ok("note", zoo, "sql", "--note", evil, "--meta", f"k={evil}", "-m", evil)
    for arguments in (("show", zoo, "sql"), ("ls", zoo, "--long"), ("log", zoo)):
        said = ok(*arguments)
        assert not set(said) & set("\x1b\x07\x9b\r")
    assert r"\x1b]0;x\x07\x9b2J\x0db" in ok("show", zoo, "sql")
    assert data("show", zoo, "sql")["adapter"]["note"] == evil
    result = run("show", zoo, evil)
    assert result.exit_code == 1
    assert r"\x1b]0;x" in result.stderr
    assert "\x1b" not in result.stderr


def test_everything_works_on_s3(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3.serve() as server:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        zoo = server.address()
        ok("init", zoo, "--base-model", "org/base")
        ok("add", zoo, *sorted(adapters.iterdir()), "-m", "first")
        ok("tag", zoo, "v1")
        ok("rm", zoo, "sql")
        ok("note", zoo, "chat", "--note", "kept")
        assert [a["name"] for a in data("ls", zoo)["adapters"]] == NAMES[:2]
        assert data("show", zoo, "chat")["adapter"]["note"] == "kept"
        assert data("diff", zoo, "v1")["removed"] == ["sql"]
        assert data("verify", zoo)["ok"]
        assert len(data("log", zoo)["versions"]) == 4
        assert data("gc", zoo, "--forget-before", "0h", "--yes")["size_before"] is None
        ok("export-adapter", zoo, "sql", "back", "--at", "v1")
        assert contents(Path("back")) == contents(adapters / "sql")
        ok("merge", zoo, "out.rmb", "--method", "average")
        assert "2 sources' digests compared" in ok("verify", "out.rmb", "--store", zoo)
