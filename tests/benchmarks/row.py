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
        ours_bytes: Most memory of this library beyond its inputs; see `memory.extra_bytes`.
        peer_bytes: Likewise the peer's.
        memory_target: The largest `ours_bytes / peer_bytes` that is acceptable.
    """

    what: str
    peer: str
    ours_s: float
    peer_s: float
    difference: float
    target: float | None = None
    peer_difference: float | None = None
    ours_bytes: int | None = None
    peer_bytes: int | None = None
    memory_target: float | None = None

    @property
    def ratio(self) -> float:
        """How many times the peer's CPU time is ours."""
        return self.peer_s / self.ours_s

    @property
    def memory_ratio(self) -> float | None:
        """Which part of the peer's memory is ours; `None` where it was not measured."""
        if self.ours_bytes is None or not self.peer_bytes:
            return None
        return self.ours_bytes / self.peer_bytes

    @property
    def met(self) -> bool:
        """Whether the ratio reaches the target, and the memory stays within its own."""
        fast = self.target is None or self.ratio >= self.target
        if self.memory_target is None:
            return fast
        return fast and self.memory_ratio is not None and self.memory_ratio <= self.memory_target


def cpu_seconds(task: Callable[[], T], *, repeats: int = 3) -> tuple[float, T]:
    """Return the smallest CPU time of `repeats` runs, and the last result."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        result = task()
        times.append(time.process_time() - start)
    return min(times), result
