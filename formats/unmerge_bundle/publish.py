"""Output directories appear whole or not at all.

Everything is written in a hidden sibling directory, flushed, and renamed into place; whatever goes
wrong before leaves the output path as it was. What stands there already is replaced only where all
of it is known: removing a directory for the sake of one file name in it would remove the work of
somebody who uses that name, too.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from unmerge_bundle.errors import BundleError, InvalidInputError, OutputExistsError
from unmerge_bundle.jsontext import parse_object
from unmerge_bundle.model import FORMAT, MANIFEST_NAME, MAX_MANIFEST_BYTES

__all__ = [
    "ADAPTER_DIRECTORY",
    "BUNDLE",
    "OutputDirectory",
    "OutputKind",
    "flush_directory",
    "write_file",
]

_BLOB_NAME = re.compile(r"[0-9a-f]{64}\.(json|safetensors)")
_ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "verbatim.safetensors",
    "README.md",
)


@dataclass(frozen=True, slots=True)
class OutputKind:
    """What an output directory is, and how to tell an earlier one from anything else.

    Attributes:
        name: What it is called in errors, with its article.
        foreign: Returns the first entry (relative path) of an existing directory that such an
            output does not have, or lacks; `None` where all of it may be replaced.
    """

    name: str
    foreign: Callable[[Path], str | None]


def _foreign_to_bundle(root: Path) -> str | None:
    for entry in _entries(root):
        if entry.name == "blobs" and _is_real(entry, directory=True):
            for blob in _entries(entry):
                if not _BLOB_NAME.fullmatch(blob.name) or not _is_real(blob):
                    return f"blobs/{blob.name}"
        elif entry.name != MANIFEST_NAME:
            return entry.name
    return None if _is_manifest(root / MANIFEST_NAME) else MANIFEST_NAME


def _foreign_to_adapter(root: Path) -> str | None:
    for entry in _entries(root):
        if entry.name not in _ADAPTER_FILES or not _is_real(entry):
            return entry.name
    config = _ADAPTER_FILES[0]
    return None if (root / config).exists() else config


BUNDLE = OutputKind("a bundle", _foreign_to_bundle)
ADAPTER_DIRECTORY = OutputKind("an adapter directory", _foreign_to_adapter)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def _is_real(entry: Path, *, directory: bool = False) -> bool:
    """Return whether `entry` is a file, or a directory, and no link to one: we write no links."""
    return not entry.is_symlink() and (entry.is_dir() if directory else entry.is_file())


def _is_manifest(file: Path) -> bool:
    """Return whether `file` is a `bundle.json` of any version, whatever its digest says."""
    if not file.exists() or not _is_real(file) or file.stat().st_size > MAX_MANIFEST_BYTES:
        return False
    try:
        content = parse_object(file.read_bytes(), where=file.name, error=BundleError, floats=True)
    except BundleError:
        return False
    return content.get("format") == FORMAT


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and flush it to the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class OutputDirectory:
    """A directory in the making; use it in a `with` statement and end with `publish`.

    Leaving the `with` block without `publish` removes everything, parents made on the way
    included.

    Attributes:
        path: Where it will appear.
        partial: Where to write until then; exists inside the `with` block.
    """

    def __init__(self, path: Path, *, overwrite: bool, kind: OutputKind) -> None:
        """Check that `path` may be written.

        Args:
            path: The output.
            overwrite: Whether an existing output may be replaced: an empty directory, or one
                that holds nothing but an earlier output of this kind. Nothing else ever is.
            kind: What will be written.

        Raises:
            InvalidInputError: `path` cannot be the path of a directory to write.
            OutputExistsError: `path` exists and may not be replaced.
        """
        _check_path(path)
        self.path = path
        self._overwrite = overwrite
        self._kind = kind
        self.partial = self._sibling("partial")
        self._made: list[Path] = []
        self._published = False
        self._check()

    def __enter__(self) -> OutputDirectory:
        parent = self.path.absolute().parent
        missing = [folder for folder in (parent, *parent.parents) if not os.path.lexists(folder)]
        try:
            for folder in reversed(missing):
                folder.mkdir(exist_ok=True)
                self._made.insert(0, folder)
            self.partial.mkdir()
        except BaseException:
            self.discard()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.discard()

    def discard(self) -> None:
        """Remove what was written; does nothing once published."""
        if self._published:
            return
        shutil.rmtree(self.partial, ignore_errors=True)
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # somebody else has put something there meanwhile
                return

    def publish(self) -> None:
        """Flush the directory and rename it to `path`.

        With `overwrite`, the old output is moved aside first and deleted last: a crash in between
        leaves both, the old one as `.<name>.<random>.replaced`.

        Raises:
            OutputExistsError: `path` has appeared meanwhile and may not be replaced.
        """
        for folder, _, _ in os.walk(self.partial):
            flush_directory(Path(folder))
        replaced: Path | None = None
        if self._check():
            replaced = self._sibling("replaced")
            self.path.rename(replaced)
        try:
            self.partial.rename(self.path)
        except OSError as problem:
            if replaced is not None:
                replaced.rename(self.path)
            if problem.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise self._exists() from None
            raise
        self._published = True
        flush_directory(self.path.absolute().parent)
        if replaced is not None:
            shutil.rmtree(replaced)

    def _check(self) -> bool:
        """Return whether there is something to replace; refuse where that is not allowed."""
        if not os.path.lexists(self.path):
            return False
        if not self._overwrite:
            raise self._exists()
        if not _is_real(self.path, directory=True):
            found = "it is no directory"
        elif not any(self.path.iterdir()):
            return True
        else:
            foreign = self._kind.foreign(self.path)
            if foreign is None:
                return True
            is_there = os.path.lexists(self.path / foreign)
            found = f"{foreign!r} is {'not part of one' if is_there else 'missing'}"
        raise OutputExistsError(
            f"exists and is neither an empty directory nor only {self._kind.name} ({found}), so it "
            "is not overwritten; choose another path or remove it yourself",
            path=str(self.path),
        )

    def _exists(self) -> OutputExistsError:
        return OutputExistsError(
            f"exists; choose another path, or replace {self._kind.name} that is there with "
            "--overwrite (command line) or overwrite=True (Python)",
            path=str(self.path),
        )

    def _sibling(self, suffix: str) -> Path:
        # Not tempfile.mkdtemp: its private mode would stay on the published directory.
        absolute = self.path.absolute()
        return absolute.with_name(f".{absolute.name}.{secrets.token_hex(8)}.{suffix}")


def _check_path(path: Path) -> None:
    """Refuse what no directory can be called, before the system does it half-way and in its words.

    Raises:
        InvalidInputError: The path holds a NUL byte, cannot be encoded, or ends in no name.
    """
    text = str(path)
    reason = None
    if "\0" in text:
        reason = "it holds a NUL byte"
    elif path.absolute().name in ("", ".."):
        reason = "it ends in no name of its own"
    else:
        try:
            os.fsencode(text)
        except UnicodeEncodeError:
            reason = "it holds characters the file system cannot encode"
    if reason is not None:  # ascii(): the message, too, must be printable
        raise InvalidInputError(
            f"the output path {text!a} cannot be written: {reason}; choose another path"
        )


def flush_directory(folder: Path) -> None:
    """Flush the names in `folder` to the disk, where the system knows how to."""
    if os.name != "posix":  # elsewhere directories cannot be opened, and need no flushing
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
