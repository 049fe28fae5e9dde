"""Runs the benchmarks and prints one table: `python -m tests.benchmarks` from the checkout."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version

import torch
from tests.benchmarks import mm_svd, restore, rmm
from tests.benchmarks.row import Row

BENCHMARKS: dict[str, Callable[[], Row]] = {
    "mm_svd": mm_svd.benchmark,
    "rmm": rmm.benchmark,
    "restore": restore.benchmark,
}
HEADER = ("what", "peer", "ours, s", "peer, s", "ratio", "target", "difference", "peer's")


def _cells(row: Row) -> tuple[str, ...]:
    target = "–" if row.target is None else f"≥ {row.target:g} {'met' if row.met else 'MISSED'}"
    peers = "–" if row.peer_difference is None else f"{row.peer_difference:.0e}"
    return (
        row.what,
        row.peer,
        f"{row.ours_s:.4f}",
        f"{row.peer_s:.4f}",
        f"{row.ratio:.3g}×",
        target,
        f"{row.difference:.0e}",
        peers,
    )


def _table(rows: Sequence[Row], *, markdown: bool) -> str:
    cells = [HEADER, *map(_cells, rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADER))]
    lines = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells
    ]
    lines.insert(1, ["-" * width for width in widths])
    if markdown:
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _machine() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "peft"))
    return (
        f"{datetime.datetime.now(datetime.UTC).date()}, {platform.platform()}, "
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"{versions}"
    )


def main() -> None:
    """Run what was asked for; the exit code is 1 where a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="print a markdown table")
    parser.add_argument("--only", choices=BENCHMARKS, help="run one benchmark")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [options.only] if options.only else list(BENCHMARKS)
    rows = [BENCHMARKS[name]() for name in names]
    print(_table(rows, markdown=options.markdown))
    print()
    print(
        "CPU seconds (time.process_time), one torch thread, smallest of the repeats. Difference: "
        "relative Frobenius norm from the dense float64 result."
    )
    print(_machine())
    raise SystemExit(0 if all(row.met for row in rows) else 1)


if __name__ == "__main__":
    main()
