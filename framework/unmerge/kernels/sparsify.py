"""Exact selection of the largest magnitudes of a stream, in bounded memory and without sorting.

The bits of a float's magnitude, read as an integer, are ordered as the magnitudes are. So the k-th
largest is found by counting: one pass counts the values by their leading bits, the next counts
those that share the leading bits of the k-th largest by the bits that follow. Two passes give it
exactly for float32, four for float64, whatever the number of values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

Entries: TypeAlias = tuple[str, int, Mapping[str, torch.Tensor]]
"""Consecutive entries of one matrix: its key, the row-major index of the first, values by name."""

Pass: TypeAlias = Callable[[], Iterable[Entries]]

COUNTERS = 1 << 16
"""Most counters that the search for one name's cut needs at a time."""

# Bits below the present ones, per level: each level counts by at most 16 bits.
_LEVELS = {torch.float32: (16, 0), torch.float64: (48, 32, 16, 0)}
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True, slots=True)
class Cut:
    """Which of one name's values are kept.

    Attributes:
        threshold: Larger magnitudes are kept, smaller ones are not.
        last: Of magnitudes equal to the threshold, those up to this row-major index are kept, by
            the key of the matrix; all of them in matrices that are not listed.
    """

    threshold: float
    last: Mapping[str, int] = field(default_factory=dict)

    def keep(self, key: str, start: int, values: torch.Tensor) -> torch.Tensor:
        """Return a bool per entry of `values`, which begin at index `start` of matrix `key`."""
        magnitude = values.abs()
        last = self.last.get(key)
        if last is None:
            return magnitude >= self.threshold
        index = torch.arange(start, start + values.numel(), device=values.device)
        early = (index <= last).reshape(values.shape)
        return (magnitude > self.threshold) | ((magnitude == self.threshold) & early)

    def trim(self, key: str, start: int, values: torch.Tensor) -> torch.Tensor:
        """Return `values`, which begin at index `start` of matrix `key`, the others set to 0.

        NaN stays, and infinity.
        """
        last = self.last.get(key)
        if last is not None and start <= last < start + values.numel() - 1:
            return values * self.keep(key, start, values)
        bound = torch.tensor(self.threshold, dtype=values.dtype)
        if last is None or last >= start:
            # Equal ones are kept: only what is at most the number before the threshold is not.
            bound = torch.nextafter(bound, torch.zeros_like(bound))
        # Several times as fast as a mask.
        return torch.hardshrink(values, float(bound))


KEEP_ALL = Cut(threshold=0.0)


def largest_magnitudes(start_pass: Pass, density: float) -> dict[str, Cut]:
    """Return, per name, the cut that keeps exactly `⌊density · count⌋` of its values.

    Args:
        start_pass: Starts a pass over all values, finite floats; equal entries at every call.
            The entries of one matrix come in ascending order of index; matrices in any order.
        density: Fraction kept, in (0, 1].

    Returns:
        A cut per name. Of values equal to the threshold the first are kept, in the order of the
        matrices' keys and of their row-major index, whatever order they came in. A threshold of 0
        keeps every value: which zeros are kept makes no difference.

    Complexity: two counting passes for float32, four for float64; where only some of the values
        at the threshold are kept, one more, or two if a name has several matrices. Memory: 2¹⁶
        counters a name.
    Source: radix selection; `k = ⌊density · count⌋` as in PEFT and mergekit (KnOTS keeps k + 1).
    """
    if density == 1:
        return {name: KEEP_ALL for _, _, values in start_pass() for name in values}
    selections: dict[str, _Selection] = {}
    for key, _, values in start_pass():
        for name, entries in values.items():
            selection = selections.setdefault(name, _Selection(entries.dtype))
            selection.keys.add(key)
            selection.count(entries)
    for selection in selections.values():
        selection.descend(int(density * selection.total))
    while any(selection.open for selection in selections.values()):
        for _, _, values in start_pass():
            for name, entries in values.items():
                if selections[name].open:
                    selections[name].count(entries)
        for selection in selections.values():
            if selection.open:
                selection.descend(selection.wanted)
    last = _cut_ties(start_pass, {n: s for n, s in selections.items() if s.surplus})
    return {
        name: Cut(threshold=selection.threshold, last=last.get(name, {}))
        for name, selection in selections.items()
    }


class _Selection:
    """The search for one name's k-th largest magnitude, one level of bits after the other."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._levels = _LEVELS[dtype]
        self._level = 0
        self._prefix = 0  # the bits of the k-th largest above the present level's
        self._counts: torch.Tensor | None = None
        self.keys: set[str] = set()
        self.total = 0
        self.wanted = 0  # how many of the values with this prefix are among the k largest
        self.surplus = 0  # how many values at the threshold are too many
        self.threshold = 0.0
        self.open = True

    def count(self, entries: torch.Tensor) -> None:
        """Count the entries that share the prefix by their bits on the present level."""
        shift = self._levels[self._level]
        bits = entries.reshape(-1).abs().view(_INTEGER[self._dtype])
        if self._level == 0:
            self.total += bits.numel()
            digits = bits >> shift
        else:
            above = self._levels[self._level - 1]
            bits = bits[(bits >> above) == self._prefix]
            digits = (bits >> shift) & ((1 << (above - shift)) - 1)
        counts = torch.bincount(digits, minlength=COUNTERS)
        self._counts = counts if self._counts is None else self._counts + counts

    def descend(self, wanted: int) -> None:
        """Take the digit at which the values counted from the largest reach `wanted`."""
        if wanted == 0:
            self.threshold, self.open = float("inf"), False
            return
        assert self._counts is not None
        reached = self._counts.flip(0).cumsum(0)  # values with this digit or a larger one
        place = int(torch.searchsorted(reached, wanted))
        digit = len(reached) - 1 - place
        equal = int(self._counts[digit])
        self.wanted = wanted - (int(reached[place]) - equal)
        above = self._levels[self._level - 1] if self._level else self._levels[0]
        width = above - self._levels[self._level]
        self._prefix = digit if self._level == 0 else (self._prefix << width) | digit
        self._counts = None
        self._level += 1
        if self._level == len(self._levels):
            bits = torch.tensor(self._prefix, dtype=_INTEGER[self._dtype])
            self.threshold = float(bits.view(self._dtype))
            self.surplus = equal - self.wanted if self.threshold > 0 else 0
            self.open = False


def _cut_ties(start_pass: Pass, selections: Mapping[str, _Selection]) -> dict[str, dict[str, int]]:
    """Return the index of the last value kept at the threshold, by name and matrix."""
    last: dict[str, dict[str, int]] = {name: {} for name in selections}
    # Per name, the one matrix in which some are kept and some are not, and how many are.
    divided: dict[str, tuple[str, int]] = {}
    for name, counts in _count_ties(start_pass, selections).items():
        left = selections[name].wanted
        for key in sorted(counts):
            if 0 < left < counts[key]:
                divided[name] = key, left
            elif left <= 0:
                last[name][key] = -1
            left -= counts[key]
    for key, start, values in start_pass() if divided else ():
        for name in [n for n, (matrix, _) in divided.items() if matrix == key and n in values]:
            missing = divided[name][1]
            at_threshold = values[name].reshape(-1).abs() == selections[name].threshold
            found = int(torch.count_nonzero(at_threshold))
            if found < missing:
                divided[name] = key, missing - found
            else:
                last[name][key] = start + int(at_threshold.nonzero()[missing - 1, 0])
                del divided[name]
        if not divided:
            break
    return last


def _count_ties(
    start_pass: Pass, selections: Mapping[str, _Selection]
) -> dict[str, dict[str, int]]:
    """Return how many values are at the threshold, by name and matrix."""
    counts = {name: dict.fromkeys(s.keys, s.wanted + s.surplus) for name, s in selections.items()}
    several = {name for name, s in selections.items() if len(s.keys) > 1}
    for name in several:
        counts[name] = dict.fromkeys(selections[name].keys, 0)
    for key, _, values in start_pass() if several else ():
        for name in values.keys() & several:
            at_threshold = values[name].abs() == selections[name].threshold
            counts[name][key] += int(torch.count_nonzero(at_threshold))
    return counts
