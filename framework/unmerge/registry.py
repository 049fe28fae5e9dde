"""The registry of strategies: plugins are found by entry point, built-ins through the same door."""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pluggy

from unmerge import hookspecs
from unmerge.errors import DuplicateMergerError, PluginError, UnknownMergerError
from unmerge.merger import Merger

__all__ = ["PluginManager", "Registration", "Registry", "default_registry", "get_plugin_manager"]

ENTRY_POINT_GROUP = hookspecs.PROJECT


class PluginManager(pluggy.PluginManager):
    """A plugin manager that knows which distribution each of its plugins comes from.

    Attributes:
        distributions: Name and version of the distribution, by the name a plugin is registered
            under; plugins that were registered by hand are not listed.
    """

    def __init__(self) -> None:
        super().__init__(hookspecs.PROJECT)
        self.distributions: dict[str, str] = {}
        self.add_hookspecs(hookspecs)

    def load(self, entry_point: importlib.metadata.EntryPoint) -> None:
        """Import and register the plugin of one entry point.

        pluggy's own loader keeps the first of two plugins of one entry-point name and says
        nothing; here each is registered under its distribution's name as well.

        Raises:
            PluginError: It cannot be imported or registered; names it and its distribution.
        """
        owner = entry_point.dist
        distribution = f"{owner.name} {owner.version}" if owner is not None else "unknown"
        name = f"{distribution}/{entry_point.name}"
        try:
            self.register(entry_point.load(), name=name)
        except Exception as error:
            # A plugin is foreign code: whatever its import raises is reported as the plugin's.
            raise PluginError(
                f'the plugin "{entry_point.name}" ({entry_point.value}) of {distribution} cannot '
                f"be loaded: {type(error).__name__}: {error}"
            ) from error
        self.distributions[name] = distribution


def get_plugin_manager(*, load_entry_points: bool = True) -> PluginManager:
    """Return a new plugin manager with the hooks of `unmerge.hookspecs`.

    Args:
        load_entry_points: Load the plugins of every installed distribution that has an entry
            point in the group `unmerge`.

    Raises:
        PluginError: A plugin cannot be imported; names it and its distribution.
    """
    manager = PluginManager()
    if load_entry_points:
        for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
            manager.load(entry_point)
    return manager


@dataclass(frozen=True, slots=True)
class Registration:
    """One registered strategy.

    Attributes:
        merger: The class.
        distribution: Name and version of the distribution it comes from, `unmerge 0.1.0`.
    """

    merger: type[Merger]
    distribution: str


class Registry(Mapping[str, Registration]):
    """Strategies by name, collected once from a plugin manager.

    Raises:
        DuplicateMergerError: Two plugins register one name; both are named, neither wins.
        PluginError: A hook returned something that is no concrete `Merger`, or is misspelt.
    """

    def __init__(self, manager: PluginManager) -> None:
        try:
            manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(f"a plugin implements an unknown hook: {error}") from error
        found: dict[str, Registration] = {}
        # `get_hookimpls` has the last registered first; names must not depend on the order.
        for implementation in manager.hook.unmerge_mergers.get_hookimpls():
            plugin = implementation.plugin_name
            distribution = manager.distributions.get(plugin, plugin)
            provided: Any = implementation.function()
            if isinstance(provided, type) or not isinstance(provided, Iterable):
                raise PluginError(
                    f"{distribution}: unmerge_mergers returned {provided!r}, expected a list of "
                    "Merger classes"
                )
            for merger in provided:
                _check_merger(merger, distribution, outsider=_is_outsider(manager, plugin))
                if merger.method in found:
                    raise DuplicateMergerError(
                        f'the strategy "{merger.method}" is registered by '
                        f"{found[merger.method].distribution} and by {distribution}; "
                        "uninstall one of them"
                    )
                found[merger.method] = Registration(merger=merger, distribution=distribution)
        self._found = dict(sorted(found.items()))

    def __getitem__(self, name: str) -> Registration:
        try:
            return self._found[name]
        except KeyError:
            near = difflib.get_close_matches(name, self._found, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise UnknownMergerError(
                f'no strategy is called "{name}"{hint} (known: {", ".join(self._found)})'
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def get(self, name: str, default: Any = None) -> Any:
        """Return the registration of `name`, or `default`: unlike `[]` it never raises."""
        return self._found.get(name, default)

    def merger_type(self, name: str) -> type[Merger]:
        """Return the strategy called `name`.

        Raises:
            UnknownMergerError: There is none; names that come near are listed.
        """
        return self[name].merger

    def build(self, recipe: Mapping[str, Any]) -> Merger:
        """Return the merger that `recipe` describes, `{"method": …, field: value, …}`.

        Raises:
            UnknownMergerError: No strategy has that name.
            pydantic.ValidationError: A field is unknown or has a wrong value.
        """
        name = recipe.get("method")
        if not isinstance(name, str):
            raise UnknownMergerError('a merger\'s recipe needs "method"')
        return self.merger_type(name).model_validate(recipe, context={"registry": self})

    def distribution(self, merger: Merger) -> str:
        """Return the distribution a merger comes from; its module where it is not registered."""
        registration = self._found.get(merger.method)
        if registration is not None and registration.merger is type(merger):
            return registration.distribution
        return type(merger).__module__


def _check_merger(merger: Any, distribution: str, *, outsider: bool) -> None:
    if not (isinstance(merger, type) and issubclass(merger, Merger)):
        raise PluginError(f"{distribution}: unmerge_mergers returned {merger!r}, no Merger class")
    if inspect.isabstract(merger) or not isinstance(getattr(merger, "method", None), str):
        raise PluginError(f"{distribution}: {merger.__name__} needs a `method` name and a `merge`")
    if outsider and "." not in merger.method:
        raise PluginError(
            f'the installed plugin {distribution} registers a strategy "{merger.method}", which '
            'needs a name of the form "vendor.name"; names without a dot are for those that come '
            "with unmerge. Nothing can be merged until the plugin is mended or uninstalled"
        )


def _is_outsider(manager: PluginManager, plugin: str) -> bool:
    """Return whether a plugin was installed by another distribution than this one."""
    distribution = manager.distributions.get(plugin)
    return distribution is not None and distribution.partition(" ")[0] != hookspecs.PROJECT


@functools.cache
def default_registry() -> Registry:
    """Return the registry of everything installed, loaded once per process."""
    return Registry(get_plugin_manager())
