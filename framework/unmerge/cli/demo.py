"""The command `demo`: the whole story on the repository's adapters, as one table."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

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
from unmerge.demo import DemoReport, default_zoo, run_demo


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
    variants = ("base", "original", "p=2", "p=3", "merged")
    rows = [
        (
            row.name,
            str(row.texts),
            *(f"{row.accuracy[variant]:.3f}" for variant in variants),
            error_text(row.errors["p=2"]),
            error_text(row.errors["p=3"]),
        )
        for row in report.rows
    ]
    means = [
        sum(row.accuracy[variant] for row in report.rows) / len(report.rows) for variant in variants
    ]
    rows.append(("mean", "", *(f"{mean:.3f}" for mean in means), "", ""))
    for label, ratios in (
        ("elements kept", report.element_ratios),
        ("bytes kept", report.byte_ratios),
    ):
        kept = (ratio(ratios[variant]) for variant in ("p=2", "p=3", "merged"))
        rows.append((label, "", "", "100.0%", *kept, "", ""))
    print_table(
        (
            "adapter",
            "texts",
            "bare base",
            "original",
            "restored p=2",
            "restored p=3",
            "merged",
            "error p=2",
            "error p=3",
        ),
        rows,
        title=f"accuracy on held-out text, {len(report.rows)} adapters of {report.base_model}",
    )
    out = report.directory
    say(
        "bare base: the adapter switched off, its head kept. restored: out of a reversible bundle "
        "(RMM) of p basis adapters. merged: one adapter for all tasks (MM-SVD of the average, "
        "rank 16), each task with its own head. error: of the delta, relative, mean over modules. "
        "bytes count the whole bundle, heads and manifest too."
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
