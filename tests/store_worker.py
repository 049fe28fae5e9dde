"""What other processes do to a store in the tests: commit, read, collect, and be killed at it."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from adapters import make_adapter, peft_tensors
from unmerge.adapter import Adapter, Factors
from unmerge.errors import StoreError
from unmerge.store import AdapterStore, staging

# Wide enough that their chunks are files of their own: Icechunk keeps tiny ones in its manifests.
MODULES = {"layers.0.q_proj": (320, 240), "layers.0.up": (240, 160)}
DTYPES = (torch.float32, torch.bfloat16)
BATCH = 4
# Versions that every other collection leaves, tagged ones aside.
KEPT = 4
# Nobody waits that long for a process that is alive.
PATIENCE = 120

Start = Callable[..., tuple[ForkServerProcess, Connection]]


def adapter(name: str) -> Adapter:
    """Return an adapter that follows from its name; ranks, dtypes and modules differ."""
    seed = zlib.crc32(name.encode())
    dtype = DTYPES[seed // 2 % 2]
    head = torch.arange(float(seed % 1000), dtype=torch.float64)
    return make_adapter(
        name,
        seed=seed,
        rank=(2, 4)[seed % 2],
        dtype=dtype,
        modules=MODULES if seed // 4 % 2 else dict(list(MODULES.items())[:1]),
        verbatim={} if seed // 8 % 2 else {"base_model.model.head.weight": head},
    )


def content(one: Adapter) -> dict[str, object]:
    """Return everything of an adapter as plain values: equal exactly when all bits are."""
    tensors: dict[str, object] = {
        key: (
            t.dtype,
            tuple(t.shape),
            t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for key, t in peft_tensors(one).items()
    }
    scalings = {path: factors.scaling.hex() for path, factors in one.modules.items()}
    rest = (one.name, one.config, one.format, one.base_model, one.revision, one.source)
    return {**tensors, **scalings, "rest": rest}


def intact(store: AdapterStore, names: Sequence[str]) -> bool:
    """Return whether a store has exactly the adapters of these names, bit for bit."""
    return list(store.names()) == sorted(names) and all(
        content(store.read_adapter(name)) == content(adapter(name)) for name in names
    )


@contextlib.contextmanager
def processes() -> Iterator[Start]:
    """Give a function that starts a function of this module in a process of its own.

    It returns the process, which is ready and waits, and our end of the pipe to it. Processes end
    with the context.
    """
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["unmerge", "adapters"])  # imports are paid for once
    started: list[ForkServerProcess] = []

    def start(target: Callable[..., None], *args: object) -> tuple[ForkServerProcess, Connection]:
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(dict(os.environ), theirs, *args))
        process.start()
        theirs.close()
        started.append(process)
        receive(ours)
        return process, ours

    try:
        yield start
    finally:
        for process in started:
            process.kill()
            process.join()


def _settle(environment: Mapping[str, str]) -> None:
    """Make this process like one that a person started."""
    os.environ.update(environment)
    # numcodecs makes a lock of the default kind, which a killed process would leave behind if
    # that were the forkserver's.
    multiprocessing.set_start_method("fork", force=True)


def receive(pipe: Connection) -> Any:
    """Return what a process says next; one that says nothing, or ended, fails the test."""
    assert pipe.poll(PATIENCE), "the process says nothing"
    return pipe.recv()


class Step(NamedTuple):
    """One thing that a writer does: "add", "remove" or "tag", and the name."""

    what: str
    name: str


class Acknowledged(NamedTuple):
    """A version that a writer was told is committed, or tagged, by then (`time.monotonic`)."""

    step: Step
    version: str
    time: float


class Seen(NamedTuple):
    """What a reader found: nothing acknowledged before `time` may be missing from it."""

    time: float
    history: tuple[str, ...]
    names: tuple[str, ...]
    tags: dict[str, str]


def write(
    environment: Mapping[str, str], pipe: Connection, address: str, steps: Sequence[Step]
) -> None:
    """Do what is asked for, a commit each, and report each one acknowledged."""
    _settle(environment)
    store = AdapterStore.open(address)
    pipe.send("ready")
    pipe.recv()
    for step in steps:
        if step.what == "tag":
            store.tag(step.name)
            version = store.version
        else:
            if step.what == "add":
                store.add(adapter(step.name))
            else:
                store.remove(step.name)
            version = store.commit(f"{step.what} {step.name}")
        pipe.send(Acknowledged(step, version, time.monotonic()))
    pipe.close()


def read(environment: Mapping[str, str], pipe: Connection, address: str, seed: int) -> None:
    """Read one version after another until told to stop; report what was seen, or what is wrong."""
    _settle(environment)
    draw = random.Random(seed)  # noqa: S311 - which adapter is looked at is no secret
    pipe.send("ready")
    pipe.recv()
    seen: list[Seen] = []
    while not pipe.poll():
        now = time.monotonic()
        store = AdapterStore.open(address)
        ids = tuple(version.id for version in store.history())
        seen.append(Seen(now, ids, store.names(), store.tags()))
        if store.names():
            one = draw.choice(store.names())
            assert content(store.read_adapter(one)) == content(adapter(one)), one
            path = draw.choice(sorted(store.modules()))
            for name, factors in store.read_module(path):
                expected = adapter(name).modules[path]
                assert torch.equal(factors.A, expected.A), (path, name)
                assert torch.equal(factors.B, expected.B), (path, name)
    pipe.send(seen)
    pipe.close()


class Report(NamedTuple):
    """What a process that is to be killed begins or has done, and when (`time.monotonic`)."""

    what: str
    number: int
    version: str
    time: float


def batch(number: int) -> list[str]:
    """Return the names of the adapters that an import has."""
    return [f"import-{number}-{n}" for n in range(BATCH)]


def batch_in(store: AdapterStore) -> int:
    """Return the number of the batch that a store holds, bit for bit and nothing else."""
    number = int(store.names()[0].split("-")[1])
    assert intact(store, batch(number)), store.version
    return number


def replace_batch(store: AdapterStore, number: int) -> str:
    """Import a batch of adapters in place of the one before, in one commit."""
    _stage(store, number)
    return store.commit(f"import {number}")


def import_batches(
    environment: Mapping[str, str], pipe: Connection, address: str, first: int
) -> None:
    """Import one batch after another until killed; report what begins, and what is acknowledged."""
    _settle(environment)
    staging._IN_MEMORY = 1  # what is staged goes to the disk, as it does for large adapters
    store = AdapterStore.open(address)
    pipe.send("ready")
    pipe.recv()
    for number in itertools.count(first):
        _report(pipe, "stages", number)
        _stage(store, number)
        _report(pipe, "commits", number)
        version = store.commit(f"import {number}")
        _report(pipe, "committed", number, version)


def collect(environment: Mapping[str, str], pipe: Connection, address: str, first: int) -> None:
    """Import a batch, leave garbage, forget old versions and collect, and so on until killed."""
    _settle(environment)
    store = AdapterStore.open(address)
    pipe.send("ready")
    pipe.recv()
    for number in itertools.count(first):
        version = replace_batch(store, number)
        _report(pipe, "committed", number, version)
        leave_garbage(store, number + 1)
        _report(pipe, "collects", number)
        # In turns, some versions are forgotten, and all but the newest, which is compacted.
        some = store.history()[:KEPT][-1].written_at
        store.gc(forget_before=some if number % 2 else datetime.now(UTC))
        _report(pipe, "collected", number)


def leave_garbage(store: AdapterStore, number: int) -> None:
    """Begin to commit a batch and give up half-way, so that chunks stay that no version has."""

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise InterruptedError

    _stage(store, number)
    with contextlib.suppress(StoreError):
        store.commit("never", progress=stop)
    store.discard()


def _stage(store: AdapterStore, number: int) -> None:
    if number:
        for name in batch(number - 1):
            store.remove(name)
    for name in batch(number):
        store.add(adapter(name))


def _report(pipe: Connection, what: str, number: int, version: str = "") -> None:
    pipe.send(Report(what, number, version, time.monotonic()))


def add_same(environment: Mapping[str, str], pipe: Connection, address: str, number: int) -> None:
    """Commit an adapter whose name others commit as well, and report how that went."""
    _settle(environment)
    store = AdapterStore.open(address)
    store.add(adapter("same"), note=f"from {number}")
    pipe.send("ready")
    pipe.recv()
    try:
        store.commit(f"from {number}")
    except Exception as error:  # noqa: BLE001 - whichever it is, the test judges it
        pipe.send(type(error).__name__)
    else:
        pipe.send("committed")


def import_large(
    environment: Mapping[str, str], pipe: Connection, address: str, count: int
) -> None:
    """Import adapters of 3 MiB in one commit; report the memory that took, and their bytes."""
    _settle(environment)
    store = AdapterStore.create(address)
    generator = torch.Generator().manual_seed(0)

    def work() -> None:
        for number in range(count):
            A = torch.randn(128, 3072, generator=generator)
            B = torch.randn(3072, 128, generator=generator)
            store.add(Adapter(f"adapter-{number:02d}", {"layers.0": Factors(A, B, 2.0)}))
        store.commit("all")

    pipe.send("ready")
    pipe.recv()
    peak = _peak(work)
    pipe.send((peak, sum(info.nbytes for info in store.list())))


def _peak(task: Callable[[], object]) -> int:
    """Return by how many bytes the resident size at its peak exceeds that before."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present size
    before = _resident("VmRSS")
    task()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])
