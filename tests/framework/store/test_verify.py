"""Verifying reads everything from the disk, finds every damage, says whose it is and goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from assorted import KINDS, assorted, content, contents
from unmerge.adapter import Adapter, Factors
from unmerge.errors import StoreError
from unmerge.store import AdapterStore, DeadSpace
from unmerge.store import verify as verify_module
from unmerge.store.repository import StoreRepository
from unmerge.store.tables import unused_verbatim
from unmerge.store.view import StoreView
from unmerge.store.writing import write_index

PATH = "layers.0.q_proj"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def large(name: str, *, seed: int) -> Adapter:
    """An adapter too large for Icechunk to keep in its manifests."""
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(shape, generator=generator) for shape in ((3, 90), (40, 3)))
    head = {"head": torch.randn(20, 20, generator=generator)}
    return Adapter(name, {PATH: Factors(A, B, 0.5)}, verbatim=head)


@pytest.fixture
def mixed(store: AdapterStore) -> AdapterStore:
    """Adapters of every dtype and kind in several segments."""
    for seed, dtype in enumerate(DTYPES):
        store.add(assorted(f"a{seed}", seed=seed, dtype=dtype, rank=2 + seed % 2, head=True))
        store.commit(f"a{seed}")
    store.add(assorted("b", seed=7, modules=(PATH,)))
    store.commit("b")
    return store


@contextmanager
def tampering(store: AdapterStore) -> Iterator[zarr.Group]:
    """Commit changes that no `AdapterStore` would make."""
    opened = repository(store)
    session = opened.session()
    yield opened.root(session)
    session.commit("tampered")


def repository(store: AdapterStore) -> StoreRepository:
    return StoreRepository.open(store.address)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 8
    file.write_bytes(data)


def chunk_of(store: AdapterStore, adapter: str, what: str) -> Path:
    """Return the chunk file without which `what` of an adapter cannot be read."""
    for file in sorted((Path(store.address) / "chunks").iterdir()):
        whole = file.read_bytes()
        file.unlink()
        try:
            AdapterStore.open(store.address).read_adapter(adapter)
        except StoreError as error:
            if what in str(error):
                return file
        finally:
            file.write_bytes(whole)
    raise AssertionError(what)


def test_a_sound_store(mixed: AdapterStore) -> None:
    steps: list[tuple[int, int]] = []
    report = mixed.verify(progress=lambda done, total: steps.append((done, total)))
    assert report.ok
    assert (report.address, report.version) == (mixed.address, mixed.version)
    assert report.adapters == 4
    assert report.nbytes == sum(info.nbytes for info in mixed.list())
    assert report.dead == DeadSpace(rows=0, records=0, verbatim=0, nbytes=0)
    assert not report.dead
    assert steps == [(n, len(steps)) for n in range(1, len(steps) + 1)]


def test_an_empty_store(store: AdapterStore) -> None:
    assert store.verify().ok


def test_what_nobody_uses_is_told_and_is_no_problem(mixed: AdapterStore) -> None:
    infos = {info.name: info for info in mixed.list()}
    mixed.remove("a0")
    mixed.annotate("a1", note="a note")
    mixed.add(
        assorted("a2", seed=2, dtype=torch.bfloat16, modules=(PATH,), head=True), replace=True
    )
    mixed.commit("less")
    report = mixed.verify()
    assert report.ok
    assert report.adapters == 3
    # The records of a0 (removed), a1 (annotated) and a2 (replaced). The new a2 has another head.
    assert report.dead == DeadSpace(
        rows=2 * 2 * len(KINDS),
        records=3,
        verbatim=2,
        nbytes=infos["a0"].nbytes + infos["a2"].nbytes,
    )
    # What is read of a table is all of it.
    assert report.nbytes == sum(info.nbytes for info in mixed.list()) + sum(
        infos[name].nbytes - infos[name].verbatim_nbytes for name in ("a0", "a2")
    )


def test_an_older_version_is_verified_as_it_was(mixed: AdapterStore) -> None:
    old = mixed.version
    mixed.remove("a0")
    mixed.commit("less")
    report = mixed.checkout(old).verify()
    assert (report.ok, report.version, report.adapters) == (True, old, 4)


def test_every_row_is_read_once_and_chunk_by_chunk(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So memory holds a few chunks, whatever the number of adapters."""
    monkeypatch.setattr("unmerge.store.segments.rows_per_chunk", lambda shape, itemsize: 4)
    for seed in range(10):
        store.add(assorted(f"a{seed}", seed=seed, modules=(PATH,)))
    store.commit("ten")
    reads: list[tuple[str, list[int]]] = []
    real: Callable[..., Any] = verify_module.read_rows

    def read_rows(root: zarr.Group, path: str, *rest: Any) -> Any:
        reads.append((path, list(rest[-1])))
        return real(root, path, *rest)

    monkeypatch.setattr(verify_module, "read_rows", read_rows)
    assert store.verify().ok
    for factor in "AB":
        path = f"modules/{PATH}/{factor}-r2-float32"
        # Ten rows in chunks of at most four: of one length, four, four and two.
        assert sorted(rows for p, rows in reads if p == path) == [
            [0, 1, 2, 3],
            [4, 5, 6, 7],
            [8, 9],
        ]


def test_random_bits_flipped_anywhere(store: AdapterStore) -> None:
    """Found, or in a file that this version does not need, or without any effect at all."""
    for name in ("a", "b"):
        store.add(large(name, seed=ord(name)))
    store.commit("both")
    store.remove("b")
    store.add(large("c", seed=9))
    store.commit("another")
    expected = contents(store)
    generator = np.random.default_rng(4)
    found = dict.fromkeys(("chunks", "manifests", "snapshots", "refs", "transactions"), 0)
    needed = set()
    for file in sorted(path for path in Path(store.address).rglob("*") if path.is_file()):
        whole = file.read_bytes()
        if not whole:  # the lock
            continue
        kind = file.relative_to(store.address).parts[0]
        file.unlink()
        if kind == "chunks" and complains(store):
            needed.add(file)
        # A snapshot is one small file, of which few bits matter.
        for _ in range(20 if kind == "snapshots" else 2):
            place = int(generator.integers(8 * len(whole)))
            damaged = bytearray(whole)
            damaged[place // 8] ^= 1 << place % 8
            file.write_bytes(damaged)
            complaint = complains(store)
            found[kind] += complaint
            assert complaint or file not in needed, (file, place)
            names = []
            for name, adapter in readable(store):
                names.append(name)
                assert adapter == expected[name], (file, place)
            assert complaint or names == ["a", "c"], (file, place)
        file.write_bytes(whole)
    assert not complains(store)
    # The factors, each in two segments, and the heads: b's is checked too, since the next adapter
    # that comes with the same would share it. Index and records are so short that Icechunk keeps
    # them in its manifests.
    assert len(needed) == 4 + 3
    assert found["chunks"] == 2 * len(needed)
    assert found["manifests"] > 0
    assert found["snapshots"] > 0


def complains(store: AdapterStore) -> bool:
    """Return whether opening or verifying says that something is wrong."""
    try:
        return not AdapterStore.open(store.address).verify().ok
    except StoreError:
        return True


def readable(damaged: AdapterStore) -> Iterator[tuple[str, dict[str, object]]]:
    """Give what can be read in spite of damage."""
    try:
        store = AdapterStore.open(damaged.address)
    except StoreError:
        return
    for name in store.names():
        try:
            yield name, content(store.read_adapter(name))
        except StoreError:
            continue


@pytest.fixture
def many(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> AdapterStore:
    """Ten adapters whose rows are in chunks of 4, 4 and 2."""
    monkeypatch.setattr("unmerge.store.segments.rows_per_chunk", lambda shape, itemsize: 4)
    for seed in range(10):
        store.add(large(f"a{seed}", seed=seed))
    store.commit("ten")
    return store


def test_damage_is_named_and_checking_goes_on(many: AdapterStore) -> None:
    assert many.verify().ok  # what is in memory now must not hide what comes
    nbytes = many.verify().nbytes
    flip(chunk_of(many, "a5", "factor A"))
    flip(chunk_of(many, "a8", "factor B"))
    flip(chunk_of(many, "a0", "verbatim"))
    report = many.verify()
    assert not report.ok
    assert [(p.adapters, p.module, p.factor) for p in report.problems] == [
        (("a4", "a5", "a6", "a7"), PATH, "A"),
        (("a8", "a9"), PATH, "B"),
        (("a0",), None, None),
    ]
    assert report.problems[0].message.startswith(
        f'{PATH}: factor A (rank 3, float32), rows 4 to 7, of "a4", "a5", "a6", "a7" cannot be read'
    )
    assert '"a0": verbatim tensors "head" cannot be read' in report.problems[2].message
    assert all("\n" not in problem.message for problem in report.problems)
    assert report.adapters == 3
    rows = 4 * 3 * 90 + 2 * 40 * 3 + 20 * 20
    assert report.nbytes == nbytes - 4 * rows
    assert report.dead == DeadSpace(rows=0, records=0, verbatim=0, nbytes=0)


def test_a_chunk_of_many_adapters_names_some_of_them(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"a{n:02}" for n in range(25)]
    for seed, name in enumerate(names):
        store.add(large(name, seed=seed))
    store.commit("25")
    flip(chunk_of(store, "a00", "factor A"))
    [problem] = store.verify().problems
    assert problem.adapters == tuple(names)
    assert '"a19" and 5 more cannot be read' in problem.message


@pytest.mark.parametrize("factor", ["A", "B"])
def test_rows_with_other_numbers(many: AdapterStore, factor: str) -> None:
    with tampering(many) as root:
        array = root[f"modules/{PATH}/{factor}-r3-float32.0"]
        array[5:7] = array[5:7][::-1].copy()
    found = AdapterStore.open(many.address).verify().problems
    assert [(p.adapters, p.module, p.factor) for p in found] == [
        ((name,), PATH, factor) for name in ("a5", "a6")
    ]
    assert found[0].message == (
        f'{PATH}: factor {factor} (rank 3, float32), row 5, of "a5": the numbers do not have the '
        "CRC-32 recorded for them"
    )


def test_numbers_that_icechunk_has_lost(many: AdapterStore) -> None:
    with tampering(many) as root:
        array = root[f"modules/{PATH}/A-r3-float32.0"]
        array.resize((4, 3, 90))
        array.resize((10, 3, 90))
    report = AdapterStore.open(many.address).verify()
    assert {p.adapters for p in report.problems} == {(f"a{n}",) for n in range(4, 10)}
    assert report.adapters == 4


def test_a_table_that_is_not_there(many: AdapterStore) -> None:
    with tampering(many) as root:
        del root[f"modules/{PATH}/B-r3-float32.0"]
    report = AdapterStore.open(many.address).verify()
    assert [p.adapters[0] for p in report.problems] == ["a0", "a4", "a8"]
    assert {p.factor for p in report.problems} == {"B"}
    assert report.adapters == 0


def test_a_record_with_another_text(mixed: AdapterStore) -> None:
    with tampering(mixed) as root:
        array = root["records/0"]  # a0's is the first
        text = array[:].tobytes()
        array[:] = np.frombuffer(text.replace(b"0x1", b"0x2", 1), dtype=np.uint8)
    report = AdapterStore.open(mixed.address).verify()
    [problem] = report.problems
    assert (problem.adapters, problem.module) == (("a0",), None)
    assert "does not have the sha256 recorded for it" in problem.message
    assert report.adapters == 3
    # Its rows look like nobody's, and that would be a wrong number.
    assert report.dead is None


def test_records_that_cannot_be_read(mixed: AdapterStore) -> None:
    with tampering(mixed) as root:
        del root["records/0"]
    report = AdapterStore.open(mixed.address).verify()
    assert [p.adapters for p in report.problems] == [("a0",), ("a1",), ("a2",), ("b",)]


def test_a_damaged_index(mixed: AdapterStore) -> None:
    with tampering(mixed) as root:
        text = root["index"][:].tobytes()
        root["index"][:] = np.frombuffer(text.replace(b'"a0"', b'"a8"'), dtype=np.uint8)
    # `AdapterStore.open` refuses it at once.
    report = verify_module.verify(repository(mixed), repository(mixed).tip())
    [problem] = report.problems
    assert (problem.adapters, problem.module, problem.factor) == ((), None, None)
    assert "index: the stored text does not have the sha256" in problem.message
    assert (report.adapters, report.nbytes, report.dead) == (0, 0, None)
    assert mixed.verify().ok  # the version before


def test_a_version_that_is_gone(mixed: AdapterStore) -> None:
    (Path(mixed.address) / "snapshots" / mixed.version).unlink()
    [problem] = mixed.verify().problems
    assert mixed.version in problem.message


def test_a_store_that_is_gone(mixed: AdapterStore) -> None:
    shutil.rmtree(mixed.address)
    [problem] = mixed.verify().problems
    assert "does not exist" in problem.message


def test_an_adapter_whose_digest_was_never_its_own(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checksums of the parts are right: only reading all of them together can tell."""
    wrong = assorted("b", seed=2).digest()
    with monkeypatch.context() as patch:
        patch.setattr(Adapter, "digest", lambda self: wrong)
        store.add(assorted("a", seed=1, head=True))
    store.add(assorted("c", seed=3))
    store.commit("")
    report = store.verify()
    [problem] = report.problems
    right = assorted("a", seed=1, head=True).digest()
    assert problem.adapters == ("a",)
    assert problem.message == f'adapter "a" has digest {right}, expected {wrong}'
    assert report.adapters == 1


def test_a_row_that_was_never_written(mixed: AdapterStore) -> None:
    """Whatever wrote that: no reader may take it for an adapter without the module."""
    with tampering(mixed) as root:
        view = StoreView(repository(mixed), mixed.version)
        table = f"modules/{PATH}/A-r2-float32"
        assert view.index.tables[table] == [1, 1]
        write_index(
            root, view.index.model_copy(update={"tables": {**view.index.tables, table: [1]}})
        )
    [problem] = AdapterStore.open(mixed.address).verify().problems
    assert (problem.adapters, problem.module, problem.factor) == (("b",), PATH, "A")
    assert "row 1" in problem.message


def test_an_index_that_says_other_things_than_the_records(mixed: AdapterStore) -> None:
    with tampering(mixed) as root:
        index = StoreView(repository(mixed), mixed.version).index
        layers = {**index.layers, PATH: (7, 6, "linear")}
        write_index(root, index.model_copy(update={"layers": layers}))
    report = AdapterStore.open(mixed.address).verify()
    assert {name for p in report.problems for name in p.adapters} == {"a0", "a1", "a2", "b"}
    assert PATH in report.problems[0].message


def test_damage_to_what_no_adapter_uses(many: AdapterStore) -> None:
    """Older versions may need it, and appending may read it again."""
    victims = [chunk_of(many, "a9", what) for what in ("factor A", "verbatim")]
    for name in ("a8", "a9"):
        many.remove(name)
    many.commit("less")
    for victim in victims:
        flip(victim)
    report = many.verify()
    assert [(p.adapters, p.module, p.factor) for p in report.problems] == [
        ((), PATH, "A"),
        ((), None, None),
    ]
    assert "rows 8 to 9, of no adapter cannot be read" in report.problems[0].message
    assert report.adapters == 8


def test_a_head_with_other_bytes_that_the_next_adapter_would_share(many: AdapterStore) -> None:
    many.remove("a9")
    many.commit("less")
    with tampering(many) as root:
        for path in unused_verbatim(root, StoreView(repository(many), many.version).records):
            root[path][3:4] = root[path][3:4] ^ 1
    [problem] = AdapterStore.open(many.address).verify().problems
    assert problem.adapters == ()
    assert "the bytes have another sha256 than it says" in problem.message


def test_dead_records_that_cannot_be_read(mixed: AdapterStore) -> None:
    for name in mixed.names():
        mixed.annotate(name, note="so that its first record is dead")
    mixed.commit("noted")
    with tampering(mixed) as root:
        del root["records/0"]
    report = AdapterStore.open(mixed.address).verify()
    [problem] = report.problems
    assert problem.adapters == ()
    assert problem.message.startswith("records/0, which no adapter uses, cannot be read: ")
    assert report.adapters == 4


def test_stopping_is_no_damage(mixed: AdapterStore) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mixed.verify(progress=stop)
