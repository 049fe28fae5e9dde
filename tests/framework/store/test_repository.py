"""Transactions, tags, expiry and collection of a repository on a local disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import icechunk
import numpy as np
import pytest
import zarr
from filelock import Timeout

import writers
from unmerge.errors import ConfigError, StoreError, UnknownVersionError
from unmerge.store.failures import reason
from unmerge.store.repository import GarbageReport, StoreRepository

NOTHING = GarbageReport(objects=0, bytes=0)


@pytest.fixture
def repository(tmp_path: Path) -> StoreRepository:
    return StoreRepository.create(tmp_path / "zoo", writers.create_log)


def put(repository: StoreRepository, number: int) -> str:
    return repository.transact(lambda root, _: writers.append(root, number), str(number))[0]


def at(repository: StoreRepository, version: str) -> list[int]:
    return [int(n) for n in np.asarray(repository.read(version)[writers.LOG][...])]


def now() -> datetime:
    return datetime.now(UTC)


def others_commit(repository: StoreRepository, number: int) -> str:
    """Commit as a writer does that knows nothing of our lock."""
    session = icechunk.Repository.open(
        icechunk.local_filesystem_storage(str(repository.path))
    ).writable_session("main")
    writers.append(zarr.open_group(session.store, mode="r+"), number)
    return session.commit(str(number))


def files(repository: StoreRepository) -> set[Path]:
    return {path for path in repository.path.rglob("*") if path.is_file()}


def test_a_transaction_gets_the_newest_version(repository: StoreRepository) -> None:
    other = StoreRepository.open(repository.path)
    first = put(other, 7)
    seen = []

    def write(root: zarr.Group, version: str) -> str:
        seen.append((version, int(root[writers.LOG][0])))
        writers.append(root, 8)
        return "value"

    version, value = repository.transact(write, "second")
    assert (seen, value) == ([(first, 7)], "value")
    assert repository.tip() == other.tip() == version
    assert at(repository, version) == [7, 8]
    newest = repository.history(version)[0]
    assert (newest.id, newest.parent, newest.message) == (version, first, "second")


def test_what_changes_nothing_makes_no_version(repository: StoreRepository) -> None:
    tip = repository.tip()
    assert repository.transact(lambda root, version: (root.path, version), "m") == (tip, ("", tip))
    assert repository.tip() == tip


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_what_write_raises_aborts(repository: StoreRepository, error: BaseException) -> None:
    tip = put(repository, 1)

    def write(root: zarr.Group, version: str) -> None:
        writers.append(root, 2)
        raise error

    with pytest.raises(type(error)) as caught:
        repository.transact(write, "m")
    assert caught.value is error
    assert repository.tip() == tip
    assert at(repository, tip) == [1]
    with ThreadPoolExecutor(1) as pool:  # the lock is free again, for everybody
        assert pool.submit(put, StoreRepository.open(repository.path), 3).result(timeout=60)
    assert at(repository, repository.tip()) == [1, 3]


def test_a_stop_while_committing_releases_the_lock(
    repository: StoreRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commit(session: icechunk.Session, message: str, **kwargs: object) -> str:
        raise KeyboardInterrupt

    tip = repository.tip()
    with monkeypatch.context() as patch:
        patch.setattr(icechunk.Session, "commit", commit)
        with pytest.raises(KeyboardInterrupt):
            put(repository, 1)
    assert repository.tip() == tip
    with StoreRepository.open(repository.path).lock().acquire(timeout=0):
        pass


def test_a_transaction_holds_the_lock_and_may_take_it_again(repository: StoreRepository) -> None:
    other = StoreRepository.open(repository.path).lock()

    def write(root: zarr.Group, version: str) -> object:
        repository.tag("before", version)
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(other.acquire, timeout=0).exception()

    tip = repository.tip()
    assert type(repository.transact(write, "m")[1]) is Timeout
    assert repository.tags() == {"before": tip}
    with other.acquire(timeout=0):
        pass


def test_a_lost_race_is_run_again(repository: StoreRepository) -> None:
    calls: list[str] = []
    theirs: list[str] = []

    def write(root: zarr.Group, version: str) -> int:
        calls.append(version)
        place = writers.append(root, 100)
        if len(calls) <= 2:
            theirs.append(others_commit(repository, len(calls)))
        return place

    first = repository.tip()
    version, place = repository.transact(write, "mine")
    assert calls == [first, *theirs]
    assert place == 2
    assert at(repository, version) == [1, 2, 100]
    assert [v.message for v in repository.history(version)] == ["mine", "2", "1", "create store"]


def test_what_fits_no_more_after_a_lost_race_is_refused(repository: StoreRepository) -> None:
    def write(root: zarr.Group, version: str) -> None:
        if root[writers.LOG].shape != (0,):
            raise ValueError("somebody was faster")
        writers.append(root, 100)
        others_commit(repository, 1)

    with pytest.raises(ValueError, match="somebody was faster"):
        repository.transact(write, "mine")
    assert at(repository, repository.tip()) == [1]


def test_a_commit_whose_answer_is_lost_is_not_repeated(
    repository: StoreRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lossy(session: icechunk.Session, message: str, **kwargs: object) -> str:
        monkeypatch.undo()
        session.commit(message, **kwargs)
        others_commit(repository, 2)
        raise icechunk.ConflictError("ONE", "TWO")

    monkeypatch.setattr(icechunk.Session, "commit", lossy)
    version = put(repository, 1)
    assert at(repository, version) == [1]
    assert at(repository, repository.tip()) == [1, 2]


def test_a_commit_that_fails_and_left_nothing(
    repository: StoreRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commit(session: icechunk.Session, message: str, **kwargs: object) -> str:
        raise icechunk.IcechunkError("  x disk is full")

    monkeypatch.setattr(icechunk.Session, "commit", commit)
    with pytest.raises(StoreError, match=r"zoo: cannot commit: disk is full$"):
        put(repository, 1)


def test_a_failure_that_cannot_be_looked_into_says_so(
    repository: StoreRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commit(session: icechunk.Session, message: str, **kwargs: object) -> str:
        monkeypatch.setattr(icechunk.Repository, "ancestry", ancestry)
        raise icechunk.IcechunkError("  x connection reset")

    def ancestry(self: object, **kwargs: object) -> None:
        raise icechunk.IcechunkError("  x no route")

    monkeypatch.setattr(icechunk.Session, "commit", commit)
    with pytest.raises(StoreError, match="whether the commit succeeded is unknown: connection"):
        put(repository, 1)


def test_an_acknowledged_commit_that_vanished_is_an_error(
    repository: StoreRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = icechunk.Session.commit

    def overwritten(session: icechunk.Session, message: str, **kwargs: object) -> str:
        version = commit(session, message, **kwargs)
        repository._repository.reset_branch("main", first)
        return version

    first = repository.tip()
    monkeypatch.setattr(icechunk.Session, "commit", overwritten)
    with pytest.raises(StoreError, match="not in the history: the server does not honour"):
        put(repository, 1)


def test_refusals_that_nobody_explains_end(
    repository: StoreRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commit(session: icechunk.Session, message: str, **kwargs: object) -> str:
        raise icechunk.ConflictError("ONE", "TWO")

    monkeypatch.setattr(icechunk.Session, "commit", commit)
    with pytest.raises(StoreError, match="refused 5 times as too late though"):
        put(repository, 1)


def test_history_can_be_cut(repository: StoreRepository) -> None:
    versions = [repository.tip(), *(put(repository, n) for n in range(3))]
    full = repository.history(versions[-1])
    assert [entry.id for entry in full] == versions[::-1]
    for limit in range(6):
        assert repository.history(versions[-1], limit=limit) == full[:limit]


def test_tags_name_versions_for_ever(repository: StoreRepository) -> None:
    first, second = put(repository, 1), put(repository, 2)
    repository.tag("v1", first)
    repository.tag("v1", first)  # as after a lost answer
    with pytest.raises(StoreError, match=f'tag "v1" already names version {first}'):
        repository.tag("v1", second)
    with pytest.raises(UnknownVersionError, match="no version 1CECHNKREP0F1RSTCMT0"):
        repository.tag("v2", "1CECHNKREP0F1RSTCMT0")  # Icechunk's own
    repository.delete_tag("v1")
    assert repository.tags() == {}
    with pytest.raises(StoreError, match='tag "v1" already was deleted; tags never move'):
        repository.tag("v1", second)
    with pytest.raises(UnknownVersionError, match='no tag "v1"; tags are: none'):
        repository.delete_tag("v1")


def test_expiry_keeps_the_newest_and_the_tagged(repository: StoreRepository) -> None:
    versions = [repository.tip(), *(put(repository, n) for n in range(3))]
    repository.tag("keep", versions[1])
    cutoff = now()
    newest = [put(repository, 3), put(repository, 4)]

    assert repository.expire(cutoff) == sorted({versions[0], versions[2], versions[3]})
    assert [v.id for v in repository.history(newest[1])] == newest[::-1]
    assert repository.history(newest[1])[-1].parent is None
    assert [v.id for v in repository.history(versions[1])] == [versions[1]]
    for known in ("keep", versions[1], versions[1][:8].lower()):
        assert repository.resolve(known) == versions[1]
    with pytest.raises(UnknownVersionError, match="no version's id begins so"):
        repository.resolve(versions[2])
    with pytest.raises(UnknownVersionError):
        repository.tag("late", versions[2])
    assert at(repository, versions[2]) == [0, 1]  # until it is collected

    assert repository.collect_garbage().objects > 0
    for version, content in ((versions[1], [0]), (newest[1], [0, 1, 2, 3, 4])):
        assert at(StoreRepository.open(repository.path), version) == content
    with pytest.raises(icechunk.IcechunkError):
        StoreRepository.open(repository.path).read(versions[2])
    assert repository.collect_garbage() == NOTHING


def test_expiry_of_everything_keeps_the_newest(repository: StoreRepository) -> None:
    versions = [repository.tip(), put(repository, 1), put(repository, 2)]
    stale = StoreRepository.open(repository.path)
    stale.history(versions[2])
    assert repository.expire(now() + timedelta(days=1)) == sorted(versions[:2])
    for again in (repository, stale):
        assert again.expire(now() + timedelta(days=1)) == []
    assert [v.id for v in repository.history(versions[2])] == versions[2:]
    third = put(stale, 3)
    assert at(repository, third) == [1, 2, 3]
    assert [v.id for v in StoreRepository.open(repository.path).history(third)] == [
        third,
        versions[2],
    ]


def test_collection_reclaims_exactly_what_failed_commits_left(repository: StoreRepository) -> None:
    versions = [put(repository, 1), put(repository, 2)]
    before = files(repository)
    content = [at(repository, version) for version in versions]

    def write(root: zarr.Group, version: str) -> None:
        array = root.create_array("big", shape=(4, 1000), chunks=(1, 1000), dtype="float64")
        array[...] = np.random.default_rng(0).random((4, 1000))
        raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        repository.transact(write, "m")
    left = files(repository) - before
    assert repository.collect_garbage(older_than=now() - timedelta(hours=1)) == NOTHING
    report = repository.collect_garbage()
    assert (report.objects, report.bytes > 4000) == (len(left), True)
    assert files(repository) == before
    assert [at(repository, version) for version in versions] == content
    assert repository.collect_garbage() == NOTHING


def test_collection_waits_for_writers(repository: StoreRepository) -> None:
    with ThreadPoolExecutor(1) as pool:
        collection = []

        def write(root: zarr.Group, version: str) -> None:
            writers.append(root, 5)
            other = StoreRepository.open(repository.path)
            collection.append(pool.submit(other.collect_garbage))
            with pytest.raises(TimeoutError):
                collection[0].result(timeout=0.2)

        version, _ = repository.transact(write, "m")
        assert collection[0].result(timeout=60) == NOTHING
    assert at(repository, version) == [5]


def test_collection_sweeps_what_killed_processes_left(repository: StoreRepository) -> None:
    put(repository, 1)
    before = files(repository)
    unfinished = [repository.path / "chunks" / "0123#1", repository.path / "refs" / "ref.json#12"]
    partial = repository.path.parent / f".zoo.{'0a' * 16}.partial"
    (partial / "snapshots").mkdir(parents=True)
    (repository.path / "chunks").mkdir(exist_ok=True)
    for path in (*unfinished, partial / "snapshots" / "1"):
        path.write_bytes(b"12345")
    mine = [
        repository.path.parent / f".zoo2.{'0a' * 16}.partial",
        repository.path.parent / ".zoo.partial",
        repository.path / "note#1",
    ]
    for path in mine:
        path.write_text("mine")

    assert repository.collect_garbage(older_than=now() - timedelta(hours=1)) == NOTHING
    assert repository.collect_garbage() == GarbageReport(objects=3, bytes=15)
    assert not partial.exists()
    assert files(repository) == {*before, mine[2]}
    assert all(path.exists() for path in mine)


def test_collection_stops_at_a_damaged_tag(repository: StoreRepository) -> None:
    tagged = put(repository, 1)
    repository.tag("keep", tagged)
    put(repository, 2)
    repository.expire(now())
    file = repository.path / "refs" / "tag.keep" / "ref.json"
    text = file.read_bytes()
    file.write_bytes(b"\0" + text[1:])
    with pytest.raises(StoreError, match=r'tag "keep" cannot be read.*ref\.json'):
        StoreRepository.open(repository.path).collect_garbage()
    file.write_bytes(text)
    repository.delete_tag("keep")  # a deleted tag is not a damaged one
    repository.collect_garbage()
    with pytest.raises(icechunk.IcechunkError):
        StoreRepository.open(repository.path).read(tagged)


@pytest.mark.parametrize("lost", ["snapshots", "manifests"])
def test_collection_deletes_nothing_when_it_cannot_read(
    repository: StoreRepository, lost: str
) -> None:
    versions = [put(repository, 1), put(repository, 2)]
    victim = repository.path / "snapshots" / versions[0]
    if lost == "manifests":
        victim = min((repository.path / lost).iterdir())
    victim.unlink()
    before = files(repository)
    with pytest.raises(StoreError, match="zoo: cannot collect garbage: "):
        StoreRepository.open(repository.path).collect_garbage()
    assert files(repository) == before


@pytest.mark.parametrize("method", ["expire", "collect_garbage"])
def test_times_have_zones(repository: StoreRepository, method: str) -> None:
    moment = datetime(2020, 1, 1)  # noqa: DTZ001 - the point
    calls: dict[str, Callable[[], object]] = {
        "expire": lambda: repository.expire(moment),
        "collect_garbage": lambda: repository.collect_garbage(older_than=moment),
    }
    with pytest.raises(ConfigError, match="2020-01-01T00:00:00, expected a time with a time zone"):
        calls[method]()


def test_a_store_that_cannot_be_locked(repository: StoreRepository) -> None:
    (repository.path / "unmerge.lock").mkdir()
    with pytest.raises(StoreError, match="zoo: cannot lock the store: "):
        put(StoreRepository.open(repository.path), 1)


def test_an_open_does_not_write(repository: StoreRepository) -> None:
    before = {path: path.stat().st_mtime_ns for path in files(repository)}
    repository.history(StoreRepository.open(os.fspath(repository.path)).tip())
    assert {path: path.stat().st_mtime_ns for path in files(repository)} == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "IcechunkError"),
        ("  x it broke\n  | \n  | context:\n  |    0: a::b\n", "it broke"),
        ("  x it broke\n  |-> a\n  `-> it broke", "it broke"),
        ("  x it broke\n  |-> a\n  `-> host not found", "it broke: host not found"),
        (
            '  x it broke\n  `-> Error { code: "NoSuchBucket", message: "No bucket.", id:\n    "1"',
            "No bucket (NoSuchBucket)",
        ),
        (
            "  x it broke\n  |-> the credential provider was off\n  `-> no providers in chain",
            (
                "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_PROFILE, or AWS_SKIP_SIGNATURE=true for a public bucket"
            ),
        ),
        ("  x no file /credentials/zoo", "no file /credentials/zoo"),
    ],
)
def test_reasons_are_one_line(text: str, expected: str) -> None:
    assert reason(icechunk.IcechunkError(text)) == expected
