import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import unmerge_bundle
from unmerge_bundle.errors import (
    BundleError,
    DigestMismatchError,
    ManifestError,
    ManifestTooLargeError,
    NotABundleError,
    UnsupportedVersionError,
)
from unmerge_bundle.jsontext import canonical_bytes
from unmerge_bundle.model import (
    MAX_DOCUMENT_BYTES,
    MAX_MANIFEST_BYTES,
    Manifest,
    parse_manifest,
    seal,
    sha256,
)

Edit = Callable[[dict[str, Any]], None]
DIGEST = f"sha256:{'0' * 64}"


def content(**changes: Any) -> dict[str, Any]:
    entry = {
        "number": 1,
        "document": {
            "digest": DIGEST,
            "size": 1,
            "media_type": "application/vnd.unmerge.generation.v1+json",
        },
        "created": "2026-01-31T12:00:00Z",
        "message": "first",
    }
    entry.update(changes.pop("entry", {}))
    return {
        "format": "unmerge-bundle",
        "format_version": "1.0-draft",
        "generations": [entry],
        **changes,
    }


def sealed(value: dict[str, Any]) -> bytes:
    return canonical_bytes({**value, "digest": sha256(canonical_bytes(value))})


def test_sealed_manifest_round_trips() -> None:
    manifest = parse_manifest(sealed(content()))
    assert seal(manifest) == sealed(content())
    assert isinstance(manifest, Manifest)


def test_unknown_fields_are_ignored_but_covered_by_the_digest() -> None:
    value = content(later={"x": [1]}, entry={"extra": "y"})
    data = sealed(value)
    assert parse_manifest(data).generations[0].message == "first"
    with pytest.raises(DigestMismatchError):
        parse_manifest(data.replace(b'"x":[1]', b'"x":[2]'))


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (canonical_bytes(content(digest=DIGEST)), DigestMismatchError, "damaged or was edited"),
        (canonical_bytes(content()), DigestMismatchError, "digest None"),
        (sealed(content(format="other")), NotABundleError, "not a bundle"),
        (b"{}", NotABundleError, "not a bundle"),
        (sealed(content(format_version="2.0")), UnsupportedVersionError, "'2.0'"),
        (sealed(content(format_version="1.0")), UnsupportedVersionError, "'1.0'"),
        (sealed(content(format_version="1.0-draft2")), UnsupportedVersionError, "draft2"),
        (sealed(content(format_version=1)), UnsupportedVersionError, "version 1 "),
        (sealed(content(generations=[])), ManifestError, "generations"),
        (sealed(content(entry={"number": 2})), ManifestError, "stands at place 1"),
        (sealed(content(entry={"number": True})), ManifestError, "number"),
        (sealed(content(entry={"number": "1"})), ManifestError, "number"),
        (sealed(content(entry={"created": "2026-1-31T12:00:00Z"})), ManifestError, "created"),
        (sealed(content(entry={"created": "2026-01-31T12:00:00+01:00"})), ManifestError, "created"),
        (sealed(content(entry={"message": None})), ManifestError, "message"),
        (sealed(content(entry={"message": "x" * 4097})), ManifestError, "message"),
        (b'{"format":"unmerge-bundle","x":0.5}', ManifestError, "no integer"),
        (b"{" + b" " * MAX_MANIFEST_BYTES + b"}", ManifestTooLargeError, "at most"),
    ],
)
def test_bad_manifests(data: bytes, error: type[BundleError], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        parse_manifest(data)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    "digest",
    [
        "sha256:../../../etc/passwd",
        f"sha256:{'0' * 63}/",
        f"sha256:{'A' * 64}",
        f"sha256:{'0' * 64}\n",
        f"md5:{'0' * 64}",
        "0" * 64,
        f"sha256:{'0' * 65}",
    ],
)
def test_a_digest_cannot_name_another_path(digest: str) -> None:
    value = content()
    value["generations"][0]["document"]["digest"] = digest
    with pytest.raises(ManifestError, match="digest"):
        parse_manifest(sealed(value))


def swap(field: str) -> Edit:
    return lambda document: document[field].reverse()


def put(*place: Any) -> Edit:
    *parents, last, value = place

    def edit(document: dict[str, Any]) -> None:
        target: Any = document
        for part in parents:
            target = target[part]
        target[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (swap("sources"), "sources must be sorted"),
        (swap("modules"), "modules must be sorted"),
        (swap("adapters"), "adapters must be sorted"),
        (put("modules", 1, "path", "layers.0.q_proj"), "appears twice"),
        (put("modules", 0, "path", "a/../b"), "not allowed"),
        (put("modules", 0, "encoding", "pickle"), "encoding"),
        (put("modules", 0, "encoding", "factors"), "mixed"),
        (put("modules", 0, "blob", 7), "shared blob 7"),
        (put("modules", 0, "blob", -1), "blob"),
        (put("modules", 0, "rank", 0), "rank"),
        (put("modules", 0, "rank", 2.0), "rank"),
        (put("modules", []), "modules"),
        (put("adapters", []), "exactly where"),
        (put("adapters", 0, "name", "../up"), "not allowed"),
        (put("adapters", 0, "generation", 2), "of generation 2, this is 1"),
        (put("adapters", 0, "generation", 0), "generation"),
        (put("adapters", 0, "name", "aaa"), "not among the sources"),
        (put("adapters", 0, "blob", "media_type", "text/plain"), "media type"),
        (put("shared", 0, "media_type", "text/plain"), "media type"),
        (put("shared", 0, "size", -1), "size"),
        (put("sources", 0, "weight", "1"), "weight"),
        (put("sources", []), "sources"),
        (put("unmerged", {"stranger": ["k"]}), "not among the sources"),
        (put("absent", {"sql": ["nowhere"]}), "not in modules"),
        (put("absent", {"sql": ["layers.1.v_proj", "layers.0.q_proj"]}), "sorted"),
        (put("store_dtype", "float64"), "store_dtype"),
        (put("number", 2), "lists generation 1"),
        (put("parent", DIGEST), "with parent"),
        (lambda document: document.pop("recipe"), "recipe"),
    ],
)
def test_bad_generation_documents(
    bundle_path: Path, reseal: Callable[[Edit], None], edit: Edit, match: str
) -> None:
    unmerge_bundle.open(bundle_path)
    reseal(edit)
    with pytest.raises(ManifestError, match=match) as caught:
        unmerge_bundle.open(bundle_path)
    assert caught.value.path.endswith(".json")


def test_unknown_fields_of_a_generation_are_ignored(
    bundle_path: Path, reseal: Callable[[Edit], None]
) -> None:
    reseal(put("modules", 0, "later", {"x": 1.5}))
    reseal(put("later", None))
    assert unmerge_bundle.open(bundle_path).restore("sql").modules


def test_an_oversized_document_is_not_even_read(bundle_path: Path) -> None:
    manifest = json.loads((bundle_path / "bundle.json").read_bytes())
    descriptor = manifest["generations"][0]["document"]
    descriptor["size"] = MAX_DOCUMENT_BYTES + 1
    del manifest["digest"]
    with (bundle_path / "blobs" / f"{descriptor['digest'][7:]}.json").open("r+b") as file:
        file.truncate(MAX_DOCUMENT_BYTES + 1)
    (bundle_path / "bundle.json").write_bytes(sealed(manifest))
    with pytest.raises(ManifestTooLargeError):
        unmerge_bundle.open(bundle_path)
    with (bundle_path / "bundle.json").open("r+b") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(ManifestTooLargeError):
        unmerge_bundle.open(bundle_path)
