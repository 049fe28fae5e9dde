"""Commands on a bundle: inspect, restore, export, append."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import click

import unmerge_bundle
from unmerge.appending import append as append_to_bundle
from unmerge.cli.options import some
from unmerge.cli.output import (
    command,
    error_text,
    fact_lines,
    mean_error,
    print_json,
    print_table,
    progress_bar,
    say,
    size,
)
from unmerge.errors import ConfigError, IncompatibleAdaptersError
from unmerge.exporting import writable
from unmerge.formats import default_formats, read_adapter
from unmerge_bundle import Appended, BundleError, SavedAdapter
from unmerge_bundle.arrays import FloatDtype
from unmerge_bundle.peft import VERBATIM_FILE

_BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
_DTYPE = click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Dtype of the factors written; as the adapters were unless given.",
)
# An appended adapter this many times worse than the worst of the others calls for a new merge.
_REFIT = 1.5

_RANK = click.option(
    "--rank",
    type=click.IntRange(min=1),
    help="Largest rank: a full-rank delta needs one, larger factors are reduced to it.",
)
_OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace an existing directory.")


@command("unmerge inspect out.rmb", name="inspect")
@_BUNDLE
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what a bundle holds: strategy, adapters, sizes, reconstruction errors."""
    opened = unmerge_bundle.open(bundle)
    document = opened.generation
    sizes = opened.size()
    elements = sizes.shared.elements + sum(a.elements for a in sizes.adapters.values())
    errors = {name: opened.errors(name) for name in opened.adapters}
    if as_json:
        print_json(
            {
                "bundle": str(bundle),
                "restores": opened.restores,
                "generations": [g.model_dump(mode="json") for g in opened.generations],
                "strategy": document.strategy.model_dump(mode="json"),
                "recipe": dict(document.recipe),
                "base_model": document.base_model.model_dump(mode="json"),
                "store_dtype": document.store_dtype,
                "libraries": document.libraries,
                "sources": [source.model_dump(mode="json") for source in document.sources],
                "modules": [module.model_dump(mode="json") for module in document.modules],
                "absent": {name: list(paths) for name, paths in document.absent.items()},
                "unmerged": {name: list(keys) for name, keys in document.unmerged.items()},
                "elements": elements,
                "total_bytes": sizes.total,
                "errors": {
                    name: {path: e.model_dump(mode="json") for path, e in by_path.items()}
                    for name, by_path in errors.items()
                },
            }
        )
        return
    strategy = document.strategy
    kind = "restores every adapter" if opened.restores else "holds one merged adapter"
    say(f"{bundle}: {kind}")
    say(f"strategy    {strategy.method} version {strategy.version}, from {strategy.distribution}")
    say(f"fields      {_fields(document.recipe)}")
    say(f"base model  {document.base_model.id or 'unknown'}")
    say(f"modules     {len(document.modules)}, stored as {document.store_dtype}")
    say(f"generation  {document.number} of {len(opened.generations)}")
    say(f"size        {size(sizes.total)}, {elements} elements in encodings")
    for line in fact_lines([module.facts for module in document.modules]):
        say(line)
    if not opened.restores:
        print_table(
            ("source", "weight", "digest"),
            [(s.name, f"{s.weight:g}", s.digest[:19]) for s in document.sources],
        )
        _say_unmerged(document.unmerged)
        return
    print_table(
        ("adapter", "own size", "error of the delta: mean", "largest", "of the factors: mean"),
        [
            (
                name,
                size(sizes.adapters[name].bytes + sizes.verbatim[name].bytes),
                error_text(fmean([e.delta for e in by_path.values()])),
                error_text(max(e.delta for e in by_path.values())),
                mean_error([e.factors for e in by_path.values()]),
            )
            for name, by_path in errors.items()
        ],
        title="relative reconstruction error over the modules",
    )


@command("unmerge restore out.rmb sql restored/sql", name="restore")
@_BUNDLE
@click.argument("name")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--portable",
    is_flag=True,
    help="Fold scalings into B and write a configuration every server reads.",
)
@_RANK
@_DTYPE
@_OVERWRITE
def restore(
    bundle: Path,
    name: str,
    directory: Path,
    portable: bool,
    rank: int | None,
    dtype: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Give one adapter back as a PEFT directory."""
    with progress_bar() as progress:
        progress("restore", 0, 1)
        restored = unmerge_bundle.open(bundle).restore(name, dtype=_float_dtype(dtype))
        saved = restored.save_peft(directory, portable=portable, rank=rank, overwrite=overwrite)
        progress("restore", 1, 1)
    errors = [module.errors for module in restored.modules.values()]
    largest = max(e.delta for e in errors)
    if as_json:
        print_json(
            {
                "adapter": name,
                "directory": str(directory),
                "modules": len(errors),
                "verbatim": list(restored.verbatim),
                "beside": list(saved.beside),
                "largest_delta_error": largest,
                "rounding": saved.rounding,
                "truncation": saved.truncation,
                "errors": {
                    path: {"factors": m.errors.factors, "delta": m.errors.delta}
                    for path, m in restored.modules.items()
                },
            }
        )
        return
    reduced = f", before the reduction to rank {rank}" if saved.truncation > 0 else ""
    say(
        f"restored {name} to {directory}: {len(errors)} modules, {len(restored.verbatim)} verbatim "
        f"tensors; relative error of the delta {error_text(fmean([e.delta for e in errors]))} on "
        f"average, {error_text(largest)} at most{reduced}"
    )
    if saved.rounding > 0:
        say(
            f"what is written differs from that by {error_text(saved.rounding)} at most, by "
            "rounding to another dtype or form"
        )
    _say_truncation(saved)
    if saved.beside:
        say(
            f"note: PEFT does not load {some(saved.beside)}, which the adapter's own format "
            f"({restored.format}) keeps whole; they are in {VERBATIM_FILE} beside it"
        )
    formats = default_formats()
    foreign = restored.format != "peft" and restored.format in formats
    if foreign and writable(formats[restored.format].format):
        say(
            f"note: modules are called as in {restored.format}; a store gives the adapter back in "
            "its own format (unmerge export-adapter)"
        )


@command("unmerge export out.rmb merged/ --rank 32", name="export")
@_BUNDLE
@click.argument("directory", type=click.Path(path_type=Path))
@_RANK
@_DTYPE
@_OVERWRITE
def export(
    bundle: Path,
    directory: Path,
    rank: int | None,
    dtype: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the merged adapter of a bundle as a PEFT directory.

    A full-rank result, as of ties or dare on deltas, needs --rank; what that cuts off is printed.
    """
    merged = unmerge_bundle.open(bundle).merged()
    with progress_bar() as progress:
        progress("export", 0, 1)
        saved = merged.save_peft(
            directory, rank=rank, dtype=_float_dtype(dtype), overwrite=overwrite
        )
        progress("export", 1, 1)
    if as_json:
        print_json(
            {
                "directory": str(directory),
                "modules": len(merged.modules),
                "rounding": saved.rounding,
                "truncation": saved.truncation,
                "unmerged": {name: list(keys) for name, keys in merged.unmerged.items()},
            }
        )
        return
    say(f"exported {len(merged.modules)} modules to {directory}")
    _say_truncation(saved)
    _say_unmerged(merged.unmerged)


@command("unmerge append out.rmb adapters/new", name="append")
@_BUNDLE
@click.argument("adapters", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--name", help="Name of the adapter, where one is appended; else its directory's.")
@click.option("-m", "--message", default="", help="What the new generation is for.")
def append(
    bundle: Path, adapters: tuple[Path, ...], name: str | None, message: str, as_json: bool
) -> None:
    """Append adapters to a reversible bundle, each as a new generation.

    Each is fitted to what the bundle shares, which stays as it is; the error that leaves it is
    printed. What was in the bundle comes back as before. Where one cannot be appended, those before
    it have been; the error names both.
    """
    if name is not None and len(adapters) > 1:
        raise ConfigError(f"--name names one adapter, but {len(adapters)} are given")
    before = unmerge_bundle.open(bundle)
    # Those the shared tensors were made for; appended ones may be anywhere.
    merged = [entry.name for entry in before.generation.adapters if entry.generation == 1]
    usual = max((fmean([e.delta for e in before.errors(n).values()]) for n in merged), default=0.0)
    read = []
    appended: dict[str, Appended] = {}
    with progress_bar() as progress:
        # All are read before the first is appended: a bad one leaves the bundle as it is.
        for done, path in enumerate(adapters):
            progress("read", done, len(adapters))
            read.append(read_adapter(path, name=name))
        for done, adapter in enumerate(read):
            progress("append", done, len(read))
            try:
                appended[adapter.name] = append_to_bundle(bundle, adapter, message=message)
            except BundleError as error:
                done_before = f" (appended before it: {', '.join(appended)})" if appended else ""
                raise IncompatibleAdaptersError(
                    f'"{adapter.name}" cannot be appended: {error}{done_before}'
                ) from error
    if as_json:
        print_json(
            {
                "bundle": str(bundle),
                "appended": {
                    name: {
                        "generation": made.generation,
                        "errors": {p: e.model_dump(mode="json") for p, e in made.errors.items()},
                    }
                    for name, made in appended.items()
                },
            }
        )
        return
    for name, made in appended.items():
        mean = fmean([e.delta for e in made.errors.values()])
        say(
            f"appended {name} as generation {made.generation}; relative error of the delta "
            f"{error_text(mean)} on average, "
            f"{error_text(max(e.delta for e in made.errors.values()))} at most"
        )
        if mean > _REFIT * usual:
            say(
                f"note: the others come back within {error_text(usual)}; merge again with "
                f"{name} for a basis that holds it too"
            )


def _say_truncation(saved: SavedAdapter) -> None:
    if saved.truncation > 0:
        say(
            f"the reduction to a rank took the deltas written away from those by "
            f"{error_text(saved.truncation)} at most (relative, largest module)"
        )


def _say_unmerged(unmerged: Mapping[str, Iterable[str]]) -> None:
    """Name the tensors a merged result has not, in one line however many adapters had them."""
    keys = sorted({key for keys in unmerged.values() for key in keys})
    if keys:
        say(f"note: not merged, of {', '.join(unmerged)}: {', '.join(keys)}")


def _float_dtype(name: str | None) -> FloatDtype | None:
    return None if name is None else cast(FloatDtype, name)  # click has checked the choice


def _fields(recipe: Mapping[str, Any]) -> str:
    merger = recipe.get("merger")
    if not isinstance(merger, Mapping):
        return "unknown"
    fields = [f"{key}={value}" for key, value in merger.items() if key != "method"]
    return ", ".join(fields) or "none"


COMMANDS = (inspect, restore, export, append)
