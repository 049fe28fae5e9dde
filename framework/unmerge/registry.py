"""The registry of strategies: plugins are found by entry point, built-ins through the same door."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from unmerge.errors import DuplicateMergerError, PluginError, UnknownMergerError
from unmerge.merger import Merger
from unmerge.plugins import PluginManager, default_plugin_manager, provided

__all__ = ["Registration", "Registry", "default_registry"]


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
        found: dict[str, Registration] = {}
        for given in provided(manager, "unmerge_mergers", "Merger classes"):
            merger, distribution = given.value, given.distribution
            _check_merger(merger, distribution, outsider=given.outsider)
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


@functools.cache
def default_registry() -> Registry:
    """Return the registry of everything installed, loaded once per process."""
    return Registry(default_plugin_manager())
