"""Arguments and options that commands on a store share, and what their texts mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, get_args

import click
from pydantic import ValidationError

from unmerge.errors import ConfigError
from unmerge.formats import AdapterFormat, default_formats
from unmerge.recipe import explain, parse_yaml

# Text, not a path: a path would make one slash of the two in a URL.
STORE = click.argument("store")
AT = click.option("--at", metavar="VERSION", help="Version id or tag to read; else the newest.")
MESSAGE = click.option("-m", "--message", help="What this version is; kept in the log.")
FORMAT_FIELDS = click.option(
    "--set",
    "fields",
    metavar="FIELD=VALUE",
    multiple=True,
    help="An option of the format named with --format; see `unmerge formats NAME`.",
)

# Names in one line of output.
_SHOWN = 20


def pairs(texts: Iterable[str], *, option: str) -> dict[str, str]:
    """Return what `KEY=VALUE` texts say.

    Raises:
        ConfigError: One has no `=` or no key, or a key is given twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f'{option} takes KEY=VALUE, not "{text}"')
        if key in found:
            raise ConfigError(f'{option} gives "{key}" twice')
        found[key] = value
    return found


def format_of(name: str | None, fields: Sequence[str]) -> AdapterFormat | None:
    """Return the format that `--format` and `--set` ask for.

    Raises:
        ConfigError: There are fields without a format, or a field is wrong.
        UnknownFormatError: There is no such format.
    """
    if name is None:
        if fields:
            raise ConfigError("--set gives options of a format; name it with --format")
        return None
    formats = default_formats()
    known = formats[name].format.model_fields
    values: dict[str, Any] = {}
    for key, text in pairs(fields, option="--set").items():
        # What is text anyway is not read as YAML: a revision 1e5 is no number.
        is_text = key in known and _takes_text(known[key].annotation)
        try:
            values[key] = text if is_text else parse_yaml(text)
        except ConfigError as error:
            raise ConfigError(f"--set {key}={text}: {error}") from error
    try:
        return formats.build(name, values)
    except ValidationError as error:
        raise ConfigError(
            f"--format {name}: {explain(error)}; `unmerge formats {name}` shows the options"
        ) from error


def some(names: Sequence[str]) -> str:
    """Return names for a line of output, not all of them where they are many."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _takes_text(annotation: Any) -> bool:
    return annotation is str or set(get_args(annotation)) == {str, type(None)}
