"""Commands on a store: init, add, ls, log, tag."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import click

from unmerge.cli.output import command, print_json, print_table, progress_bar, say, size
from unmerge.errors import ConfigError
from unmerge.formats import read_adapter
from unmerge.store import AdapterInfo, AdapterStore

# Text, not a path: a path would make one slash of the two in a URL.
_STORE = click.argument("store")


@command("unmerge init zoo --base-model sentence-transformers/all-MiniLM-L6-v2", name="init")
@_STORE
@click.option("--base-model", metavar="MODEL", help="Id of the base model of all adapters.")
@click.option("--revision", help="Revision of the base model.")
def init(store: str, base_model: str | None, revision: str | None, as_json: bool) -> None:
    """Create an empty store.

    Without --base-model the first adapter's base model becomes the store's.
    """
    created = AdapterStore.create(store, base_model=base_model, revision=revision)
    if as_json:
        print_json({"store": str(store), "version": created.version, "base_model": base_model})
    else:
        say(f"created {store}")


@command('unmerge add zoo adapters/* -m "first import"', name="add")
@_STORE
@click.argument("adapters", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-m", "--message", help="What this version is; kept in the log.")
@click.option("--name", help="Name of the adapter, where one is added; else its directory's.")
def add(
    store: str, adapters: tuple[Path, ...], message: str | None, name: str | None, as_json: bool
) -> None:
    """Read adapters, check them, and commit all of them as one version.

    One bad adapter and nothing is written.
    """
    if name is not None and len(adapters) > 1:
        raise ConfigError(f"--name names one adapter, but {len(adapters)} are given")
    opened = AdapterStore.open(store)
    unknown: list[str] = []
    with progress_bar() as progress:
        for done, path in enumerate(adapters):
            progress("read", done, len(adapters))
            adapter = read_adapter(path, name=name)
            opened.add(adapter)
            if adapter.base_model is None:
                unknown.append(adapter.name)
        progress("read", len(adapters), len(adapters))
        staged = opened.staged
        version = opened.commit(
            message or f"add {', '.join(staged)}",
            progress=lambda done, total: progress("write", done, total),
        )
    if as_json:
        print_json({"store": str(store), "version": version, "added": list(staged)})
    else:
        say(f"added {', '.join(staged)} as version {version}")
        if unknown and opened.base_model is not None:
            say(
                f"note: {', '.join(unknown)} name no base model; they are taken to be for the "
                f"store's, {opened.base_model}"
            )


@command("unmerge ls zoo --at v1", name="ls")
@_STORE
@click.option("--at", metavar="VERSION", help="Version id or tag to read instead of the newest.")
def ls(store: str, at: str | None, as_json: bool) -> None:
    """List the adapters of a store."""
    opened = AdapterStore.open(store, at=at)
    infos = opened.list()
    if as_json:
        print_json(
            {
                "store": str(store),
                "version": opened.version,
                "base_model": opened.base_model,
                "adapters": [_info_data(info) for info in infos],
            }
        )
        return
    print_table(
        ("adapter", "modules", "rank", "dtype", "size", "verbatim", "added"),
        [
            (
                info.name,
                str(len(info.modules)),
                _common(m.rank for m in info.modules.values()),
                _common(m.dtype for m in info.modules.values()),
                size(info.nbytes),
                str(len(info.verbatim)),
                info.added,
            )
            for info in infos
        ],
        title=f"{store} at {opened.version}, base model {opened.base_model or 'unknown'}",
    )


@command("unmerge log zoo", name="log")
@_STORE
def log(store: str, as_json: bool) -> None:
    """Show the versions of a store, newest first."""
    versions = AdapterStore.open(store).history()
    if as_json:
        print_json(
            {
                "store": str(store),
                "versions": [
                    {
                        "id": v.id,
                        "parent": v.parent,
                        "message": v.message,
                        "written_at": v.written_at.isoformat(),
                        "tags": list(v.tags),
                    }
                    for v in versions
                ],
            }
        )
        return
    print_table(
        ("version", "written", "tags", "message"),
        [
            (v.id, f"{v.written_at:%Y-%m-%d %H:%M:%S}", ", ".join(v.tags), v.message)
            for v in versions
        ],
    )


@command("unmerge tag zoo v1", name="tag")
@_STORE
@click.argument("name")
@click.option("--at", metavar="VERSION", help="Version to tag; the newest unless given.")
def tag(store: str, name: str, at: str | None, as_json: bool) -> None:
    """Give a version a name that never moves."""
    opened = AdapterStore.open(store)
    opened.tag(name, at)
    version = opened.tags()[name]
    if as_json:
        print_json({"store": str(store), "tag": name, "version": version})
    else:
        say(f"{name} is version {version}")


def _info_data(info: AdapterInfo) -> dict[str, object]:
    return {
        "name": info.name,
        "format": info.format,
        "source": info.source,
        "base_model": info.base_model,
        "revision": info.revision,
        "digest": info.digest,
        "added": info.added,
        "elements": info.elements,
        "bytes": info.nbytes,
        "modules": {
            path: {
                "rank": m.rank,
                "d_out": m.d_out,
                "d_in": m.d_in,
                "dtype": m.dtype,
                "scaling": m.scaling,
            }
            for path, m in info.modules.items()
        },
        "verbatim": {
            key: {"dtype": dtype, "shape": list(shape)}
            for key, (dtype, shape) in info.verbatim.items()
        },
    }


def _common(values: Iterable[object]) -> str:
    """Return the values that occur, the most frequent first."""
    return ", ".join(str(value) for value, _ in Counter(values).most_common())


COMMANDS = (init, add, ls, log, tag)
