"""The layout on the disk: what other Zarr readers see, and what an append rewrites."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unmerge.store import AdapterStore
from unmerge.store.layout import chunk_shape, factor_chunks, node_name
from unmerge.store.repository import StoreRepository


@pytest.mark.parametrize(
    ("shape", "itemsize", "expected"),
    [
        ((16, 384), 2, (16, 16, 384)),  # small: the cap in adapters
        ((16, 4096), 4, (16, 16, 4096)),  # 256 KiB a row, 4 MiB a chunk
        ((64, 4096), 4, (4, 64, 4096)),
        ((256, 11008), 4, (1, 95, 11008)),  # one adapter is more than a chunk
        ((11008, 256), 4, (1, 4096, 256)),
    ],
)
def test_chunks_of_factors(
    shape: tuple[int, int], itemsize: int, expected: tuple[int, int, int]
) -> None:
    assert factor_chunks(shape, itemsize) == expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((), ()), ((0,), (1,)), ((0, 5), (1, 5)), ((3, 0), (3, 1)), ((2, 3), (2, 3))],
)
def test_chunks_of_odd_shapes(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert chunk_shape(shape, 4) == expected


@given(st.lists(st.integers(0, 3000), max_size=3), st.sampled_from([1, 2, 4, 8]))
def test_chunks_are_small_and_legal(shape: list[int], itemsize: int) -> None:
    chunk = chunk_shape(tuple(shape), itemsize)
    nbytes = itemsize
    for length, limit in zip(chunk, shape, strict=True):
        assert 1 <= length <= max(1, limit)
        nbytes *= length
    assert nbytes <= 4 << 20


@given(st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=2, unique=True))
def test_node_names_differ_and_are_legal(names: list[str]) -> None:
    first, second = map(node_name, names)
    assert first != second
    assert "/" not in first
    assert not first.startswith((".", "__"))
    assert not first.endswith("zarr.json")


def test_other_zarr_readers_see_plain_arrays(filled: AdapterStore) -> None:
    root = StoreRepository.open(filled.path).read(filled.version)
    assert root.attrs["store_format"] == 1
    array = root["modules/layers.0.q_proj/A-r3-bfloat16"]
    assert (array.shape, array.dtype) == ((1, 3, 4), "uint16")
    assert array.attrs["logical_dtype"] == "bfloat16"
    codecs = [codec["name"] for codec in array.metadata.to_dict()["codecs"]]
    assert codecs == ["bytes", "blosc", "crc32c"]
    bits = torch.from_numpy(array[:]).view(torch.bfloat16)
    assert torch.equal(bits[0], filled.read_adapter("chat").modules["layers.0.q_proj"].A)


def test_an_append_rewrites_at_most_the_last_chunk(
    store: AdapterStore, kit: SimpleNamespace
) -> None:
    def names(numbers: range) -> None:
        for i in numbers:
            store.add(kit.make(f"a{i:02}", paths=("m",), d_in=80, d_out=80))
        store.commit("")

    names(range(36))  # 16 + 16 + 4 rows, in A and in B
    before = set(kit.chunk_files(store.path))
    assert len(before) == 6
    names(range(36, 37))
    assert len(set(kit.chunk_files(store.path)) - before) == 2
    names(range(37, 48))
    before = set(kit.chunk_files(store.path))
    names(range(48, 50))  # the last chunk was full: nothing is read or rewritten
    assert len(set(kit.chunk_files(store.path)) - before) == 2
    root = StoreRepository.open(store.path).read(store.version)
    assert root["modules/m/A-r2-float32"].shape == (50, 2, 80)
    assert sorted(root["modules/m"].array_keys()) == ["A-r2-float32", "B-r2-float32"]


def test_zeros_are_written_like_anything_else(store: AdapterStore, kit: SimpleNamespace) -> None:
    adapter = kit.make("a", d_in=900, d_out=900)
    for factors in adapter.modules.values():
        factors.A.zero_()
    store.add(adapter)
    store.commit("")
    root = StoreRepository.open(store.path).read(store.version)
    assert root["modules/layers.0.q_proj/A-r2-float32"].nchunks_initialized == 1
