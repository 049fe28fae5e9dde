"""Commands that put adapters into a store, change what is known of them, and take them out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from unmerge.cli.options import AT, FORMAT_FIELDS, MESSAGE, STORE, format_of, pairs, some
from unmerge.cli.output import INTERRUPTED, command, print_json, printable, progress_bar, say
from unmerge.errors import ConfigError, ImportRefusedError
from unmerge.exporting import export_adapter as export
from unmerge.importing import ImportReport, import_adapters
from unmerge.store import AdapterStore


@command('unmerge add zoo adapters/* -m "first import"', name="add")
@STORE
@click.argument("sources", nargs=-1, required=True)
@MESSAGE
@click.option("--name", help="Name of the adapter, where one is added; else its directory's.")
@click.option("--format", "format_name", metavar="NAME", help="Format; else it is recognised.")
@FORMAT_FIELDS
@click.option("--revision", help="Branch, tag or commit of the sources on the hub.")
@click.option("--note", default="", help="Free text to keep with each adapter.")
@click.option("--meta", metavar="KEY=VALUE", multiple=True, help="Metadata to keep with each.")
@click.option("--replace", is_flag=True, help="Replace adapters of these names that are there.")
@click.option("--allow-duplicates", is_flag=True, help="Add what is there under another name.")
@click.option("--link", is_flag=True, help="Leave the numbers in the files; store where they are.")
@click.option("--skip-bad", is_flag=True, help="Add the good ones where others are bad.")
def add(
    store: str, sources: tuple[str, ...], skip_bad: bool, as_json: bool, **options: Any
) -> None:
    """Read adapters, check them, and commit all of them as one version.

    SOURCES are paths, or ids on the Hugging Face hub: org/name, org/name@revision,
    hf://org/name@revision/path/in/it. One bad adapter and nothing is written, unless --skip-bad is
    given; every bad one is reported. Exits 1 if nothing could be added.
    """
    chosen = format_of(options["format_name"], options["fields"])
    metadata = pairs(options["meta"], option="--meta")
    if options["name"] is not None and len(sources) > 1:
        raise ConfigError(f"--name names one adapter, but {len(sources)} are given")
    opened = AdapterStore.open(store)
    try:
        with _known_outcome(opened), progress_bar() as progress:
            report = import_adapters(
                opened,
                sources,
                name=options["name"],
                revision=options["revision"],
                format=chosen,
                note=options["note"],
                metadata=metadata,
                replace=options["replace"],
                allow_duplicates=options["allow_duplicates"],
                link=options["link"],
                skip_bad=skip_bad,
                message=options["message"],
                progress=progress,
            )
    except ImportRefusedError as error:
        if as_json:
            print_json(_data(store, None, refused=error.refused))
        raise
    refused = [(source.source, source.reason) for source in report.refused]
    if as_json:
        print_json(
            _data(
                store,
                report.version,
                added=report.names("added"),
                replaced=report.names("replaced"),
                unchanged=report.names("unchanged"),
                refused=refused,
            )
        )
    else:
        _say_added(report, opened.base_model)
    if refused:
        problem = ImportRefusedError(refused, of=len(sources))
        for reason in problem.reasons:
            click.echo(f"unmerge: skipped {printable(reason)}", err=True)
    if len(refused) == len(sources):
        sys.exit(1)


@command('unmerge note zoo sql --note "too eager" --meta owner=ana', name="note")
@STORE
@click.argument("name")
@click.option("--note", help="The adapter's new note; an empty one takes it away.")
@click.option("--meta", metavar="KEY=VALUE", multiple=True, help="A key to set.")
@click.option("--drop-meta", metavar="KEY", multiple=True, help="A key to take away.")
@MESSAGE
def note(
    store: str,
    name: str,
    note: str | None,
    meta: tuple[str, ...],
    drop_meta: tuple[str, ...],
    message: str | None,
    as_json: bool,
) -> None:
    """Change the note and the metadata of an adapter, as a new version."""
    given = pairs(meta, option="--meta")
    if note is None and not given and not drop_meta:
        raise ConfigError("there is nothing to change; give --note, --meta or --drop-meta")
    if both := sorted(given.keys() & set(drop_meta)):
        raise ConfigError(f'"{both[0]}" is to be set and taken away; give one of the two')
    opened = AdapterStore.open(store)
    kept = dict(opened.info(name).metadata)
    for key in drop_meta:
        if key not in kept:
            raise ConfigError(f'{name} has no metadata "{key}"; it has {some([*kept]) or "none"}')
        del kept[key]
    opened.annotate(name, note=note, metadata={**kept, **given})
    with _known_outcome(opened):
        version = opened.commit(message or f"note on {name}")
    info = opened.info(name)
    if as_json:
        print_json(
            {
                "store": store,
                "version": version,
                "adapter": name,
                "note": info.note,
                "metadata": dict(info.metadata),
            }
        )
    else:
        say(f"noted {name} as version {version}")


@command("unmerge rm zoo sql math", name="rm")
@STORE
@click.argument("names", nargs=-1, required=True)
@MESSAGE
def rm(store: str, names: tuple[str, ...], message: str | None, as_json: bool) -> None:
    """Remove adapters, as a new version.

    Older versions keep them, and --at finds them there, until `unmerge gc --forget-before` forgets
    these versions.
    """
    opened = AdapterStore.open(store)
    for name in dict.fromkeys(names):
        opened.remove(name)
    removed = opened.staged
    before = opened.version
    with _known_outcome(opened):
        version = opened.commit(message or f"remove {some(removed)}")
    if as_json:
        print_json({"store": store, "version": version, "removed": list(removed)})
    else:
        say(f"removed {some(removed)} as version {version}; --at {before} still has them")


@command("unmerge export-adapter zoo sql restored/sql --at v1", name="export-adapter")
@STORE
@click.argument("name")
@click.argument("directory", type=click.Path(path_type=Path))
@AT
@click.option("--format", "format_name", metavar="NAME", help="Format; the adapter's own if none.")
@FORMAT_FIELDS
@click.option("--overwrite", is_flag=True, help="Replace an earlier export of the same files.")
def export_adapter(
    store: str,
    name: str,
    directory: Path,
    at: str | None,
    format_name: str | None,
    fields: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Give an adapter of a store back as files, bit for bit.

    In its own format every tensor and the configuration are what they were. In another one nothing
    is lost, or what would be is named and nothing is written.
    """
    chosen = format_of(format_name, fields)
    with progress_bar() as progress:
        progress("export", 0, 1)
        opened = AdapterStore.open(store, at=at)
        done = export(opened, name, directory, format=chosen, overwrite=overwrite)
        progress("export", 1, 1)
    if as_json:
        print_json(
            {
                "store": store,
                "version": opened.version,
                "adapter": name,
                "directory": str(directory),
                "format": done.format,
                "files": list(done.files),
                "converted": done.converted,
                "options": done.options,
                "checked": done.checked,
            }
        )
        return
    how = f"converted to {done.format}" if done.converted else f"{done.format}, as it was read"
    say(f"exported {name} to {directory} ({how}): {', '.join(done.files)}")
    if done.options:
        told = " ".join(f"--set {key}={value}" for key, value in done.options.items())
        say(f"note: the files do not say all; to read them again: --format {done.format} {told}")
    if not done.checked:
        say(
            f"note: this release of unmerge would not read {done.format} files with what these "
            "say; they are what was once read, but were not read again"
        )


@contextmanager
def _known_outcome(store: AdapterStore) -> Iterator[None]:
    """Say so if there is a new version after Ctrl-C: it may have come just after the commit."""
    before = store.version
    try:
        yield
    except KeyboardInterrupt:
        newest = AdapterStore.open(store.address).version
        if newest == before:
            raise
        click.echo(
            f"unmerge: interrupted, but the store has a new version {newest}; unmerge log "
            f"{store.address} shows what it is",
            err=True,
        )
        sys.exit(INTERRUPTED)


def _say_added(report: ImportReport, base_model: str | None) -> None:
    if names := report.names("added"):
        say(f"added {some(names)} as version {report.version}")
    if names := report.names("replaced"):
        say(f"replaced {some(names)} as version {report.version}")
    if names := report.names("unchanged"):
        say(f"unchanged: {some(names)}")
    unknown = [
        source.name or source.source
        for source in report.sources
        if source.status in ("added", "replaced") and source.base_model is None
    ]
    if unknown and base_model is not None:
        say(
            f"note: {some(unknown)} name no base model; they are taken to be for the "
            f"store's, {base_model}"
        )


def _data(
    store: str,
    version: str | None,
    *,
    refused: Sequence[tuple[str, str]],
    added: Sequence[str] = (),
    replaced: Sequence[str] = (),
    unchanged: Sequence[str] = (),
) -> dict[str, object]:
    """Return what `add` did; without a version nothing was written."""
    return {
        "store": store,
        "version": version,
        "added": list(added),
        "replaced": list(replaced),
        "unchanged": list(unchanged),
        "refused": [{"source": source, "reason": reason} for source, reason in refused],
    }


COMMANDS = (add, note, rm, export_adapter)
