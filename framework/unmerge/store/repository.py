"""The Icechunk repository under a store: creating, opening, locking, versions and tags."""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import icechunk
import zarr
from filelock import FileLock

from unmerge.errors import StoreError, StoreExistsError, UnknownVersionError, UnmergeError
from unmerge.store.records import Version

_BRANCH = "main"
# Icechunk lists only its own folders, so a file beside them is never taken for data.
_LOCK_NAME = "unmerge.lock"
_SHORTEST_PREFIX = 6
_SETTLING_SECONDS = 0.05


class StoreRepository:
    """One Icechunk repository in a local directory.

    Attributes:
        path: The directory, as the caller wrote it.
    """

    def __init__(self, path: Path, repository: icechunk.Repository) -> None:
        self.path = path
        # Absolute now: a later change of directory must not move the lock away from the data.
        self._lock_path = path.absolute() / _LOCK_NAME
        self._repository = repository

    @classmethod
    def create(cls, path: Path, initialise: Callable[[zarr.Group], None]) -> StoreRepository:
        """Create a repository whose first version holds what `initialise` writes.

        It is built beside `path` and renamed, so that `path` holds a whole store or none.

        Raises:
            StoreExistsError: `path` is there and not an empty directory.
            StoreError: The directory cannot be written.
        """
        with backend(f"{path}: cannot create a store"):
            _check_vacant(path)
            target = path.absolute()
            missing = [folder for folder in target.parents if not folder.exists()]
            partial = target.parent / f".{target.name}.{uuid.uuid4().hex}.partial"
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                # A directory that cannot be made is an error here; Icechunk would panic over it
                # and print a backtrace.
                partial.mkdir()
                repository = _create(partial)
                session = repository.writable_session(_BRANCH)
                initialise(zarr.create_group(session.store, zarr_format=3))
                session.commit("create store")
                del session, repository
                _move(partial, target)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                for folder in missing:
                    with contextlib.suppress(OSError):  # somebody else's files may be in it by now
                        folder.rmdir()
                # Somebody else may have created the store between the check and the rename.
                _check_vacant(path)
                raise
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> StoreRepository:
        """Open the repository at `path`, creating nothing.

        Raises:
            StoreError: There is none.
        """
        with backend(f"{path}: cannot open the store"):
            if not path.is_dir():
                what = "is a file" if path.exists() else "does not exist"
                raise StoreError(f"{path}: {what}, expected the directory of an adapter store")
            storage = _storage(path.absolute())
            if not icechunk.Repository.exists(storage):
                raise StoreError(
                    f"{path}: is no adapter store; create one with AdapterStore.create "
                    "(unmerge init on the command line)"
                )
            return cls(path, icechunk.Repository.open(storage))

    def lock(self) -> FileLock:
        """Return a lock that excludes every other writer, in any process of this machine.

        Without it Icechunk loses acknowledged commits on a local disk. The wait has no limit: the
        system releases the lock of a process that ends, so a holder is always a live writer.
        """
        return FileLock(self._lock_path)

    def tip(self) -> str:
        """Return the id of the newest version."""
        return self._repository.lookup_branch(_BRANCH)

    def read(self, version: str) -> zarr.Group:
        """Return the root group of one version, read-only."""
        session = self._repository.readonly_session(snapshot_id=version)
        return zarr.open_group(session.store, mode="r", zarr_format=3, use_consolidated=False)

    def root(self, session: icechunk.Session) -> zarr.Group:
        """Return the root group of a session that writes."""
        return zarr.open_group(session.store, mode="r+", zarr_format=3, use_consolidated=False)

    def session(self) -> icechunk.Session:
        """Return a new session that writes on top of the newest version; hold the lock."""
        return self._repository.writable_session(_BRANCH)

    def history(self, version: str) -> list[Version]:
        """Return `version` and those before it, newest first."""
        tags: dict[str, list[str]] = {}
        for name, tagged in self.tags().items():
            tags.setdefault(tagged, []).append(name)
        ancestry = list(self._repository.ancestry(snapshot_id=version))
        # The oldest is Icechunk's own, from before the store's first commit: it holds nothing.
        roots = {entry.id for entry in ancestry if entry.parent_id is None}
        return [
            Version(
                id=entry.id,
                parent=None if entry.parent_id in roots else entry.parent_id,
                message=entry.message,
                written_at=entry.written_at,
                tags=tuple(tags.get(entry.id, ())),
            )
            for entry in ancestry
            if entry.id not in roots
        ]

    def tags(self) -> dict[str, str]:
        """Return the version of every tag, sorted by tag."""
        repository = self._repository
        return {name: repository.lookup_tag(name) for name in sorted(repository.list_tags())}

    def tag(self, name: str, version: str) -> None:
        """Give `version` a further name."""
        self._repository.create_tag(name, version)

    def resolve(self, version: str) -> str:
        """Return the full id of a tag, an id, or an unambiguous beginning of one.

        Raises:
            UnknownVersionError: There is none, there are several, or the beginning is too short.
        """
        tags = self.tags()
        if version in tags:
            return tags[version]
        ids = [entry.id for entry in self.history(self.tip())]
        matches = [known for known in ids if known.startswith(version.upper())]
        if len(version) >= _SHORTEST_PREFIX and len(matches) == 1:
            return matches[0]
        if len(version) < _SHORTEST_PREFIX:
            problem = f"and an id needs at least {_SHORTEST_PREFIX} characters"
        elif matches:
            problem = f"and several ids begin so: {', '.join(matches)}"
        else:
            problem = "and no version's id begins so"
        raise UnknownVersionError(
            f'{self.path}: "{version}" is no tag {problem}; tags are: {", ".join(tags) or "none"}; '
            "ids are in the store's history (unmerge log on the command line)"
        )


@contextlib.contextmanager
def backend(what: str) -> Iterator[None]:
    """Turn whatever Zarr, Icechunk or the disk raises into a `StoreError` that begins with `what`.

    Damaged data makes them raise nearly anything (KeyError, TypeError, a panic of the Rust side),
    so no list of classes would be complete.
    """
    try:
        yield
    except UnmergeError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise StoreError(f"{what}: {reason(error)}") from error


def is_failure(error: BaseException) -> bool:
    """Return whether something failed, rather than a person or the interpreter asking to stop."""
    # PyO3 derives the exception of a panic from BaseException and exports no class to catch.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def reason(error: BaseException) -> str:
    """Return what an exception says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" |")]
    # Icechunk prints a tree: its first line says what happened, the rest where in its sources.
    text = lines[0].removeprefix("x ").rstrip(".") if lines else ""
    # A panic prints that tree on one line.
    text = text.partition(", context: SpanTrace")[0]
    return text or type(error).__name__


def _check_vacant(path: Path) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise StoreExistsError(
            f"{path}: already exists and is not an empty directory; "
            "choose another path, or open the store that is there"
        )


def _create(path: Path) -> icechunk.Repository:
    options: dict[str, Any] = {}
    # Icechunk 2 writes its newer format by default, which Icechunk 1 cannot read.
    if "spec_version" in inspect.signature(icechunk.Repository.create).parameters:
        options["spec_version"] = 1
    return icechunk.Repository.create(_storage(path), **options)


def _storage(path: Path) -> icechunk.Storage:
    # It warns on every open that concurrent commits are not safe; `lock` is what makes them so.
    if "ICECHUNK_LOG" not in os.environ:
        icechunk.set_logs_filter("error")
    _settle_at_exit()
    return icechunk.local_filesystem_storage(os.fspath(path))


@functools.cache
def _settle_at_exit() -> None:
    """Let Icechunk's threads come to rest before the interpreter goes, once per process.

    After its result has arrived, the thread that delivered it still needs the interpreter for a
    moment; should that be shutting down by then, the process aborts (SIGABRT), with all work done
    (PyO3/pyo3-async-runtimes issue 40). Sleeping gives that moment.
    """
    atexit.register(time.sleep, _SETTLING_SECONDS)


def _move(partial: Path, target: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        target.rmdir()  # an empty directory: Windows would not rename onto it
    partial.rename(target)
