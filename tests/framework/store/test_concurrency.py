"""Several writers at once, and killed ones: what was acknowledged is there, whatever happens."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import numpy as np
import pytest

import writers
from unmerge.store.repository import StoreRepository

WRITERS, COMMITS = 4, 25


@pytest.fixture(params=["local", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "zoo")
    found: str = request.getfixturevalue("s3_address")
    return found


Start = Callable[..., tuple[ForkServerProcess, Connection]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a function of `writers` in a process of its own; processes end with the test."""
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    # The import that takes seconds is paid for once. Not Icechunk: a fork would lack its threads.
    context.set_forkserver_preload(["torch"])
    processes: list[ForkServerProcess] = []

    def start_process(target: Callable[..., None], *args: object) -> tuple[object, Connection]:
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(dict(os.environ), theirs, *args))
        process.start()
        theirs.close()
        processes.append(process)
        assert ours.poll(120)
        ours.recv()  # it is ready
        return process, ours

    yield start_process
    for process in processes:
        process.kill()
        process.join()


def numbers(repository: StoreRepository) -> list[int]:
    log = repository.read(repository.tip())[writers.LOG]
    return [int(number) for number in np.asarray(log[...])]


def test_four_writers_lose_nothing(address: str, start: Start) -> None:
    StoreRepository.create(address, writers.create_log)
    pipes = [
        start(writers.write, address, COMMITS * writer, COMMITS)[1] for writer in range(WRITERS)
    ]
    for pipe in pipes:
        pipe.send("go")
    acknowledged = {}
    for pipe in pipes:
        for _ in range(COMMITS):
            assert pipe.poll(120)
            number, version = pipe.recv()
            acknowledged[version] = str(number)
    assert len(acknowledged) == WRITERS * COMMITS

    repository = StoreRepository.open(address)
    assert sorted(numbers(repository)) == list(range(WRITERS * COMMITS))
    history = repository.history(repository.tip())
    assert {entry.id: entry.message for entry in history[:-1]} == acknowledged
    # The writers took turns: otherwise nothing was tested.
    assert [int(entry.message) for entry in reversed(history[:-1])] != sorted(numbers(repository))


def test_one_of_several_creators_wins(address: str, start: Start) -> None:
    pipes = [start(writers.create, address, number)[1] for number in range(WRITERS)]
    for pipe in pipes:
        pipe.send("go")
    outcomes = []
    for pipe in pipes:
        assert pipe.poll(60)
        outcomes.append(pipe.recv())
    assert sorted(outcomes) == ["StoreExistsError"] * (WRITERS - 1) + ["created"]
    repository = StoreRepository.open(address)
    assert numbers(repository) == [outcomes.index("created")]
    assert len(repository.history(repository.tip())) == 1


def test_a_killed_writer_leaves_its_last_commit(address: str, start: Start) -> None:
    repository = StoreRepository.create(address, writers.create_log)
    expected: list[int] = []
    for attempt in range(4):
        process, pipe = start(writers.write, address, 1000 * attempt, 1000)
        pipe.send("go")
        assert pipe.poll(60)
        time.sleep(0.03 + 0.017 * attempt)  # a moment of its own in some later commit
        process.kill()
        process.join()
        acknowledged = []
        while pipe.poll():
            try:
                acknowledged.append(pipe.recv()[0])
            except EOFError:
                break
        there = numbers(StoreRepository.open(address))
        assert there[: len(expected) + len(acknowledged)] == expected + acknowledged
        # One more may have been committed and not reported: that is the old or the new state.
        expected += list(range(1000 * attempt, 1000 * attempt + len(acknowledged) + 1))
        assert there in (expected, expected[:-1])
        expected = there
        repository.transact(lambda root, _: writers.append(root, -1), "it goes on")
        expected.append(-1)

    everything = datetime.now(UTC) + timedelta(days=1)  # no writer is alive
    repository.collect_garbage(older_than=everything, force=True)
    assert numbers(StoreRepository.open(address)) == expected
    again = repository.collect_garbage(older_than=everything, force=True)
    assert (again.objects, again.bytes) == (0, 0)
