import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import unmerge_bundle
from unmerge_bundle import (
    AdapterNotInBundleError,
    BlobError,
    BlobSizeError,
    BundleError,
    DeltaEncoding,
    DigestMismatchError,
    MissingBlobError,
    NonFiniteError,
    NotABundleError,
    TensorMismatchError,
    WrongKindError,
    reconstruct,
)
from unmerge_bundle.arrays import FLOAT_DTYPES, FloatDtype
from unmerge_bundle.blob import BlobReader, Held, write_safetensors

Make = Callable[..., Any]
Blob = Callable[[str], Path]


@pytest.mark.parametrize("stored", list(FLOAT_DTYPES))
@pytest.mark.parametrize("source", list(FLOAT_DTYPES))
def test_restored_is_reconstructed_bit_for_bit(
    tmp_path: Path, make_zoo: Make, stored: FloatDtype, source: FloatDtype
) -> None:
    zoo = make_zoo(dtype=stored, source_dtype=source, scaling=0.5, config="{ }\n")
    zoo.write(tmp_path / "out")
    bundle = unmerge_bundle.open(tmp_path / "out")
    assert bundle.adapters == ("code", "math", "sql")
    assert list(bundle.modules) == list(zoo.encodings)
    assert bundle.restores == "factors"
    for name in bundle.adapters:
        adapter = bundle.restore(name)
        assert list(adapter.modules) == list(zoo.originals[name])
        for path, module in adapter.modules.items():
            A, B = reconstruct(zoo.encodings[path], name, dtype=source)
            assert module.A.tobytes() == A.tobytes()
            assert module.B.tobytes() == B.tobytes()
            assert module.A.dtype == module.B.dtype == FLOAT_DTYPES[source]
            assert (module.scaling, module.source_scaling, module.source_rank) == (0.5, 2.0, 2)
            assert module.errors == zoo.errors[path][name] == bundle.errors(name)[path]
            expected = 0.5 * (B.astype(np.float64) @ A.astype(np.float64))
            np.testing.assert_allclose(adapter.delta(path), expected, rtol=1e-5, atol=1e-5)
            assert adapter.delta(path).dtype == np.float32
        record = zoo.records[name]
        assert (adapter.name, adapter.config, adapter.format) == (name, "{ }\n", "peft")
        assert (adapter.base_model, adapter.revision) == ("tiny/base", "main")
        assert adapter.source_digest == record.digest
        original = zoo.verbatim.get(name, {})
        assert adapter.verbatim.keys() == original.keys()
        for key, tensor in original.items():
            assert adapter.verbatim[key].tobytes() == tensor.tobytes()
            assert adapter.verbatim[key].dtype == tensor.dtype
            assert adapter.verbatim[key].shape == tensor.shape


def test_another_dtype_on_request(bundle_path: Path) -> None:
    module = unmerge_bundle.open(bundle_path).restore("sql", dtype="bfloat16")
    assert module.modules["layers.0.q_proj"].A.dtype == ml_dtypes.bfloat16


def test_overflow_on_request_is_an_error(tmp_path: Path, make_zoo: Make) -> None:
    zoo = make_zoo()
    zoo.encodings["layers.0.q_proj"].mean_A[0, 0] = 1e9
    zoo.write(tmp_path / "out")
    bundle = unmerge_bundle.open(tmp_path / "out")
    bundle.restore("sql")
    with pytest.raises(NonFiniteError, match="float16"):
        bundle.restore("sql", dtype="float16")


@pytest.mark.parametrize("dtype", list(FLOAT_DTYPES))
@pytest.mark.parametrize("dense", [False, True])
def test_merged_results_round_trip(
    tmp_path: Path, make_merged: Make, dtype: FloatDtype, dense: bool
) -> None:
    zoo = make_merged(dtype=dtype, dense=dense)
    zoo.write(tmp_path / "out")
    bundle = unmerge_bundle.open(tmp_path / "out")
    assert (bundle.adapters, bundle.restores) == ((), None)
    merged = bundle.merged()
    assert [source.name for source in merged.sources] == ["code", "math"]
    assert (merged.base_model, merged.revision) == ("tiny/base", "main")
    assert merged.unmerged == {"math": ("base_model.model.head.weight",)}
    for path, encoding in zoo.encodings.items():
        got = merged.modules[path]
        for name, tensor in encoding.shared_tensors().items():
            assert got.shared_tensors()[name].tobytes() == tensor.tobytes()
            assert got.shared_tensors()[name].dtype == tensor.dtype
        tensors = {n: t.astype(np.float32) for n, t in encoding.shared_tensors().items()}
        expected = (
            tensors["delta"] if isinstance(encoding, DeltaEncoding) else tensors["B"] @ tensors["A"]
        )
        np.testing.assert_allclose(merged.delta(path), expected, rtol=1e-6, atol=1e-6)


def test_wrong_kind_names_the_right_command(
    tmp_path: Path, bundle_path: Path, make_merged: Make
) -> None:
    make_merged().write(tmp_path / "merged")
    with pytest.raises(WrongKindError, match="use restore with one of code, math, sql"):
        unmerge_bundle.open(bundle_path).merged()
    merged = unmerge_bundle.open(tmp_path / "merged")
    for call in (merged.restore, merged.errors):
        with pytest.raises(WrongKindError, match="export"):
            call("code")


def test_unknown_adapter_lists_near_names(bundle_path: Path) -> None:
    bundle = unmerge_bundle.open(bundle_path)
    with pytest.raises(AdapterNotInBundleError, match="did you mean math"):
        bundle.restore("maths")
    with pytest.raises(LookupError, match="it holds 3, among them code, math, sql"):
        bundle.restore("zzz")


def test_paths_that_are_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(NotABundleError, match=r"bundle\.json") as caught:
            unmerge_bundle.open(path)
        assert str(path) in str(caught.value)


def test_one_adapter_needs_its_own_blob_only(bundle_path: Path, adapter_blob: Blob) -> None:
    adapter_blob("math").unlink()
    bundle = unmerge_bundle.open(bundle_path)
    bundle.restore("sql")
    bundle.restore("code")
    with pytest.raises(MissingBlobError):
        bundle.restore("math")


@pytest.mark.parametrize("which", ["shared", "sql"])
def test_damage_is_an_error_before_any_number_comes_out(
    bundle_path: Path, adapter_blob: Blob, which: str
) -> None:
    blob = unmerge_bundle.open(bundle_path).generation.shared[0].file
    file = bundle_path / blob if which == "shared" else adapter_blob(which)
    data = file.read_bytes()
    for position in (len(data) - 1, len(data) // 2, 3):
        flipped = bytearray(data)
        flipped[position] ^= 0x10
        file.write_bytes(flipped)
        expected = BlobError if position == 3 else DigestMismatchError
        with pytest.raises((expected, BlobError)) as caught:
            unmerge_bundle.open(bundle_path).restore("sql")
        assert caught.value.path == str(file)
    for wrong in (data[:-1], data + b"\0", b""):
        file.write_bytes(wrong)
        with pytest.raises(BlobSizeError, match=f"expected {len(data)}"):
            unmerge_bundle.open(bundle_path).restore("sql")
    file.write_bytes(data)
    unmerge_bundle.open(bundle_path).restore("sql")


def test_every_flipped_bit_of_a_blob_is_noticed(bundle_path: Path, adapter_blob: Blob) -> None:
    file = adapter_blob("sql")
    data = file.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(data), 40):
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(flipped)
        with pytest.raises((DigestMismatchError, BlobError)):
            unmerge_bundle.open(bundle_path).restore("sql")


def test_damaged_documents(bundle_path: Path) -> None:
    (document,) = (bundle_path / "blobs").glob("*.json")
    data = document.read_bytes()
    document.write_bytes(data.replace(b"rmm", b"rmn"))
    with pytest.raises(DigestMismatchError, match="damaged"):
        unmerge_bundle.open(bundle_path)
    document.write_bytes(data + b" ")
    with pytest.raises(BlobSizeError):
        unmerge_bundle.open(bundle_path)
    document.unlink()
    with pytest.raises(MissingBlobError):
        unmerge_bundle.open(bundle_path)


Tensors = dict[str, Any]


def swap_blob(bundle_path: Path, reseal: Any, name: str, change: Any) -> None:
    """Replace an adapter's blob by a changed one whose digests fit."""
    bundle = unmerge_bundle.open(bundle_path)
    (index,) = [i for i, a in enumerate(bundle.generation.adapters) if a.name == name]
    file = bundle_path / bundle.generation.adapters[index].blob.file
    reader = BlobReader(file, where="old")
    tensors = {n: reader.array(n) for n in reader.tensors}
    metadata = dict(reader.metadata)
    change(tensors, metadata)
    held = {n: Held.of(t, name=n) for n, t in tensors.items()}
    blob = write_safetensors(bundle_path / "new", held, metadata)
    (bundle_path / "new").rename(bundle_path / "blobs" / f"{blob.digest[7:]}.safetensors")
    reseal(
        lambda document: document["adapters"][index]["blob"].update(
            digest=blob.digest, size=blob.size
        )
    )


def text(old: str, new: str) -> Callable[[Tensors, dict[str, str]], None]:
    def change(_: Tensors, metadata: dict[str, str]) -> None:
        assert old in metadata["unmerge"]
        metadata["unmerge"] = metadata["unmerge"].replace(old, new)

    return change


def tensor(name: str, value: Any) -> Callable[[Tensors, dict[str, str]], None]:
    def change(tensors: Tensors, _: dict[str, str]) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return change


COEFFICIENTS = "modules/layers.0.q_proj/coefficients_A"


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (text('"name":"math"', '"name":"sql"'), BlobError, "describes adapter 'sql'"),
        (text('"digest":"sha256:', '"digest":"sha512:'), BlobError, "digest"),
        (text("layers.1.v_proj", "layers.2.v_proj"), BlobError, "not the 2"),
        (text('"scaling":2.0', '"scaling":1e999'), BlobError, "out of range"),
        (text('"rank":2', '"rank":0'), BlobError, "rank"),
        (text('"float32"', '"float64"'), BlobError, "dtype"),
        (text('{"base_model"', '{"name":"x","base_model"'), BlobError, "appears twice"),
        (text('"scalar"', '"scalar2"'), TensorMismatchError, "'verbatim/scalar2' is missing"),
        (lambda _, metadata: metadata.update(more="x"), BlobError, "alone"),
        (lambda _, metadata: metadata.clear(), BlobError, "alone"),
        (tensor(COEFFICIENTS, None), TensorMismatchError, "is missing"),
        (tensor(COEFFICIENTS, np.zeros((2, 4))), TensorMismatchError, "float64"),
        (tensor(COEFFICIENTS, np.zeros((4, 2), np.float32)), TensorMismatchError, "shape"),
        (tensor(COEFFICIENTS, np.full((2, 4), np.nan, np.float32)), NonFiniteError, "not finite"),
        (tensor("errors/delta", np.array([0.0, np.nan])), TensorMismatchError, "NaN or negative"),
        (tensor("errors/factors", np.array([0.0, -1.0])), TensorMismatchError, "NaN or negative"),
        (tensor("errors/factors", np.zeros(3)), TensorMismatchError, "shape"),
    ],
)
def test_blobs_that_contradict_the_document(
    bundle_path: Path, reseal: Any, change: Any, error: type[BundleError], match: str
) -> None:
    swap_blob(bundle_path, reseal, "math", change)
    bundle = unmerge_bundle.open(bundle_path)
    with pytest.raises(error, match=match) as caught:
        bundle.restore("math")
    assert type(caught.value) is error
    bundle.restore("sql")
    report = unmerge_bundle.verify(bundle_path, "reconstruction")
    assert [problem.code for problem in report.problems] == [error.code]


def test_unknown_tensors_of_a_blob_are_ignored(bundle_path: Path, reseal: Any) -> None:
    swap_blob(bundle_path, reseal, "math", tensor("later/x", np.zeros(3)))
    unmerge_bundle.open(bundle_path).restore("math")


def test_many_threads_share_one_bundle(tmp_path: Path, make_zoo: Make) -> None:
    make_zoo().write(tmp_path / "out", shared_blob_bytes=1)
    bundle = unmerge_bundle.open(tmp_path / "out")
    expected = unmerge_bundle.open(tmp_path / "out").restore("math").delta("layers.1.v_proj")
    results: list[Any] = []

    def work() -> None:
        results.extend(bundle.restore("math").delta("layers.1.v_proj") for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 30
    assert all(np.array_equal(result, expected) for result in results)


def test_results_outlive_the_bundle(bundle_path: Path) -> None:
    adapter = unmerge_bundle.open(bundle_path).restore("math")
    shutil.rmtree(bundle_path)
    assert adapter.verbatim["base_model.model.head.weight"].sum() == 15


def test_repr_says_what_it_is(bundle_path: Path) -> None:
    shown = repr(unmerge_bundle.open(bundle_path))
    assert "rmm, restores factors, 2 modules, 3 adapters" in shown


def test_reading_needs_neither_torch_nor_the_framework(bundle_path: Path) -> None:
    code = """
import sys
for name in ("torch", "zarr", "icechunk", "unmerge", "unmerge_strategies"):
    sys.modules[name] = None
import unmerge_bundle
bundle = unmerge_bundle.open(sys.argv[1])
for name in bundle.adapters:
    bundle.restore(name).save_peft(f"{sys.argv[1]}.{name}", portable=True)
assert unmerge_bundle.verify(sys.argv[1], "reconstruction").ok
"""
    package = Path(unmerge_bundle.__file__).parent.parent
    subprocess.run(
        [sys.executable, "-c", code, str(bundle_path)],
        check=True,
        env={"PYTHONPATH": str(package)},
    )
    assert Path(f"{bundle_path}.sql", "adapter_model.safetensors").is_file()
