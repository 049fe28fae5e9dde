"""What every use of Icechunk needs: one branch, one format version, quiet logs, threads at rest."""

from __future__ import annotations

import atexit
import functools
import inspect
import os
import time
from typing import Any

import icechunk
import zarr

BRANCH = "main"

_SETTLING_SECONDS = 0.05


def create_empty(storage: icechunk.Storage) -> icechunk.Repository:
    """Create an Icechunk repository of the format that every supported Icechunk reads."""
    options: dict[str, Any] = {}
    # Icechunk 2 writes its newer format by default, which Icechunk 1 cannot read.
    if "spec_version" in inspect.signature(icechunk.Repository.create).parameters:
        options["spec_version"] = 1
    return icechunk.Repository.create(storage, **options)


def new_root(session: icechunk.Session) -> zarr.Group:
    """Create the root group in the first session of a repository."""
    return zarr.create_group(session.store, zarr_format=3)


def writable_root(session: icechunk.Session) -> zarr.Group:
    """Return the root group of a session that writes."""
    return zarr.open_group(session.store, mode="r+", zarr_format=3, use_consolidated=False)


@functools.cache
def prepare() -> None:
    """Set Icechunk up for this process, once, before its first use."""
    # It warns on every open of a local store that concurrent commits are not safe; the lock of
    # `LocalPlace` is what makes them so.
    if "ICECHUNK_LOG" not in os.environ:
        icechunk.set_logs_filter("error")
    # Let Icechunk's threads come to rest before the interpreter goes. After its result has
    # arrived, the thread that delivered it still needs the interpreter for a moment; should that
    # be shutting down by then, the process aborts (SIGABRT), with all work done
    # (PyO3/pyo3-async-runtimes issue 40). Sleeping gives that moment.
    atexit.register(time.sleep, _SETTLING_SECONDS)
