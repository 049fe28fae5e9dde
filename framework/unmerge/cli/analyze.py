"""The command that compares adapters before they are merged: analyze."""

from __future__ import annotations

import math
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
from unmerge.diagnostics import Analysis, analyze, plot_analysis
from unmerge.diagnostics.plot import check_plot
from unmerge.store import AdapterStore

# More adapters give no readable matrix, and more modules no readable table: the largest are shown.
_MOST_COLUMNS = 10
_MOST_ROWS = 12


@command("unmerge analyze zoo --adapters sql,math --plot zoo.png", name="analyze")
@click.argument("store")
@click.option("--adapters", metavar="A,B,…", help="Adapters to compare; all unless given.")
@click.option(
    "--modules", metavar="GLOB", multiple=True, help="Modules to look at; all unless given."
)
@click.option("--at", metavar="VERSION", help="Version id or tag of the store to read.")
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Draw heat maps into a .png or .svg file; needs unmerge[plots].",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing plot.")
def analyze_command(
    store: str,
    adapters: str | None,
    modules: tuple[str, ...],
    at: str | None,
    plot: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Say how adapters overlap and how much they would interfere.

    Cosines, angles and shares are exact and need no data; docs/diagnostics.md says what each
    number means. --json prints all of them, the tables show the largest.
    """
    if plot is not None:
        check_plot(plot, overwrite=overwrite)
    with progress_bar() as progress:
        result = analyze(
            AdapterStore.open(store, at=at),
            None if adapters is None else [name.strip() for name in adapters.split(",")],
            list(modules) or None,
            progress=progress,
        )
    if plot is not None:
        plot_analysis(result, plot, overwrite=overwrite)
    if as_json:
        print_json({**result.to_data(), "plot": None if plot is None else str(plot)})
        return
    _print_adapters(result)
    _print_pairs(result)
    _print_modules(result)
    if plot is not None:
        say(f"wrote {plot}")


def _print_adapters(result: Analysis) -> None:
    counts = dict.fromkeys(result.adapters, 0)
    for module in result.modules:
        for name in module.adapters:
            counts[name] += 1
    print_table(
        ("adapter", "modules", "norm", "interference", "closest", "cosine", "most inside", "share"),
        [
            (
                name,
                str(counts[name]),
                error_text(float(result.norms[n])),
                error_text(float(result.interference[n])),
                *_extreme(result, n, "cosine"),
                *_extreme(result, n, "share"),
            )
            for n, name in enumerate(result.adapters)
        ],
        title=f"{result.store} at {result.version}, {len(result.modules)} modules",
    )
    say("interference: what the sum of the others adds where an adapter acts, relative to it\n")


def _extreme(result: Analysis, n: int, what: str) -> tuple[str, str]:
    """Return the other adapter of largest cosine (by magnitude) or share with adapter n."""
    values = (result.cosines if what == "cosine" else result.shares)[n].tolist()
    others = [(abs(value), -m) for m, value in enumerate(values) if m != n]
    if not others:
        return "–", "–"
    m = -max(others)[1]
    shown = _cosine(values[m]) if what == "cosine" else ratio(values[m])
    return result.adapters[m], shown


def _print_pairs(result: Analysis) -> None:
    names = result.adapters
    if 1 < len(names) <= _MOST_COLUMNS:
        print_table(
            ("cosine", *names),
            [
                (name, *(_cosine(value) for value in result.cosines[n].tolist()))
                for n, name in enumerate(names)
            ],
        )
        return
    cosines = result.cosines.tolist()
    pairs = [(n, m) for n in range(len(names)) for m in range(n + 1, len(names))]
    pairs.sort(key=lambda pair: -abs(cosines[pair[0]][pair[1]]))
    if pairs:
        print_table(
            ("adapter", "and", "cosine"),
            [(names[n], names[m], _cosine(cosines[n][m])) for n, m in pairs[:_MOST_ROWS]],
            title=f"the {min(_MOST_ROWS, len(pairs))} largest cosines of {len(pairs)} pairs",
        )


def _print_modules(result: Analysis) -> None:
    if len(result.adapters) < 2:
        return
    ranked = sorted(
        result.modules, key=lambda module: (-float(module.geometry.interference.max()), module.path)
    )
    rows = []
    for module in ranked[:_MOST_ROWS]:
        geometry, direct = module.geometry, module.direct
        worst = int(geometry.interference.argmax())
        rows.append(
            (
                module.path,
                f"{module.d_out} × {module.d_in}",
                error_text(float(geometry.interference[worst])),
                module.adapters[worst],
                _between(geometry.columns.overlap.tolist()),
                _between(geometry.rows.overlap.tolist()),
                "–" if direct is None else error_text(direct.relative),
                "–" if direct is None else ratio(direct.top_energy),
                "–" if direct is None else ratio(direct.noise().top_energy(direct.rank)),
            )
        )
    print_table(
        (
            *("module", "shape", "interference", "of", "columns", "rows"),
            *("direct", "in rank r", "noise"),
        ),
        rows,
        title=f"the {len(rows)} modules with most interference, of {len(ranked)}",
    )
    say(
        "columns, rows: mean overlap of column and row spaces; direct: cross terms of direct "
        "merging, relative\nto the sum of the deltas; in rank r: share of their energy in as many "
        "directions as an adapter has, and of noise\n"
    )
    if result.direct_relative is not None:
        say(
            "adding up factors instead of deltas (direct merging) changes the sum by "
            f"{error_text(result.direct_relative)} of its norm"
        )
    reasons = {module.no_direct for module in result.modules if module.no_direct}
    if reasons:
        count = sum(1 for module in result.modules if module.no_direct)
        say(f"{count} modules cannot be merged directly: {'; '.join(sorted(reasons))}")


def _between(overlap: list[list[float]]) -> str:
    """Return the mean over the pairs of different adapters, a dash where there is none."""
    values = [value for n, row in enumerate(overlap) for value in row[n + 1 :]]
    return ratio(math.fsum(values) / len(values)) if values else "–"


def _cosine(value: float) -> str:
    """Return a cosine; always signed, so that a column is aligned. Not -0.000, nor a rounded 1."""
    return f"{value + 0.0:+.3f}".replace("-0.000", "+0.000")


COMMANDS = (analyze_command,)
