"""What every adapter reader provides, so that formats join without a change to `read_adapter`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from unmerge.adapter import Adapter

__all__ = ["AdapterReader", "describe", "entries", "excerpt"]


class AdapterReader(ABC):
    """Reads adapters of one format. Readers hold no state and are built without arguments.

    Class attributes:
        format: The format's name, which becomes `Adapter.format`; outsiders use `vendor.name`.
        looks_for: What the reader recognises, as it ends the sentence "looked for …".
    """

    format: ClassVar[str]
    looks_for: ClassVar[str]

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Return whether `path` holds an adapter of this format, whole or damaged.

        Looks at names only and opens no file: a damaged adapter is recognised, so that `read` can
        say what is wrong with it. Raises nothing.
        """

    @abstractmethod
    def read(self, path: Path, name: str | None) -> Adapter:
        """Return the adapter at `path`.

        Args:
            path: A path the reader recognises.
            name: The adapter's name, or `None` to derive it from `path`.

        Raises:
            AdapterError: The adapter is malformed, or its name is not allowed.
            UnsupportedAdapterError: It uses a feature that the reader refuses.
            NonFiniteError: A tensor holds NaN or an infinity.
        """


def entries(path: Path) -> list[Path]:
    """Return what the directory `path` holds, sorted; nothing if it is none or cannot be read."""
    try:
        return sorted(path.iterdir())
    except (OSError, ValueError):  # ValueError: a path with a NUL or a lone surrogate
        return []


def describe(path: Path) -> str:
    """Return what is at `path`, in words that end the sentence "found …"."""
    try:
        if not path.exists():
            return "nothing there"
        if not path.is_dir():
            return "a file"
        names = [entry.name for entry in sorted(path.iterdir())]
    except OSError as error:
        return f"something that cannot be read ({error.strerror})"
    if not names:
        return "an empty directory"
    shown = ", ".join(excerpt(name) for name in names[:6])
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"a directory with {shown}{more}"


def excerpt(text: str, length: int = 200) -> str:
    """Return text from a file as an error message can hold it: on one line, and not too long."""
    shown = text if len(text) <= length else f"{text[:length]}…"
    return shown if shown.isprintable() else repr(shown)[1:-1]
