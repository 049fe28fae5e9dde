"""Rows in segments: how often a row is rewritten, how many segments there are to read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unmerge.store.segments import FANOUT, append_rows, merged_tail, read_rows

SHAPE = (2, 3)


def grow(batches: list[int], full: int) -> tuple[list[int], list[int]]:
    """Append batches of rows; return the segments, and how often each row was written."""
    segments: list[int] = []
    written: list[int] = []
    for rows in batches:
        taken = merged_tail(segments, rows, full)
        kept = segments[: len(segments) - taken]
        first = sum(kept)
        written.extend([0] * rows)
        segments = [*kept, len(written) - first]
        for row in range(first, len(written)):
            written[row] += 1
    return segments, written


def test_a_counter_to_the_base_of_the_fan_out() -> None:
    grown = [grow([1] * n, 64)[0] for n in range(1, 18)]
    assert grown[:5] == [[1], [1, 1], [1, 1, 1], [4], [4, 1]]
    assert grown[14:] == [[4, 4, 4, 1, 1, 1], [16], [16, 1]]


def test_full_segments_are_left_alone() -> None:
    segments, written = grow([1] * 1000, 64)
    assert segments == [64] * 15 + [16, 16, 4, 4]
    assert max(written) == 4  # once as 1, 4, 16 and 64


def test_rows_as_large_as_a_chunk_are_written_once() -> None:
    assert grow([1] * 10, 1) == ([1] * 10, [1] * 10)


def test_a_batch_is_one_segment() -> None:
    assert grow([500], 64)[0] == [500]
    assert grow([33, 1, 1], 64)[0] == [33, 1, 1]
    assert grow([4, 1, 1, 33], 64)[0] == [39]


@given(st.lists(st.integers(1, 300), max_size=60), st.sampled_from([1, 2, 7, 64, 1000]))
@example([4, 2, 4, 4, 4, 8, 4, 1, 16, 16, 16, 4, 256], 64)  # a row is written 5 times
def test_writes_and_segments_are_bounded(batches: list[int], full: int) -> None:
    segments, written = grow(batches, full)
    assert sum(segments) == sum(batches)
    levels = 1
    while FANOUT**levels < full:
        levels += 1
    # A segment stays in its class when it takes in smaller ones and a batch of its own class: that
    # adds at least what the class begins with, so it can happen twice.
    assert max(written, default=0) <= 3 * levels + 1
    if set(batches) == {1}:
        assert max(written) <= levels + 1
    small = [rows for rows in segments if rows < full]
    assert len(small) <= len(batches)
    for size_class in range(levels + 1):
        low, high = FANOUT**size_class, FANOUT ** (size_class + 1)
        alike = 0
        for rows in reversed(segments):  # a run at the end, before anything larger
            if rows >= min(high, full):
                break
            alike += low <= rows
        assert alike < FANOUT


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.data())
def test_rows_keep_their_numbers(batches: list[int], data: st.DataObject) -> None:
    root = zarr.create_group({})
    numbers: Iterator[int] = iter(range(10_000))
    segments: list[int] = []
    for rows in batches:
        new = [np.full(SHAPE, next(numbers), dtype=np.float32) for _ in range(rows)]
        segments = append_rows(
            root, "t", segments, SHAPE, "float32", [lambda row=row: row for row in new]
        )
    total = sum(batches)
    assert sum(segments) == total
    assert len(list(root.array_keys())) == len(segments)
    wanted = sorted(data.draw(st.sets(st.integers(0, total - 1), min_size=1)))
    read = list(read_rows(root, "t", segments, SHAPE, "float32", wanted))
    assert [row for rows, _ in read for row in rows] == wanted
    for rows, block in read:
        assert (block == np.array(rows)[:, None, None]).all()


def test_a_table_that_is_not_as_recorded_is_an_error() -> None:
    root = zarr.create_group({})
    row = np.zeros(SHAPE, dtype=np.float32)
    segments = append_rows(root, "t", [], SHAPE, "float32", [lambda: row] * 3)
    for recorded, shape, dtype in (
        ([4], SHAPE, "float32"),
        ([2], SHAPE, "float32"),
        (segments, (2, 4), "float32"),
        (segments, SHAPE, "float16"),
        ([3, 1], SHAPE, "float32"),
    ):
        with pytest.raises((TypeError, IndexError, KeyError)):
            list(read_rows(root, "t", recorded, shape, dtype, [0, sum(recorded) - 1]))
    with pytest.raises(IndexError, match="has 3 rows, expected more than 3"):
        list(read_rows(root, "t", segments, SHAPE, "float32", [0, 3]))
