"""Many adapters into a store at once: all are read and checked before one of them is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unmerge.adapter import Adapter
from unmerge.errors import (
    AdapterError,
    AdapterExistsError,
    ConfigError,
    DuplicateAdapterError,
    ImportRefusedError,
    NonFiniteError,
    StoreError,
    UnmergeError,
)
from unmerge.formats import AdapterFormat, Formats, default_formats, read_adapter
from unmerge.formats.base import entries
from unmerge.formats.hub import hub_address
from unmerge.store import AdapterInfo, AdapterStore
from unmerge.store.linking import altered

__all__ = ["ImportReport", "Imported", "Status", "import_adapters"]

Status = Literal["added", "replaced", "unchanged", "refused"]
Progress = Callable[[str, int, int], None]

# What is wrong with one source, and no reason to doubt the next one or the store.
_ONE_SOURCE = (
    AdapterError,
    AdapterExistsError,
    ConfigError,
    DuplicateAdapterError,
    NonFiniteError,
)
# Adapters that a message of the log names.
_NAMED = 5


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of one source.

    Attributes:
        source: The source, as it was given.
        status: "added"; "replaced", in the place of a stored adapter of its name; "unchanged",
            because that one was the same; or "refused".
        name: The adapter's name; of a refused source only if one was given.
        reason: Why it was refused, in one line.
        base_model: The base model that the source names, if any.
    """

    source: str
    status: Status
    name: str | None = None
    reason: str = ""
    base_model: str | None = None


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import did.

    Attributes:
        version: The version written; the one there was if there was nothing to write.
        sources: What became of each source, in the order given.
    """

    version: str
    sources: tuple[Imported, ...]

    def names(self, *statuses: Status) -> tuple[str, ...]:
        """Return the names of the adapters of which one of these became, sorted."""
        found = (source.name for source in self.sources if source.status in statuses)
        return tuple(sorted(name for name in found if name is not None))

    @property
    def refused(self) -> tuple[Imported, ...]:
        """The sources that were refused, in the order given."""
        return tuple(source for source in self.sources if source.status == "refused")


def import_adapters(
    store: AdapterStore,
    sources: Sequence[str | os.PathLike[str]],
    *,
    name: str | None = None,
    revision: str | None = None,
    format: str | AdapterFormat | None = None,  # noqa: A002 - the field's word, as in `Adapter`
    formats: Formats | None = None,
    note: str = "",
    metadata: Mapping[str, str] | None = None,
    replace: bool = False,
    allow_duplicates: bool = False,
    link: bool = False,
    skip_bad: bool = False,
    message: str | None = None,
    progress: Progress | None = None,
) -> ImportReport:
    """Read adapters, check them all, and commit them as one version.

    Memory holds one adapter at a time; those that passed wait in a temporary file. Whatever is
    raised, the store is at its last commit, and nothing is staged.

    Args:
        store: The store, with nothing staged.
        sources: Paths or ids on the hub, as `read_adapter` takes them.
        name: The adapter's name, where there is one source.
        revision: Revision of the sources on the hub.
        format: The format of all sources; recognised for each unless given.
        formats: The formats there are; all installed ones unless given.
        note: Free text to keep with each adapter.
        metadata: Keys and values to keep with each adapter.
        replace: Take the place of stored adapters of the same names, with their note and metadata
            where no others are given. What is there already, bit for bit and with the same
            configuration, note and metadata, is left as it is.
        allow_duplicates: Take adapters that are there under another name, bit for bit.
        link: Leave the factors in the sources' safetensors files, of which symbolic links are
            followed once, now; see `AdapterStore.add`.
        skip_bad: Commit the good ones where others are bad.
        message: What is done, for the history; by default it names the adapters.
        progress: Called with a phase, units done and units in all.

    Returns:
        What became of each source, in order.

    Raises:
        ConfigError: There is no source, or a name for several.
        StoreError: Something is staged, or the store cannot be read or written.
        UnknownFormatError: There is no format of that name.
        ImportRefusedError: Of several sources some are bad, and `skip_bad` is not given. A single
            source raises what is wrong with it, as `read_adapter` and `AdapterStore.add` do.
    """
    if not sources:
        raise ConfigError("there is nothing to import; give at least one path or hub id")
    if name is not None and len(sources) > 1:
        raise ConfigError(f'the name "{name}" is for one adapter, but {len(sources)} are given')
    if store.staged:
        raise StoreError(
            f"{store.address}: {', '.join(store.staged)} wait to be committed; "
            "commit or discard them first"
        )
    known = default_formats() if formats is None else formats
    chosen = known.build(format) if isinstance(format, str) else format
    report = progress or _silent

    def take(source: str | os.PathLike[str]) -> Imported:
        files = _linkable(source, revision) if link else None
        adapter = read_adapter(source, name=name, revision=revision, format=chosen, formats=known)
        own_note, own_metadata = note, metadata or {}
        there = store.info(adapter.name) if replace and adapter.name in store.names() else None
        if there is not None:
            own_note, own_metadata = note or there.note, metadata or there.metadata
            kept = own_note == there.note and own_metadata == there.metadata
            stays = kept and _stays_where_it_is(there, files)
            if stays and _same(adapter, there, store.read_config(adapter.name)):
                return _became("unchanged", source, adapter)
        store.add(
            adapter,
            note=own_note,
            metadata=own_metadata,
            replace=there is not None,
            allow_duplicates=allow_duplicates,
            link=files,
        )
        return _became("added" if there is None else "replaced", source, adapter)

    done: list[Imported] = []
    errors: list[UnmergeError] = []
    try:
        for source in sources:
            report("read", len(done), len(sources))
            try:
                done.append(take(source))
            except _ONE_SOURCE as error:
                errors.append(error)
                reason = " ".join(str(error).split())
                done.append(Imported(os.fspath(source), "refused", name, reason))
        report("read", len(done), len(sources))
        if errors and not skip_bad:
            _refuse(done, errors)
        version = store.version
        if store.staged:
            version = store.commit(
                message or _message(store.staged),
                progress=lambda part, whole: report("write", part, whole),
            )
    finally:
        store.discard()
    return ImportReport(version, tuple(done))


def _refuse(done: Sequence[Imported], errors: Sequence[UnmergeError]) -> None:
    """Raise what is wrong with the only source, or with all that are bad."""
    if len(done) == 1:
        raise errors[0]
    refused = [(source.source, source.reason) for source in done if source.status == "refused"]
    raise ImportRefusedError(refused, of=len(done)) from errors[0]


def _became(status: Status, source: str | os.PathLike[str], adapter: Adapter) -> Imported:
    return Imported(os.fspath(source), status, adapter.name, base_model=adapter.base_model)


def _same(adapter: Adapter, stored: AdapterInfo, config: str) -> bool:
    """Return whether a stored adapter is this one, wherever it was read."""
    return (
        stored.format == adapter.format
        and (stored.base_model, stored.revision) == (adapter.base_model, adapter.revision)
        and config == adapter.config
        and stored.digest == adapter.digest()
    )


def _linkable(source: str | os.PathLike[str], revision: str | None) -> tuple[Path, ...]:
    """Return the safetensors files of a source, to which an adapter can be linked.

    Raises:
        AdapterError: The source is on the hub, or has no such file.
    """
    text = os.fspath(source)
    if hub_address(text, revision, local=not isinstance(source, str)) is not None:
        raise AdapterError(
            f"{text}: cannot be linked: is on the hub, whose downloads come and go; add it without "
            "--link, or download it to a directory of yours first"
        )
    place = Path(source)
    found = [place] if place.is_file() else entries(place)
    # Where a symbolic link leads today is where the bytes are that were checked.
    files = tuple(path.resolve() for path in found if path.suffix == ".safetensors")
    if place.exists() and not files:
        raise AdapterError(
            f"{text}: cannot be linked: has no safetensors file, and others cannot be linked to; "
            "add it without --link"
        )
    return files


def _stays_where_it_is(stored: AdapterInfo, files: Sequence[Path] | None) -> bool:
    """Return whether a stored adapter is linked as it would be now, or copied as it would be."""
    if not stored.files or files is None:
        return not stored.files and files is None
    return stored.files.keys() <= {os.fspath(path) for path in files} and not any(
        altered(file, facts) for file, facts in stored.files.items()
    )


def _message(names: Sequence[str]) -> str:
    """Return what the history says by default, short however many adapters there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"add {', '.join(names[:_NAMED])}{more}"


def _silent(phase: str, done: int, total: int) -> None:
    """Ignore progress."""
