"""The registry: what plugins may return, who is named when they clash, near misses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stacks import Result, SumRule
from unmerge.errors import DuplicateMergerError, PluginError, UnknownMergerError
from unmerge.hookspecs import hookimpl
from unmerge.merger import MergeContext, Merger
from unmerge.plugins import get_plugin_manager
from unmerge.registry import Registration, Registry, default_registry
from unmerge.stack import FactorStack
from unmerge_strategies import Average, Rmm


class Other(Merger, frozen=True):
    """Another strategy under the name of `SumRule`."""

    method = "test.sum"

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Result]:
        return []


class Plugin:
    """A plugin that returns whatever it was made with."""

    def __init__(self, returned: Any) -> None:
        self.returned = returned

    @hookimpl
    def unmerge_mergers(self) -> Any:
        return self.returned


class MisspeltPlugin:
    """A plugin whose hook is called `unmerge_merger`, without the s."""

    @hookimpl
    def unmerge_merger(self) -> list[type[Merger]]:
        return []


def registry(**plugins: Any) -> Registry:
    manager = get_plugin_manager(load_entry_points=False)
    for name, returned in plugins.items():
        manager.register(Plugin(returned), name=name)
    return Registry(manager)


def test_the_built_ins_come_through_the_entry_point() -> None:
    found = default_registry()
    assert {"average", "mm_svd", "rmm", "task_arithmetic"} <= set(found)
    assert found["rmm"].merger is Rmm
    assert found["rmm"].distribution.startswith("unmerge ")
    assert found.distribution(Rmm()) == found["rmm"].distribution


def test_without_entry_points_nothing_is_registered() -> None:
    assert len(registry()) == 0


def test_a_registry_is_a_mapping_in_sorted_order() -> None:
    found = registry(one=[SumRule, Rmm], two=(Average,))
    assert list(found) == ["average", "rmm", "test.sum"]
    assert len(found) == 3
    assert "rmm" in found
    assert "ties" not in found
    assert found["rmm"] == Registration(merger=Rmm, distribution="one")
    assert found.merger_type("average") is Average
    assert dict(found.items())["test.sum"].merger is SumRule
    assert found.get("rmm") == found["rmm"]


def test_get_of_an_unknown_name_is_the_default_as_for_every_mapping() -> None:
    assert registry(one=[Rmm]).get("ties") is None


def test_the_order_of_registration_does_not_matter() -> None:
    first = registry(one=[SumRule], two=[Rmm])
    second = registry(two=[Rmm], one=[SumRule])
    assert dict(first.items()) == dict(second.items())


def test_an_unknown_name_lists_what_is_near_and_known() -> None:
    found = registry(one=[Rmm, Average])
    with pytest.raises(
        UnknownMergerError,
        match=r'^no strategy is called "averag"; did you mean average\? \(known: average, rmm\)$',
    ):
        found["averag"]
    with pytest.raises(LookupError, match='"xyz" \\(known'):
        found.merger_type("xyz")


@pytest.mark.parametrize("recipe", [{}, {"method": 3}, {"method": None}])
def test_a_recipe_without_a_method_is_refused(recipe: dict[str, Any]) -> None:
    with pytest.raises(UnknownMergerError, match='needs "method"'):
        registry(one=[Rmm]).build(recipe)


def test_two_plugins_with_one_name_are_both_named() -> None:
    for names in (("acme", "bolt"), ("bolt", "acme")):
        with pytest.raises(DuplicateMergerError, match=r'"test\.sum" is registered by') as caught:
            registry(**dict(zip(names, ([SumRule], [Other]), strict=True)))
        assert "acme" in str(caught.value)
        assert "bolt" in str(caught.value)


def test_one_plugin_that_returns_a_name_twice_is_refused() -> None:
    with pytest.raises(DuplicateMergerError, match=r"test\.sum"):
        registry(acme=[SumRule, Other])


def install(directory: Path, name: str, module: str, source: str) -> None:
    """Lay out an installed distribution with one entry point in the group `unmerge`."""
    (directory / f"{module}.py").write_text(source)
    # Underscores, as installers write it: the first hyphen ends the name.
    info = directory / f"{name.replace('-', '_')}-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(f"[unmerge]\n{name} = {module}\n")


PLUGIN = """
from unmerge import Merger, hookimpl

class Rule(Merger, frozen=True):
    method = "clash.rule"
    def merge(self, stack, context):
        return []

@hookimpl
def unmerge_mergers():
    return [Rule]
"""


def test_two_installed_distributions_with_one_name_are_both_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "clash-one", "unmerge_test_clash_one", PLUGIN)
    install(tmp_path, "clash-two", "unmerge_test_clash_two", PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DuplicateMergerError) as caught:
        Registry(get_plugin_manager())
    for part in ('"clash.rule"', "clash-one 1.5", "clash-two 1.5", "uninstall one of them"):
        assert part in str(caught.value)


def test_a_plugin_that_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "broken-one", "unmerge_test_broken", "import unmerge_no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        PluginError, match=r"ModuleNotFoundError: .*unmerge_no_such_module"
    ) as caught:
        get_plugin_manager()
    assert "broken-one" in str(caught.value)


def test_a_misspelt_hook_is_refused() -> None:
    manager = get_plugin_manager(load_entry_points=False)
    manager.register(MisspeltPlugin(), name="acme")
    with pytest.raises(PluginError, match=r"unknown hook.*'unmerge_merger' in plugin"):
        Registry(manager)


class Nameless(Merger, frozen=True):
    """Has a merge, but no name."""

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Result]:
        return []


class Abstract(Merger, frozen=True):
    """Has a name, but no merge."""

    method = "test.abstract"


@pytest.mark.parametrize(
    "returned",
    [[int], [Rmm()], ["rmm"], [None], [Merger], [Nameless], [Abstract], Rmm, None, 3],
    ids=str,
)
def test_what_is_no_list_of_concrete_mergers_is_refused(returned: Any) -> None:
    with pytest.raises(PluginError, match="acme"):
        registry(acme=returned)


def test_a_merger_that_is_not_registered_is_traced_to_its_module() -> None:
    assert registry().distribution(Rmm()) == "unmerge_strategies.rmm"
    assert registry(acme=[SumRule]).distribution(Other()) == Other.__module__


def test_every_manager_is_new() -> None:
    first, second = (get_plugin_manager(load_entry_points=False) for _ in range(2))
    first.register(Plugin([Rmm]), name="acme")
    assert len(Registry(first)) == 1
    assert len(Registry(second)) == 0
