"""kill -9 at random moments of imports, commits and collections: the last commit is there, whole.

What counts as acknowledged is what the killed process had sent before it died.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

import store_worker
from store_worker import Report, Start, batch_in, receive
from unmerge.store import AdapterStore
from unmerge.store.repository import GarbageReport, StoreRepository

IMPORTS_KILLED, COMMITS_KILLED, COLLECTIONS_KILLED = 50, 25, 20
NOTHING = GarbageReport(objects=0, bytes=0)


@pytest.fixture
def start() -> Iterator[Start]:
    with store_worker.processes() as start:
        yield start


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the store is made; temporary files of the processes would be in it as well."""
    folder = tmp_path / "disturbed"
    (folder / "temporary").mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(folder / "temporary"))
    return folder


class Killer:
    """Starts processes at one store, one after another, and kills each at a random moment.

    Attributes:
        acknowledged: Version of every import that was acknowledged, by its number.
        newest: Number of the newest import that is there.
        unfinished: How often the work in question was cut off.
    """

    def __init__(self, start: Start, work: Callable[..., None], address: Path) -> None:
        self._start, self._work, self._address = start, work, address
        self._draw = random.Random(work.__name__)  # noqa: S311 - the same in every run
        self._seconds = 0.1
        self.acknowledged = {0: store_worker.replace_batch(AdapterStore.create(address), 0)}
        self.newest = 0
        self.unfinished = 0

    def strike(self, begin: str, end: str) -> None:
        """Kill a process between its reports `begin` and `end`, or not long after."""
        # An import that was cut off is repeated.
        process, pipe = self._start(self._work, self._address, self.newest + 1)
        pipe.send("go")
        found: list[Report] = []
        while not found or found[-1].what != begin:
            found.append(receive(pipe))
        time.sleep(self._draw.uniform(0, self._seconds))
        process.kill()
        process.join()
        found += last_words(pipe)
        self.acknowledged |= {r.number: r.version for r in found if r.what == "committed"}

        finished = [report.what for report in found].count(end)
        self.unfinished += not finished
        # How long the work takes depends on the machine and on what is there already: so that
        # three of five kills come before its end, whatever it takes.
        self._seconds *= 0.7**finished if finished else 1.25

    def check(self) -> AdapterStore:
        """Return the store, which is at the last commit acknowledged, whole."""
        store = AdapterStore.open(self._address)
        expected = max(self.newest, *self.acknowledged)
        self.newest = batch_in(store)
        # One more may be there, of which the process could not tell any more.
        assert self.newest in (expected, expected + 1)
        versions = {version.message: version.id for version in store.history()}
        for number, version in self.acknowledged.items():
            assert versions.get(f"import {number}", version) == version
        return store


def last_words(pipe: Connection) -> list[Report]:
    """Everything that a killed process had sent and nobody has read."""
    found = []
    while pipe.poll():
        try:
            found.append(pipe.recv())
        except EOFError:
            break
    return found


def sizes(folder: Path) -> tuple[Counter[str], int]:
    """How many files there are in each folder, and the bytes of all."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    places = Counter(path.parent.relative_to(folder).as_posix() for path in found)
    return places, sum(path.stat().st_size for path in found)


def check_nothing_left(disturbed: Path, undisturbed: Path) -> None:
    """Compare the files of a store whose garbage was collected with those of one never killed."""
    places, size = sizes(disturbed)
    expected_places, expected_size = sizes(undisturbed)
    assert places == expected_places
    # Ids and times of versions compress differently.
    assert abs(size - expected_size) < 4096
    assert StoreRepository.open(disturbed / "zoo").collect_garbage() == NOTHING


@pytest.mark.parametrize(
    ("begin", "kills"), [("stages", IMPORTS_KILLED), ("commits", COMMITS_KILLED)]
)
def test_a_killed_import_leaves_the_last_commit(
    begin: str, kills: int, folder: Path, tmp_path: Path, start: Start
) -> None:
    killer = Killer(start, store_worker.import_batches, folder / "zoo")
    for _ in range(kills):
        killer.strike(begin, "committed")
        killer.check()
        assert not any((folder / "temporary").iterdir())
    assert killer.unfinished > kills / 4
    before = sizes(folder)[1]
    assert StoreRepository.open(folder / "zoo").collect_garbage().bytes > 10_000
    assert sizes(folder)[1] < before - 10_000

    store = killer.check()
    *imports, _ = store.history()  # all but the creation
    assert [version.message for version in imports] == [
        f"import {number}" for number in range(killer.newest, -1, -1)
    ]
    assert killer.acknowledged.items() <= dict(enumerate(v.id for v in imports[::-1])).items()
    for number in range(0, killer.newest, 5):
        assert batch_in(store.checkout(imports[-1 - number].id)) == number

    undisturbed = AdapterStore.create(tmp_path / "undisturbed" / "zoo")
    for number in range(killer.newest + 1):
        store_worker.replace_batch(undisturbed, number)
    check_nothing_left(folder, tmp_path / "undisturbed")


def test_a_killed_collection_loses_nothing(folder: Path, tmp_path: Path, start: Start) -> None:
    killer = Killer(start, store_worker.collect, folder / "zoo")
    AdapterStore.open(folder / "zoo").tag("tagged")
    compacted = 0
    for _ in range(COLLECTIONS_KILLED):
        killer.strike("collects", "collected")
        store = killer.check()
        history = [version for version in store.history() if version.message != "create store"]
        numbers = [batch_in(store.checkout(version.id)) for version in history]
        # Without gaps, from the newest back; one that was compacted may be there twice.
        assert sorted({*numbers}) == list(range(numbers[-1], killer.newest + 1))
        assert numbers == sorted(numbers, reverse=True)
        compacted += history[0].message.startswith("gc")
        assert batch_in(store.checkout("tagged")) == 0
    assert killer.unfinished > COLLECTIONS_KILLED / 4
    assert compacted

    undisturbed = AdapterStore.create(tmp_path / "undisturbed" / "zoo")
    for number in range(killer.newest + 1):
        store_worker.replace_batch(undisturbed, number)
        if number == 0:
            undisturbed.tag("tagged")
    for store in (killer.check(), undisturbed):
        store.gc(forget_before=datetime.now(UTC))
        assert batch_in(store) == killer.newest
    check_nothing_left(folder, tmp_path / "undisturbed")
