"""The worked example of the spec is what the code writes, byte for byte."""

import json
import re
import struct
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from pydantic import Field, TypeAdapter

import unmerge_bundle
from formats.kinds import KINDS, encode, originals
from unmerge_bundle import (
    AdapterRecord,
    AffineBasisEncoding,
    BundleWriter,
    GenerationInfo,
    ModuleErrors,
    RecordedModule,
    fit_adapter,
)
from unmerge_bundle.arrays import DTYPES
from unmerge_bundle.entry import module_entry
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
from unmerge_bundle.modules import RestoringModule, check_tensor
from unmerge_bundle.reconstruct import restore_module
from unmerge_bundle.verify import UNKNOWN_SOURCE

ENCODING_EXAMPLES = {
    "shared_factors",
    "diagonal shared_factors",
    "masked_delta",
    "adapter_factors",
}
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
    labelled = re.findall(r"<!-- example: ([a-z._ ]+) -->\n```json\n(.*?)```", text, re.DOTALL)
    assert len(labelled) == text.count("```json"), "every JSON block has a label"
    return {label: json.loads(block) for label, block in labelled}


def test_every_json_block_is_what_the_code_writes(example: Path) -> None:
    found = blocks()
    expected = produced(example)
    assert {label: found[label] for label in expected} == expected
    assert found.keys() == expected.keys() | ENCODING_EXAMPLES


@pytest.mark.parametrize("label", sorted(ENCODING_EXAMPLES))
def test_the_examples_of_encodings_are_what_is_restored_and_appended(label: str) -> None:
    example = blocks()[label]
    adapter: TypeAdapter[RestoringModule] = TypeAdapter(
        Annotated[RestoringModule, Field(discriminator="encoding")]
    )
    entry = adapter.validate_json(json.dumps({**example["entry"], "path": "layers.0", "facts": {}}))
    layouts = {**entry.shared_layout(), **entry.adapter_layout(example["restored_rank"])}
    assert entry.admits(example["restored_rank"])
    tensors = {}
    for name, values in {**example["shared"], **example["own"]}.items():
        dtype = np.float32 if layouts[name].bits is None else np.uint8
        tensors[name] = np.array(values, dtype=dtype)
        check_tensor(name, tensors[name], layouts[name], "float32", where=label)
    assert tensors.keys() == layouts.keys()
    restored = restore_module(
        entry, tensors, scaling=example["scaling"], dtype="float32", where=label
    )
    found = (
        {"A": restored[0].tolist(), "B": restored[1].tolist()}
        if isinstance(restored, tuple)
        else {"delta": restored.tolist()}
    )
    assert found == example["restored"]
    if "factors" in example:
        fit = fit_adapter(
            entry,
            {name: tensors[name] for name in example["shared"]},
            (np.array(example["factors"]["A"]), np.array(example["factors"]["B"])),
            source_scaling=example["source_scaling"],
            scaling=example["source_scaling"],
            store_dtype="float32",
        )
        assert fit.tensors.keys() == example["own"].keys()
        for name, tensor in fit.tensors.items():
            np.testing.assert_allclose(tensor, example["own"][name], rtol=1e-6, atol=1e-6)
        assert (fit.scaling, fit.restored_rank) == (example["scaling"], example["restored_rank"])


def test_the_spec_lists_every_encoding_and_its_tensors() -> None:
    text = SPEC.read_text(encoding="utf-8")
    for kind in KINDS:
        encoding = encode(kind, originals())
        section = text.split(f"### `{encoding.kind}`\n")[1].split("\n#")[0]
        for name in (*encoding.shared_tensors(), *encoding.adapter_tensors("sql")):
            assert f"| `{name}` |" in section, name
        for name in module_entry("x", encoding).model_dump():
            if name not in ("path", "kind", "encoding", "d_out", "d_in", "facts", "blob"):
                assert f"`{name}`" in section, name


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
