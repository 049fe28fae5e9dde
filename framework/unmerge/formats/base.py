"""What an adapter format provides, so that formats join without a change to `read_adapter`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict

from unmerge.adapter import Adapter
from unmerge.errors import UnsupportedAdapterError

__all__ = ["AdapterFormat", "describe", "entries", "excerpt"]


class AdapterFormat(BaseModel, ABC):
    """Reads adapters of one format, and writes them where it can.

    A format is a frozen pydantic model: its fields are what reading needs to be told beside the
    path, and every field has a default. Formats hold no state.

    Class attributes:
        format: The format's name, which becomes `Adapter.format`; outsiders use `vendor.name`.
        looks_for: What the format recognises, as it ends the sentence "looked for …".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: ClassVar[str]
    looks_for: ClassVar[str]

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Return whether `path` holds an adapter of this format, whole or damaged.

        Looks at names of files, and where these do not tell, at names in a file's header; at no
        tensor. At most one format should recognise a path. Raises nothing.
        """

    @abstractmethod
    def read(self, path: Path, name: str | None) -> Adapter:
        """Return the adapter at `path`.

        Args:
            path: A path the format recognises, or that the caller says is of this format.
            name: The adapter's name, or `None` to derive it from `path`.

        Raises:
            AdapterError: The adapter is malformed, or its name is not allowed.
            UnsupportedAdapterError: It uses a feature that the format's reader refuses.
            NonFiniteError: A tensor holds NaN or an infinity.
        """

    def write(self, adapter: Adapter, directory: Path) -> None:
        """Write the adapter into an empty directory, in this format.

        What `read` took in is given back: every tensor under its name, with its shape, dtype and
        bits, and the configuration. An adapter of another format is converted if nothing is lost:
        reading what was written gives the same factors and scalings, bit for bit.

        Args:
            adapter: The adapter; its `format` says where it comes from.
            directory: A directory that is there and empty.

        Raises:
            UnsupportedAdapterError: The format cannot hold something the adapter has; says what.
            OSError: The disk refuses.
        """
        raise UnsupportedAdapterError(
            f'adapter "{adapter.name}" cannot be written as {self.format} into {directory}: the '
            "format can only be read; choose another one",
            feature=self.format,
        )

    def reader_of(self, adapter: Adapter) -> Self:  # noqa: ARG002 - for those that override this
        """Return the format with the options it takes to read what `write` makes of `adapter`.

        A format whose options say what files do not overrides this, and takes them from the
        configuration of an adapter of its own.
        """
        return type(self)()


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
