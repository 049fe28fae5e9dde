"""The Icechunk repository under a store: opening, transactions, versions, tags, collection."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TypeVar

import icechunk
import zarr

from unmerge.errors import ConfigError, StoreError, UnknownVersionError
from unmerge.store.engine import BRANCH, writable_root
from unmerge.store.failures import backend
from unmerge.store.local import LocalPlace
from unmerge.store.places import Place, place_at
from unmerge.store.records import Version
from unmerge.store.transactions import transact

T = TypeVar("T")

_SHORTEST_PREFIX = 6
_ID_LENGTH = 20


@dataclass(frozen=True, slots=True)
class GarbageReport:
    """What a collection reclaimed.

    Attributes:
        objects: Objects deleted: chunks, manifests, snapshots, unfinished files.
        bytes: Their bytes.
    """

    objects: int
    bytes: int


class StoreRepository:
    """One Icechunk repository, in a local directory or on S3.

    Attributes:
        address: The directory as the caller wrote it, or `s3://bucket/prefix`.
    """

    def __init__(self, place: Place, repository: icechunk.Repository) -> None:
        """Use `create` or `open` instead."""
        self.address = place.address
        self._place = place
        self._repository = repository

    @classmethod
    def create(
        cls, address: str | os.PathLike[str], initialise: Callable[[zarr.Group], None]
    ) -> StoreRepository:
        """Create a repository whose first version holds what `initialise` writes, and open it.

        A creation that was interrupted can be repeated. Of several at once one succeeds.

        Raises:
            StoreExistsError: Something is there already.
            StoreError: The address is no directory and no `s3://bucket/prefix`, or writing failed.
        """
        place = place_at(address)
        with backend(f"{place.address}: cannot create a store"):
            place.create(initialise)
        return cls._open(place)

    @classmethod
    def open(cls, address: str | os.PathLike[str]) -> StoreRepository:
        """Open the repository at a local directory or at `s3://bucket/prefix`, creating nothing.

        Raises:
            StoreError: There is none, or it cannot be reached.
        """
        return cls._open(place_at(address))

    @classmethod
    def _open(cls, place: Place) -> StoreRepository:
        with backend(f"{place.address}: cannot open the store"):
            return cls(place, place.open())

    def reopened(self) -> StoreRepository:
        """Return the repository as it is on the disk, with nothing of it in memory yet."""
        return self._open(self._place)

    @property
    def path(self) -> Path:
        """The local directory.

        Raises:
            StoreError: The repository is not on a local disk.
        """
        if not isinstance(self._place, LocalPlace):
            raise StoreError(f"{self.address}: is no local directory")
        return self._place.path

    @property
    def is_local(self) -> bool:
        """Whether the repository is in a local directory, which `path` gives then."""
        return isinstance(self._place, LocalPlace)

    def lock(self) -> AbstractContextManager[object]:
        """Return a lock that excludes every other writer of this machine; nothing on S3."""
        return self._place.lock()

    def tip(self) -> str:
        """Return the id of the newest version."""
        return self._repository.lookup_branch(BRANCH)

    def read(self, version: str) -> zarr.Group:
        """Return the root group of one version, read-only; linked tables cannot be read in it."""
        return _readonly_root(self._repository, version)

    def read_linked(self, version: str, folders: Iterable[Path]) -> zarr.Group:
        """Return the root group of one version, read-only, for linked tables.

        Args:
            version: Its id.
            folders: The directories whose files may be read.

        Raises:
            StoreError: The repository is not on a local disk.
        """
        if not isinstance(self._place, LocalPlace):
            raise StoreError(
                f"{self.address}: holds linked adapters, which only a store in a local directory "
                "may; add them without linking"
            )
        return _readonly_root(self._place.open_linked(folders), version)

    def root(self, session: icechunk.Session) -> zarr.Group:
        """Return the root group of a session that writes."""
        return writable_root(session)

    def session(self) -> icechunk.Session:
        """Return a new session that writes on top of the newest version; see `transact`."""
        return self._repository.writable_session(BRANCH)

    def transact(self, write: Callable[[zarr.Group, str], T], message: str) -> tuple[str, T]:
        """Write one version on top of the newest, whatever other writers do meanwhile.

        On a local disk writers queue. On S3 they do not: one whose commit comes too late starts
        again on top of the newer version, so `write` may be called several times and must do the
        same each time, checks included. Each refusal means that somebody else's commit succeeded.

        Args:
            write: Called with the root group, to be changed, and the id of the version it shows.
            message: What was done, for the history.

        Returns:
            The id of the version written and what `write` returned. Where `write` changed nothing,
            none is written and the id is that of the version it was called with.

        Raises:
            StoreError: Writing failed, and the newest version is as it was; or the connection
                broke at the last moment, and the message says that the outcome is unknown.
            BaseException: Whatever `write` raises; nothing is written then.
        """
        with self._writing():
            return transact(self._repository, self._place, write, message)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with contextlib.ExitStack() as held:
            with backend(f"{self.address}: cannot lock the store"):
                held.enter_context(self.lock())
            yield

    def history(self, version: str, *, limit: int | None = None) -> list[Version]:
        """Return `version` and those before it, newest first, at most `limit` of them."""
        tags: dict[str, list[str]] = {}
        for name, tagged in self.tags().items():
            tags.setdefault(tagged, []).append(name)
        # One more, to know whether the last one's parent is Icechunk's own version.
        stop = None if limit is None else limit + 1
        entries = list(islice(self._repository.ancestry(snapshot_id=version), stop))
        roots = {entry.id for entry in entries if entry.parent_id is None}
        return [
            Version(
                id=entry.id,
                parent=None if entry.parent_id in roots else entry.parent_id,
                message=entry.message,
                written_at=entry.written_at,
                tags=tuple(tags.get(entry.id, ())),
            )
            for entry in entries[:limit]
            if entry.id not in roots
        ]

    def tags(self) -> dict[str, str]:
        """Return the version of every tag, sorted by tag."""
        repository = self._repository
        return {name: repository.lookup_tag(name) for name in sorted(repository.list_tags())}

    def tag(self, name: str, version: str) -> None:
        """Give `version` a further name, for ever.

        Raises:
            StoreError: The name is that of another version, or was that of a deleted tag.
            UnknownVersionError: There is no such version.
        """
        with self._writing(), backend(f'{self.address}: cannot write tag "{name}"'):
            if version not in set(self._versions()):
                raise UnknownVersionError(f"{self.address}: there is no version {version}")
            try:
                self._repository.create_tag(name, version)
            except icechunk.IcechunkError as error:
                tags = self.tags()
                if tags.get(name) == version:  # ours: its answer was lost, and it was sent again
                    return
                if name not in tags and "already exists" not in str(error):
                    raise
                owner = f"names version {tags[name]}" if name in tags else "was deleted"
                raise StoreError(
                    f'{self.address}: tag "{name}" already {owner}; '
                    "tags never move: choose another name"
                ) from error

    def delete_tag(self, name: str) -> None:
        """Delete a tag; its name stays taken, so that it can never come to mean another version.

        Raises:
            UnknownVersionError: There is no such tag.
        """
        with self._writing(), backend(f'{self.address}: cannot delete tag "{name}"'):
            if name not in (tags := self._repository.list_tags()):
                raise UnknownVersionError(
                    f'{self.address}: there is no tag "{name}"; '
                    f"tags are: {', '.join(sorted(tags)) or 'none'}"
                )
            self._repository.delete_tag(name)

    def resolve(self, version: str) -> str:
        """Return the full id of a tag, an id, or an unambiguous beginning of one.

        Raises:
            UnknownVersionError: There is none, there are several, or the beginning is too short.
        """
        tags = self.tags()
        if version in tags:
            return tags[version]
        matches: set[str] = set()
        if len(version) < _SHORTEST_PREFIX:
            problem = f"and an id needs at least {_SHORTEST_PREFIX} characters"
        else:
            for known in self._versions():
                if known.startswith(version.upper()):
                    matches.add(known)
                    if len(version) == _ID_LENGTH:  # no need to look at the rest of the history
                        break
            if len(matches) == 1:
                return matches.pop()
            problem = "and no version's id begins so"
            if matches:
                problem = f"and several ids begin so: {', '.join(sorted(matches))}"
        raise UnknownVersionError(
            f'{self.address}: "{version}" is no tag {problem}; '
            f"tags are: {', '.join(tags) or 'none'}; "
            "ids are in the store's history (unmerge log on the command line)"
        )

    def expire(self, older_than: datetime) -> list[str]:
        """Forget versions written before a date; the newest and the tagged ones stay.

        They leave the history at once. What only they held is deleted by `collect_garbage`; until
        then a store that is open at one of them can still be read. The history of a version that
        stays ends where a forgotten one would follow.

        Args:
            older_than: With a time zone.

        Returns:
            The ids of the versions forgotten, sorted.

        Raises:
            ConfigError: `older_than` has no time zone.
            StoreError: A tag is damaged; nothing is forgotten.
        """
        _check_zone(older_than)
        with self._writing(), backend(f"{self.address}: cannot forget versions"):
            self._refresh()
            self.check_tags()
            before = set(self._versions())
            self._repository.expire_snapshots(older_than)
            return sorted(before - set(self._versions()))

    def collect_garbage(
        self, *, older_than: datetime | None = None, force: bool = False
    ) -> GarbageReport:
        """Delete what no version references: of failed and killed commits, and after `expire`.

        Args:
            older_than: Keep younger objects; with a time zone. By default, on a local disk, where
                the lock keeps writers out, nothing is kept; on S3, where a commit may be under
                way, what is younger than 24 hours is.
            force: Take a later `older_than` on S3 as well. A commit under way would be lost.

        Returns:
            What was deleted.

        Raises:
            ConfigError: `older_than` has no time zone, or is too late without `force`.
            StoreError: Something that a version references cannot be read; nothing is deleted.
        """
        self.check_cutoff(older_than, force=force)
        with self._writing(), backend(f"{self.address}: cannot collect garbage"):
            cutoff = self._place.cutoff(older_than, force=force)
            self._refresh()
            self.check_tags()
            summary = self._repository.garbage_collect(cutoff)
            objects, size = self._place.sweep(cutoff)
        return GarbageReport(
            objects=objects
            + summary.chunks_deleted
            + summary.manifests_deleted
            + summary.snapshots_deleted
            + summary.attributes_deleted
            + summary.transaction_logs_deleted,
            bytes=size + summary.bytes_deleted,
        )

    def check_tags(self) -> None:
        """Refuse to go on where a tag is damaged, and so keeps nothing; hold the lock.

        Raises:
            StoreError: There is one.
        """
        with backend(f"{self.address}: cannot read the tags"):
            self._place.check_tags(self._repository.list_tags())

    def check_cutoff(self, older_than: datetime | None, *, force: bool) -> None:
        """Refuse what `collect_garbage` would refuse, for those who do other work before it.

        Raises:
            ConfigError: As it does.
        """
        if older_than is not None:
            _check_zone(older_than)
        self._place.cutoff(older_than, force=force)

    def _refresh(self) -> None:
        """Forget Icechunk's cache: `expire` by somebody else changes versions that may be in it."""
        self._repository = self._place.open()

    def _versions(self) -> Iterator[str]:
        """Yield the id of every version, some twice: the newest and those before it, the tagged."""
        for start in (self.tip(), *self.tags().values()):
            for entry in self._repository.ancestry(snapshot_id=start):
                if entry.parent_id is not None:  # Icechunk's own, from before the first version
                    yield entry.id


def _readonly_root(repository: icechunk.Repository, version: str) -> zarr.Group:
    session = repository.readonly_session(snapshot_id=version)
    return zarr.open_group(session.store, mode="r", zarr_format=3, use_consolidated=False)


def _check_zone(moment: datetime) -> None:
    if moment.tzinfo is None:
        raise ConfigError(f"older_than is {moment.isoformat()}, expected a time with a time zone")
