"""The worked example of the spec is what the code writes, byte for byte."""

import json
import re
import struct
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import unmerge_bundle
from unmerge_bundle import (
    AdapterRecord,
    AffineBasisEncoding,
    BundleWriter,
    GenerationInfo,
    ModuleErrors,
    RecordedModule,
)
from unmerge_bundle.arrays import DTYPES
from unmerge_bundle.errors import BundleError
from unmerge_bundle.jsontext import canonical_bytes
from unmerge_bundle.model import (
    BLOB_MEDIA_TYPE,
    FORMAT_VERSION,
    GENERATION_MEDIA_TYPE,
    MAX_DOCUMENT_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_MESSAGE_CHARACTERS,
    AdapterMetadata,
    Generation,
    parse_manifest,
)
from unmerge_bundle.verify import UNKNOWN_SOURCE

SPEC = Path(__file__).parents[2] / "docs" / "spec" / "bundle-v1.md"
DIGEST = "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("unmerge_bundle.writer.producer_version", lambda: "0.1.0")

    def array(values: object) -> Any:
        return np.array(values, dtype=np.float32)

    info = GenerationInfo.model_validate(
        {
            "strategy": {"method": "rmm", "version": 1, "distribution": "unmerge"},
            "recipe": {"merger": {"method": "rmm", "basis_size": 1}},
            "base_model": {"id": "tiny/base", "revision": None},
            "store_dtype": "float32",
            "libraries": {"torch": "2.13.0"},
            "sources": [{"name": "sql", "digest": DIGEST, "weight": 1.0}],
        }
    )
    record = AdapterRecord(
        name="sql",
        format="peft",
        config='{"r": 1}',
        base_model="tiny/base",
        digest=DIGEST,
        modules=(RecordedModule(path="layers.0", rank=1, source_scaling=2.0, dtype="float32"),),
    )
    encoding = AffineBasisEncoding(
        names=("sql",),
        scalings=(2.0,),
        mean_A=array([[1, 2]]),
        basis_A=array([[[1, 0.5]]]),
        coefficients_A=array([[[2, 4]]]),
        mean_B=array([[1], [0]]),
        basis_B=array([[[1], [-1]]]),
        coefficients_B=array([[[0, 3]]]),
    )
    with BundleWriter(tmp_path / "out.rmb", info=info) as writer:
        writer.add_adapter(record, {})
        errors = {"sql": ModuleErrors(factors=0.0, delta=0.0)}
        writer.add_module("layers.0", encoding, errors=errors)
        writer.finish(message="first", created=datetime(2026, 1, 31, 12, tzinfo=UTC))
    return tmp_path / "out.rmb"


def header(file: Path) -> Any:
    data = file.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length])


def produced(example: Path) -> dict[str, Any]:
    bundle = unmerge_bundle.open(example)
    own = header(example / bundle.generation.adapters[0].blob.file)
    return {
        "bundle.json": json.loads((example / "bundle.json").read_bytes()),
        "generation": json.loads((example / bundle.generations[0].document.file).read_bytes()),
        "shared header": header(example / bundle.generation.shared[0].file),
        "adapter header": own,
        "adapter metadata": json.loads(own["__metadata__"]["unmerge"]),
    }


def blocks() -> dict[str, Any]:
    text = SPEC.read_text(encoding="utf-8")
    labelled = re.findall(r"<!-- example: ([a-z. ]+) -->\n```json\n(.*?)```", text, re.DOTALL)
    assert len(labelled) == text.count("```json"), "every JSON block has a label"
    return {label: json.loads(block) for label, block in labelled}


def test_every_json_block_is_what_the_code_writes(example: Path) -> None:
    assert blocks() == produced(example)


def test_the_blocks_are_valid_on_their_own() -> None:
    found = blocks()
    parse_manifest(canonical_bytes(found["bundle.json"]))
    generation = Generation.model_validate_json(canonical_bytes(found["generation"]))
    AdapterMetadata.model_validate_json(canonical_bytes(found["adapter metadata"]))
    assert found["bundle.json"]["generations"][0]["document"]["size"] == len(
        canonical_bytes(found["generation"])
    )
    assert generation.restores == "factors"


def test_the_restored_numbers_of_the_example(example: Path) -> None:
    module = unmerge_bundle.open(example).restore("sql").modules["layers.0"]
    assert module.A.tolist() == [[3.0, 4.0]]
    assert module.B.tolist() == [[1.0], [-3.0]]
    text = SPEC.read_text(encoding="utf-8")
    assert "A = [[3, 4]]" in text
    assert "B = [[1], [−3]]" in text
    assert "[[6, 8], [−18, −24]]" in text
    delta = unmerge_bundle.open(example).restore("sql").delta("layers.0")
    assert delta.tolist() == [[6.0, 8.0], [-18.0, -24.0]]


def test_the_spec_names_every_code_dtype_and_limit() -> None:
    text = SPEC.read_text(encoding="utf-8")

    def codes(error: type[BundleError]) -> set[str]:
        return {error.code}.union(*(codes(child) for child in error.__subclasses__()))

    for fact in (
        *(f"`{code}`" for code in codes(BundleError) - {"bundle"}),
        *(f"`{code}`" for code in DTYPES),
        f"`{FORMAT_VERSION}`",
        f"`{GENERATION_MEDIA_TYPE}`",
        f"`{BLOB_MEDIA_TYPE}`",
        f"{MAX_MANIFEST_BYTES:,}",
        f"{MAX_DOCUMENT_BYTES:,}",
        f"{MAX_MESSAGE_CHARACTERS:,}",
        f"`{UNKNOWN_SOURCE}`",
        "100,000,000",
    ):
        assert fact in text, fact
    for model in (Generation, AdapterMetadata):
        for name in model.model_fields:
            assert f"`{name}`" in text, name
