"""Damage on the disk, or inside Icechunk's own metadata, is an error and never a wrong number."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zarr

from unmerge.adapter import Adapter
from unmerge.errors import StoreError
from unmerge.store import AdapterStore
from unmerge.store.repository import StoreRepository

PATH = "layers.0.q_proj"


HEAD = torch.randn(40, 40)


def original(kit: SimpleNamespace, name: str) -> Adapter:
    head = {"head": HEAD} if name == "a00" else None
    adapter: Adapter = kit.make(name, paths=(PATH,), d_in=32, d_out=24, verbatim=head)
    return adapter


@pytest.fixture
def big(store: AdapterStore, kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> AdapterStore:
    """20 adapters: two chunks per factor, each larger than what Icechunk keeps in its manifests."""
    monkeypatch.setattr("unmerge.store.segments.rows_per_chunk", lambda shape, itemsize: 11)
    for i in range(20):
        store.add(original(kit, f"a{i:02}"))
        if i == 10:
            store.commit("full")
    store.commit("")
    return store


@contextmanager
def tampering(store: AdapterStore) -> Iterator[zarr.Group]:
    """Commit changes that no `AdapterStore` would make."""
    repository = StoreRepository.open(store.address)
    session = repository.session()
    yield repository.root(session)
    session.commit("tampered")


def complaint(damaged: AdapterStore, kit: SimpleNamespace) -> str | None:
    """Return why a store cannot be read; whatever can be read is as it was."""
    try:
        store = AdapterStore.open(damaged.address)
        for name in store.names():
            assert kit.content(store.read_adapter(name)) == kit.content(original(kit, name))
    except StoreError as error:
        return str(error)
    return None


def lost_rows(damaged: AdapterStore, kit: SimpleNamespace, factor: str) -> bool:
    """Return whether the first of two chunks is lost; its adapters are named, and no others."""
    store = AdapterStore.open(damaged.address)
    with pytest.raises(StoreError, match=f"{PATH}: {factor}") as caught:
        store.read_module(PATH)
    first = '"a00"' in str(caught.value)
    named = {name for name in store.names() if f'"{name}"' in str(caught.value)}
    assert named == {f"a{i:02}" for i in (range(11) if first else range(11, 20))}
    well = "a19" if first else "a01"
    assert kit.content(store.read_adapter(well)) == kit.content(original(kit, well))
    return first


@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_damaged_chunk_files_are_named(big: AdapterStore, kit: SimpleNamespace, how: str) -> None:
    blamed = set()
    for file in kit.chunk_files(Path(big.address)):
        whole = file.read_bytes()
        if how == "flip":
            file.write_bytes(whole[:99] + bytes([whole[99] ^ 1]) + whole[100:])
        elif how == "truncate":
            file.write_bytes(whole[:-1])
        else:
            file.unlink()
        message = complaint(big, kit)
        if message is not None:  # the version before has an index and records of its own
            assert "\n" not in message
            what = re.search(r"index|record|verbatim|factor [AB]", message)
            assert what, message
            blamed.add(what[0])
            if what[0] == "verbatim":
                assert 'adapter "a00": verbatim tensors "head" cannot be read' in message
                assert len(AdapterStore.open(big.address).read_module(PATH)) == 20
            if what[0].startswith("factor"):
                blamed.add((what[0], lost_rows(big, kit, what[0])))
        file.write_bytes(whole)
    sides = {(f"factor {factor}", first) for factor in "AB" for first in (True, False)}
    assert blamed >= {"index", "record", "verbatim"} | sides


def test_every_flipped_bit_of_the_metadata_is_harmless_or_an_error(
    store: AdapterStore, kit: SimpleNamespace
) -> None:
    # Icechunk has no checksum over manifests: some flips exchange, lose or redirect chunks.
    names = [f"a{i:02}" for i in range(18)]
    for name in names:
        store.add(kit.make(name, paths=(PATH,), d_in=80, d_out=80))
    store.commit("")
    expected = {name: kit.content(store.read_adapter(name)) for name in names}
    refused = 0
    for file in sorted((Path(store.address) / "manifests").iterdir()):
        whole = file.read_bytes()
        for place in range(40, len(whole), 3):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            file.write_bytes(damaged)
            try:
                again = AdapterStore.open(Path(store.address))
                read = {name: again.read_module(PATH, [name]) for name in (names[0], names[-1])}
            except StoreError:
                refused += 1
                continue
            for name, [(_, factors)] in read.items():
                found = (kit.bits(factors.A), kit.bits(factors.B), factors.scaling.hex())
                assert found == expected[name][PATH], place
        file.write_bytes(whole)
    assert refused > 20


def test_a_chunk_that_icechunk_has_lost_is_no_zeros(big: AdapterStore) -> None:
    with tampering(big) as root:
        array = root[f"modules/{PATH}/A-r2-float32.11"]
        array.resize((0, 2, 32))
        array.resize((9, 2, 32))
    store = AdapterStore.open(big.address)
    with pytest.raises(StoreError, match=f'{PATH}: factor A .*row 11, adapter "a11".*CRC-32'):
        store.read_module(PATH)
    assert len(store.read_module(PATH, ["a00", "a10"])) == 2


def test_appending_to_a_damaged_segment_is_refused(big: AdapterStore, kit: SimpleNamespace) -> None:
    for name in ("x1", "x2", "x3"):  # three small segments behind: the next append rewrites them
        big.add(kit.make(name, paths=(PATH,), d_in=32, d_out=24))
        big.commit("")
    with tampering(big) as root:
        array = root[f"modules/{PATH}/A-r2-float32.20"]
        array.resize((2, 2, 32))
    before = kit.state(Path(big.address))
    store = AdapterStore.open(big.address)
    store.add(kit.make("new", paths=(PATH,), d_in=32, d_out=24))
    with pytest.raises(StoreError, match=rf"{PATH}: factor A .* cannot be appended to: .*2, 2, 32"):
        store.commit("")
    assert store.staged == ("new",)
    assert kit.state(Path(big.address)) == before


def test_exchanged_rows_are_noticed(big: AdapterStore) -> None:
    with tampering(big) as root:
        array = root[f"modules/{PATH}/B-r2-float32.0"]
        array[:2] = array[:2][::-1].copy()
    with pytest.raises(StoreError, match=r'factor B .*row 0, adapter "a00".*CRC-32'):
        AdapterStore.open(big.address).read_module(PATH)


def test_a_changed_verbatim_tensor_is_noticed(big: AdapterStore) -> None:
    with tampering(big) as root:
        [(_, array)] = root["verbatim"].arrays()
        array[5] = 7
    with pytest.raises(StoreError, match=r'adapter "a00": verbatim tensor "head".*CRC-32'):
        AdapterStore.open(big.address).read_verbatim("a00")


def test_what_is_damaged_is_not_shared(big: AdapterStore, kit: SimpleNamespace) -> None:
    with tampering(big) as root:
        [(_, array)] = root["verbatim"].arrays()
        array[5] = 7
    store = AdapterStore.open(big.address)
    new = kit.make("new", paths=(PATH,), d_in=32, d_out=24, verbatim={"head": HEAD})
    store.add(new)
    store.commit("")
    again = AdapterStore.open(big.address)
    assert kit.content(again.read_adapter("new")) == kit.content(new)
    assert kit.content(again.read_adapter("a00")) == kit.content(original(kit, "a00"))


def test_a_changed_record_is_noticed(filled: AdapterStore) -> None:
    with tampering(filled) as root:
        text = root["records/0"][:].tobytes()
        scaling = (0.1).hex().encode()
        line = text.split(b"\n")[2]  # sorted by name: chat, math, sql
        assert scaling in line
        changed = text.replace(line, line.replace(scaling, (0.2).hex().encode()))
        root["records/0"][:] = np.frombuffer(changed, dtype=np.uint8)
    store = AdapterStore.open(filled.address)
    with pytest.raises(
        StoreError, match=r'adapter "sql": the stored text does not have the sha256'
    ):
        store.read_module(PATH)
    assert store.info("chat").name == "chat"


def test_a_changed_index_is_noticed(filled: AdapterStore) -> None:
    with tampering(filled) as root:
        array = root["index"]
        text = array[:].tobytes()
        array[:] = np.frombuffer(text.replace(b'"sql"', b'"sqk"'), dtype=np.uint8)
    with pytest.raises(StoreError, match="index: the stored text does not have the sha256"):
        AdapterStore.open(filled.address)


def test_a_digest_that_is_not_the_adapters_is_noticed(
    store: AdapterStore, kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Adapter, "digest", lambda self: "sha256:0")
        store.add(kit.make("a"))
    store.commit("")
    with pytest.raises(StoreError, match=r'adapter "a" has digest sha256:.*expected sha256:0'):
        store.read_adapter("a")


def test_a_damaged_history_is_no_store(filled: AdapterStore, tmp_path: Path) -> None:
    for file in (Path(filled.address) / "snapshots").iterdir():
        file.write_bytes(file.read_bytes()[:30])
    with pytest.raises(StoreError, match="cannot be read"):
        AdapterStore.open(Path(filled.address))
