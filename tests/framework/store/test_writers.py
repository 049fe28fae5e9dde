"""Several processes add, remove, tag and read at once: nothing acknowledged is ever missing."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

import store_worker
from store_worker import Acknowledged, Seen, Start, Step, receive
from unmerge.store import AdapterStore, Version

WRITERS, COMMITS = 4, 25


@pytest.fixture(params=["local", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "zoo")
    found: str = request.getfixturevalue("s3_address")
    return found


@pytest.fixture
def start() -> Iterator[Start]:
    with store_worker.processes() as start:
        yield start


def run(start: Start, address: str, plans: list[list[Step]]) -> list[list[Acknowledged]]:
    """Have one writer per plan carry it out, all at once, and return what they report."""
    pipes = [start(store_worker.write, address, plan)[1] for plan in plans]
    for pipe in pipes:
        pipe.send("go")
    return [[receive(pipe) for _ in plan] for pipe, plan in zip(pipes, plans, strict=True)]


def names_by_version(history: list[Version]) -> dict[str, list[str]]:
    """What each version must hold, as the messages tell it."""
    names: set[str] = set()
    expected = {}
    for version in reversed(history):
        what, _, name = version.message.partition(" ")
        names = names | {name} if what == "add" else names - {name}
        expected[version.id] = sorted(names)
    return expected


def test_four_writers_lose_nothing(address: str, start: Start) -> None:
    AdapterStore.create(address)
    plans = [[Step("add", f"{w}-{n}") for n in range(COMMITS)] for w in range(WRITERS)]
    reports = run(start, address, plans)

    store = AdapterStore.open(address)
    names = [step.name for plan in plans for step in plan]
    assert len(names) == WRITERS * COMMITS
    assert store_worker.intact(store, names)
    *history, _ = store.history()  # all but the creation
    acknowledged = {a.version: f"add {a.step.name}" for report in reports for a in report}
    assert {version.id: version.message for version in history} == acknowledged
    assert len(history) == len(acknowledged) == WRITERS * COMMITS
    # The writers took turns: otherwise nothing was tested.
    order = [version.message for version in reversed(history)]
    assert order != sorted(order, key=lambda message: message[: len("add 0")])


def test_readers_see_every_version_whole(address: str, start: Start) -> None:
    AdapterStore.create(address)
    readers: list[Connection] = [start(store_worker.read, address, seed)[1] for seed in range(2)]
    for pipe in readers:
        pipe.send("go")
    plans = [
        [Step("add", f"steady-{n}") for n in range(8)],
        [Step(what, f"passing-{n}") for n in range(4) for what in ("add", "remove")],
        [Step(what, f"named-{n}") for n in range(4) for what in ("add", "tag")],
    ]
    reports = run(start, address, plans)
    for pipe in readers:
        pipe.send("stop")
    seen: list[Seen] = [one for pipe in readers for one in receive(pipe)]

    store = AdapterStore.open(address)
    assert store_worker.intact(
        store, [step.name for plan in (plans[0], plans[2][::2]) for step in plan]
    )
    history = store.history()
    ids = [version.id for version in history]
    commits = [a for report in reports for a in report if a.step.what != "tag"]
    assert len(set(ids)) == len(ids) == 1 + len(commits)
    assert {a.version for a in commits} == set(ids[:-1])

    # Of every version, also of those that nobody looked at: what its history says.
    expected = names_by_version(history)
    for version in ids:
        assert store_worker.intact(store.checkout(version), expected[version])
    tags = {a.step.name: a.version for a in reports[2] if a.step.what == "tag"}
    assert store.tags() == tags
    assert len(tags) == 4

    assert len({one.history[0] for one in seen}) > 3  # they read while others wrote
    for one in seen:
        version = one.history[0]
        assert list(one.history) == ids[ids.index(version) :]
        assert list(one.names) == expected[version]
        before = [a for report in reports for a in report if a.time < one.time]
        assert {a.version for a in before} <= set(one.history)
        assert {a.step.name for a in before if a.step.what == "tag"} <= set(one.tags)
        assert one.tags.items() <= tags.items()


def test_of_several_that_add_one_name_one_succeeds(address: str, start: Start) -> None:
    AdapterStore.create(address)
    pipes = [start(store_worker.add_same, address, number)[1] for number in range(WRITERS)]
    for pipe in pipes:
        pipe.send("go")
    outcomes = [receive(pipe) for pipe in pipes]
    assert sorted(outcomes) == ["AdapterExistsError"] * (WRITERS - 1) + ["committed"]
    store = AdapterStore.open(address)
    assert store.names() == ("same",)
    assert store.info("same").note == f"from {outcomes.index('committed')}"
    assert len(store.history()) == 2
