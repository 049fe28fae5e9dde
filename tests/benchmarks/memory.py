"""The memory that a task needs beyond what is there before it, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def extra_bytes(module: str, part: str) -> int | None:
    """Run `python -m module part`, which must call `report`, and return what it prints.

    A fresh process: an allocator keeps what was freed, and a peak is one of the whole process.
    `None` on systems that do not tell (Linux does).
    """
    if not _CLEAR.exists():
        return None
    done = subprocess.run(
        [sys.executable, "-m", module, part],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return int(done.stdout)


def report(task: Callable[[], object]) -> None:
    """Print `growth(task)`."""
    print(growth(task))


def growth(task: Callable[[], object]) -> int:
    """Return by how many bytes the resident size at its peak during `task` exceeds that before."""
    _CLEAR.write_text("5")  # resets the peak to the present size
    before = _kibibytes("VmRSS")
    result = task()
    peak = _kibibytes("VmHWM")
    del result
    return 1024 * (peak - before)


def _kibibytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), flags=re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{_STATUS} has no {field}")
    return int(found[1])
