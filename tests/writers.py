"""What the processes of the concurrency tests run; a module, because they import it by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from multiprocessing.connection import Connection

import zarr

from unmerge.store.repository import StoreRepository

LOG = "log"


def create_log(root: zarr.Group) -> None:
    """Write the array that writers append to, all of them to the same one."""
    root.create_array(LOG, shape=(0,), chunks=(8,), dtype="int64")


def append(root: zarr.Group, number: int) -> int:
    """Append a number to the array, and return where it lies."""
    array = root[LOG]
    assert isinstance(array, zarr.Array)
    (end,) = array.shape
    array.resize((end + 1,))
    array[end] = number
    return int(end)


def write(
    environment: Mapping[str, str], pipe: Connection, address: str, first: int, count: int
) -> None:
    """Commit numbers one by one once told to start, and report each one acknowledged."""
    os.environ.update(environment)
    repository = StoreRepository.open(address)
    pipe.send(("ready", ""))
    pipe.recv()
    for number in range(first, first + count):
        version, _ = repository.transact(
            lambda root, _, number=number: append(root, number), str(number)
        )
        pipe.send((number, version))
    pipe.close()


def create(environment: Mapping[str, str], pipe: Connection, address: str, number: int) -> None:
    """Create a repository that holds one number, once told to, and report how that went."""
    os.environ.update(environment)

    def initialise(root: zarr.Group) -> None:
        create_log(root)
        append(root, number)

    pipe.send("ready")
    pipe.recv()
    try:
        StoreRepository.create(address, initialise)
    except Exception as error:  # noqa: BLE001 - whichever it is, the test judges it
        pipe.send(type(error).__name__)
    else:
        pipe.send("created")
    pipe.close()
