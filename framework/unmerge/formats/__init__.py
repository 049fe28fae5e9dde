"""Reading adapters from where other tools left them: one door, one format each behind it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from unmerge.adapter import Adapter
from unmerge.errors import AdapterError, UnmergeError
from unmerge.formats.base import AdapterFormat, describe, entries, excerpt
from unmerge.formats.checkpoint import CheckpointFormat
from unmerge.formats.diffusers import DiffusersFormat
from unmerge.formats.hub import download, hub_address
from unmerge.formats.kohya import KohyaFormat
from unmerge.formats.mlx import MlxFormat
from unmerge.formats.peft import PeftFormat, read_peft
from unmerge.formats.peft_file import PeftFileFormat
from unmerge.formats.registry import FormatRegistration, Formats, default_formats

__all__ = [
    "BUILTIN_FORMATS",
    "AdapterFormat",
    "CheckpointFormat",
    "DiffusersFormat",
    "FormatRegistration",
    "Formats",
    "KohyaFormat",
    "MlxFormat",
    "PeftFileFormat",
    "PeftFormat",
    "default_formats",
    "read_adapter",
    "read_peft",
]

BUILTIN_FORMATS: tuple[type[AdapterFormat], ...] = (
    PeftFormat,
    CheckpointFormat,
    MlxFormat,
    KohyaFormat,
    DiffusersFormat,
    PeftFileFormat,
)
"""The formats that come with the framework; its plugin registers them as any other would."""

# Adapters one level down that a message names.
_SHOWN = 20


def read_adapter(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    revision: str | None = None,
    format: str | AdapterFormat | None = None,  # noqa: A002 - the field's word, as in `Adapter`
    formats: Formats | None = None,
) -> Adapter:
    """Read the adapter at `path`, whatever its format.

    Args:
        path: Where the adapter is: a directory or a file; or, as text, an id on the Hugging Face
            hub: `org/name`, `org/name@revision`, or `hf://org/name@revision/path/in/it`. What
            is there as a local path is never looked for on the hub.
        name: The adapter's name; by default derived from `path` (a directory's own name, or the
            last part of an id).
        revision: Branch, tag or commit of the adapter's repository on the hub; its main branch
            unless given. The commit it stands for is recorded in `Adapter.source`.
        format: The format, by name or built with its options; recognised unless given.
        formats: The formats there are; all installed ones unless given.

    Returns:
        The adapter, its tensors mapped from the file where the format allows it.

    Raises:
        AdapterError: No format or several formats recognise `path`, the adapter is malformed, or
            it cannot be had from the hub.
        ConfigError: A revision is given for a local path, or twice.
        UnknownFormatError: There is no format of that name.
        UnsupportedAdapterError: It uses a feature that is refused, see `docs/adapters.md`.
        NonFiniteError: A tensor holds NaN or an infinity.
    """
    known = default_formats() if formats is None else formats
    chosen = known.build(format) if isinstance(format, str) else format
    # A path object is a path: only text can be an id.
    address = hub_address(os.fspath(path), revision, local=not isinstance(path, str))
    if address is None:
        return _read_local(path, name, chosen, known)
    found = download(address, checkpoint=isinstance(chosen, CheckpointFormat))
    adapter = _read_local(found.path, address.name if name is None else name, chosen, known)
    return replace(adapter, source=found.source)


def _read_local(
    path: str | os.PathLike[str],
    name: str | None,
    chosen: AdapterFormat | None,
    known: Formats,
) -> Adapter:
    place = Path(path)
    if chosen is not None:
        return _read_as(chosen, place, name)
    matching = known.recognising(place)
    if len(matching) > 1:
        several = ", ".join(sorted(candidate.format for candidate in matching))
        raise AdapterError(
            f"{path}: several formats recognise this adapter: {several}; say which it is "
            "(`format=` in Python, --format on the command line)"
        )
    if not matching:
        raise AdapterError(_nothing_found(os.fspath(path), place, known))
    return _read_as(matching[0], place, name)


def _read_as(chosen: AdapterFormat, place: Path, name: str | None) -> Adapter:
    try:
        return chosen.read(place, name)
    except UnmergeError:
        raise
    except Exception as error:
        # A plugin's reader is foreign code: one that fails must not take a whole import with it.
        raise AdapterError(
            f"{place}: the reader of the format {chosen.format} failed: {type(error).__name__}: "
            f"{excerpt(str(error), 300)}; report it to whoever provides the format"
        ) from error


def _nothing_found(given: str, place: Path, known: Formats) -> str:
    message = f"{given}: no adapter here, found {describe(place)}; "
    inside = [entry.name for entry in entries(place) if known.recognising(entry)]
    if inside:
        more = f" and {len(inside) - _SHOWN} more" if len(inside) > _SHOWN else ""
        below = f"{given.rstrip('/')}/*"
        return message + (
            f"it holds adapters one level down, pass {below} or one of: "
            f"{', '.join(inside[:_SHOWN])}{more}"
        )
    looked_for = [registration.format.looks_for for registration in known.values()]
    wanted = "; or ".join(looked_for) or "nothing: no formats given"
    return f"{message}pass the directory or file that the adapter was saved to; looked for {wanted}"
