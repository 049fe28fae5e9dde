"""The documentation runs: every command, snippet, table and link in it is checked here."""

from __future__ import annotations

import doctest
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import unmerge
import unmerge.errors
import unmerge_bundle
import unmerge_bundle.errors
from adapter_files import WRITERS, contents
from adapters import make_adapter, write_peft_directory
from unmerge import AdapterStore, MergePipeline, get_plugin_manager, hookspecs
from unmerge.cli import cli
from unmerge.registry import Registry
from unmerge.testing import check_merger, random_collection

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = sorted([README, *(ROOT / "docs").rglob("*.md")])


def code_blocks(path: Path, language: str) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def own_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the adapters the documents speak of."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "path" / "to" / "adapters"
    for seed, name in enumerate(("sql", "math", "chat", "code", "law")):
        write_peft_directory(make_adapter(name, seed=seed), folder / name)
    return folder


def commands(path: Path) -> Iterator[list[str]]:
    for block in code_blocks(path, "sh"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["unmerge"]:
                yield words[1:]


def expanded(words: list[str]) -> list[str]:
    """What a shell makes of the words of a command."""
    found = []
    for word in words:
        matches = sorted(str(p) for p in Path().glob(word)) if "*" in word else []
        found += matches or [word]
    return found


def test_every_command_of_the_readme_runs_as_typed(own_adapters: Path) -> None:
    typed = list(commands(README))
    assert {words[0] for words in typed} >= {"init", "add", "plan", "merge", "restore", "export"}
    for words in typed:
        result = CliRunner().invoke(cli, expanded(words))
        assert result.exit_code == 0, (words, result.output)


ARCHIVE = ROOT / "docs" / "archive.md"


@pytest.fixture
def collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with the files that the page of the archive speaks of."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("sql", "math", "chat", "code", "law")):
        write_peft_directory(make_adapter(name, seed=seed), Path("adapters") / name)
    write_peft_directory(make_adapter("sql", seed=9), Path("retrained/sql"))
    write_peft_directory(make_adapter("poet", seed=8), Path("models/poet"))
    Path("downloads").mkdir()
    Path("runs/old").mkdir(parents=True)
    WRITERS["peft_file"](Path("downloads"), 1, torch.float16)
    WRITERS["mlx"](Path("runs/old"), 2, torch.float32)
    Path("runs/old/adapter_config.json").unlink()


def test_every_command_of_the_archives_page_runs_as_typed(collected: None) -> None:
    typed = list(commands(ARCHIVE))
    assert {words[0] for words in typed} >= {
        *("init", "add", "formats", "ls", "show", "tag", "note", "rm", "log", "diff"),
        *("export-adapter", "verify", "gc"),
    }
    for words in typed:
        result = CliRunner().invoke(cli, expanded(words))
        assert result.exit_code == 0, (words, result.output)
    assert contents(Path("out/sql")) == contents(Path("retrained/sql"))
    assert contents(Path("out/sql-v1")) == contents(Path("adapters/sql"))


def test_the_python_of_the_archives_page_runs(
    collected: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (program,) = code_blocks(ARCHIVE, "python")
    (Path("adapters") / "README.md").write_text("no adapter")
    exec(program, {})  # noqa: S102
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("adapters/README.md adapters/README.md: no adapter here")
    assert said[1:] == ["('law',) ['sql']", "True"]
    assert contents(Path("out/law")) == contents(Path("adapters/law"))


def test_the_python_of_the_readme_runs(own_adapters: Path) -> None:
    (program,) = code_blocks(README, "python")
    exec(program, {"adapter_directories": sorted(own_adapters.iterdir())})  # noqa: S102
    assert Path("one-adapter/adapter_model.safetensors").is_file()


def test_the_readme_shows_the_two_commands_and_every_strategy() -> None:
    text = README.read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text
    for method in _builtin_methods():
        assert f"`{method}`" in text


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if ">>>" in p.read_text()], ids=str)
def test_the_sessions_in_the_documents_give_what_they_show(path: Path) -> None:
    failed, tried = doctest.testfile(str(path), module_relative=False)
    assert tried > 0
    assert failed == 0


GUIDE = ROOT / "docs" / "writing-a-merger.md"


@pytest.fixture(scope="module")
def installed_guide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The guide's package, written as it says and installed; and an environment that has it."""
    folder, target = (tmp_path_factory.mktemp(name) for name in ("acme", "site"))
    program, test = code_blocks(GUIDE, "python")[:2]
    (folder / "acme_merging.py").write_text(program, encoding="utf-8")
    (folder / "test_acme.py").write_text(test, encoding="utf-8")
    (folder / "pyproject.toml").write_text(code_blocks(GUIDE, "toml")[0], encoding="utf-8")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-input"),
            *("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"),
            *("--target", str(target), str(folder)),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    inherited = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(part for part in (str(target), inherited) if part)
    return folder, {**os.environ, "PYTHONPATH": path}


def test_the_package_of_the_guide_passes_its_own_tests(
    installed_guide: tuple[Path, dict[str, str]],
) -> None:
    folder, environment = installed_guide
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_acme.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert tested.returncode == 0, tested.stdout
    listed = subprocess.run(
        [sys.executable, "-c", "from unmerge.cli import main; main()", "methods"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "acme.equal_norms" in listed.stdout
    assert "acme-merging 1.0" in listed.stdout


def test_the_mergers_of_the_guide_merge_as_they_say(tmp_path: Path) -> None:
    blocks = code_blocks(GUIDE, "python")
    layerwise, surveying, elementwise, basis, reversible = (
        _module(program, f"guide_{number}")
        for number, program in enumerate([blocks[0], *blocks[2:]])
    )
    manager = get_plugin_manager()
    manager.register(layerwise)
    registry = Registry(manager)
    assert registry["acme.equal_norms"].merger is layerwise.EqualNorms

    store = AdapterStore.create(tmp_path / "zoo")
    for seed in range(3):
        store.add(make_adapter(f"a{seed}", seed=seed))
    store.commit("three")
    adapters = [store.read_adapter(name).modules for name in store.names()]
    path = "layers.0.mlp.up"
    deltas = torch.stack([_delta(modules[path]) for modules in adapters])
    norms = torch.linalg.vector_norm(deltas, dim=(1, 2), keepdim=True)
    model_norms = torch.tensor(
        [
            sum(float(_delta(f).square().sum()) for f in modules.values()) ** 0.5
            for modules in adapters
        ]
    )[:, None, None]
    agree = deltas.sign().sum(dim=0).abs() > 1.5

    for merger, expected in (
        ({"method": "acme.equal_norms", "norm": 2.0}, (2.0 * deltas / norms).sum(dim=0)),
        (surveying.EqualModelNorms(), (deltas / model_norms).sum(dim=0)),
        (elementwise.SignMajority(), torch.where(agree, deltas.mean(dim=0), 0.0)),
        (basis.OutputBasis(inner={"method": "average"}), deltas.mean(dim=0)),
    ):
        out = tmp_path / "merged.rmb"
        MergePipeline(store, merger, registry=registry).run(out, overwrite=True)
        merged = unmerge_bundle.open(out).merged()
        assert torch.allclose(torch.from_numpy(merged.delta(path)).double(), expected, atol=1e-5)

    MergePipeline(store, reversible.Hosvd(rank=100)).run(tmp_path / "hosvd.rmb")
    bundle = unmerge_bundle.open(tmp_path / "hosvd.rmb")
    for name, delta in zip(store.names(), deltas, strict=True):
        back = torch.from_numpy(bundle.restore(name).delta(path)).double()
        assert torch.allclose(back, delta, atol=1e-5)


@pytest.mark.parametrize(
    ("block", "name"),
    [(2, "EqualModelNorms"), (3, "SignMajority"), (4, "OutputBasis"), (5, "Hosvd")],
)
def test_the_mergers_of_the_guide_pass_the_kit(block: int, name: str) -> None:
    program = code_blocks(GUIDE, "python")[block]
    check_merger(getattr(_module(program, f"guide_block_{block}"), name)())


def test_the_guide_is_as_short_as_it_says() -> None:
    for number in (0, 2, 3, 4, 5):
        program = code_blocks(GUIDE, "python")[number]
        start = program.index("class ")
        lines = [line for line in program[start:].splitlines() if line.strip()]
        assert len(lines) <= 30, number


@pytest.mark.parametrize("method", sorted(Registry(get_plugin_manager())))
def test_every_built_in_strategy_has_a_page_with_all_its_fields(method: str) -> None:
    registration = Registry(get_plugin_manager())[method]
    if not registration.merger.__module__.startswith("unmerge_strategies"):
        pytest.fail(f"{method} is registered by {registration.distribution}: not a clean install")
    page = (ROOT / "docs" / "methods" / f"{method}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# `{method}`")
    for name, info in registration.merger.model_fields.items():
        assert f"| `{name}` |" in page, name
        assert info.description, name
    for heading in ("**Space.**", "**Cost.**", "**Source.**", "**When to use it.**"):
        assert heading in page


def test_the_comparison_says_what_the_strategies_declare() -> None:
    page = (ROOT / "docs" / "methods" / "README.md").read_text(encoding="utf-8")
    rows = {
        method: [cell.strip() for cell in cells.split("|")]
        for method, cells in re.findall(r"^\| \[`(\w+)`\]\(\w+\.md\) \|(.*)\|$", page, re.MULTILINE)
    }
    assert sorted(rows) == _builtin_methods()
    case = random_collection((3, 3), seed=1)
    for method, (result, back, mixed, gauge, weights, chance, _) in rows.items():
        merger = Registry(get_plugin_manager())[method].merger()
        declared = merger.capabilities
        [encoding, *_] = merger.merge(case.stack(), case.context())
        assert encoding.kind == result, method
        assert (declared.restores or "–") == back, method
        assert (mixed == "yes") == declared.mixed_ranks, method
        assert (gauge == "invariant") == declared.gauge_invariant, method
        assert (weights == "none") == declared.ignores_weights, method
        assert (chance == "yes") == declared.stochastic, method


def test_every_error_is_listed_with_its_code() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    framework = {
        error for error in vars(unmerge.errors).values() if _is_error(error, unmerge.UnmergeError)
    }
    bundle = {
        error
        for error in vars(unmerge_bundle.errors).values()
        if _is_error(error, unmerge_bundle.BundleError)
    }
    first, second = page.split("## Bundles")
    rows = re.compile(r"^\| `(\w+Error)` \| (?:`([\w-]+)`|–) \|", flags=re.MULTILINE)
    assert {name for name, _ in rows.findall(first)} == {e.__name__ for e in framework}
    assert set(rows.findall(second)) == {(e.__name__, e.code) for e in bundle}


def test_every_hook_is_documented() -> None:
    pages = [ROOT / "docs" / name for name in ("writing-a-merger.md", "adapters.md")]
    guide = "".join(page.read_text(encoding="utf-8") for page in pages)
    hooks = [name for name in vars(hookspecs) if name.startswith("unmerge_")]
    assert hooks
    for hook in hooks:
        assert hook in guide
        assert getattr(hookspecs, hook).__doc__


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (path.parent / target).exists(), target


def test_the_changelog_has_an_unreleased_section_of_every_kind_used() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in text
    headings = set(re.findall(r"^### (.+)$", text, flags=re.MULTILINE))
    allowed = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert headings <= allowed | {"Numerics", "Bundle format"}
    assert {"Added", "Numerics", "Bundle format"} <= headings


def _builtin_methods() -> list[str]:
    return sorted(Registry(get_plugin_manager()))


def _is_error(candidate: object, root: type[Exception]) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, root)


def _delta(factors: unmerge.Factors) -> torch.Tensor:
    return factors.scaling * (factors.B.double() @ factors.A.double())


def _module(program: str, name: str):
    import types

    module = types.ModuleType(name)
    exec(compile(program, name, "exec"), module.__dict__)  # noqa: S102
    return module
