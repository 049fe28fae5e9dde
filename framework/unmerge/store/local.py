"""A store's repository in a local directory: created whole or not at all, one writer at a time."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import icechunk
import zarr
from filelock import FileLock

from unmerge.errors import StoreError, StoreExistsError
from unmerge.store.engine import BRANCH, create_empty, new_root, prepare
from unmerge.store.linking import access

# Icechunk lists only its own folders, so a file beside them is never taken for data.
_LOCK_NAME = "unmerge.lock"
# An object is written under such a name and renamed; only a killed writer leaves one behind.
_UNFINISHED = re.compile(r".+#\d+")
# The clock of a file server may be ahead of ours, and what is collected has no writer anyway.
_CLOCK_SKEW = timedelta(days=1)


class LocalPlace:
    """A directory that holds a repository, or will.

    Attributes:
        address: The directory as the caller wrote it, for messages.
        path: Likewise, as a path.
    """

    longest_transaction: timedelta | None = None

    def __init__(self, path: Path) -> None:
        self.address = os.fspath(path)
        self.path = path
        # Absolute now: a later change of directory must not move the lock away from the data.
        self._target = path.absolute()
        self._lock = FileLock(self._target / _LOCK_NAME)

    def open(self) -> icechunk.Repository:
        """Open the repository, creating nothing.

        Raises:
            StoreError: There is none.
        """
        if not self.path.is_dir():
            what = "is a file" if self.path.exists() else "does not exist"
            raise StoreError(f"{self.address}: {what}, expected the directory of an adapter store")
        storage = _storage(self._target)
        if not icechunk.Repository.exists(storage):
            raise StoreError(
                f"{self.address}: is no adapter store; create one with AdapterStore.create "
                "(unmerge init on the command line)"
            )
        return icechunk.Repository.open(storage)

    def open_linked(self, folders: Iterable[Path]) -> icechunk.Repository:
        """Open the repository so that references into these directories can be read."""
        config, authorised = access(folders)
        return icechunk.Repository.open(
            _storage(self._target), config=config, authorize_virtual_chunk_access=authorised
        )

    def create(self, initialise: Callable[[zarr.Group], None]) -> None:
        """Create a repository beside the directory and rename it.

        Raises:
            StoreExistsError: The directory is there and not empty.
        """
        self._check_vacant()
        target = self._target
        missing = [folder for folder in target.parents if not folder.exists()]
        partial = target.parent / f".{target.name}.{uuid.uuid4().hex}.partial"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # A directory that cannot be made is an error here; Icechunk would panic over it
            # and print a backtrace.
            partial.mkdir()
            repository = create_empty(_storage(partial))
            session = repository.writable_session(BRANCH)
            initialise(new_root(session))
            session.commit("create store")
            del session, repository
            _move(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            for folder in missing:
                with contextlib.suppress(OSError):  # somebody else's files may be in it by now
                    folder.rmdir()
            # Somebody else may have created the store between the check and the rename.
            self._check_vacant()
            raise

    def lock(self) -> FileLock:
        """Return a lock that excludes every other writer, in any process of this machine.

        Without it Icechunk loses acknowledged commits on a local disk. The wait has no limit: the
        system releases the lock of a process that ends, so a holder is always a live writer. The
        thread that holds it may take it again.
        """
        return self._lock

    def cutoff(self, older_than: datetime | None, *, force: bool) -> datetime:  # noqa: ARG002
        """Return before when an unreferenced object may be collected; hold the lock.

        No writer is alive then, so nothing is too young.
        """
        return older_than or datetime.now(UTC) + _CLOCK_SKEW

    def check_tags(self, tags: Iterable[str]) -> None:
        """Check that every tag on the disk is among `tags`, those that Icechunk lists.

        Icechunk takes a tag that it cannot read for a deleted one, and would then collect what
        only that tag keeps.

        Raises:
            StoreError: A tag's file is damaged.
        """
        listed = set(tags)
        for folder in sorted((self._target / "refs").glob("tag.*")):
            name = folder.name.removeprefix("tag.")
            if name not in listed and not (folder / "ref.json.deleted").exists():
                raise StoreError(
                    f'{self.address}: tag "{name}" cannot be read, expected a version id in '
                    f"{folder / 'ref.json'}; restore that file from a copy, or delete it"
                )

    def sweep(self, cutoff: datetime) -> tuple[int, int]:
        """Delete what killed writers left that Icechunk does not know of; hold the lock.

        That is objects that were never finished, and directories beside this one in which somebody
        was creating this store: it is there, so nobody can succeed any more.

        Returns:
            How many, and their bytes.
        """
        partial = re.compile(rf"\.{re.escape(self._target.name)}\.[0-9a-f]{{32}}\.partial")
        unfinished = [
            file
            for folder in self._target.iterdir()
            if folder.is_dir()
            for file in folder.rglob("*#*")
            if _UNFINISHED.fullmatch(file.name)
        ]
        abandoned = [
            folder for folder in self._target.parent.iterdir() if partial.fullmatch(folder.name)
        ]
        count = size = 0
        for path in (*unfinished, *abandoned):
            files = [file for file in (path, *path.rglob("*")) if file.is_file()]
            if path.stat().st_mtime >= cutoff.timestamp():
                continue
            count += len(files)
            size += sum(file.stat().st_size for file in files)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        return count, size

    def _check_vacant(self) -> None:
        path = self.path
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise StoreExistsError(
                f"{self.address}: already exists and is not an empty directory; "
                "choose another path, or open the store that is there"
            )


def _storage(path: Path) -> icechunk.Storage:
    prepare()
    return icechunk.local_filesystem_storage(os.fspath(path))


def _move(partial: Path, target: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        target.rmdir()  # an empty directory: Windows would not rename onto it
    partial.rename(target)
