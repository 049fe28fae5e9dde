"""The store at a thousand adapters: import and its memory, reading by layer, adding one by one.

Times are of the wall, because the disk is part of the work. What reads begins with a cold page
cache, so the folder for temporary files has to be on a disk, with room for four times the adapters
(7 to 10 GB); `TMPDIR` chooses it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.benchmarks.memory import growth

from unmerge import Adapter, AdapterStore, Factors

T = TypeVar("T")

SHAPES = {
    "q": (384, 384),
    "k": (384, 384),
    "v": (384, 384),
    "o": (384, 384),
    "up": (1536, 384),
    "down": (384, 1536),
}
TARGETS = (("q", "k", "v", "o", "up", "down"), ("q", "v", "up", "down"))
RANKS = (4, 8, 16, 32, 64)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

REPEATS = 3
MEMORY = 1 << 30
READ_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured.

    Attributes:
        count: Adapters of the collection.
        layers: Layers each of them has.
        single: How many are added one by one, to compare what that writes.
        single_layers: Layers of those.
        versions: Length of the history that is listed.
    """

    count: int = 1000
    layers: int = 6
    single: tuple[int, ...] = (64, 256)
    single_layers: int = 2
    versions: int = 1000


QUICK = Size(count=60, layers=2, single=(16, 64), single_layers=1, versions=50)


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing measured.

    Attributes:
        what: What is done, with its sizes.
        ours: What was measured.
        against: What it is compared with: a peer in the same run, or a limit.
        ratio: Ours relative to that.
        most: The largest ratio that is acceptable, if there is one.
        least: The smallest, likewise.
    """

    what: str
    ours: str
    against: str
    ratio: float
    most: float | None = None
    least: float | None = None

    @property
    def met(self) -> bool:
        """Whether the ratio is acceptable."""
        most = float("inf") if self.most is None else self.most
        least = 0.0 if self.least is None else self.least
        return least <= self.ratio <= most


def adapter(number: int, layers: int) -> Adapter:
    """Return adapter `number` of a collection of mixed ranks, dtypes and targets."""
    generator = torch.Generator().manual_seed(number)
    rank = RANKS[number % len(RANKS)]
    dtype = DTYPES[number // len(RANKS) % len(DTYPES)]
    targets = TARGETS[number // (len(RANKS) * len(DTYPES)) % len(TARGETS)]
    modules = {}
    for layer in range(layers):
        for target in targets:
            d_out, d_in = SHAPES[target]
            modules[f"layers.{layer}.{target}"] = Factors(
                torch.randn(rank, d_in, generator=generator).to(dtype),
                torch.randn(d_out, rank, generator=generator).to(dtype),
                2.0,
            )
    return Adapter(f"adapter-{number:04d}", modules)


def nbytes(one: Adapter) -> int:
    """Return the bytes of an adapter's factors."""
    return sum(f.A.nbytes + f.B.nbytes for f in one.modules.values())


def tensors(one: Adapter) -> dict[str, torch.Tensor]:
    """Return an adapter's factors by key, as a file of its own has them."""
    return {
        f"{path}.lora_{factor}.weight": tensor
        for path, f in one.modules.items()
        for factor, tensor in (("A", f.A), ("B", f.B))
    }


def files(folder: Path) -> list[Path]:
    """Return all files in a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def written(folder: Path) -> int:
    """Return the bytes of all files; Icechunk changes none, so this is what was ever written."""
    return sum(path.stat().st_size for path in files(folder))


def forget_pages(folder: Path) -> None:
    """Have the next reader of these files wait for the disk."""
    for path in files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # pages that are still to be written cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(task: Callable[[], T]) -> tuple[float, T]:
    """Return how many seconds a task took, and its result."""
    start = time.perf_counter()
    result = task()
    return time.perf_counter() - start, result


def import_all(zoo: Path, size: Size) -> dict[str, float]:
    """Add the collection in one commit; the seconds are without those for making the adapters."""
    store = AdapterStore.create(zoo)
    making = total = 0.0

    def work() -> None:
        nonlocal making, total
        for number in range(size.count):
            seconds, one = timed(functools.partial(adapter, number, size.layers))
            making += seconds
            total += nbytes(one)
            store.add(one)
        store.commit("import")

    began = time.perf_counter()
    peak = growth(work)
    return {"seconds": time.perf_counter() - began - making, "bytes": total, "peak": peak}


def imported(zoo: Path, size: Size) -> dict[str, float]:
    """Run `import_all` in a process of its own, whose memory nothing else has used."""
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(zoo), json.dumps(dataclasses.asdict(size))],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


def read_layers(zoo: Path) -> int:
    """Read every module across all adapters; return the bytes."""
    store = AdapterStore.open(zoo)
    return sum(
        f.A.nbytes + f.B.nbytes for path in store.modules() for _, f in store.read_module(path)
    )


def read_layers_of_files(folder: Path, paths: Sequence[str], *, keep_open: bool) -> int:
    """Do the same with one safetensors file per adapter, opened once or once per module."""
    held: dict[Path, Any] = {}
    total = 0
    for path in paths:
        keys = {f"{path}.lora_{factor}.weight" for factor in "AB"}
        for file in files(folder):
            opened = held[file] if file in held else safe_open(file, "pt")
            if keep_open:
                held[file] = opened
            for key in keys.intersection(opened.keys()):
                total += opened.get_tensor(key).clone().nbytes  # a view alone reads nothing
    return total


def write_raw(path: Path, total: int) -> None:
    """Write `total` random bytes."""
    with path.open("wb") as file:
        while left := total - file.tell():
            file.write(os.urandom(min(left, READ_BYTES)))


def read_raw(path: Path) -> int:
    """Read a file from its beginning to its end."""
    buffer = bytearray(READ_BYTES)
    total = 0
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(buffer):
            total += got
    return total


def rate(bytes_: float, seconds: float) -> str:
    """Return a rate for people."""
    return f"{bytes_ / seconds / 1e6:.0f} MB/s"


def importing(zoo: Path, loose: Path, size: Size) -> Iterator[Fact]:
    """Import the collection, and write it as files of its own as well; both stay."""
    got = imported(zoo, size)
    total, seconds = int(got["bytes"]), got["seconds"]
    what = f"import of {size.count} adapters, {total / 1e9:.2f} GB, in one commit"
    theirs = 0.0
    loose.mkdir()
    for number in range(size.count):
        one, path = tensors(adapter(number, size.layers)), loose / f"{number:04d}.safetensors"
        theirs += timed(functools.partial(save_file, one, path))[0]
    yield Fact(
        what,
        rate(total, seconds),
        f"a safetensors file each, no checks: {rate(total, theirs)}",
        theirs / seconds,
    )
    peak = got["peak"]
    yield Fact(f"{what}: memory", f"{peak / 1e6:.0f} MB", "1 GiB", peak / MEMORY, most=1.0)
    stored = written(zoo)
    yield Fact(f"{what}: disk", f"{stored / 1e9:.2f} GB", "the tensors' bytes", stored / total)


def reading(zoo: Path, loose: Path | None, what: str) -> Iterator[Fact]:
    """Read a store by layer with a cold cache, against as many bytes of one file."""
    total = read_layers(zoo)
    raw = zoo.parent / "raw"
    write_raw(raw, total)
    peers: list[tuple[str, Callable[[], int], float | None]] = [
        ("as many bytes of one file", lambda: read_raw(raw), 0.4),
    ]
    if loose is not None:
        paths = list(AdapterStore.open(zoo).modules())
        each = functools.partial(read_layers_of_files, loose, paths)
        peers += [
            ("a safetensors file each", functools.partial(each, keep_open=False), 1.0),
            ("the same, all kept open, no checks", functools.partial(each, keep_open=True), None),
        ]
    tasks: dict[str, Callable[[], int]] = {"ours": functools.partial(read_layers, zoo)}
    tasks |= {name: task for name, task, _ in peers}
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(REPEATS):  # in turns, so that a disk that slows down does so for all
        for name, task in tasks.items():
            forget_pages(zoo.parent)
            seconds, got = timed(task)
            times[name].append(seconds)
            if got != total:
                raise RuntimeError(f"{name}: {got} bytes were read, expected {total}")
    raw.unlink()
    ours = min(times["ours"])
    for name, _, least in peers:
        theirs = min(times[name])
        against = f"{name}: {rate(total, theirs)}"
        yield Fact(what, rate(total, ours), against, theirs / ours, least=least)


def looking(zoo: Path, what: str) -> Iterator[Fact]:
    """Open a store and list its adapters and versions."""
    parts: dict[str, Callable[[], object]] = {
        "open": lambda: AdapterStore.open(zoo),
        "ls": lambda: AdapterStore.open(zoo).list(),
        "log": lambda: AdapterStore.open(zoo).history(),
    }
    for part, task in parts.items():
        seconds = min(timed(task)[0] for _ in range(REPEATS))
        yield Fact(f"{part}, {what}", f"{1e3 * seconds:.0f} ms", "1 s", seconds, most=1.0)


def adding_one_by_one(zoo: Path, size: Size) -> Iterator[Fact]:
    """Add adapters in a commit each, and compare the bytes written with the adapters'."""
    store = AdapterStore.create(zoo)
    total = count = 0
    for wanted in size.single:
        while count < wanted:
            one = adapter(count, size.single_layers)
            count += 1
            total += nbytes(one)
            store.add(one)
            store.commit(f"{count}")
        # A row is written once, and once more for every power of four up to a full chunk.
        yield Fact(
            f"{count} adapters added one by one, {total / 1e6:.0f} MB: bytes written",
            f"{written(zoo) / 1e6:.0f} MB",
            "the tensors' bytes",
            written(zoo) / total,
            most=6.0,
        )


def many_versions(zoo: Path, size: Size) -> Iterator[Fact]:
    """List a long history."""
    store = AdapterStore.create(zoo)
    store.add(adapter(0, 1))
    store.commit("the adapter")
    for number in range(size.versions - len(store.history())):
        store.annotate("adapter-0000", note=f"note {number}")
        store.commit(f"note {number}")
    yield from looking(zoo, f"{size.versions} versions")


def benchmarks(*, quick: bool = False) -> list[Fact]:
    """Measure everything; takes minutes. If `quick`, a small store, for which no limit is set."""
    size = QUICK if quick else Size()
    facts: list[Fact] = []
    with tempfile.TemporaryDirectory() as name:
        zoo, loose = Path(name) / "zoo", Path(name) / "loose"
        facts += importing(zoo, loose, size)
        facts += reading(zoo, loose, f"{size.count} adapters: read by layer, cold cache")
        facts += looking(zoo, f"{size.count} adapters")
    with tempfile.TemporaryDirectory() as name:
        facts += adding_one_by_one(Path(name) / "single", size)
        what = f"{size.single[-1]} adapters added one by one: read by layer, cold cache"
        facts += [
            dataclasses.replace(fact, least=None)
            for fact in reading(Path(name) / "single", None, what)
        ]
        facts += many_versions(Path(name) / "long", size)
    return [dataclasses.replace(f, least=None, most=None) if quick else f for f in facts]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(import_all(Path(sys.argv[1]), Size(**json.loads(sys.argv[2])))))
