"""A stored adapter as files again, in its own format or another, or no files at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unmerge.adapter import Adapter, Factors
from unmerge.errors import AdapterError, StoreError, UnsupportedAdapterError
from unmerge.formats import AdapterFormat, Formats, default_formats
from unmerge.store import AdapterStore
from unmerge_bundle.publish import OutputDirectory, OutputKind

__all__ = ["Exported", "export_adapter", "writable"]


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        directory: Where.
        format: In which format.
        files: Its files, relative to the directory, sorted.
        converted: Whether the adapter came from another format.
        options: What the format must be told to read it again, because the files do not say it.
        checked: Whether it was read again and is the same. It is not where the format's reader has
            come to refuse what it once took.
    """

    directory: Path
    format: str
    files: tuple[str, ...]
    converted: bool
    options: dict[str, Any]
    checked: bool


def export_adapter(
    store: AdapterStore,
    name: str,
    directory: str | os.PathLike[str],
    *,
    format: str | AdapterFormat | None = None,  # noqa: A002 - the field's word, as in `Adapter`
    formats: Formats | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a stored adapter as the files it came from, or as those of another format.

    In its own format every tensor has its name, shape, dtype and bits again, and the configuration
    is what it was. In another one, modules and tensors may be called otherwise. What was written is
    read again and compared before it appears at `directory`, which happens whole or not at all.

    Args:
        store: The store, open at the version to read.
        name: The adapter.
        directory: The directory to write.
        format: The format, by name or built with its options; the adapter's own unless given.
        formats: The formats there are; all installed ones unless given.
        overwrite: Replace a directory that holds only files of the names that are written.

    Raises:
        AdapterNotInStoreError: There is no such adapter at this version.
        StoreError: What is read is not what was written, or a file that is to be replaced is one
            that an adapter of this version is linked to.
        UnknownFormatError: There is no format of that name.
        UnsupportedAdapterError: The format cannot be written, or something of the adapter would
            be lost in it; says what.
        AdapterError: What was written is not read back as the same.
        BundleError: The directory exists, and may not be replaced, or cannot be a path.
    """
    adapter = store.read_adapter(name)
    known = default_formats() if formats is None else formats
    target = _target(adapter, format, known)
    if overwrite:
        _spare_links(store, Path(directory))
    written: set[str] = set()
    kind = OutputKind("an export with the same files", lambda root: _foreign(root, written))
    with OutputDirectory(Path(directory), overwrite=overwrite, kind=kind) as output:
        target.write(adapter, output.partial)
        files = [path for path in sorted(output.partial.rglob("*")) if path.is_file()]
        reader = target.reader_of(adapter)
        checked = _check(adapter, reader, output.partial, files)
        names = [path.relative_to(output.partial).as_posix() for path in files]
        written.update(names)
        for file in files:
            _settle(file, output.partial.stat().st_mode)
        output.publish()
    return Exported(
        directory=Path(directory),
        format=target.format,
        files=tuple(names),
        converted=target.format != adapter.format,
        options=reader.model_dump(mode="json", exclude_defaults=True),
        checked=checked,
    )


def writable(format: type[AdapterFormat]) -> bool:  # noqa: A002 - the field's word
    """Return whether adapters can be written in a format."""
    return format.write is not AdapterFormat.write


def _spare_links(store: AdapterStore, directory: Path) -> None:
    """Refuse to replace files that stored adapters are linked to: they would be lost with them.

    Raises:
        StoreError: There is one; names it and the adapter.
    """
    place = directory.resolve()
    for info in store.list() if place.is_dir() else []:
        for file in info.files:
            if Path(file).resolve().is_relative_to(place):
                raise StoreError(
                    f'{directory}: holds {file}, which "{info.name}" in {store.address} is linked '
                    "to and would be lost with; export to another directory"
                )


def _target(adapter: Adapter, format: str | AdapterFormat | None, known: Formats) -> AdapterFormat:  # noqa: A002
    if format is None and adapter.format not in known:
        raise UnsupportedAdapterError(
            f'adapter "{adapter.name}" is of the format "{adapter.format}", which no installed '
            f"plugin provides; install it, or choose one of {_choices(known)} (--format)",
            feature=adapter.format,
        )
    chosen = adapter.format if format is None else format
    built = known.build(chosen) if isinstance(chosen, str) else chosen
    if not writable(type(built)):
        raise UnsupportedAdapterError(
            f'adapter "{adapter.name}" cannot be written as {built.format}: the format can only be '
            f"read; choose one of {_choices(known)} (--format)",
            feature=built.format,
        )
    return built


def _choices(known: Formats) -> str:
    return ", ".join(name for name, found in known.items() if writable(found.format))


def _check(adapter: Adapter, reader: AdapterFormat, directory: Path, files: Sequence[Path]) -> bool:
    """Read what was written and refuse it unless it is the adapter.

    Returns:
        False where the reader refuses a feature: it did not once, or the adapter would not be in
        the store, and what could be read must be given back.

    Raises:
        AdapterError: It is another adapter.
    """
    native = reader.format == adapter.format
    single = files[0] if len(files) == 1 else directory
    place = next((path for path in (directory, *files) if reader.recognises(path)), single)
    try:
        again = reader.read(place, adapter.name)
    except UnsupportedAdapterError:
        if native:
            return False
        raise
    if native:
        same = again.digest() == adapter.digest() and again.config == adapter.config
    else:
        same = _contents(again) == _contents(adapter)
    if not same:
        raise AdapterError(
            f'adapter "{adapter.name}" written as {reader.format} is not read back as the same; '
            "nothing is written; the format has a defect, choose another one (--format)"
        )
    return True


def _contents(adapter: Adapter) -> list[str]:
    """Return digests of what an adapter holds, whatever it is called."""

    def digest(modules: dict[str, Factors], verbatim: dict[str, torch.Tensor]) -> str:
        return Adapter("it", modules, verbatim=verbatim).digest()

    modules = [digest({"it": factors}, {}) for factors in adapter.modules.values()]
    verbatim = [digest({}, {"it": tensor}) for tensor in adapter.verbatim.values()]
    return [*sorted(modules), *sorted(verbatim)]


def _foreign(root: Path, written: set[str]) -> str | None:
    """Return something in `root` that would be lost; nothing is known to be before writing."""
    if not written:
        return None
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink() or (not path.is_dir() and name not in written):
            return name
    return None


def _settle(file: Path, mode: int) -> None:
    """Give a file the rights of any new one, which safetensors' are not, and flush it to the disk.

    Args:
        file: The file.
        mode: The mode of a new directory, whose rights to read and write a new file has as well.
    """
    file.chmod(mode & 0o666)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
