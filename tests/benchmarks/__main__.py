"""Runs the benchmarks and prints one table: `python -m tests.benchmarks` from the checkout."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from tests.benchmarks import knots, lore, mm_svd, restore, rmm, ties
from tests.benchmarks.row import Row

BENCHMARKS: dict[str, Callable[[], list[Row]]] = {
    "mm_svd": mm_svd.benchmarks,
    "knots": knots.benchmarks,
    "lore": lore.benchmarks,
    "ties": ties.benchmarks,
    "rmm": rmm.benchmarks,
    "restore": restore.benchmarks,
}
HEADER = ("what", "peer", "ours, s", "peer, s", "ratio", "target", "memory", "difference", "peer's")
PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
# The table of the page is what stands between these two lines.
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def _cells(row: Row) -> tuple[str, ...]:
    target = "–" if row.target is None else f"≥ {row.target:g}× {_verdict(row.ratio >= row.target)}"
    memory = "–"
    if row.memory_ratio is not None and row.ours_bytes is not None:
        memory = f"{row.ours_bytes / 1e6:.0f} MB, {row.memory_ratio:.3g} of the peer's"
        if row.memory_target is not None:
            met = row.memory_ratio <= row.memory_target
            memory += f" (≤ {row.memory_target:g} {_verdict(met)})"
    peers = "–" if row.peer_difference is None else f"{row.peer_difference:.0e}"
    return (
        row.what,
        row.peer,
        f"{row.ours_s:.4f}",
        f"{row.peer_s:.4f}",
        f"{row.ratio:.3g}×",
        target,
        memory,
        f"{row.difference:.0e}",
        peers,
    )


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


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
        f"{datetime.datetime.now(datetime.UTC).date()}, {platform.system()}, "
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"{versions}"
    )


def _save(rows: Sequence[Row]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    measured = f"{BEGIN}\n{_machine()}\n\n{_table(rows, markdown=True)}\n{END}"
    PAGE.write_text(before + measured + after, encoding="utf-8")


def main() -> None:
    """Run what was asked for; the exit code is 1 where a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--only", choices=BENCHMARKS, help="run one benchmark")
    parser.add_argument(
        "--save", action="store_true", help=f"put the whole table into docs/{PAGE.name}"
    )
    options = parser.parse_args()
    if options.only and options.save:
        parser.error("--save keeps the whole table; leave out --only")
    torch.set_num_threads(1)
    names = [options.only] if options.only else list(BENCHMARKS)
    rows = [row for name in names for row in BENCHMARKS[name]()]
    print(_table(rows, markdown=False))
    print()
    print(
        "CPU seconds (time.process_time), one torch thread, smallest of the repeats. Difference: "
        "relative Frobenius norm from the reference result."
    )
    print(_machine())
    if options.save:
        _save(rows)
    raise SystemExit(0 if all(row.met for row in rows) else 1)


if __name__ == "__main__":
    main()
