"""The layout on the disk: what other Zarr readers see, and what an append rewrites."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from unmerge.store import AdapterStore
from unmerge.store.layout import chunk_shape, node_name, rows_per_chunk
from unmerge.store.repository import StoreRepository


@pytest.mark.parametrize(
    ("shape", "itemsize", "expected"),
    [
        ((2, 8), 2, 1024),  # tiny: the cap in adapters
        ((4, 384), 2, 682),  # 3 KiB a row, 2 MiB a chunk
        ((16, 4096), 4, 8),
        ((256, 11008), 4, 1),  # one adapter is more than a chunk
    ],
)
def test_rows_of_a_chunk(shape: tuple[int, int], itemsize: int, expected: int) -> None:
    assert rows_per_chunk(shape, itemsize) == expected


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
    root = StoreRepository.open(filled.address).read(filled.version)
    assert root.attrs["store_format"] == 2
    array = root["modules/layers.0.q_proj/A-r3-bfloat16.0"]
    assert (array.shape, array.dtype) == ((1, 3, 4), "uint16")
    assert array.attrs["logical_dtype"] == "bfloat16"
    codecs = [codec["name"] for codec in array.metadata.to_dict()["codecs"]]
    assert codecs == ["bytes", "blosc", "crc32c"]
    bits = torch.from_numpy(array[:]).view(torch.bfloat16)
    assert torch.equal(bits[0], filled.read_adapter("chat").modules["layers.0.q_proj"].A)


def test_chunks_of_one_length_without_a_padded_tail(
    store: AdapterStore, kit: SimpleNamespace
) -> None:
    # 320 kB a row of A: 6 in a chunk of 2 MiB, so 7 rows are two chunks of 4 and not of 6.
    for i in range(7):
        store.add(kit.make(f"a{i}", paths=("m",), d_in=40_000, d_out=1))
    store.commit("")
    array = StoreRepository.open(store.address).read(store.version)["modules/m/A-r2-float32.0"]
    assert array.shape == (7, 2, 40_000)
    assert array.chunks == (4, 2, 40_000)


def test_rows_larger_than_a_chunk_are_split(store: AdapterStore, kit: SimpleNamespace) -> None:
    adapter = kit.make("a", paths=("m",), d_in=700_000, d_out=1)
    store.add(adapter)
    store.commit("")
    array = StoreRepository.open(store.address).read(store.version)["modules/m/A-r2-float32.0"]
    assert array.chunks == (1, 1, 700_000)
    assert kit.content(store.read_adapter("a")) == kit.content(adapter)


def test_adding_one_by_one_rewrites_few_rows(store: AdapterStore, kit: SimpleNamespace) -> None:
    written = 0
    for i in range(17):
        before = set(_rows(store))
        store.add(kit.make(f"a{i:02}", paths=("m",)))
        store.commit("")
        written += sum(array.shape[0] for path, array in _rows(store).items() if path not in before)
    assert {path.rpartition("/")[2] for path in _rows(store)} == {
        f"{factor}-r2-float32.{first}" for factor in "AB" for first in (0, 16)
    }
    # By path, so a segment that a larger one replaced under its name is not counted twice; every
    # row is written once alone, 16 of them among 4 and 16 among 16.
    assert written <= 2 * 3 * 17


def _rows(store: AdapterStore) -> dict[str, zarr.Array]:
    root = StoreRepository.open(store.address).read(store.version)
    return (
        {array.path: array for _, array in root["modules/m"].arrays()} if "modules" in root else {}
    )


def test_the_bytes_written_one_by_one_are_a_constant_factor(
    store: AdapterStore, kit: SimpleNamespace
) -> None:
    sizes = []
    for i in range(40):
        store.add(kit.make(f"a{i:02}", paths=("m",), d_in=4000, d_out=4000))
        store.commit("")
        if i + 1 in (20, 40):
            sizes.append(sum(file.stat().st_size for file in kit.chunk_files(Path(store.address))))
    one = 2 * 2 * 4000 * 4
    # Each row once alone, once among 4, once among 16; and the index and the records.
    assert sizes[0] < 20 * one * 3.2
    assert sizes[1] < 40 * one * 3.2


def test_zeros_are_written_like_anything_else(store: AdapterStore, kit: SimpleNamespace) -> None:
    adapter = kit.make("a", d_in=900, d_out=900)
    for factors in adapter.modules.values():
        factors.A.zero_()
    store.add(adapter)
    store.commit("")
    root = StoreRepository.open(store.address).read(store.version)
    assert root["modules/layers.0.q_proj/A-r2-float32.0"].nchunks_initialized == 1
