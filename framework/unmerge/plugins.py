"""The plugin manager: what is installed is found by entry point, and knows where it comes from."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pluggy

from unmerge import hookspecs
from unmerge.errors import PluginError

__all__ = [
    "PluginManager",
    "Provided",
    "default_plugin_manager",
    "get_plugin_manager",
    "provided",
]

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


@functools.cache
def default_plugin_manager() -> PluginManager:
    """Return the manager of everything installed, loaded once per process."""
    return get_plugin_manager()


@dataclass(frozen=True, slots=True)
class Provided:
    """One thing that a plugin's hook returned.

    Attributes:
        value: The thing.
        distribution: Name and version of the distribution it comes from.
        outsider: Whether that is another distribution than this one.
    """

    value: Any
    distribution: str
    outsider: bool


def provided(manager: PluginManager, hook: str, what: str) -> Iterator[Provided]:
    """Give everything that the plugins return for one hook, in the order of registration.

    Args:
        manager: The plugins.
        hook: Name of the hook, whose implementations take nothing and return an iterable.
        what: What the iterable must hold, for messages: "Merger classes".

    Raises:
        PluginError: A plugin implements a hook that there is not, or its hook raised something or
            returned no iterable.
    """
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"a plugin implements an unknown hook: {error}") from error
    for implementation in getattr(manager.hook, hook).get_hookimpls():
        plugin = implementation.plugin_name
        installed = manager.distributions.get(plugin)
        distribution = installed or plugin
        try:
            returned: Any = implementation.function()
            listed = isinstance(returned, Iterable) and not isinstance(returned, type)
            values: list[Any] | None = list(returned) if listed else None
        except Exception as error:
            # A plugin is foreign code: whatever it raises is reported as the plugin's.
            raise PluginError(
                f"{distribution}: {hook} failed: {type(error).__name__}: {error}; mend the plugin "
                "or uninstall it"
            ) from error
        if values is None:
            raise PluginError(
                f"{distribution}: {hook} returned {returned!r}, expected a list of {what}"
            )
        outsider = installed is not None and installed.partition(" ")[0] != hookspecs.PROJECT
        for value in values:
            yield Provided(value, distribution, outsider)
