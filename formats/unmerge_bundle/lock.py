"""One writer at a time: an advisory lock beside the bundle, which a crash cannot leave locked."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from unmerge_bundle.errors import BundleBusyError

__all__ = ["locked"]

_PAUSE = 0.05


@contextmanager
def locked(root: Path, *, timeout: float) -> Iterator[None]:
    """Hold the lock of the bundle at `root`; others wait for it, in this process and elsewhere.

    The lock is the system's on the file `.<name>.lock` beside the bundle, so that it goes with the
    process that holds it. The file is removed by whoever releases the lock.

    Args:
        root: The bundle's directory, resolved.
        timeout: Seconds to wait.

    Raises:
        BundleBusyError: Others hold it that long.
        OSError: The file cannot be made.
    """
    file = root.with_name(f".{root.name}.lock")
    deadline = time.monotonic() + timeout
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        if _try_lock(descriptor):
            # Whoever held it before may have removed the file we opened: then this locks nothing.
            if _is_open_at(descriptor, file):
                break
        elif time.monotonic() >= deadline:
            os.close(descriptor)
            raise BundleBusyError(
                f"another writer holds the lock {file.name} beside it, for more than {timeout:g} "
                "seconds; try again when it is done",
                path=str(root),
            )
        os.close(descriptor)
        time.sleep(_PAUSE)
    try:
        yield
    finally:
        with suppress(OSError):  # where an open file cannot be removed, it stays and is used again
            file.unlink()
        os.close(descriptor)


def _is_open_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
