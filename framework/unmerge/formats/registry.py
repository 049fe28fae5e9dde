"""Which adapter formats there are: built-in ones, and those that plugins bring."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmerge.errors import PluginError, UnknownFormatError
from unmerge.formats.base import AdapterFormat
from unmerge.plugins import PluginManager, default_plugin_manager, provided

__all__ = ["FormatRegistration", "Formats", "default_formats"]


@dataclass(frozen=True, slots=True)
class FormatRegistration:
    """One registered format.

    Attributes:
        format: The class.
        distribution: Name and version of the distribution it comes from, `unmerge 0.1.0`.
    """

    format: type[AdapterFormat]
    distribution: str


class Formats(Mapping[str, FormatRegistration]):
    """Adapter formats by name, collected once from a plugin manager.

    Raises:
        PluginError: Two plugins register one name, or a hook returned something that is no
            concrete `AdapterFormat`, or is misspelt.
    """

    def __init__(self, manager: PluginManager) -> None:
        found: dict[str, FormatRegistration] = {}
        for given in provided(manager, "unmerge_formats", "AdapterFormat classes"):
            _check_format(given.value, given.distribution, outsider=given.outsider)
            name = given.value.format
            if name in found:
                raise PluginError(
                    f'the format "{name}" is registered by {found[name].distribution} and by '
                    f"{given.distribution}; uninstall one of them"
                )
            found[name] = FormatRegistration(given.value, given.distribution)
        self._found = dict(sorted(found.items()))

    def __getitem__(self, name: str) -> FormatRegistration:
        try:
            return self._found[name]
        except KeyError:
            near = difflib.get_close_matches(name, self._found, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise UnknownFormatError(
                f'no adapter format is called "{name}"{hint} (known: {", ".join(self._found)})'
            ) from None

    def __contains__(self, name: object) -> bool:
        # Mapping's own takes no LookupError but KeyError for an answer.
        return name in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def build(self, name: str, options: Mapping[str, Any] | None = None) -> AdapterFormat:
        """Return the format called `name`, with `options` as its fields.

        Raises:
            UnknownFormatError: There is none; names that come near are listed.
            pydantic.ValidationError: An option is unknown or has a wrong value.
        """
        return self[name].format.model_validate(dict(options or {}))

    def recognising(self, path: Path) -> list[AdapterFormat]:
        """Return the formats, with their default fields, that recognise `path`."""
        built = [registration.format() for registration in self._found.values()]
        return [candidate for candidate in built if candidate.recognises(path)]


@functools.cache
def default_formats() -> Formats:
    """Return the formats of everything installed, loaded once per process."""
    return Formats(default_plugin_manager())


def _check_format(given: Any, distribution: str, *, outsider: bool) -> None:
    if not (isinstance(given, type) and issubclass(given, AdapterFormat)):
        raise PluginError(
            f"{distribution}: unmerge_formats returned {given!r}, no AdapterFormat class"
        )
    names = [getattr(given, name, None) for name in ("format", "looks_for")]
    if inspect.isabstract(given) or not all(isinstance(name, str) for name in names):
        raise PluginError(
            f"{distribution}: {given.__name__} needs `format` and `looks_for`, `recognises` and "
            "`read`"
        )
    if required := [name for name, info in given.model_fields.items() if info.is_required()]:
        raise PluginError(
            f"{distribution}: {given.__name__} has fields without a default: {', '.join(required)}"
        )
    if outsider and "." not in given.format:
        raise PluginError(
            f'the installed plugin {distribution} registers a format "{given.format}", which needs '
            'a name of the form "vendor.name"; names without a dot are for those that come with '
            "unmerge. Nothing can be read until the plugin is mended or uninstalled"
        )
