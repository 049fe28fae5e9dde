"""Reading adapters from where other tools left them: one door, one reader per format behind it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from unmerge.adapter import Adapter
from unmerge.errors import AdapterError
from unmerge.readers.base import AdapterReader, describe, entries
from unmerge.readers.peft import PeftReader, read_peft

__all__ = ["BUILTIN_READERS", "AdapterReader", "PeftReader", "read_adapter", "read_peft"]

BUILTIN_READERS: tuple[AdapterReader, ...] = (PeftReader(),)
"""The readers that need no plugin."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def read_adapter(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    readers: Sequence[AdapterReader] = BUILTIN_READERS,
) -> Adapter:
    """Read the adapter at `path`, whatever its format.

    Args:
        path: Where the adapter is on this machine, today a PEFT directory.
        name: The adapter's name; by default derived from `path` (a directory's own name).
        readers: The readers to ask; exactly one must recognise `path`.

    Returns:
        The adapter, its tensors mapped from the file where the format allows it.

    Raises:
        AdapterError: No reader or several readers recognise `path`, or the adapter is malformed.
        UnsupportedAdapterError: It uses a feature that is refused, see `docs/adapters.md`.
        NonFiniteError: A tensor holds NaN or an infinity.
    """
    place = Path(path)
    matching = [reader for reader in readers if reader.recognises(place)]
    if len(matching) > 1:
        formats = ", ".join(sorted(reader.format for reader in matching))
        raise AdapterError(
            f"{path}: several readers recognise this adapter: {formats}; "
            "pass `readers=[…]` with the one to use"
        )
    if not matching:
        raise AdapterError(_nothing_found(os.fspath(path), place, readers))
    return matching[0].read(place, name)


def _nothing_found(given: str, place: Path, readers: Sequence[AdapterReader]) -> str:
    looked_for = "; or ".join(reader.looks_for for reader in readers) or "nothing: no readers given"
    found = describe(place)
    message = f"{given}: no adapter here; looked for {looked_for}; found {found}; "
    inside = [
        entry.name
        for entry in entries(place)
        if any(reader.recognises(entry) for reader in readers)
    ]
    if inside:
        return message + f"it holds adapters one level down, pass one of: {', '.join(inside)}"
    if found == "a file":
        return message + (
            "a file of weights alone does not say rank and scaling, "
            "pass the directory that holds it together with its configuration"
        )
    if found == "nothing there" and _HUB_ID.fullmatch(given):
        return message + (
            "if this is the id of a repository on a hub, download it first "
            f"(`hf download {given} --local-dir DIRECTORY`) and pass the directory"
        )
    return message + "pass the directory that the adapter was saved to"
