"""What the commands share: errors as one line, tables, JSON, a progress bar, the common options."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import click
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from unmerge.errors import (
    ConfigError,
    ImportRefusedError,
    UnknownFormatError,
    UnknownMergerError,
    UnmergeError,
)
from unmerge.recipe import explain
from unmerge_bundle import BundleError

_WIDTH_OF_A_FILE = 160
# All but line feed and tab: an escape sequence can clear a terminal, or write into it.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_USAGE = (ConfigError, UnknownFormatError, UnknownMergerError, ValidationError)
# Adapters that are refused at once, one a line.
_REASONS = 20
INTERRUPTED = 130  # what a shell reports for a process that SIGINT ended


def command(example: str, name: str) -> Callable[[Callable[..., None]], click.Command]:
    """Return a decorator for the command `name`: an example, `--json`, `--debug`, error handling.

    The function gets `as_json` as a keyword argument. Errors of the library become one line on
    standard error, several adapters that are refused at once one line each: exit 2 for wrong usage,
    1 for everything else; tracebacks only with `--debug`.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def guarded(*args: Any, debug: bool, **options: Any) -> None:
            try:
                function(*args, **options)
            except (click.ClickException, click.exceptions.Exit, click.Abort):
                raise
            except KeyboardInterrupt:
                click.echo("unmerge: interrupted; store and output are as they were", err=True)
                sys.exit(INTERRUPTED)
            except Exception as error:
                if debug:
                    raise
                for line in _lines(error):
                    click.echo(f"unmerge: {line}", err=True)
                sys.exit(2 if isinstance(error, _USAGE) else 1)

        debug_option = click.option("--debug", is_flag=True, help="Show tracebacks.")
        json_option = click.option(
            "--json", "as_json", is_flag=True, help="Print one JSON object instead of text."
        )
        made = click.command(name, epilog=f"Example: {example}")
        return made(json_option(debug_option(guarded)))

    return decorate


def _lines(error: Exception) -> list[str]:
    """Return what is said of an error, without line breaks in it."""
    if isinstance(error, ImportRefusedError):
        return _refusals(error)
    if isinstance(error, ValidationError):
        text = explain(error)
    elif isinstance(error, UnmergeError | BundleError | OSError):
        text = str(error)
    else:
        text = f"unexpected {type(error).__name__}: {error}; --debug shows where"
    return [printable(text)]


def _refusals(error: ImportRefusedError) -> list[str]:
    refused = len(error.refused)
    lines = [printable(reason) for reason in error.reasons[:_REASONS]]
    if refused > _REASONS:
        lines.append(f"and {refused - _REASONS} more")
    hint = "; --skip-bad adds the others" if refused < error.of else ""
    if refused == 1:
        return [f"{lines[0]} (nothing was added{hint})"]
    return [*lines, f"{error.summary}{hint}"]


def printable(text: str) -> str:
    """Return `visible` text on one line."""
    return visible(" ".join(text.split()))


def visible(text: str) -> str:
    """Return text with escapes for what a terminal would obey, and for what cannot be encoded.

    Names, notes and configurations may come from strangers.
    """
    encoded = text.replace("\r\n", "\n").encode("utf-8", "backslashreplace").decode("utf-8")
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", encoded)


def console() -> Console:
    """Return a console for standard output, wide enough for tables when it is a file."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, width=_WIDTH_OF_A_FILE)


def print_json(data: Any) -> None:
    """Print `data` as one JSON object; infinities, which JSON lacks, become null."""
    click.echo(json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """Print a table; every column but the first that holds numbers only is right-aligned."""
    table = Table(title=escape(visible(title)) if title else None, title_justify="left")
    for index, column in enumerate(columns):
        cells = [row[index] for row in rows]
        numeric = bool(cells) and all(cell[:1].isdigit() or cell in ("", "–") for cell in cells)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(visible(cell)) for cell in row))
    console().print(table)


def say(text: str) -> None:
    """Print a line of `visible` text."""
    console().print(escape(visible(text)), soft_wrap=True)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar on standard error, where that is a terminal.

    Gives a function of phase, units done and units in all.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    terminal = Console(stderr=True)
    hidden = not terminal.is_terminal
    with Progress(*columns, console=terminal, transient=True, disable=hidden) as progress:
        tasks: dict[str, Any] = {}

        def update(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=total)
            progress.update(tasks[phase], completed=done, total=total)

        yield update


def size(nbytes: int) -> str:
    """Return a number of bytes for people, in powers of 1000."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def ratio(value: float | None) -> str:
    """Return a ratio as a percentage, or a dash where it is unknown."""
    return "–" if value is None else f"{value:.1%}"


def error_text(value: float | None) -> str:
    """Return a relative error with three significant digits, or a dash where there is none."""
    if value is None:
        return "–"
    return "∞" if value == float("inf") else f"{value:.3g}"


def mean_error(values: Sequence[float | None]) -> str:
    """Return the mean of relative errors, or a dash where one is not there.

    Factors have no error where only their product comes back.
    """
    known = [value for value in values if value is not None]
    return error_text(fmean(known) if known and len(known) == len(values) else None)


def type_text(annotation: Any) -> str:
    """Return the type of a field for people."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return text.replace("typing.", "").replace("Literal", "one of ")


def fact_lines(modules: Iterable[Mapping[str, float]]) -> list[str]:
    """Return one line per fact of a strategy: its range over the modules, or its one value."""
    by_name: dict[str, list[float]] = {}
    for facts in modules:
        for name, value in facts.items():
            by_name.setdefault(name, []).append(value)
    lines = []
    for name, values in sorted(by_name.items()):
        low, high = f"{min(values):.4g}", f"{max(values):.4g}"
        spread = low if low == high else f"{low} to {high}, {fmean(values):.4g} on average"
        lines.append(f"{name.replace('_', ' ')}: {spread} ({len(values)} modules)")
    return lines


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    if isinstance(data, float) and data in (float("inf"), float("-inf")):
        return None
    return data
