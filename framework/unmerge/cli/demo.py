"""The command `demo`: the whole story on the repository's adapters, as one table."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import click

from unmerge.cli.output import (
    command,
    error_text,
    print_json,
    print_table,
    progress_bar,
    ratio,
    say,
)
from unmerge.demo import RESTORED, DemoReport, default_zoo, run_demo


@command("unmerge demo --out demo-output", name="demo")
@click.option(
    "--zoo",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of adapters with texts; the repository's unless given.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Directory to create.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier demo's output.")
def demo(zoo: Path | None, out: Path, device: str, overwrite: bool, as_json: bool) -> None:
    """Import, merge, restore and measure real adapters.

    Six or more adapters of a small sentence encoder, each for a task of its own, are imported
    into a store, merged with RMM (p = 2 and 3) and with MM-SVD of the average, restored, and
    measured on held-out text.
    """
    with progress_bar() as progress:
        report = run_demo(
            zoo or default_zoo(), out, overwrite=overwrite, device=device, progress=progress
        )
    if as_json:
        print_json(_data(report))
        return
    _print(report)


def _data(report: DemoReport) -> dict[str, object]:
    return {
        "directory": str(report.directory),
        "base_model": report.base_model,
        "adapters": [asdict(row) for row in report.rows],
        "element_ratios": report.element_ratios,
        "byte_ratios": report.byte_ratios,
    }


def _print(report: DemoReport) -> None:
    variants = ("base", "original", *RESTORED, "merged")
    rows = []
    for variant in variants:
        errors = [row.errors[variant] for row in report.rows if variant in row.errors]
        scores = [row.accuracy[variant] for row in report.rows]
        kept = report.byte_ratios.get(variant, 1.0 if variant == "original" else None)
        rows.append(
            (
                variant,
                *(f"{score:.3f}" for score in scores),
                f"{fmean(scores):.3f}",
                ratio(kept),
                error_text(fmean(errors) if errors else None),
            )
        )
    print_table(
        ("", *(row.name for row in report.rows), "mean", "bytes kept", "error"),
        rows,
        title=f"accuracy on held-out text, {len(report.rows)} adapters of {report.base_model}, "
        f"{sum(row.texts for row in report.rows)} texts",
    )
    out = report.directory
    say(
        "base: the adapter switched off, its head kept. Restored out of reversible bundles: rmm (p "
        "shared basis adapters), each adapter alone cut to a rank (as many elements as p=2), and "
        "in 8- and 4-bit groups. merged: one adapter for all tasks (MM-SVD of the average, rank "
        "16), each task with its own head. bytes kept: of the whole bundle, heads and manifest "
        "too, relative to the adapter files. error: of the delta, relative, mean over modules."
    )
    say(
        f"\nStore, bundles and restored adapters are in {out}/. Now with adapters of your own:\n\n"
        f"{_activation()}"
        "    unmerge init zoo\n"
        "    unmerge add zoo path/to/adapters/*\n"
        "    unmerge plan zoo --method rmm --set basis_size=3\n"
        "    unmerge merge zoo out.rmb --method rmm --set basis_size=3\n"
        "    unmerge restore out.rmb NAME restored/NAME\n"
    )


def _activation() -> str:
    """Return the line that puts `unmerge` on the path, where it is not there yet."""
    script = Path(sys.prefix, "bin", "activate")
    if shutil.which("unmerge") is not None or not script.is_file():
        return ""
    return f"    source {os.path.relpath(script)}\n"


COMMANDS = (demo,)
