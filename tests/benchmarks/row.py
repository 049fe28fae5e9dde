"""One line of the benchmark table, and how its times are taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison.

    Attributes:
        what: What is done, with its sizes.
        peer: What it is compared with.
        ours_s: CPU seconds of this library.
        peer_s: CPU seconds of the peer.
        difference: Relative Frobenius distance of our result from the dense reference.
        target: The smallest `peer_s / ours_s` that is acceptable; `None` where none is set.
        peer_difference: The peer's distance from the same reference, where it has one.
    """

    what: str
    peer: str
    ours_s: float
    peer_s: float
    difference: float
    target: float | None = None
    peer_difference: float | None = None

    @property
    def ratio(self) -> float:
        """How many times the peer's CPU time is ours."""
        return self.peer_s / self.ours_s

    @property
    def met(self) -> bool:
        """Whether the ratio reaches the target."""
        return self.target is None or self.ratio >= self.target


def cpu_seconds(task: Callable[[], T], *, repeats: int = 3) -> tuple[float, T]:
    """Return the smallest CPU time of `repeats` runs, and the last result."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        result = task()
        times.append(time.process_time() - start)
    return min(times), result
