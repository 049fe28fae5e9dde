"""Output directories appear whole or not at all.

Everything is written in a hidden sibling directory, flushed, and renamed into place; whatever goes
wrong before leaves the output path as it was.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType

from unmerge_bundle.errors import OutputExistsError

__all__ = ["OutputDirectory", "write_file"]


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

    def __init__(self, path: Path, *, overwrite: bool, marker: str, what: str) -> None:
        """Check that `path` may be written.

        Args:
            path: The output.
            overwrite: Whether an existing output may be replaced: an empty directory, or one
                that holds `marker`. Nothing else ever is.
            marker: File that shows a directory to be an earlier output of this kind.
            what: What such an output is called, for errors.

        Raises:
            OutputExistsError: `path` exists and may not be replaced.
        """
        self.path = path
        self._overwrite = overwrite
        self._marker = marker
        self._what = what
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
            _flush_directory(Path(folder))
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
        _flush_directory(self.path.absolute().parent)
        if replaced is not None:
            shutil.rmtree(replaced)

    def _check(self) -> bool:
        """Return whether there is something to replace; refuse where that is not allowed."""
        if not os.path.lexists(self.path):
            return False
        if not self._overwrite:
            raise self._exists()
        if not self.path.is_symlink() and self.path.is_dir():
            entries = os.listdir(self.path)  # noqa: PTH208 - only names are needed
            if not entries or self._marker in entries:
                return True
        raise OutputExistsError(
            f"exists and is neither an empty directory nor {self._what} (it has no "
            f"{self._marker}), so it is not overwritten; choose another path or remove it",
            path=str(self.path),
        )

    def _exists(self) -> OutputExistsError:
        return OutputExistsError(
            f"exists; choose another path, or ask for overwriting to replace {self._what}",
            path=str(self.path),
        )

    def _sibling(self, suffix: str) -> Path:
        # Not tempfile.mkdtemp: its private mode would stay on the published directory.
        absolute = self.path.absolute()
        return absolute.with_name(f".{absolute.name}.{secrets.token_hex(8)}.{suffix}")


def _flush_directory(folder: Path) -> None:
    if os.name != "posix":  # elsewhere directories cannot be opened, and need no flushing
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
