"""Collection gives back the space of what nobody needs, and changes no bit of what is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from filelock import FileLock, Timeout
from safetensors.torch import save_file

from assorted import KINDS, assorted, contents
from unmerge.errors import (
    AdapterExistsError,
    AdapterNotInStoreError,
    ConfigError,
    IncompatibleAdaptersError,
    StoreError,
    UnknownVersionError,
)
from unmerge.store import AdapterStore, DeadSpace, GcReport
from unmerge.store import compact as compact_module
from unmerge.store.repository import StoreRepository
from unmerge.store.view import StoreView

PATH = "layers.0.q_proj"
TABLE = f"modules/{PATH}/A-r2-float32"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NOTHING = DeadSpace(rows=0, records=0, verbatim=0, nbytes=0)


def now() -> datetime:
    return datetime.now(UTC)


def view(store: AdapterStore) -> StoreView:
    return StoreView(StoreRepository.open(store.address), store.version)


def size(store: AdapterStore) -> int:
    return sum(path.stat().st_size for path in Path(store.address).rglob("*") if path.is_file())


def files(store: AdapterStore) -> dict[Path, bytes]:
    found = (path for path in Path(store.address).rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in found}


@pytest.fixture
def mixed(store: AdapterStore) -> AdapterStore:
    """Six adapters of every kind and dtype, three with heads, in several segments."""
    for seed in range(6):
        dtype = DTYPES[seed % 3]
        rank = 3 if seed % 3 == 1 else 2
        store.add(assorted(f"a{seed}", seed=seed, dtype=dtype, rank=rank, head=seed % 2 == 0))
        if seed % 3 == 0:
            store.commit(f"up to {seed}")
    store.commit("all")
    return store


def test_a_tag_keeps_every_bit_that_the_newest_version_loses(mixed: AdapterStore) -> None:
    tagged = contents(mixed)
    mixed.tag("v1")
    first = mixed.history()[-2].id
    for name in ("a0", "a3", "a4"):
        mixed.remove(name)
    mixed.add(assorted("a1", seed=99, rank=4, head=True), replace=True)
    mixed.annotate("a2", note="still here")
    middle = mixed.commit("less")
    newest = contents(mixed)

    report = mixed.gc(forget_before=now())
    assert report.compacted == mixed.version
    assert report.dropped.rows == 4 * 2 * len(KINDS)
    assert report.dropped.records == 5
    assert report.dropped.verbatim == 2
    assert {first, middle} <= set(report.forgotten)
    assert report.objects > 0
    for store in (mixed, AdapterStore.open(mixed.address)):
        assert contents(store) == newest
        assert contents(store.checkout("v1")) == tagged
        assert store.verify().dead == NOTHING
        assert store.verify().ok
        assert store.checkout("v1").verify().ok
        assert store.info("a2").note == "still here"
        assert [version.id for version in store.history()] == [report.compacted]
        assert store.history()[0].message == "gc: without what no adapter uses"
        assert store.diff("v1").removed == ("a0", "a3", "a4")
        for forgotten in report.forgotten:
            with pytest.raises(UnknownVersionError):
                store.resolve(forgotten)


def test_what_is_kept_is_that_of_a_store_that_never_had_more(
    store: AdapterStore, tmp_path: Path
) -> None:
    for seed in range(12):
        store.add(assorted(f"a{seed:02}", seed=seed, dtype=DTYPES[seed % 3], head=True))
    store.commit("twelve")
    for seed in (0, 5, 6, 11):
        store.remove(f"a{seed:02}")
    store.commit("eight")
    before = size(store)
    report = store.gc(forget_before=now())
    assert (report.size_before, report.size_after) == (before, size(store))
    other = AdapterStore.create(tmp_path / "other")
    for name in store.names():
        other.add(store.read_adapter(name))
    other.commit("eight")
    other.gc(forget_before=now())
    found, expected = view(store), view(other)
    assert found.index.tables == expected.index.tables
    assert found.index.layers == expected.index.layers
    assert found.index.records == expected.index.records == [8]
    assert {n: r.modules for n, r in found.records.items()} == {
        n: r.modules for n, r in expected.records.items()
    }
    assert abs(size(store) - size(other)) < 0.05 * size(other)
    assert size(store) < 0.8 * before


def test_versions_stay_where_nothing_is_forgotten(mixed: AdapterStore) -> None:
    """Alone, collection deletes what killed writers left, and nothing else."""
    mixed.remove("a0")
    mixed.commit("less")
    versions = mixed.history()
    before = files(mixed)
    (Path(mixed.address) / "chunks" / "000000000000000000G0").write_bytes(bytes(77))
    report = mixed.gc()
    assert report == GcReport(
        forgotten=(),
        compacted=None,
        dropped=NOTHING,
        objects=1,
        nbytes=77,
        size_before=size(mixed) + 77,
        size_after=size(mixed),
        dry_run=False,
    )
    assert files(mixed) == before
    assert mixed.history() == versions


def test_nothing_is_rewritten_where_nothing_is_dead(mixed: AdapterStore) -> None:
    tip, moment = mixed.version, now()
    foreseen = mixed.gc(forget_before=moment, dry_run=True)
    report = mixed.gc(forget_before=moment)
    assert (report.compacted, report.dropped, mixed.version) == (None, NOTHING, tip)
    assert report.forgotten == foreseen.forgotten
    assert len(report.forgotten) == 3  # created, and two of three imports
    before = files(mixed)
    again = mixed.gc(forget_before=now())
    assert (again.forgotten, again.compacted, again.objects) == ((), None, 0)
    assert files(mixed) == before


def test_only_what_has_something_dead_in_it_is_rewritten(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unmerge.store.segments.rows_per_chunk", lambda shape, itemsize: 2)
    for first in (0, 4, 8):
        for seed in range(first, first + 4):
            store.add(assorted(f"a{seed:02}", seed=seed, modules=(PATH,)))
        store.commit("four")
    store.add(assorted("other", seed=12, modules=("tokens",)))
    store.commit("another")
    expected = contents(store)
    assert view(store).index.tables[TABLE] == [4, 4, 4]
    for name in ("a05", "a06", "a10"):
        store.remove(name)
        del expected[name]
    store.commit("less")
    written: list[str] = []
    real: Callable[..., None] = compact_module.write_rows

    def write_rows(root: zarr.Group, path: str, *rest: Any) -> None:
        written.append(path)
        real(root, path, *rest)

    monkeypatch.setattr(compact_module, "write_rows", write_rows)
    steps: list[tuple[int, int]] = []
    store.gc(forget_before=now(), progress=lambda *step: steps.append(step))
    # The first segment has none; what is behind it becomes one.
    assert written == [f"{TABLE}.4", f"{TABLE.replace('A-r', 'B-r')}.4"]
    assert view(store).index.tables[TABLE] == [4, 5]
    assert view(store).records["a11"].modules[PATH].A.row == 8
    assert contents(store) == expected
    assert steps == [(n, 4) for n in range(1, 5)]
    # Rows that come later go behind them.
    store.add(assorted("later", seed=5, modules=(PATH,)))
    store.commit("later")
    assert contents(store).keys() == {*expected, "later"}
    assert store.verify().ok


def test_rows_are_rewritten_chunk_by_chunk(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So memory holds a few chunks, whatever the number of adapters."""
    monkeypatch.setattr("unmerge.store.segments.rows_per_chunk", lambda shape, itemsize: 3)
    for seed in range(12):
        store.add(assorted(f"a{seed:02}", seed=seed, modules=(PATH,)))
    store.commit("twelve")
    for seed in range(0, 12, 4):
        store.remove(f"a{seed:02}")
    store.commit("nine")
    expected = contents(store)
    reads: list[list[int]] = []
    real: Callable[..., Any] = compact_module.read_rows

    def read_rows(*arguments: Any) -> Iterator[Any]:
        reads.append(arguments[-1])
        return iter(real(*arguments))

    monkeypatch.setattr(compact_module, "read_rows", read_rows)
    store.gc(forget_before=now())
    assert reads == 2 * [[1, 2], [3, 5], [6, 7], [9, 10, 11]]
    assert contents(store) == expected


def test_modules_and_layers_that_are_gone(store: AdapterStore) -> None:
    store.add(assorted("a", seed=1, modules=("conv", PATH)))
    store.add(assorted("b", seed=2, modules=(PATH,)))
    store.commit("both")
    other = assorted("c", seed=3, modules=("conv",))
    factors = other.modules["conv"]
    other = type(other)("c", {"conv": type(factors)(factors.A, factors.B, 1.0)})  # linear
    store.remove("a")
    store.commit("less")
    with pytest.raises(IncompatibleAdaptersError):
        store.add(other)
    store.gc(forget_before=now())
    assert list(view(store).index.layers) == [PATH]
    root = StoreRepository.open(store.address).read(store.version)
    assert sorted(root["modules"].keys()) == [PATH]
    store.add(other)
    store.commit("another base model's, in truth")
    assert store.modules() == {"conv": (7, 45), PATH: (7, 5)}


def test_a_store_that_is_emptied(mixed: AdapterStore) -> None:
    for name in mixed.names():
        mixed.remove(name)
    mixed.commit("none")
    report = mixed.gc(forget_before=now())
    assert report.dropped.rows == 6 * 2 * len(KINDS)
    assert mixed.names() == ()
    index = view(mixed).index
    assert (index.tables, index.layers, index.records) == ({}, {}, [])
    assert mixed.verify().dead == NOTHING
    assert not list((Path(mixed.address) / "chunks").iterdir())
    mixed.add(assorted("a", seed=1, head=True))
    mixed.commit("again")
    assert contents(AdapterStore.open(mixed.address)).keys() == {"a"}


def test_old_notes_alone(mixed: AdapterStore) -> None:
    expected = contents(mixed)
    mixed.annotate("a3", note="n", metadata={"k": "v"})
    mixed.commit("noted")
    tables = view(mixed).index.tables
    report = mixed.gc(forget_before=now())
    assert report.dropped == DeadSpace(rows=0, records=1, verbatim=0, nbytes=0)
    assert view(mixed).index.tables == tables
    assert (mixed.info("a3").note, mixed.info("a3").metadata) == ("n", {"k": "v"})
    assert contents(mixed) == expected


def test_a_head_that_another_adapter_has(store: AdapterStore) -> None:
    first = assorted("a", seed=1, modules=(PATH,), head=True)
    second = assorted("b", seed=2, modules=("tokens",))
    store.add(first)
    store.add(type(second)("b", second.modules, verbatim=first.verbatim))
    store.commit("both")
    store.remove("a")
    store.commit("less")
    expected = contents(store)
    assert store.gc(forget_before=now()).dropped.verbatim == 0
    assert contents(store) == expected


class TestWhereTheNewestVersionIsKept:
    """A version without what is dead takes more space then, until that one is forgotten."""

    @pytest.fixture
    def hour(self) -> datetime:
        """An hour ago: all versions are younger."""
        return now() - timedelta(hours=1)

    def test_little_is_dead(self, mixed: AdapterStore, hour: datetime) -> None:
        mixed.remove("a1")
        mixed.commit("less")
        before = files(mixed)
        report = mixed.gc(forget_before=hour)
        assert (report.compacted, report.dropped, report.forgotten) == (None, NOTHING, ())
        assert files(mixed) == before

    def test_most_is_dead(self, mixed: AdapterStore, hour: datetime) -> None:
        for name in mixed.names()[2:]:
            mixed.remove(name)
        mixed.commit("less")
        report = mixed.gc(forget_before=hour)
        assert report.compacted == mixed.version
        assert report.forgotten == ()
        assert mixed.verify().dead == NOTHING
        assert mixed.gc(forget_before=hour).compacted is None

    def test_it_has_a_tag(self, mixed: AdapterStore) -> None:
        mixed.remove("a0")
        mixed.commit("less")
        mixed.tag("v2")
        tip = mixed.version
        report = mixed.gc(forget_before=now())
        assert (report.compacted, mixed.version) == (None, tip)
        assert tip not in report.forgotten


def test_damage_is_not_made_permanent(store: AdapterStore) -> None:
    for seed in range(4):
        store.add(assorted(f"a{seed}", seed=seed, modules=(PATH,)))
    store.commit("four")
    store.remove("a0")
    store.commit("less")
    session = (repository := StoreRepository.open(store.address)).session()
    array: Any = repository.root(session)[f"{TABLE}.0"]
    array[2:3] = array[2:3] * 3 + 1
    session.commit("tampered")
    before = files(store)
    with pytest.raises(StoreError, match=rf'{PATH}: factor A .* "a2": .* CRC-32 .* remove the ada'):
        store.gc(forget_before=now())
    versions = [path for path in before if path.parent.name in ("snapshots", "branch.main")]
    assert {path: path.read_bytes() for path in versions} == {
        path: before[path] for path in versions
    }
    damaged = AdapterStore.open(store.address)
    damaged.remove("a2")
    damaged.commit("without it")
    assert damaged.gc(forget_before=now()).compacted is not None
    assert damaged.verify().ok


def test_nothing_is_forgotten_where_a_tag_is_damaged(mixed: AdapterStore) -> None:
    mixed.tag("v1")
    mixed.remove("a0")
    mixed.commit("less")
    file = Path(mixed.address) / "refs" / "tag.v1" / "ref.json"
    file.write_bytes(file.read_bytes()[:-3])
    before = files(mixed)
    with pytest.raises(StoreError, match='tag "v1" cannot be read'):
        mixed.gc(forget_before=now())
    with pytest.raises(StoreError, match='tag "v1" cannot be read'):
        StoreRepository.open(mixed.address).expire(now())
    assert files(mixed) == before


def test_what_would_be_done(mixed: AdapterStore) -> None:
    mixed.tag("v1", mixed.history()[-1].id)
    mixed.remove("a0")
    mixed.commit("less")
    before, moment = files(mixed), now()
    foreseen = mixed.gc(forget_before=moment, dry_run=True)
    assert foreseen.dry_run
    assert (foreseen.objects, foreseen.nbytes, foreseen.compacted) == (0, 0, None)
    assert foreseen.size_before == foreseen.size_after == size(mixed)
    assert files(mixed) == before
    assert mixed.gc(dry_run=True).forgotten == ()
    done = mixed.gc(forget_before=moment)
    assert (done.forgotten, done.dropped) == (foreseen.forgotten, foreseen.dropped)
    assert len(done.forgotten) == 5 - 1
    # And where the newest stays as it is.
    later = now()
    mixed.annotate("a1", note="n")
    mixed.commit("noted")
    assert mixed.gc(forget_before=later, dry_run=True).forgotten == (done.compacted,)
    assert mixed.gc(forget_before=later).forgotten == (done.compacted,)


def test_what_is_staged_stays_staged(mixed: AdapterStore) -> None:
    mixed.remove("a0")
    mixed.commit("less")
    mixed.add(assorted("new", seed=77, head=True))
    mixed.annotate("a1", note="n")
    mixed.gc(forget_before=now())
    assert mixed.staged == ("a1", "new")
    mixed.commit("more")
    again = AdapterStore.open(mixed.address)
    assert contents(again)["new"] == contents(mixed)["new"]
    assert again.info("a1").note == "n"
    assert again.verify().ok


def test_what_is_staged_is_checked_against_the_version_that_gc_moves_to(
    store: AdapterStore,
) -> None:
    stale = AdapterStore.open(store.address)
    mine = assorted("a0", seed=1)
    stale.add(mine)
    store.add(assorted("a0", seed=2))
    version = store.commit("theirs")
    stale.gc(forget_before=now() - timedelta(days=1))
    with pytest.raises(AdapterExistsError, match="a0"):
        stale.commit("mine")
    assert AdapterStore.open(store.address).version == version
    assert stale.staged == ("a0",)


def test_a_store_that_reads_an_old_version(mixed: AdapterStore) -> None:
    """It moves to the newest: its own may be gone."""
    other = AdapterStore.open(mixed.address)
    mixed.remove("a0")
    mixed.commit("less")
    other.gc(forget_before=now())
    with pytest.raises(AdapterNotInStoreError):
        other.info("a0")
    with pytest.raises(StoreError, match="read-only"):
        mixed.checkout(other.version).gc()


@pytest.mark.parametrize("name", ["forget_before", "older_than"])
def test_times_have_zones(mixed: AdapterStore, name: str) -> None:
    mixed.remove("a0")
    mixed.commit("less")
    before = files(mixed)
    options: dict[str, Any] = {"forget_before": now(), name: datetime(2020, 1, 1)}  # noqa: DTZ001
    with pytest.raises(ConfigError, match=rf"{name} is 2020-01-01T00:00:00, expected .* time zone"):
        mixed.gc(**options)
    assert files(mixed) == before


def test_young_objects_can_be_kept(mixed: AdapterStore) -> None:
    mixed.remove("a0")
    mixed.commit("less")
    chunks = set((Path(mixed.address) / "chunks").iterdir())
    report = mixed.gc(forget_before=now(), older_than=now() - timedelta(hours=1))
    assert report.forgotten
    assert report.objects == 0
    assert chunks <= set((Path(mixed.address) / "chunks").iterdir())


def test_writers_wait_and_lose_nothing(mixed: AdapterStore) -> None:
    """A commit that stands on a version which is about to be forgotten."""
    other = AdapterStore.open(mixed.address)
    other.add(assorted("new", seed=50))
    other.remove("a2")
    mixed.remove("a0")
    mixed.commit("less")
    waiting = threading.Thread(target=other.commit, args=("meanwhile",))

    def step(done: int, total: int) -> None:
        if done == 1:
            waiting.start()

    report = mixed.gc(forget_before=now(), progress=step)
    waiting.join()
    assert [v.message for v in other.history()] == ["meanwhile", "gc: without what no adapter uses"]
    assert other.history()[1].id == report.compacted
    assert set(other.names()) == {*mixed.names(), "new"} - {"a2"}
    assert other.verify().ok


def test_no_writer_comes_in_between(mixed: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this machine: what is compacted is what is collected, and sizes are those of a whole."""
    expire = StoreRepository.expire

    def locked(self: StoreRepository, older_than: datetime) -> list[str]:
        with pytest.raises(Timeout):
            FileLock(Path(mixed.address) / "unmerge.lock", timeout=0).acquire()
        return expire(self, older_than)

    monkeypatch.setattr(StoreRepository, "expire", locked)
    assert mixed.gc(forget_before=now()).forgotten


def test_on_s3_a_race_is_run_again(s3_address: str) -> None:
    store = AdapterStore.create(s3_address)
    for seed in range(3):
        store.add(assorted(f"a{seed}", seed=seed, head=True))
    store.commit("three")
    store.tag("v1")
    tagged = contents(store)
    store.remove("a0")
    store.commit("two")
    other = AdapterStore.open(s3_address)
    other.remove("a1")
    other.add(assorted("a3", seed=3))
    tries = []

    def step(done: int, total: int) -> None:
        tries.append(done)
        if len(tries) == 1:
            other.commit("faster")

    with pytest.raises(ConfigError, match="expected at least 24 hours ago"):
        store.gc(forget_before=now(), older_than=now())
    report = store.gc(forget_before=now(), progress=step)
    assert tries.count(1) == 2
    assert (report.objects, report.size_before) == (0, None)  # all of it is younger than a day
    assert store.names() == ("a2", "a3")
    # That of the other writer is younger than what was to be forgotten.
    assert [v.message for v in store.history()] == ["gc: without what no adapter uses", "faster"]
    assert store.version == report.compacted
    collected = store.gc(older_than=now() + timedelta(minutes=1), force=True)
    assert collected.objects > 0
    again = AdapterStore.open(s3_address)
    assert contents(again) == {"a2": tagged["a2"], "a3": contents(other)["a3"]}
    assert contents(again.checkout("v1")) == tagged
    assert again.verify().dead == NOTHING


def test_linked_adapters(store: AdapterStore, tmp_path: Path) -> None:
    """Their factors lie in files of their own: nothing of them is rewritten."""
    for seed, name in enumerate(("linked", "gone", "copied", "removed")):
        adapter = assorted(name, seed=seed, head=True)
        file = tmp_path / f"{name}.safetensors"
        save_file(
            {f"{p}.{x}": getattr(f, x) for p, f in adapter.modules.items() for x in "AB"}, file
        )
        store.add(adapter, link=[file] if name in ("linked", "gone") else None)
    store.commit("four")
    store.tag("v1")
    tagged = contents(store)
    for name in ("gone", "removed"):
        store.remove(name)
    store.commit("two")
    (tmp_path / "gone.safetensors").rename(tmp_path / "kept.safetensors")
    assert store.verify().ok
    report = store.gc(forget_before=now())
    assert report.dropped.rows == 2 * len(KINDS)  # of the copied one: a reference takes no space
    assert contents(store) == {name: tagged[name] for name in ("copied", "linked")}
    assert store.verify().ok
    store.remove("linked")
    store.commit("one")
    store.gc(forget_before=now())
    assert not [path for path in view(store).index.tables if "linked" in path]
    assert contents(store) == {"copied": tagged["copied"]}
    (tmp_path / "kept.safetensors").rename(tmp_path / "gone.safetensors")
    assert contents(store.checkout("v1")) == tagged
