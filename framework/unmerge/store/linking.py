"""Factors that stay in the files of others: found in them, referred to, never trusted.

A linked table is one uncompressed array with a chunk per adapter, and each chunk is a virtual
reference of Icechunk: a file, an offset, a length, and a time after which the file must not have
been written to. Nothing of it is ever rewritten: the array grows, and new references go behind
the old.

Whoever writes a store decides what it refers to, so a store from a stranger may refer to any file
of the machine that it is read on. Icechunk follows no reference by itself. Access is given only
once a linked adapter is read, and only to the directories of the files that its record names,
after each of these was found to be a regular file of the recorded size that was not written to
since. What is read must have the recorded CRC-32, and a whole adapter its digest: the writer of the
store had to know the bytes, or to guess them. `AdapterInfo.files` shows beforehand what would be
read.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

import icechunk
import numpy as np
import zarr

from unmerge.adapter import Adapter
from unmerge.errors import AdapterError, StoreError
from unmerge.formats.files import read_header
from unmerge.store.layout import FACTORS, Bits, Factor, crc32, storage_dtype, to_stored
from unmerge.store.records import LinkedFile
from unmerge.store.staging import Links, StagedAdapter, StagedTensor

_Wanted = dict[tuple[int, int], list[tuple[str, Factor, Bits]]]
"""Module path, factor and bits of what is looked for, by number of bytes and CRC-32."""

# Read at a time for a file's sha256.
_BLOCK = 1 << 20

REPAIR = "put the file back as it was, with its time (cp -p), or add the adapter again"
"""What to do about a linked file that is not what it was."""


def find_links(adapter: Adapter, paths: Sequence[Path]) -> Links:
    """Find an adapter's factors, byte by byte, in safetensors files.

    Args:
        adapter: The adapter, its tensors in memory.
        paths: Absolute paths of the files to look in; those in which nothing is found do not
            matter.

    Raises:
        AdapterError: A factor is in none of them row by row; or a file is no readable safetensors
            file, has no path that can be referred to, or changed meanwhile.
    """
    wanted: _Wanted = {}
    for module, factors in adapter.modules.items():
        for factor in FACTORS:
            bits = to_stored(factors.A if factor == "A" else factors.B)
            wanted.setdefault((bits.nbytes, crc32(bits)), []).append((module, factor, bits))
    places: dict[tuple[str, Factor], tuple[str, int]] = {}
    files: dict[str, LinkedFile] = {}
    for path in paths:
        name = _checked(adapter.name, path)
        before = _facts(path)
        with _opened(path) as file:
            found = {key: (name, start) for key, start in _found(file, path, wanted)}
            if new := found.keys() - places.keys():
                files[name] = LinkedFile(before.st_size, _sha256(file), _modified(before))
                places.update({key: found[key] for key in new})
        if _identity(_facts(path)) != _identity(before):
            raise AdapterError(
                f'{path}: was written to while adapter "{adapter.name}" was being linked to it; '
                "add it again"
            )
    for module, factor, _ in itertools.chain.from_iterable(wanted.values()):
        if (module, factor) not in places:
            where = ", ".join(str(path) for path in paths) or "no file"
            raise AdapterError(
                f'{module}: adapter "{adapter.name}" cannot be linked: factor {factor} is not '
                f"stored row by row in any of: {where}; add it without --link"
            )
    return Links(files, places)


def append_links(
    root: zarr.Group,
    path: str,
    segments: Sequence[int],
    tensors: Sequence[StagedTensor],
    files: Sequence[Mapping[str, LinkedFile]],
) -> list[int]:
    """Append references to the linked table at `path` and return its segments, always one.

    Args:
        root: Root group of a writable session.
        path: What the path of the table's array begins with.
        segments: The table's segments so far; none if there is no such table.
        tensors: What to refer to, of one shape and dtype.
        files: For each, the files that its adapter is linked to.
    """
    first = sum(segments)
    shape, dtype = tensors[0].shape, tensors[0].dtype
    array_path = f"{path}.0"
    total = (first + len(tensors), *shape)
    if first:
        cast("zarr.Array[Any]", root[array_path]).resize(total)
    else:
        # The bytes are those of the files: neither compressed nor followed by a checksum.
        root.create_array(
            array_path,
            shape=total,
            chunks=(1, *shape),
            dtype=storage_dtype(dtype),
            compressors=None,
            attributes={"logical_dtype": dtype},
        )
    references = []
    for row, (tensor, known) in enumerate(zip(tensors, files, strict=True), start=first):
        if tensor.file is None:
            raise StoreError(f"{path}: a tensor is to be linked that is in no file")
        references.append(
            icechunk.VirtualChunkSpec(
                index=[row, *(0 for _ in shape)],
                location=Path(tensor.file).as_uri(),
                offset=tensor.start,
                length=tensor.nbytes,
                last_updated_at_checksum=datetime.fromtimestamp(known[tensor.file].modified, UTC),
            )
        )
    store = cast(icechunk.IcechunkStore, root.store)
    # No directory is open for reading while a version is written.
    store.set_virtual_refs(array_path, references, validate_containers=False)
    return [total[0]]


def check_unaltered(adapter: StagedAdapter) -> None:
    """Refuse to commit links to files that changed after the adapter was added.

    Raises:
        StoreError: There is one; says which.
    """
    for file, facts in adapter.files.items():
        if problem := altered(file, facts):
            raise StoreError(
                f'adapter "{adapter.name}" was linked to {file}, which {problem}; '
                "discard it and add it again"
            )


def altered(file: str, facts: LinkedFile) -> str | None:
    """Return what speaks against a linked file before it is read, `None` if nothing does."""
    try:
        found = Path(file).stat()
    except (OSError, ValueError) as error:
        return f"cannot be found ({getattr(error, 'strerror', None) or error})"
    if not stat.S_ISREG(found.st_mode):
        return "is no regular file"
    if found.st_size != facts.size:
        return f"has {found.st_size} bytes, expected {facts.size}"
    if _modified(found) > facts.modified:
        return "was written to after the adapter was linked to it"
    return None


def damaged(file: str, facts: LinkedFile) -> str | None:
    """Return what is wrong with a linked file, all of which is read, `None` if nothing is."""
    if problem := altered(file, facts):
        return problem
    try:
        with Path(file).open("rb") as opened:
            found = _sha256(opened)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return None if found == facts.sha256 else f"has {found}, expected {facts.sha256}"


def access(
    folders: Iterable[Path],
) -> tuple[icechunk.RepositoryConfig, dict[str, icechunk.AnyCredential | None]]:
    """Return what Icechunk needs to be told to follow references into these directories.

    Returns:
        Its configuration, and the authorisation: places that a store's own configuration names
        are not in it.
    """
    config = icechunk.RepositoryConfig.default()
    prefixes: dict[str, icechunk.AnyCredential | None] = {}
    for folder in sorted(folders):
        # Icechunk compares prefixes with locations that it has decoded.
        prefix = f"{unquote(folder.as_uri())}/"
        store = icechunk.local_filesystem_store(os.fspath(folder))
        config.set_virtual_chunk_container(icechunk.VirtualChunkContainer(prefix, store))
        prefixes[prefix] = None
    return config, prefixes


def _checked(name: str, path: Path) -> str:
    """Return a path as text if it can be referred to."""
    text = os.fspath(path)
    # Icechunk takes `..` away without looking at the disk, and refers to no file in the root.
    whole = path.is_absolute() and ".." not in path.parts and len(path.parts) > 2
    if not whole or not text.isprintable():
        raise AdapterError(
            f'{text!a}: adapter "{name}" cannot be linked to this path, expected an absolute one '
            "of printable characters, without .. and below a directory; add it without --link"
        )
    return text


def _facts(path: Path) -> os.stat_result:
    try:
        found = path.stat()
    except OSError as error:
        raise AdapterError(f"{path}: cannot be linked: {error.strerror or error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise AdapterError(f"{path}: cannot be linked: is no regular file")
    return found


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _modified(found: os.stat_result) -> int:
    """Return the time of the last writing as Icechunk compares it: no reference may be older."""
    return max(0, -(-found.st_mtime_ns // 1_000_000_000))


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise AdapterError(f"{path}: cannot be linked: {error.strerror or error}") from error


def _found(file: BinaryIO, path: Path, wanted: _Wanted) -> Iterator[tuple[tuple[str, Factor], int]]:
    """Give module path and factor, and its first byte, of those wanted that are in the file."""
    for start, content in _tensors(file, path, {nbytes for nbytes, _ in wanted}):
        for module, factor, bits in wanted.get((content.nbytes, crc32(content)), ()):
            # Equal checksums are a reason to look, no more.
            if bits.tobytes() == content.tobytes():
                yield (module, factor), start


def _tensors(file: BinaryIO, path: Path, sizes: set[int]) -> Iterator[tuple[int, Bits]]:
    """Give first byte and bytes of every tensor of a safetensors file that has one of `sizes`."""
    header = read_header(path)
    left = size = os.fstat(file.fileno()).st_size - header.size
    for key, entry in header.tensors.items():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        match offsets:
            case [int(begin), int(end)] if 0 <= begin <= end <= size:
                left -= end - begin
            case _:
                left = -1
        if left < 0:  # nor may tensors overlap, and have their bytes read again and again
            raise AdapterError(
                f'{path}: no readable safetensors file: tensor "{key}" has data_offsets {offsets}; '
                "it is truncated or damaged, get it again"
            )
        if end - begin in sizes:
            file.seek(header.size + begin)
            data = file.read(end - begin)
            yield header.size + begin, np.frombuffer(data, dtype=np.uint8)


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(_BLOCK):
        digest.update(block)
    return f"sha256:{digest.hexdigest()}"
