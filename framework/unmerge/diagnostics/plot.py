"""The picture of an analysis: two heat maps, drawn with matplotlib, which is imported here only."""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unmerge.errors import ConfigError
from unmerge_bundle import OutputExistsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from unmerge.diagnostics.analysis import Analysis

__all__ = ["check_plot", "plot_analysis"]

_FORMATS = (".png", ".svg")
# Beyond these a label no longer fits its row, a number its cell.
_MOST_LABELS = 60
_MOST_NUMBERS = 12


def plot_analysis(
    analysis: Analysis, path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Draw the cosines between adapters and the interference per module and adapter.

    Args:
        analysis: From `analyze`.
        path: Where to; a name that ends in .png or .svg. It appears complete or not at all, and
            equal analyses give equal bytes with one matplotlib.
        overwrite: Replace an existing file.

    Raises:
        ConfigError: Another ending, or matplotlib is not installed.
        OutputExistsError: The file exists and `overwrite` was not given.
    """
    target = check_plot(path, overwrite=overwrite)
    _write(target, _draw(analysis, target.suffix.lower()), overwrite=overwrite)


def check_plot(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Return the path of a plot that can be drawn, before anything is computed for it.

    Raises:
        ConfigError: The ending is neither .png nor .svg, or matplotlib is not installed.
        OutputExistsError: The file exists and `overwrite` was not given, or is a directory.
    """
    target = Path(path)
    if target.suffix.lower() not in _FORMATS:
        raise ConfigError(f"{target}: a plot is a file that ends in {' or '.join(_FORMATS)}")
    if target.is_dir():
        raise OutputExistsError("is a directory; choose another path", path=str(target))
    if os.path.lexists(target) and not overwrite:
        raise _exists(target)
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: there is no directory {target.parent}")
    try:
        import matplotlib as _matplotlib  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise ConfigError(
            f"a plot needs {error.name}; install it with: pip install 'unmerge[plots]'"
        ) from error
    return target


def _draw(analysis: Analysis, suffix: str) -> bytes:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names, paths = analysis.adapters, [module.path for module in analysis.modules]
    # Inches; a label needs a fifth of one, and a picture may not grow with thousands of adapters.
    side = min(max(3.0, 0.35 * len(names)), 24.0)
    height = max(side, min(0.2 * len(paths), 24.0))
    # Identifiers in an SVG come from this salt instead of a random one.
    with mpl.rc_context({"svg.hashsalt": "unmerge", "svg.fonttype": "none"}):
        figure = Figure(figsize=(2 * side + 6, height + 2), layout="constrained")
        left, right = figure.subplots(1, 2)
        # The diagonal is 1, and next to it most pairs would have one colour.
        widest = float(analysis.cosines.triu(1).abs().max()) or 1.0
        others = analysis.cosines.clone()
        others.diagonal().fill_(float("nan"))
        _heat_map(
            left,
            others,
            f"cosine between adapters, whole model (full colour: {widest:.2g})",
            columns=names,
            rows=names,
            colours=("RdBu_r", -widest, widest),
        )
        left.set_aspect("equal")
        matrix = analysis.interference_matrix()
        known = matrix[~matrix.isnan()]
        _heat_map(
            right,
            matrix,
            "interference per module and adapter (grey: no such module)",
            columns=names,
            rows=paths,
            # A store without any interference is drawn as 0 on a scale that has a width.
            colours=("magma_r", 0.0, float(known.max()) or 1.0),
        )
        buffer = io.BytesIO()
        # Without its date a file depends on what it shows alone.
        metadata: dict[str, Any] = {"Date": None} if suffix == ".svg" else {"Software": None}
        figure.savefig(buffer, format=suffix[1:], dpi=120, metadata=metadata)
    return buffer.getvalue()


def _heat_map(
    axes: Axes,
    values: torch.Tensor,
    title: str,
    *,
    columns: Sequence[str],
    rows: Sequence[str],
    colours: tuple[str, float, float],
) -> None:
    name, low, high = colours
    axes.set_facecolor("0.8")
    image = axes.imshow(values.numpy(), cmap=name, vmin=low, vmax=high, aspect="auto")
    axes.set_title(title, fontsize=10)
    axes.set_xticks(*_labels(columns), rotation=90, fontsize=7)
    axes.set_yticks(*_labels(rows), fontsize=7)
    if max(len(columns), len(rows)) <= _MOST_NUMBERS:
        middle, half = (low + high) / 2, (high - low) / 2
        for row, line in enumerate(values.tolist()):
            for column, value in enumerate(line):
                # Both colour maps are dark at one end or at both; there white can be read.
                dark = value > middle + 0.6 * half or (low < 0 and value < middle - 0.6 * half)
                if value == value:
                    axes.text(
                        *(column, row, f"{value:.2f}".replace("-0.00", "0.00")),
                        ha="center",
                        va="center",
                        fontsize=6,
                        color="white" if dark else "black",
                    )
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


def _labels(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Return positions and texts of as many evenly spaced labels as can be read."""
    step = -(-len(names) // _MOST_LABELS)
    positions = list(range(0, len(names), step))
    # A dollar sign would start a formula.
    return positions, [names[position].replace("$", r"\$") for position in positions]


def _write(target: Path, data: bytes, *, overwrite: bool) -> None:
    partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
    try:
        partial.write_bytes(data)
        if overwrite:
            partial.replace(target)
            return
        try:
            # A link, unlike a rename, never replaces what has appeared meanwhile.
            target.hardlink_to(partial)
        except FileExistsError as error:
            raise _exists(target) from error
    finally:
        partial.unlink(missing_ok=True)


def _exists(target: Path) -> OutputExistsError:
    return OutputExistsError(
        "exists; choose another path, or replace it with --overwrite (command line) or "
        "overwrite=True (Python)",
        path=str(target),
    )
