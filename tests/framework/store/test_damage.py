"""Damage on the disk, or inside Icechunk's own metadata, is an error and never a wrong number."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from unmerge.adapter import Adapter
from unmerge.errors import StoreError
from unmerge.store import AdapterStore
from unmerge.store.repository import StoreRepository

PATH = "layers.0.q_proj"


@pytest.fixture
def big(store: AdapterStore, kit: SimpleNamespace) -> AdapterStore:
    """20 adapters: two chunks per array, each larger than what Icechunk keeps in its manifests."""
    for i in range(20):
        head = {"head": torch.randn(40, 40)} if i == 0 else None
        store.add(kit.make(f"a{i:02}", paths=(PATH,), d_in=32, d_out=24, verbatim=head))
    store.commit("")
    return store


def _rewrite(store: AdapterStore, **attributes: dict[str, object]) -> None:
    repository = StoreRepository.open(store.path)
    session = repository.session()
    root = repository.root(session)
    for node, values in attributes.items():
        (root if node == "root" else root[node]).attrs.update(values)
    session.commit("tampered")


@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_damaged_chunk_files_are_named(big: AdapterStore, kit: SimpleNamespace, how: str) -> None:
    blamed = set()
    for file in kit.chunk_files(big.path):
        whole = file.read_bytes()
        if how == "flip":
            file.write_bytes(whole[:99] + bytes([whole[99] ^ 1]) + whole[100:])
        elif how == "truncate":
            file.write_bytes(whole[:-1])
        else:
            file.unlink()
        store = AdapterStore.open(big.path)
        if _reads(store.read_module, PATH):
            with pytest.raises(StoreError, match='"a00": verbatim tensor "head" cannot be read'):
                store.read_verbatim("a00")
            with pytest.raises(StoreError, match="head"):
                store.read_adapter("a00")
            blamed.add("head")
        else:
            with pytest.raises(StoreError) as caught:
                store.read_module(PATH)
            message = str(caught.value)
            assert "\n" not in message
            assert f"{PATH}: factor " in message
            first = '"a00"' in message
            assert ('"a15"' in message, '"a16"' in message) == (first, not first)
            blamed.add((message.split("factor ")[1][0], first))
            # The other chunk's adapters are still there.
            well = "a19" if first else "a01"
            original = kit.make(well, paths=(PATH,), d_in=32, d_out=24)
            assert kit.content(store.read_adapter(well)) == kit.content(original)
        file.write_bytes(whole)
    assert blamed == {"head", ("A", True), ("A", False), ("B", True), ("B", False)}


def _reads(read: object, argument: str) -> bool:
    try:
        read(argument)
    except StoreError:
        return False
    return True


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
    for file in sorted((store.path / "manifests").iterdir()):
        whole = file.read_bytes()
        for place in range(40, len(whole), 3):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            file.write_bytes(damaged)
            try:
                again = AdapterStore.open(store.path)
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
    repository = StoreRepository.open(big.path)
    session = repository.session()
    array = repository.root(session)[f"modules/{PATH}/A-r2-float32"]
    array.resize((16, 2, 32))
    array.resize((20, 2, 32))
    session.commit("lose the second chunk")
    store = AdapterStore.open(big.path)
    with pytest.raises(StoreError, match=f'{PATH}: factor A .*row 16, adapter "a16".*CRC-32'):
        store.read_module(PATH)
    assert len(store.read_module(PATH, ["a00", "a15"])) == 2


def test_appending_to_a_damaged_chunk_is_refused(big: AdapterStore, kit: SimpleNamespace) -> None:
    for file in kit.chunk_files(big.path):
        whole = bytearray(file.read_bytes())
        whole[99] ^= 1
        file.write_bytes(whole)
    before = kit.state(big.path)
    store = AdapterStore.open(big.path)
    store.add(kit.make("new", paths=(PATH,), d_in=32, d_out=24))
    with pytest.raises(StoreError, match=rf"{PATH}: factor A .* cannot be appended to: .*checksum"):
        store.commit("")
    assert store.staged == ("new",)
    assert kit.state(big.path) == before


def test_exchanged_rows_are_noticed(big: AdapterStore) -> None:
    repository = StoreRepository.open(big.path)
    session = repository.session()
    array = repository.root(session)[f"modules/{PATH}/B-r2-float32"]
    array[:2] = array[:2][::-1].copy()
    session.commit("exchange a00 and a01")
    with pytest.raises(StoreError, match=r'factor B .*row 0, adapter "a00".*CRC-32'):
        AdapterStore.open(big.path).read_module(PATH)


def test_a_changed_verbatim_tensor_is_noticed(big: AdapterStore) -> None:
    repository = StoreRepository.open(big.path)
    session = repository.session()
    repository.root(session)["adapters/a00/verbatim/head"][0, 0] = 7
    session.commit("change one number")
    with pytest.raises(StoreError, match=r'adapter "a00": verbatim tensor "head".*CRC-32'):
        AdapterStore.open(big.path).read_verbatim("a00")


def test_a_changed_record_is_noticed(filled: AdapterStore) -> None:
    repository = StoreRepository.open(filled.path)
    text = repository.read(filled.version)["adapters/sql"].attrs["record"]
    scaling = (0.1).hex()
    assert scaling in text
    _rewrite(filled, **{"adapters/sql": {"record": text.replace(scaling, (0.2).hex())}})
    store = AdapterStore.open(filled.path)
    with pytest.raises(
        StoreError, match=r'adapter "sql": the stored text does not have the sha256'
    ):
        store.read_module(PATH)
    assert store.info("chat").name == "chat"


def test_a_changed_index_is_noticed(filled: AdapterStore) -> None:
    _rewrite(filled, root={"index": '{"base_model": null, "revision": null, "adapters": {}}'})
    with pytest.raises(StoreError, match="index: the stored text does not have the sha256"):
        AdapterStore.open(filled.path)


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
    for file in (filled.path / "snapshots").iterdir():
        file.write_bytes(file.read_bytes()[:30])
    with pytest.raises(StoreError, match="cannot be read"):
        AdapterStore.open(filled.path)
