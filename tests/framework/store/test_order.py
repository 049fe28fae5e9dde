"""How a collection came into the store does not show: neither in tensors nor in merged bundles."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import store_worker
from unmerge import MergePipeline
from unmerge.store import AdapterStore
from unmerge.store.repository import StoreRepository

NAMES = [f"adapter-{n:02d}" for n in range(23)]
RECIPES: list[dict[str, Any]] = [
    {"method": "ties", "density": 0.3},
    {"method": "rmm", "basis_size": 3, "pad": True},
    {"method": "mm_svd", "rank": 4},
]


def imported(folder: Path, seed: int) -> AdapterStore:
    """A store with `NAMES`, in an order and in batches of its own, and with a past of its own."""
    draw = random.Random(seed)  # noqa: S311 - the same in every run
    store = AdapterStore.create(folder / "zoo")
    waiting = draw.sample(NAMES, len(NAMES))
    guests: list[str] = []  # adapters that come and go
    while waiting or guests:
        for name in waiting[: draw.randint(1, 6)]:
            store.add(store_worker.adapter(name))
            waiting.remove(name)
        leaving = draw.sample(guests, draw.randint(0, len(guests)))
        for name in leaving:
            store.remove(name)
        guests = [name for name in guests if name not in leaving]
        if waiting:
            guests.append(f"guest-{len(waiting)}")
            store.add(store_worker.adapter(guests[-1]))
        if store.staged:
            store.commit(f"{len(waiting)} to come")
        if draw.random() < 0.3:
            StoreRepository.open(store.address).collect_garbage()
    return AdapterStore.open(store.address)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[AdapterStore]:
    """The same collection: in one commit, and twice on detours."""
    plain = AdapterStore.create(tmp_path_factory.mktemp("plain") / "zoo")
    for name in NAMES:
        plain.add(store_worker.adapter(name))
    plain.commit("all")
    return [plain, *(imported(tmp_path_factory.mktemp("detour"), seed) for seed in (1, 2))]


def test_the_tensors_are_the_same(kit: SimpleNamespace, stores: list[AdapterStore]) -> None:
    plain = stores[0]
    assert len(plain.history()) == 2
    for store in stores[1:]:
        assert len(store.history()) > 5
        assert store_worker.intact(store, NAMES)
        assert store.modules() == plain.modules()
        assert [info.digest for info in store.list()] == [info.digest for info in plain.list()]
        for path in plain.modules():
            for (name, mine), (other, theirs) in zip(
                store.read_module(path), plain.read_module(path), strict=True
            ):
                assert (name, mine.scaling, mine.kind) == (other, theirs.scaling, theirs.kind)
                assert kit.bits(mine.A) == kit.bits(theirs.A), (path, name)
                assert kit.bits(mine.B) == kit.bits(theirs.B), (path, name)


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe["method"] for recipe in RECIPES])
def test_the_bundles_are_the_same(
    recipe: dict[str, Any], stores: list[AdapterStore], tmp_path: Path
) -> None:
    blobs = []
    for number, store in enumerate(stores):
        bundle = tmp_path / f"{number}.rmb"
        MergePipeline(store, recipe, device="cpu", workers=1).run(bundle)
        # Their names are the digests of the payloads.
        blobs.append({path.name: path.read_bytes() for path in (bundle / "blobs").iterdir()})
    assert blobs[0] == blobs[1] == blobs[2]
    assert len(blobs[0]) > 1
