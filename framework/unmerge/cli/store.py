"""Commands that make a store and look into one of its versions: init, ls, show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

import click

from unmerge.cli.options import AT, STORE, pairs
from unmerge.cli.output import command, print_json, print_table, say, size
from unmerge.store import AdapterInfo, AdapterStore

_DIGITS_OF_A_DIGEST = 12


@command("unmerge init zoo --base-model sentence-transformers/all-MiniLM-L6-v2", name="init")
@STORE
@click.option("--base-model", metavar="MODEL", help="Id of the base model of all adapters.")
@click.option("--revision", help="Revision of the base model.")
def init(store: str, base_model: str | None, revision: str | None, as_json: bool) -> None:
    """Create an empty store, in a local directory or at s3://bucket/prefix.

    Without --base-model the first adapter's base model becomes the store's.
    """
    created = AdapterStore.create(store, base_model=base_model, revision=revision)
    if as_json:
        print_json({"store": store, "version": created.version, "base_model": base_model})
    else:
        say(f"created {store}")


@command("unmerge ls zoo --meta team=search --module '*.q_proj' --rank 16", name="ls")
@STORE
@AT
@click.option("--name", metavar="GLOB", help="Only adapters of such names.")
@click.option("--meta", metavar="KEY=VALUE", multiple=True, help="Only those with this metadata.")
@click.option("--format", "format_name", metavar="NAME", help="Only those of this format.")
@click.option("--module", metavar="GLOB", help="Only those with such a module.")
@click.option(
    "--rank", type=click.IntRange(min=1), help="Only those with a module of this rank (and name)."
)
@click.option("--long", "in_full", is_flag=True, help="Show sources, digests, metadata, notes.")
def ls(
    store: str,
    at: str | None,
    name: str | None,
    meta: tuple[str, ...],
    format_name: str | None,
    module: str | None,
    rank: int | None,
    in_full: bool,
    as_json: bool,
) -> None:
    """List the adapters of a store, all of them or those that every filter lets through."""
    wanted = _filter(pairs(meta, option="--meta"), format_name, module, rank)
    opened = AdapterStore.open(store, at=at)
    named = (found for found in opened.names() if fnmatchcase(found, name or "*"))
    infos = [info for info in map(opened.info, named) if wanted(info)]
    if as_json:
        print_json(
            {
                "store": store,
                "version": opened.version,
                "base_model": opened.base_model,
                "adapters": [_info_data(info) for info in infos],
            }
        )
        return
    title = f"{store} at {opened.version}, base model {opened.base_model or 'unknown'}"
    if len(infos) < len(opened.names()):
        title += f": {len(infos)} of {len(opened.names())} adapters"
    columns = ("adapter", "modules", "rank", "dtype", "size", "verbatim", "added")
    more = ("format", "source", "digest", "metadata", "note")
    print_table(
        (*columns, *more) if in_full else columns,
        [(*_row(info), *_more(info)) if in_full else _row(info) for info in infos],
        title=title,
    )


@command("unmerge show zoo sql", name="show")
@STORE
@click.argument("name")
@AT
def show(store: str, name: str, at: str | None, as_json: bool) -> None:
    """Show all that is known of one adapter: where it is from, its modules, its configuration."""
    opened = AdapterStore.open(store, at=at)
    info = opened.info(name)
    config = opened.read_config(name)
    if as_json:
        print_json(
            {
                "store": store,
                "version": opened.version,
                "adapter": {**_info_data(info), "config": config},
            }
        )
        return
    revision = f" at {info.revision}" if info.revision else ""
    say(f"{info.name} in {store} at {opened.version}")
    say(f"format      {info.format}")
    say(f"source      {info.source or 'unknown'}")
    say(f"base model  {info.base_model or 'not named'}{revision}")
    say(f"digest      {info.digest}")
    say(f"added       {info.added}")
    say(f"size        {size(info.nbytes)}, {info.elements} elements")
    for file in info.files:
        say(f"linked to   {file}")
    for key, value in info.metadata.items():
        say(f"metadata    {key}={value}")
    if info.note:
        say(f"note        {info.note}")
    print_table(
        ("module", "rank", "d_out", "d_in", "kind", "dtype", "scaling"),
        [
            (path, str(m.rank), str(m.d_out), str(m.d_in), m.kind, m.dtype, f"{m.scaling:g}")
            for path, m in info.modules.items()
        ],
    )
    if info.verbatim:
        print_table(
            ("verbatim tensor", "dtype", "shape"),
            [
                (key, dtype, " × ".join(str(n) for n in shape) or "scalar")
                for key, (dtype, shape) in info.verbatim.items()
            ],
        )
    say(f"configuration:\n{config.rstrip()}" if config else "no configuration")


def _filter(
    metadata: dict[str, str], format_name: str | None, module: str | None, rank: int | None
) -> Callable[[AdapterInfo], bool]:
    """Return whether an adapter is wanted; what is `None` or empty lets all through."""

    def wanted(info: AdapterInfo) -> bool:
        return (
            format_name in (None, info.format)
            and metadata.items() <= dict(info.metadata).items()
            and any(
                fnmatchcase(path, module or "*") and rank in (None, m.rank)
                for path, m in info.modules.items()
            )
        )

    return wanted


def _row(info: AdapterInfo) -> tuple[str, ...]:
    return (
        info.name,
        str(len(info.modules)),
        _common(m.rank for m in info.modules.values()),
        _common(m.dtype for m in info.modules.values()),
        size(info.nbytes),
        str(len(info.verbatim)),
        info.added,
    )


def _more(info: AdapterInfo) -> tuple[str, ...]:
    return (
        info.format,
        info.source,
        info.digest.removeprefix("sha256:")[:_DIGITS_OF_A_DIGEST],
        ", ".join(f"{key}={value}" for key, value in info.metadata.items()),
        info.note,
    )


def _info_data(info: AdapterInfo) -> dict[str, object]:
    return {
        "name": info.name,
        "format": info.format,
        "source": info.source,
        "base_model": info.base_model,
        "revision": info.revision,
        "digest": info.digest,
        "added": info.added,
        "note": info.note,
        "metadata": dict(info.metadata),
        "elements": info.elements,
        "bytes": info.nbytes,
        "verbatim_bytes": info.verbatim_nbytes,
        "modules": {
            path: {
                "rank": m.rank,
                "d_out": m.d_out,
                "d_in": m.d_in,
                "kind": m.kind,
                "dtype": m.dtype,
                "scaling": m.scaling,
            }
            for path, m in info.modules.items()
        },
        "files": {
            file: {"bytes": f.size, "sha256": f.sha256, "modified": f.modified}
            for file, f in info.files.items()
        },
        "verbatim": {
            key: {"dtype": dtype, "shape": list(shape)}
            for key, (dtype, shape) in info.verbatim.items()
        },
    }


def _common(values: Iterable[object]) -> str:
    """Return the values that occur, the most frequent first."""
    return ", ".join(str(value) for value, _ in Counter(values).most_common())


COMMANDS = (init, ls, show)
