"""Versions, tags and writers: what is committed stays, and nobody's commit is lost."""

from __future__ import annotations

import errno
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import Timeout

from unmerge.errors import (
    AdapterError,
    AdapterExistsError,
    AdapterNotInStoreError,
    DuplicateAdapterError,
    IncompatibleAdaptersError,
    StoreError,
    UnknownVersionError,
)
from unmerge.store import AdapterStore
from unmerge.store.repository import StoreRepository


def test_history_is_newest_first_with_tags(store: AdapterStore, kit: SimpleNamespace) -> None:
    empty = store.version
    store.add(kit.make("a"))
    first = store.commit("first")
    store.tag("v1")
    store.add(kit.make("b"))
    second = store.commit("second")
    store.tag("latest")
    store.tag("other", first)

    newest, middle, oldest = store.history()
    assert (newest.id, newest.parent, newest.message) == (second, first, "second")
    assert (middle.id, middle.parent, middle.message) == (first, empty, "first")
    assert (oldest.id, oldest.parent) == (empty, None)
    assert newest.tags == ("latest",)
    assert middle.tags == ("other", "v1")
    assert abs(datetime.now(UTC) - newest.written_at) < timedelta(minutes=5)
    assert store.tags() == {"latest": second, "other": first, "v1": first}
    assert store.version == second


def test_an_old_version_still_reads_the_old_set(store: AdapterStore, kit: SimpleNamespace) -> None:
    store.add(kit.make("a"))
    first = store.commit("first")
    store.tag("v1")
    before = kit.content(store.read_adapter("a"))
    for name in "bcd":
        store.add(kit.make(name))
        store.commit(name)

    for at in (first, first[:8], first[:6].lower(), "v1"):
        old = AdapterStore.open(store.address, at=at)
        assert (old.version, old.read_only, old.names()) == (first, True, ("a",))
        assert [n for n, _ in old.read_module("layers.0.q_proj")] == ["a"]
        assert kit.content(old.read_adapter("a")) == before
        assert [v.message for v in old.history()] == ["first", "create store"]
    assert store.names() == ("a", "b", "c", "d")
    assert not store.read_only


def test_a_store_opened_at_a_version_writes_nothing(
    filled: AdapterStore, kit: SimpleNamespace
) -> None:
    old = AdapterStore.open(filled.address, at=filled.version)
    for write in (
        lambda: old.add(kit.make("new")),
        lambda: old.commit("m"),
        lambda: old.tag("t"),
    ):
        with pytest.raises(StoreError, match="read-only"):
            write()
    assert kit.state(Path(filled.address)) == (filled.version, filled.names())
    assert filled.tags() == {}


@pytest.mark.parametrize(
    ("version", "reason"),
    [("ABCDEF", "no version's id"), ("AB", "at least 6"), ("", "at least 6"), ("v9", "at least")],
)
def test_unknown_versions(filled: AdapterStore, version: str, reason: str) -> None:
    with pytest.raises(UnknownVersionError, match=reason):
        filled.resolve(version)
    with pytest.raises(UnknownVersionError, match=reason):
        AdapterStore.open(filled.address, at=version)
    with pytest.raises(UnknownVersionError, match=reason):
        filled.tag("t", version)
    assert filled.tags() == {}


def test_tags_never_move(filled: AdapterStore, kit: SimpleNamespace) -> None:
    first = filled.version
    filled.tag("v1")
    filled.add(kit.make("new"))
    filled.commit("more")
    with pytest.raises(StoreError, match=f'"v1" already names version {first}'):
        filled.tag("v1")
    for bad in ("", "a/b", "../x", " "):
        with pytest.raises(StoreError, match="not allowed"):
            filled.tag(bad)
    assert filled.tags() == {"v1": first}


def test_two_stores_interleave(store: AdapterStore, kit: SimpleNamespace) -> None:
    other = AdapterStore.open(store.address)
    store.add(kit.make("a"))
    other.add(kit.make("b"))
    store.commit("a")
    assert other.names() == ()  # it reads the version it was opened at
    other.commit("b")
    assert other.names() == ("a", "b")
    assert store.names() == ("a",)
    store.add(kit.make("c"))
    store.commit("c")
    assert store.names() == ("a", "b", "c")
    for name in "abc":
        assert kit.content(store.read_adapter(name)) == kit.content(kit.make(name))
    assert [v.message for v in store.history()] == ["c", "b", "a", "create store"]


def test_a_name_taken_meanwhile_is_found_at_commit(
    store: AdapterStore, kit: SimpleNamespace
) -> None:
    other = AdapterStore.open(store.address)
    store.add(kit.make("a"))
    other.add(kit.make("a", rank=3))
    other.add(kit.make("b"))
    version = store.commit("a")
    with pytest.raises(AdapterExistsError, match=r'already has an adapter "a".*--name'):
        other.commit("b")
    assert other.staged == ("a", "b")
    assert kit.state(Path(store.address)) == (version, ("a",))
    other.discard()
    other.add(kit.make("b"))
    other.commit("b")
    assert other.names() == ("a", "b")


def test_what_others_noted_meanwhile_stays(filled: AdapterStore) -> None:
    other = AdapterStore.open(filled.address)
    other.annotate("sql", note="mine")
    filled.annotate("sql", metadata={"team": "theirs"})
    filled.commit("metadata")
    other.commit("note")
    assert (other.info("sql").note, other.info("sql").metadata) == ("mine", {"team": "theirs"})


@pytest.mark.parametrize("change", [{"note": "x"}, {"metadata": {"team": "x"}}])
def test_a_note_changed_by_others_meanwhile_is_not_overwritten(
    filled: AdapterStore, change: dict[str, Any]
) -> None:
    other = AdapterStore.open(filled.address)
    same = AdapterStore.open(filled.address)
    other.annotate("sql", note="mine", metadata={"owner": "mine"})
    same.annotate("sql", **change)
    filled.annotate("sql", **change)
    version = filled.commit("theirs")
    with pytest.raises(StoreError, match=f'changed the {next(iter(change))} of adapter "sql"'):
        other.commit("mine")
    assert other.staged == ("sql",)
    assert AdapterStore.open(filled.address).version == version
    same.commit("the same")
    assert same.info("sql") == filled.info("sql")


@pytest.mark.parametrize("change", [{"d_in": 7}, {"d_out": 7}, {"base_model": "org/other"}])
def test_what_does_not_fit_what_came_meanwhile(
    store: AdapterStore, kit: SimpleNamespace, change: dict[str, object]
) -> None:
    other = AdapterStore.open(store.address)
    other.add(kit.make("b", **change))
    store.add(kit.make("a", base_model="org/base"))
    version = store.commit("a")
    with pytest.raises(IncompatibleAdaptersError):
        other.commit("b")
    assert other.staged == ("b",)
    assert kit.state(Path(store.address)) == (version, ("a",))


def test_the_first_named_base_model_is_adopted(store: AdapterStore, kit: SimpleNamespace) -> None:
    assert (store.base_model, store.revision) == (None, None)
    store.add(kit.make("z"))
    store.add(kit.make("y", base_model="org/base", revision="abc"))
    store.add(kit.make("x", base_model="org/base"))
    assert store.base_model is None
    store.commit("")
    assert (store.base_model, store.revision) == ("org/base", "abc")
    assert AdapterStore.open(store.address).base_model == "org/base"
    assert store.info("z").base_model is None


@pytest.mark.parametrize("one_by_one", [True, False])
def test_the_first_named_revision_is_adopted(
    tmp_path: Path, kit: SimpleNamespace, one_by_one: bool
) -> None:
    store = AdapterStore.create(tmp_path / "zoo", base_model="org/base")
    for name, base, revision in (("x", None, "9"), ("y", "org/base", None), ("z", "org/base", "1")):
        store.add(kit.make(name, base_model=base, revision=revision))
        if one_by_one:
            store.commit(name)
    other = kit.make("other", base_model="org/base", revision="2")
    with pytest.raises(IncompatibleAdaptersError, match=r'revision "2".*"1"'):
        store.add(other)
    if not one_by_one:
        store.commit("all")
    assert store.revision == "1"


def test_a_full_disk_while_staging(
    filled: AdapterStore, kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    filled.add(kit.make("before"))
    with monkeypatch.context() as patched:
        patched.setattr("tempfile.SpooledTemporaryFile.write", full)
        with pytest.raises(StoreError, match=r"temporary file .* cannot be written: No space left"):
            filled.add(kit.make("new"))
    assert filled.staged == ("before",)
    filled.add(kit.make("new"))
    filled.commit("room again")
    for name in ("before", "new"):
        assert kit.content(filled.read_adapter(name)) == kit.content(kit.make(name))


def test_a_failure_while_writing_leaves_the_last_commit(
    filled: AdapterStore, kit: SimpleNamespace
) -> None:
    version = filled.version

    def fail(done: int, total: int) -> None:
        assert 0 < done <= total
        if done == 3:
            raise OSError(28, "No space left on device")

    filled.add(kit.make("new"))
    with pytest.raises(StoreError, match="cannot commit: No space left on device"):
        filled.commit("m", progress=fail)
    assert filled.staged == ("new",)
    assert filled.version == version
    assert kit.state(Path(filled.address)) == (version, ("chat", "math", "sql"))
    filled.commit("again")
    assert kit.content(filled.read_adapter("new")) == kit.content(kit.make("new"))
    assert filled.staged == ()


def test_progress_counts_to_its_total(store: AdapterStore, kit: SimpleNamespace) -> None:
    calls: list[tuple[int, int]] = []
    store.add(kit.make("a"))
    store.add(kit.make("b", rank=3))
    store.commit("", progress=lambda done, total: calls.append((done, total)))
    # Two modules, two factors, two ranks: 8 arrays; and 2 adapters.
    assert calls == [(n, 10) for n in range(1, 11)]


def test_nothing_to_commit(filled: AdapterStore, kit: SimpleNamespace) -> None:
    filled.add(kit.make("new"))
    filled.discard()
    assert filled.staged == ()
    with pytest.raises(StoreError, match="nothing to commit"):
        filled.commit("m")
    assert kit.state(Path(filled.address)) == (filled.version, filled.names())


def test_a_commit_holds_the_lock(store: AdapterStore, kit: SimpleNamespace) -> None:
    attempts = []

    def try_lock(done: int, total: int) -> None:
        lock = StoreRepository.open(Path(store.address)).lock()
        with ThreadPoolExecutor(1) as pool:  # in a thread: the lock is not this one's to take twice
            attempts.append(pool.submit(lock.acquire, timeout=0).exception())

    store.add(kit.make("a"))
    store.commit("", progress=try_lock)
    assert {type(attempt) for attempt in attempts} == {Timeout}
    with StoreRepository.open(Path(store.address)).lock().acquire(timeout=0):
        pass


_WRITER = """
import sys, torch
from unmerge.adapter import Adapter, Factors
from unmerge.store import AdapterStore

torch.set_num_threads(1)
path, writer = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
for i in range(5):
    store = AdapterStore.open(path)
    module = Factors(torch.full((2, 3), float(i)), torch.full((4, 2), float(writer)), 1.0)
    store.add(Adapter(f"w{writer}-{i}", {"m": module}))
    store.commit(f"{writer} {i}")
"""


def test_two_processes_lose_no_commit(store: AdapterStore) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(Path(store.address)), str(w)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for w in (1, 2)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:  # both have loaded everything: their commits overlap
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=120)
    assert [writer.returncode for writer in writers] == [0, 0]
    again = AdapterStore.open(store.address)
    expected = {f"w{w}-{i}": (float(i), float(w)) for w in (1, 2) for i in range(5)}
    assert again.names() == tuple(sorted(expected))
    assert len(again.history()) == 11
    for name, factors in again.read_module("m"):
        assert (factors.A[0, 0].item(), factors.B[0, 0].item()) == expected[name]


def test_a_moved_store_is_the_same_store(filled: AdapterStore, tmp_path: Path) -> None:
    names, version = filled.names(), filled.version
    moved = Path(filled.address).rename(tmp_path / "moved")
    store = AdapterStore.open(moved)
    assert (store.names(), store.version, Path(store.address)) == (names, version, moved)
    assert len(store.read_module("layers.0.q_proj")) == 3


def test_the_same_tensors_under_another_name_are_refused(
    filled: AdapterStore, kit: SimpleNamespace
) -> None:
    twin = replace(kit.make("sql"), name="twin", config="another text")
    with pytest.raises(DuplicateAdapterError, match=r'"twin" is "sql" of store .*bit for bit'):
        filled.add(twin)
    filled.add(twin, allow_duplicates=True)
    with pytest.raises(DuplicateAdapterError, match='"third" is "twin" of the staged set'):
        filled.add(replace(twin, name="third"))
    filled.commit("both")
    assert filled.names() == ("chat", "math", "sql", "twin")
    assert kit.content(filled.read_adapter("twin")) == kit.content(twin)


def test_a_twin_committed_meanwhile_is_found_at_commit(
    store: AdapterStore, kit: SimpleNamespace
) -> None:
    other = AdapterStore.open(store.address)
    other.add(replace(kit.make("a"), name="twin"))
    store.add(kit.make("a"))
    store.commit("a")
    with pytest.raises(DuplicateAdapterError, match='"twin" is "a"'):
        other.commit("twin")
    assert kit.state(Path(store.address)) == (store.version, ("a",))


def test_removing_and_replacing(filled: AdapterStore, kit: SimpleNamespace) -> None:
    filled.tag("v1")
    filled.remove("math")
    better = kit.make("sql", rank=4)
    with pytest.raises(AdapterExistsError, match="already has"):
        filled.add(better)
    filled.add(better, replace=True)
    assert filled.staged == ("math", "sql")
    assert filled.names() == ("chat", "math", "sql")
    filled.commit("new sql, no math")
    assert filled.names() == ("chat", "sql")
    assert kit.content(filled.read_adapter("sql")) == kit.content(better)
    with pytest.raises(AdapterNotInStoreError):
        filled.read_adapter("math")
    assert [name for name, _ in filled.read_module("layers.0.q_proj")] == ["chat", "sql"]
    old = filled.checkout("v1")
    assert old.read_only
    assert kit.content(old.read_adapter("sql")) == kit.content(kit.make("sql"))
    assert old.read_adapter("math").verbatim.keys() == {"score.weight"}
    filled.add(kit.make("math"))  # a removed adapter may come again
    filled.commit("math again, without its head")
    assert kit.content(filled.read_adapter("math")) == kit.content(kit.make("math"))


def test_an_adapter_may_take_the_tensors_of_one_that_goes(
    filled: AdapterStore, kit: SimpleNamespace
) -> None:
    filled.remove("sql")
    filled.add(replace(kit.make("sql"), name="sql-2"))
    filled.commit("renamed")
    assert filled.names() == ("chat", "math", "sql-2")


def test_removing_what_somebody_else_removed(filled: AdapterStore, kit: SimpleNamespace) -> None:
    other = AdapterStore.open(filled.address)
    other.remove("sql")
    filled.remove("sql")
    version = filled.commit("gone")
    with pytest.raises(AdapterNotInStoreError, match='"sql"'):
        other.commit("gone")
    with pytest.raises(AdapterNotInStoreError, match='"sql"'):
        filled.remove("sql")
    assert kit.state(Path(filled.address)) == (version, ("chat", "math"))


def test_notes_and_metadata(filled: AdapterStore, kit: SimpleNamespace) -> None:
    filled.add(kit.make("new"), note="from the archive", metadata={"owner": "b", "task": "sql"})
    filled.commit("new")
    info = filled.info("new")
    assert (info.note, info.metadata) == ("from the archive", {"owner": "b", "task": "sql"})
    before = {name: kit.content(filled.read_adapter(name)) for name in filled.names()}
    filled.annotate("new", note="checked")
    filled.annotate("sql", metadata={"owner": "c"})
    for again in (
        lambda: filled.annotate("new", note="twice"),
        lambda: filled.remove("new"),
        lambda: filled.add(kit.make("new", rank=3), replace=True),
    ):
        with pytest.raises(AdapterExistsError, match=r'change of adapter "new" is staged already'):
            again()
    version = filled.commit("notes")
    assert (filled.info("new").note, filled.info("new").metadata["owner"]) == ("checked", "b")
    assert (filled.info("sql").note, filled.info("sql").metadata) == ("", {"owner": "c"})
    assert {name: kit.content(filled.read_adapter(name)) for name in filled.names()} == before
    old = AdapterStore.open(filled.address, at=filled.history()[1].id)
    assert old.info("new").note == "from the archive"
    for bad in ({"": "x"}, {"k": 1}, {"line\nbreak": "x"}, {"k" * 101: "x"}, {"k": "\ud800"}):
        with pytest.raises(AdapterError, match="metadata"):
            filled.annotate("new", metadata=bad)
    with pytest.raises(AdapterError, match="10001 characters"):
        filled.annotate("new", note="x" * 10_001)
    assert kit.state(Path(filled.address))[0] == version


def test_a_deleted_tag_is_gone_for_good(filled: AdapterStore, kit: SimpleNamespace) -> None:
    filled.tag("v1")
    with pytest.raises(UnknownVersionError, match='no tag "v2"'):
        filled.delete_tag("v2")
    with pytest.raises(StoreError, match="read-only"):
        filled.checkout("v1").delete_tag("v1")
    filled.delete_tag("v1")
    assert filled.tags() == {}
    with pytest.raises(StoreError, match='"v1" already was deleted'):
        filled.tag("v1")
