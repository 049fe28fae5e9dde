"""One version written on top of the newest, whatever other writers do and whichever answer is lost.

Icechunk moves the branch to a new version only if it still is at the version written upon. Its own
rebase cannot help here: two writers that resize one array are beyond every conflict solver. So a
transaction that lost the race runs again from the start.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable
from typing import TypeVar

import icechunk
import zarr

from unmerge.errors import StoreError
from unmerge.store.engine import BRANCH, writable_root
from unmerge.store.failures import backend, is_failure, reason
from unmerge.store.places import Place

T = TypeVar("T")

# Metadata of a commit, by which its writer recognises it again.
_MARK = "unmerge_transaction"
_FIRST_DELAY, _LONGEST_DELAY = 0.02, 2.0
# Refusals in a row that nobody else's commit explains.
_PATIENCE = 5


def transact(
    repository: icechunk.Repository,
    place: Place,
    write: Callable[[zarr.Group, str], T],
    message: str,
) -> tuple[str, T]:
    """Commit what `write` writes; see `StoreRepository.transact`. Hold the place's lock."""
    what = f"{place.address}: cannot commit"
    refusals = unexplained = 0
    while True:
        with backend(what):
            session = repository.writable_session(BRANCH)
            base = session.snapshot_id
            root = writable_root(session)
        began = time.monotonic()
        value = write(root, base)
        _check_duration(place, time.monotonic() - began)
        with backend(what):
            if not session.has_uncommitted_changes:
                return base, value
            version = _commit(repository, place, session, base, message)
            if version is not None:
                return version, value
            refusals += 1
            unexplained = unexplained + 1 if repository.lookup_branch(BRANCH) == base else 0
            if unexplained == _PATIENCE:
                raise StoreError(
                    f"{what}: refused {_PATIENCE} times as too late though {base} is still the "
                    "newest version; check the server"
                )
        longest = min(_LONGEST_DELAY, _FIRST_DELAY * 2.0 ** min(refusals, 10))
        # Not the module's generator: processes that were forked share its state, and would all
        # wait equally long.
        time.sleep(random.SystemRandom().uniform(0, longest))


def _check_duration(place: Place, seconds: float) -> None:
    longest = place.longest_transaction
    if longest is not None and seconds > longest.total_seconds():
        raise StoreError(
            f"{place.address}: writing took {seconds / 3600:.1f} hours, expected at most "
            f"{longest.total_seconds() / 3600:.0f}: what was written first may have been "
            "collected as garbage, so nothing is committed; commit less at a time"
        )


def _commit(
    repository: icechunk.Repository,
    place: Place,
    session: icechunk.Session,
    base: str,
    message: str,
) -> str | None:
    """Commit and return the version's id, or None if somebody else was faster.

    Raises:
        StoreError: Whether the commit succeeded is unknown, or it was acknowledged and is not in
            the history.
    """
    mark = uuid.uuid4().hex
    try:
        version = session.commit(message, metadata={_MARK: mark})
    except BaseException as error:
        if not is_failure(error):
            raise
        # A write whose answer was lost is sent again and then refused, because of the version it
        # wrote itself: what an error means is seen in the history only.
        try:
            landed = _landed(repository, mark, base)
        except Exception as second:
            raise StoreError(
                f"{place.address}: whether the commit succeeded is unknown: {reason(error)}; "
                "look at the history (unmerge log on the command line) before committing again"
            ) from second
        if landed is None and not isinstance(error, icechunk.ConflictError):
            raise
        return landed
    if repository.lookup_branch(BRANCH) != version and _landed(repository, mark, base) is None:
        raise StoreError(
            f"{place.address}: version {version} was acknowledged and is not in the history: "
            "the server does not honour conditional writes, so it can hold no store that "
            "several people write to; commit again, and move the store to another server"
        )
    return version


def _landed(repository: icechunk.Repository, mark: str, base: str) -> str | None:
    """Return the version written since `base` by the transaction of that mark, if any."""
    for entry in repository.ancestry(branch=BRANCH):
        if entry.metadata.get(_MARK) == mark:
            return entry.id
        if entry.id == base:
            break
    return None
