"""The documentation runs: every command, snippet, table and link in it is checked here."""

from __future__ import annotations

import doctest
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import unmerge
import unmerge.errors
import unmerge_bundle
import unmerge_bundle.errors
from adapters import make_adapter, write_peft_directory
from unmerge import AdapterStore, MergePipeline, get_plugin_manager, hookspecs
from unmerge.cli import cli
from unmerge.registry import Registry

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


def test_every_command_of_the_readme_runs_as_typed(own_adapters: Path) -> None:
    typed = list(commands(README))
    assert {words[0] for words in typed} >= {"init", "add", "plan", "merge", "restore", "export"}
    for words in typed:
        expanded = []
        for word in words:
            matches = sorted(str(p) for p in Path().glob(word)) if "*" in word else []
            expanded += matches or [word]
        result = CliRunner().invoke(cli, expanded)
        assert result.exit_code == 0, (words, result.output)


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


def test_the_mergers_of_the_guide_work_as_plugins(tmp_path: Path) -> None:
    guide = ROOT / "docs" / "writing-a-merger.md"
    layerwise, elementwise = (
        _module(program, f"guide_{number}")
        for number, program in enumerate(code_blocks(guide, "python"))
    )
    manager = get_plugin_manager()
    manager.register(layerwise)
    registry = Registry(manager)
    assert registry["acme.equal_norms"].merger is layerwise.EqualNorms

    store = AdapterStore.create(tmp_path / "zoo")
    for seed in range(3):
        store.add(make_adapter(f"a{seed}", seed=seed))
    store.commit("three")
    MergePipeline(store, {"method": "acme.equal_norms", "norm": 2.0}, registry=registry).run(
        tmp_path / "layerwise.rmb"
    )
    merged = unmerge_bundle.open(tmp_path / "layerwise.rmb").merged()
    path = "layers.0.mlp.up"
    expected = 0
    deltas = []
    for name in store.names():
        f = store.read_adapter(name).modules[path]
        delta = f.scaling * (f.B.double() @ f.A.double())
        deltas.append(delta)
        expected = expected + 2.0 * delta / torch.linalg.vector_norm(delta)
    assert torch.allclose(torch.from_numpy(merged.delta(path)).double(), expected, atol=1e-5)

    for space in ("delta", "factors"):
        MergePipeline(store, elementwise.SignMajority(space=space)).run(tmp_path / f"{space}.rmb")
    merged = unmerge_bundle.open(tmp_path / "delta.rmb").merged()
    stacked = torch.stack(deltas)
    agree = stacked.sign().sum(dim=0).abs() > 1.5
    expected = torch.where(agree, stacked.mean(dim=0), 0.0)
    assert torch.allclose(torch.from_numpy(merged.delta(path)).double(), expected, atol=1e-5)


def test_the_guide_is_as_short_as_it_says() -> None:
    program = code_blocks(ROOT / "docs" / "writing-a-merger.md", "python")[0]
    lines = [line for line in program.splitlines() if line.strip()]
    assert len(lines) <= 36


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
    guide = (ROOT / "docs" / "writing-a-merger.md").read_text(encoding="utf-8")
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


def _module(program: str, name: str):
    import types

    module = types.ModuleType(name)
    exec(compile(program, name, "exec"), module.__dict__)  # noqa: S102
    return module
