"""Writes the documents of a generation, for a new bundle and for one that is appended to."""

from __future__ import annotations

import importlib.metadata
from datetime import UTC, datetime
from pathlib import Path

from unmerge_bundle.errors import InvalidInputError
from unmerge_bundle.fields import TIME_FORMAT
from unmerge_bundle.jsontext import canonical_bytes
from unmerge_bundle.model import (
    GENERATION_MEDIA_TYPE,
    MANIFEST_NAME,
    MAX_DOCUMENT_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_MESSAGE_CHARACTERS,
    Descriptor,
    Generation,
    GenerationEntry,
    Manifest,
    check_size,
    seal,
    sha256,
)
from unmerge_bundle.publish import write_file

__all__ = [
    "check_created",
    "check_message",
    "generation_bytes",
    "producer_version",
    "write_documents",
]


def check_message(message: str) -> str:
    """Return `message` if a generation may carry it.

    `BundleWriter.finish` checks it again; call this before hours of work depend on it.

    Raises:
        InvalidInputError: It has more than 4096 characters, or UTF-8 cannot express it.
    """
    if len(message) > MAX_MESSAGE_CHARACTERS:
        raise InvalidInputError(
            f"the message has {len(message)} characters, at most {MAX_MESSAGE_CHARACTERS} are "
            "allowed; shorten it"
        )
    try:
        message.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise InvalidInputError(
            f"the message holds {message[problem.start]!a} at position {problem.start}, which "
            "UTF-8 cannot express; remove it"
        ) from None
    return message


def check_created(created: datetime | None) -> datetime:
    """Return `created`, or now.

    Raises:
        InvalidInputError: It has no time zone.
    """
    moment = created or datetime.now(UTC)
    if moment.tzinfo is None:
        raise InvalidInputError(f"created {moment} has no time zone; give an aware time")
    return moment


def producer_version() -> str:
    """Return the installed version of unmerge, "unknown" when run from a bare source tree."""
    try:
        return importlib.metadata.version("unmerge")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def generation_bytes(generation: Generation, *, path: str) -> bytes:
    """Return the document of a generation.

    Raises:
        InvalidInputError: It holds what JSON cannot say: NaN in a recipe, broken text.
        ManifestTooLargeError: It would be larger than the format allows.
    """
    try:
        document = canonical_bytes(generation.model_dump(mode="json"))
    except ValueError as problem:
        raise InvalidInputError(f"cannot be written as JSON: {problem}", path=path) from None
    check_size(len(document), MAX_DOCUMENT_BYTES, f"{path}: generation document")
    return document


def write_documents(
    folder: Path,
    document: bytes,
    *,
    before: tuple[GenerationEntry, ...],
    message: str,
    created: datetime,
    path: str,
) -> Descriptor:
    """Write a generation's document and a new `bundle.json` into `folder`.

    Args:
        folder: Has `blobs/`; `bundle.json` is not there yet.
        document: The generation's bytes.
        before: The generations before this one, oldest first.
        message: What the generation is for.
        created: Aware time of creation.
        path: The bundle, for errors.

    Returns:
        The document's descriptor.

    Raises:
        ManifestTooLargeError: `bundle.json` would be larger than the format allows.
    """
    descriptor = Descriptor(
        digest=sha256(document), size=len(document), media_type=GENERATION_MEDIA_TYPE
    )
    entry = GenerationEntry(
        number=len(before) + 1,
        document=descriptor,
        created=created.astimezone(UTC).strftime(TIME_FORMAT),
        message=message,
    )
    manifest = seal(Manifest(generations=(*before, entry)))
    check_size(len(manifest), MAX_MANIFEST_BYTES, f"{path}: {MANIFEST_NAME}")
    write_file(folder / descriptor.file, document)
    write_file(folder / MANIFEST_NAME, manifest)
    return descriptor
