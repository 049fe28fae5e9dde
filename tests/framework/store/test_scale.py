"""What a large collection costs: memory that does not grow with it, few bytes written twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import store_worker
from store_worker import Start, receive
from unmerge.adapter import Adapter, Factors
from unmerge.store import AdapterStore

ADAPTERS = 60


@pytest.fixture
def start() -> Iterator[Start]:
    with store_worker.processes() as start:
        yield start


def test_memory_does_not_grow_with_the_collection(tmp_path: Path, start: Start) -> None:
    _, pipe = start(store_worker.import_large, tmp_path / "zoo", ADAPTERS)
    pipe.send("go")
    peak, total = receive(pipe)
    assert total == 180 << 20
    # What is staged is held in memory up to 32 MiB; chunks of up to 4 MiB come on top.
    assert peak < 96 << 20


def test_adding_one_by_one_writes_a_constant_factor(tmp_path: Path) -> None:
    store = AdapterStore.create(tmp_path / "zoo")
    generator = torch.Generator().manual_seed(0)
    factors: dict[int, float] = {}
    for number in range(1, 65):
        A, B = torch.randn(8, 2048, generator=generator), torch.randn(1024, 8, generator=generator)
        store.add(Adapter(f"adapter-{number}", {"layers.0.q_proj": Factors(A, B, 2.0)}))
        store.commit(f"{number}")
        # Nothing is deleted, so this is all that was ever written.
        written = sum(path.stat().st_size for path in store_files(tmp_path))
        factors[number] = written / (number * (A.nbytes + B.nbytes))
    # Once, and once more for every power of four rows. Compression saves a tenth, and what the
    # store writes about itself, in small adapters, is that much again.
    for power in (0, 1, 2, 3):
        assert factors[4**power] < power + 1.2, factors
    assert max(factors.values()) < 4, factors


def store_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
