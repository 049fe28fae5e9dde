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
from tests.benchmarks import knots, lore, mm_svd, restore, rmm, store, ties
from tests.benchmarks.row import Row
from tests.benchmarks.store import Fact

BENCHMARKS: dict[str, Callable[[], list[Row]]] = {
    "mm_svd": mm_svd.benchmarks,
    "knots": knots.benchmarks,
    "lore": lore.benchmarks,
    "ties": ties.benchmarks,
    "rmm": rmm.benchmarks,
    "restore": restore.benchmarks,
}
HEADER = ("what", "peer", "ours, s", "peer, s", "ratio", "target", "memory", "difference", "peer's")
STORE = "store"
STORE_HEADER = ("what", "ours", "against", "ratio", "target")
PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
# A table of the page is what stands between two such lines.
MARKS = "<!-- {0}: begin -->", "<!-- {0}: end -->"


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


def _fact_cells(fact: Fact) -> tuple[str, ...]:
    limits = ((fact.least, "≥"), (fact.most, "≤"))
    bounds = [f"{sign} {limit:g}" for limit, sign in limits if limit is not None]
    target = f"{' '.join(bounds)} {_verdict(fact.met)}" if bounds else "–"
    return fact.what, fact.ours, fact.against, f"{fact.ratio:.3g}", target


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def _table(cells: Sequence[tuple[str, ...]], *, markdown: bool) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
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


def _save(mark: str, cells: Sequence[tuple[str, ...]]) -> None:
    begin, end = (line.format(mark) for line in MARKS)
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(begin)
    after = rest.split(end)[1]
    measured = f"{begin}\n{_machine()}\n\n{_table(cells, markdown=True)}\n{end}"
    PAGE.write_text(before + measured + after, encoding="utf-8")


def main() -> None:
    """Run what was asked for; the exit code is 1 where a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--only", choices=[*BENCHMARKS, STORE], help="run one benchmark")
    parser.add_argument("--quick", action="store_true", help="measure a small store")
    parser.add_argument(
        "--save", action="store_true", help=f"put the whole tables into docs/{PAGE.name}"
    )
    options = parser.parse_args()
    if options.save and (options.only not in (None, STORE) or options.quick):
        parser.error("--save keeps whole tables; leave out --quick, and --only but for the store's")
    torch.set_num_threads(1)
    met = True
    if options.only != STORE:
        names = [options.only] if options.only else list(BENCHMARKS)
        rows = [row for name in names for row in BENCHMARKS[name]()]
        cells = [HEADER, *map(_cells, rows)]
        met = all(row.met for row in rows)
        print(_table(cells, markdown=False))
        print()
        print(
            "CPU seconds (time.process_time), one torch thread, smallest of the repeats. "
            "Difference: relative Frobenius norm from the reference result."
        )
        if options.save:
            _save("measured", cells)
    if options.only in (None, STORE):
        facts = store.benchmarks(quick=options.quick)
        cells = [STORE_HEADER, *map(_fact_cells, facts)]
        met = met and all(fact.met for fact in facts)
        print(_table(cells, markdown=False))
        if options.save:
            _save(STORE, cells)
    print(_machine())
    raise SystemExit(0 if met else 1)


if __name__ == "__main__":
    main()
