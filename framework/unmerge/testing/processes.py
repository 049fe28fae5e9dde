"""The same merge in another Python process, which shares nothing with this one but the files.

One such process serves all checks of a session: starting Python with torch takes seconds. Its
hash seed is another one, so that an order taken from a set or a dictionary of hashes shows.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from unmerge.merger import Merger
from unmerge.testing import cases
from unmerge.testing.outcome import bits
from unmerge.testing.results import Violation

__all__ = ["Elsewhere", "digest_elsewhere", "digest_here"]


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What the other process answered.

    Attributes:
        digest: As `digest_here` returns it, or "".
        error: What the merge raised there, or "".
        skipped: Why the process cannot run the merger, or `None`.
    """

    digest: str = ""
    error: str = ""
    skipped: str | None = None


def digest_here(merger: Merger) -> str:
    """Return a hash of the merger's results on some collections, of every bit and fact."""
    total = hashlib.sha256()
    for collection in (cases.general(), cases.with_missing_modules()):
        results = cases.merge_collection(merger, collection, seed=1)
        for path, encoding in sorted(results.items()):
            total.update(f"{path} {bits(encoding)}\n".encode())
    return total.hexdigest()


def digest_elsewhere(merger: Merger) -> Elsewhere:
    """Return what `digest_here` gives in the other process."""
    kind = type(merger)
    if kind.__module__ == "__main__" or "<locals>" in kind.__qualname__:
        return Elsewhere(
            skipped=f"{kind.__qualname__} is defined in a script or a function, where another "
            "process cannot import it from"
        )
    request = {
        "path": sys.path,
        "module": kind.__module__,
        "class": kind.__qualname__,
        "recipe": merger.recipe(),
    }
    return Elsewhere(**_ask(_worker(), request))


def _ask(process: subprocess.Popen[str], request: dict[str, Any]) -> dict[str, Any]:
    if process.stdin is None or process.stdout is None:
        raise Violation("another process", "a process with pipes", "one without")
    process.stdin.write(f"{json.dumps(request)}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        _worker.cache_clear()
        raise Violation(
            "another process", "a result", f"the process ended with status {process.wait()}"
        )
    answer: dict[str, Any] = json.loads(line)
    return answer


@functools.cache
def _worker() -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "unmerge.testing.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=environment,
    )
    atexit.register(_stop, process)
    return process


def _stop(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait()
