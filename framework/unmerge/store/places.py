"""Which address leads where, and what differs between a local disk and an object store."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

import icechunk
import zarr

from unmerge.errors import StoreError
from unmerge.store.local import LocalPlace
from unmerge.store.remote import S3Place

# `pathlib.Path` makes `s3:/bucket` of `s3://bucket`. One letter would be a drive of Windows.
_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/")


class Place(Protocol):
    """Where a repository lies, and what differs between a local disk and an object store."""

    address: str
    longest_transaction: timedelta | None

    def open(self) -> icechunk.Repository:
        """Open the repository, creating nothing."""

    def create(self, initialise: Callable[[zarr.Group], None]) -> None:
        """Create the repository with a first version."""

    def lock(self) -> AbstractContextManager[object]:
        """Return what keeps other writers out, if that is needed."""

    def cutoff(self, older_than: datetime | None, *, force: bool) -> datetime:
        """Return before when an unreferenced object may be collected."""

    def check_tags(self, tags: Iterable[str]) -> None:
        """Check that Icechunk lists every tag there is."""

    def sweep(self, cutoff: datetime) -> tuple[int, int]:
        """Delete what Icechunk does not know of; return objects and bytes."""


def place_at(address: str | os.PathLike[str]) -> Place:
    """Read an address.

    Raises:
        StoreError: It is neither a usable path nor `s3://bucket/prefix`.
    """
    text = os.fspath(address)
    if text.startswith("s3://"):
        return S3Place(text)
    if "://" in text or _ADDRESS.match(text):
        hint = "; give it as text, pathlib takes a slash away" if text.startswith("s3:") else ""
        raise StoreError(
            f"{text}: is an address of a kind that holds no store, "
            f"expected a local directory or s3://bucket/prefix{hint}"
        )
    try:
        usable = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise StoreError(
            f"{text!r}: no path can hold a NUL or a character that the file system's encoding "
            "lacks, expected a local directory"
        )
    return LocalPlace(Path(text))
