"""The JSON of a bundle as typed models: `bundle.json`, generation documents, adapter records.

Reading is strict about types and values, and ignores fields it does not know, so that a later
minor version may add some. Nothing here touches a file.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, JsonValue, ValidationError, model_validator

from unmerge_bundle.arrays import FloatDtype
from unmerge_bundle.encodings import Restores
from unmerge_bundle.errors import (
    BundleError,
    DigestMismatchError,
    ManifestError,
    ManifestTooLargeError,
    NotABundleError,
    UnsupportedVersionError,
)
from unmerge_bundle.fields import (
    Count,
    Digest,
    FormatModel,
    Key,
    ModulePath,
    Name,
    Positive,
    Time,
    check_sorted,
)
from unmerge_bundle.jsontext import canonical_bytes, parse_object
from unmerge_bundle.modules import ModuleEntry

__all__ = [
    "BLOB_MEDIA_TYPE",
    "FORMAT",
    "FORMAT_VERSION",
    "GENERATION_MEDIA_TYPE",
    "MANIFEST_NAME",
    "MAX_DOCUMENT_BYTES",
    "MAX_MANIFEST_BYTES",
    "MAX_MESSAGE_CHARACTERS",
    "AdapterEntry",
    "AdapterMetadata",
    "Amount",
    "BaseModelId",
    "BundleSize",
    "Descriptor",
    "Generation",
    "GenerationEntry",
    "Manifest",
    "ModuleErrors",
    "Producer",
    "RestoredModuleRecord",
    "Source",
    "Strategy",
    "parse_generation",
    "parse_manifest",
    "parse_model",
    "seal",
    "sha256",
]

FORMAT = "unmerge-bundle"
FORMAT_VERSION = "1.0-draft"
MANIFEST_NAME = "bundle.json"
GENERATION_MEDIA_TYPE = "application/vnd.unmerge.generation.v1+json"
BLOB_MEDIA_TYPE = "application/vnd.safetensors"
MAX_MANIFEST_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 64 << 20
MAX_MESSAGE_CHARACTERS = 4096


class Descriptor(FormatModel):
    """Where a blob is (its digest is its name), how large, and what it holds."""

    digest: Digest
    size: Count
    media_type: str

    @property
    def file(self) -> str:
        """The blob's path inside the bundle, `/`-separated."""
        suffix = "json" if self.media_type == GENERATION_MEDIA_TYPE else "safetensors"
        return f"blobs/{self.digest.removeprefix('sha256:')}.{suffix}"


class GenerationEntry(FormatModel):
    """One generation as `bundle.json` names it."""

    number: Positive
    document: Descriptor
    created: Time
    message: Annotated[str, Field(max_length=MAX_MESSAGE_CHARACTERS)]


class Manifest(FormatModel):
    """`bundle.json`: the generations, oldest first; the last one is current."""

    format: Literal["unmerge-bundle"] = "unmerge-bundle"
    format_version: Literal["1.0-draft"] = "1.0-draft"
    generations: Annotated[tuple[GenerationEntry, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        for number, entry in enumerate(self.generations, start=1):
            if entry.number != number:
                raise ValueError(f"generation {entry.number} stands at place {number}")
            _check_media_type(entry.document, GENERATION_MEDIA_TYPE)
        return self


class Producer(FormatModel):
    """The program that wrote a generation."""

    name: str
    version: str


class Strategy(FormatModel):
    """The strategy that made the encodings: its name, its version, who distributes it."""

    method: str
    version: int
    distribution: str


class BaseModelId(FormatModel):
    """The model the adapters sit on, as far as it is known."""

    id: str | None = None
    revision: str | None = None


class Source(FormatModel):
    """One adapter that went in: its digest identifies the original, its weight is the user's."""

    name: Name
    digest: Digest
    weight: float


class AdapterEntry(FormatModel):
    """One adapter that can be restored.

    Attributes:
        name: Its name; one of the sources.
        generation: Number of the generation that added it: 1 for those that were merged, a later
            one for those that were appended, from which no shared tensor was made.
        blob: Its blob.
    """

    name: Name
    generation: Positive
    blob: Descriptor


class Generation(FormatModel):
    """A generation document: everything one state of the bundle consists of.

    It holds no time and no message (`bundle.json` does), so that equal inputs give equal bytes.
    """

    number: Positive
    parent: Digest | None
    producer: Producer
    strategy: Strategy
    recipe: dict[str, JsonValue]
    base_model: BaseModelId
    store_dtype: FloatDtype
    libraries: dict[str, str]
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    modules: Annotated[tuple[ModuleEntry, ...], Field(min_length=1)]
    shared: tuple[Descriptor, ...]
    adapters: tuple[AdapterEntry, ...]
    unmerged: dict[Name, tuple[Key, ...]]
    absent: dict[Name, tuple[ModulePath, ...]]

    @property
    def restores(self) -> Restores | None:
        """What the bundle gives back for each adapter, or `None` for one merged result.

        "factors" where every module gives back factors, "delta" where at least one gives back
        nothing but the delta.
        """
        kinds = {module.restores for module in self.modules}
        return "delta" if "delta" in kinds else "factors" if "factors" in kinds else None

    @model_validator(mode="after")
    def _consistent(self) -> Generation:
        sources = check_sorted("sources", [source.name for source in self.sources])
        paths = check_sorted("modules", [module.path for module in self.modules])
        adapters = check_sorted("adapters", [adapter.name for adapter in self.adapters])
        if len({module.restores is None for module in self.modules}) > 1:
            raise ValueError("modules that restore adapters and merged ones are mixed")
        if (self.restores is None) != (not adapters):
            raise ValueError("adapters are listed exactly where the modules restore them")
        for module in self.modules:
            if module.blob is not None and module.blob >= len(self.shared):
                raise ValueError(
                    f"module {module.path} is in shared blob {module.blob}, there are "
                    f"{len(self.shared)}"
                )
        for adapter in self.adapters:
            if adapter.generation > self.number:
                raise ValueError(
                    f"adapter {adapter.name} is of generation {adapter.generation}, this is "
                    f"{self.number}"
                )
        for descriptor in (*self.shared, *(adapter.blob for adapter in self.adapters)):
            _check_media_type(descriptor, BLOB_MEDIA_TYPE)
        for label, names in (
            ("adapters", adapters),
            ("unmerged", self.unmerged),
            ("absent", self.absent),
        ):
            if strangers := sorted(set(names) - sources):
                raise ValueError(f"{label} names {strangers[0]!r}, which is not among the sources")
        for name, keys in self.unmerged.items():
            check_sorted(f"unmerged {name}", keys)
        for name, absent in self.absent.items():
            if strangers := sorted(check_sorted(f"absent {name}", absent) - paths):
                raise ValueError(f"absent names module {strangers[0]!r}, which is not in modules")
        return self

    def adapter_paths(self, name: str) -> tuple[str, ...]:
        """Return the paths of the modules adapter `name` has, sorted."""
        absent = frozenset(self.absent.get(name, ()))
        return tuple(module.path for module in self.modules if module.path not in absent)


class RestoredModuleRecord(FormatModel):
    """One module of one adapter, as the adapter's blob describes it.

    Attributes:
        path: The module.
        rank: Rank of the source's factors.
        restored_rank: Rank of the factors that come back, larger or smaller than the source's;
            `None` where a dense delta comes back.
        scaling: What the restored factors are used with: `delta = scaling · B @ A`; or what a
            unified delta is multiplied with.
        source_scaling: What the source's factors are used with.
        dtype: Dtype of the source's factors, and of the restored ones unless asked otherwise.
    """

    path: ModulePath
    rank: Positive
    restored_rank: Positive | None
    scaling: float
    source_scaling: float
    dtype: FloatDtype


class AdapterMetadata(FormatModel):
    """The JSON text in the header of an adapter's blob."""

    name: Name
    format: str
    config: str
    base_model: str | None
    revision: str | None
    digest: Digest
    modules: Annotated[tuple[RestoredModuleRecord, ...], Field(min_length=1)]
    verbatim: tuple[Key, ...]

    @model_validator(mode="after")
    def _consistent(self) -> AdapterMetadata:
        check_sorted("modules", [module.path for module in self.modules])
        check_sorted("verbatim", self.verbatim)
        return self


class ModuleErrors(FormatModel):
    """How far one adapter's module is from its original, as relative Frobenius norms.

    Attributes:
        factors: Of A and B together; `None` where the encoding gives back no factors but a delta.
        delta: Of `scaling · B @ A`.

    They are infinite only where the original's norm is 0 and the difference is not.
    """

    model_config = ConfigDict(allow_inf_nan=True)

    factors: Annotated[float, Field(ge=0)] | None
    delta: Annotated[float, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class Amount:
    """Tensor entries, and the bytes they take."""

    elements: int = 0
    bytes: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.elements + other.elements, self.bytes + other.bytes)


@dataclass(frozen=True, slots=True)
class BundleSize:
    """Where the bytes of a bundle's current generation are.

    Attributes:
        shared: Tensors all adapters share, or the merged result.
        adapters: Per adapter, the tensors it is restored from.
        verbatim: Per adapter, tensors kept as they were (task heads, biases).
        overhead: Everything else, in bytes: JSON, headers of blobs, recorded errors.
        total: Bytes of `bundle.json`, the generation document and its blobs.
    """

    shared: Amount
    overhead: int
    total: int
    adapters: dict[str, Amount] = field(default_factory=dict)
    verbatim: dict[str, Amount] = field(default_factory=dict)


def sha256(data: bytes) -> str:
    """Return `sha256:…` over `data`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def seal(manifest: Manifest) -> bytes:
    """Return the bytes of `bundle.json`: canonical, carrying the digest of the rest."""
    content = manifest.model_dump(mode="json")
    return canonical_bytes({**content, "digest": sha256(canonical_bytes(content))})


def parse_manifest(data: bytes, *, where: str = MANIFEST_NAME) -> Manifest:
    """Return the manifest `data` holds.

    Raises:
        ManifestTooLargeError: It is larger than the format allows.
        NotABundleError: It is some other program's `bundle.json`.
        UnsupportedVersionError: Its format version is not the one this reader knows.
        DigestMismatchError: Its content does not match the digest it carries.
        ManifestError: It is malformed.
    """
    check_size(len(data), MAX_MANIFEST_BYTES, where)
    content = parse_object(data, where=where, error=ManifestError, floats=False)
    if content.get("format") != FORMAT:
        raise NotABundleError(
            f'expected "format": "{FORMAT}", got {content.get("format")!r}; '
            "the file is not a bundle's",
            path=where,
        )
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise UnsupportedVersionError(
            f"format version {version!r} is not supported, this release reads {FORMAT_VERSION!r} "
            "only; use the release of unmerge that wrote the bundle, or write it again",
            path=where,
        )
    recorded = content.pop("digest", None)
    found = sha256(canonical_bytes(content))
    if recorded != found:
        raise DigestMismatchError(
            f"records the digest {recorded}, its content has {found}; the file is damaged or was "
            "edited: get it again",
            path=where,
        )
    return parse_model(Manifest, data, where=where, error=ManifestError)


def parse_generation(data: bytes, *, where: str) -> Generation:
    """Return the generation document `data` holds; the caller has checked its digest.

    Raises:
        ManifestTooLargeError: It is larger than the format allows.
        ManifestError: It is malformed or contradicts itself.
    """
    check_size(len(data), MAX_DOCUMENT_BYTES, where)
    parse_object(data, where=where, error=ManifestError, floats=True)
    return parse_model(Generation, data, where=where, error=ManifestError)


ModelT = TypeVar("ModelT", bound=FormatModel)


def parse_model(
    model: type[ModelT], data: bytes, *, where: str, error: type[BundleError]
) -> ModelT:
    """Return `data`, JSON that `parse_object` has accepted, as a `model`.

    Raises:
        BundleError: Of class `error`; a field is missing or has a wrong value.
    """
    try:
        return model.model_validate_json(data)
    except ValidationError as problem:
        raise error(first_problem(problem), path=where) from problem


def first_problem(problem: ValidationError) -> str:
    """Return the first thing pydantic found wrong, as one line."""
    first: Any = problem.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    more = f" (and {problem.error_count() - 1} more)" if problem.error_count() > 1 else ""
    return f"{place}: {message}{more}" if place else f"{message}{more}"


def check_size(size: int, limit: int, where: str) -> None:
    """Refuse a JSON document of more than `limit` bytes.

    Raises:
        ManifestTooLargeError: It is larger.
    """
    if size > limit:
        raise ManifestTooLargeError(
            f"has {size} bytes, at most {limit} are allowed; it is no document of this format",
            path=where,
        )


def _check_media_type(descriptor: Descriptor, expected: str) -> None:
    if descriptor.media_type != expected:
        raise ValueError(
            f"blob {descriptor.digest} has media type {descriptor.media_type!r}, expected "
            f"{expected!r}"
        )
