import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from unmerge_bundle.arrays import DTYPES
from unmerge_bundle.blob import BlobReader, BlobWriter, Held, Spool, write_safetensors
from unmerge_bundle.errors import (
    BlobError,
    DigestMismatchError,
    InvalidInputError,
    TensorMismatchError,
)
from unmerge_bundle.model import sha256

EVERY_DTYPE = {code: np.arange(6).reshape(2, 3).astype(dtype) for code, dtype in DTYPES.items()} | {
    "scalar": np.array(-2.5, dtype=np.float16),
    "empty": np.zeros((0, 4), dtype=np.float32),
}


def write(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> str:
    held = {name: Held.of(array, name=name) for name, array in tensors.items()}
    return write_safetensors(path, held, metadata).digest


def raw(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_every_dtype_round_trips_bit_for_bit(tmp_path: Path) -> None:
    write(tmp_path / "x", EVERY_DTYPE, {"k": "v"})
    reader = BlobReader(tmp_path / "x", where="x")
    assert reader.metadata == {"k": "v"}
    assert set(reader.tensors) == set(EVERY_DTYPE)
    for name, array in EVERY_DTYPE.items():
        got = reader.array(name)
        assert got.dtype == array.dtype
        assert got.shape == array.shape
        assert got.tobytes() == array.tobytes()
        assert not got.flags.writeable
        assert got.size == 0 or got.__array_interface__["data"][0] % got.itemsize == 0


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    write(tmp_path / "x", EVERY_DTYPE, {"k": "v"})
    data = (tmp_path / "x").read_bytes()
    found = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    for name, array in EVERY_DTYPE.items():
        assert tuple(found[name]["shape"]) == array.shape
        assert bytes(found[name]["data"]) == array.tobytes()
    assert found["BF16"]["dtype"] == "BF16"
    plain = {n: a for n, a in EVERY_DTYPE.items() if a.dtype != ml_dtypes.bfloat16}
    write(tmp_path / "plain", plain)
    for name, array in safetensors.numpy.load_file(tmp_path / "plain").items():
        np.testing.assert_array_equal(array, plain[name])
        assert array.dtype == plain[name].dtype


def test_we_read_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    tensors = {n: a for n, a in EVERY_DTYPE.items() if a.dtype != ml_dtypes.bfloat16}
    safetensors.numpy.save_file(tensors, tmp_path / "x", metadata={"k": "v"})
    reader = BlobReader(tmp_path / "x", where="x")
    assert reader.metadata == {"k": "v"}
    for name, array in tensors.items():
        assert reader.array(name).tobytes() == array.tobytes()
        assert reader.array(name).dtype == array.dtype


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
        hnp.arrays(
            st.sampled_from([np.float32, np.float16, np.int64, np.uint8]),
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        ),
        max_size=5,
    )
)
def test_any_tensors_agree_with_the_library(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Any]
) -> None:
    tensors.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("blob") / "x"
    write(path, tensors)
    theirs = safetensors.numpy.load(path.read_bytes())
    ours = BlobReader(path, where="x")
    assert set(theirs) == set(tensors) == set(ours.tensors)
    for name, array in tensors.items():
        assert theirs[name].tobytes() == ours.array(name).tobytes() == array.tobytes()


def test_bytes_depend_on_content_only_and_the_name_is_their_digest(tmp_path: Path) -> None:
    files = []
    for order in (1, -1):
        spool = Spool(tmp_path / f"spool{order}")
        writer = BlobWriter(spool)
        for name in list(EVERY_DTYPE)[::order]:
            writer.add(name, np.asfortranarray(EVERY_DTYPE[name]))
        folder = tmp_path / str(order)
        folder.mkdir()
        blob = writer.finish(folder)
        spool.remove()
        (file,) = folder.iterdir()
        files.append(file.read_bytes())
        assert blob.digest == sha256(files[-1]) == f"sha256:{file.name.split('.')[0]}"
        assert blob.size == len(files[-1])
        assert sum(a.nbytes for a in EVERY_DTYPE.values()) == writer.nbytes
    assert files[0] == files[1]
    assert not (tmp_path / "spool1").exists()


def test_big_endian_arrays_are_stored_little_endian(tmp_path: Path) -> None:
    write(tmp_path / "x", {"a": np.array([1.0, 2.0], dtype=">f4")})
    np.testing.assert_array_equal(BlobReader(tmp_path / "x", where="x").array("a"), [1.0, 2.0])


def test_unknown_dtypes_and_repeated_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="complex64"):
        write(tmp_path / "x", {"a": np.zeros(2, dtype=np.complex64)})
    spool = Spool(tmp_path / "spool")
    writer = BlobWriter(spool)
    writer.add("a", np.zeros(2))
    with pytest.raises(InvalidInputError, match="twice"):
        writer.add("a", np.zeros(2))
    spool.close()


OK = entry("F32", [1], 0, 4)
BAD = {
    "empty file": (b"", "truncated"),
    "no header": (b"\x00" * 7, "truncated"),
    "header beyond the end": (raw({}, length=99), "truncated"),
    "header beyond the limit": (raw({}, length=1 << 62), "claims"),
    "header no JSON": (raw(b"{nope}"), "JSON"),
    "header no object": (raw([]), "object"),
    "duplicate key": (
        raw(b'{"a":%b,"a":%b}' % ((json.dumps(OK).encode(),) * 2), b"\0" * 4),
        "appears twice",
    ),
    "duplicate key inside": (
        raw(b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
        "appears twice",
    ),
    "entry no object": (raw({"a": 1}), "must be an object"),
    "missing field": (raw({"a": {"dtype": "F32", "shape": [1]}}), "must be an object"),
    "extra field": (raw({"a": {**OK, "x": 1}}, b"\0" * 4), "must be an object"),
    "unknown dtype": (raw({"a": entry("F8_E4M3", [4], 0, 4)}, b"\0" * 4), "dtype"),
    "dtype no string": (raw({"a": {**OK, "dtype": ["F32"]}}, b"\0" * 4), "dtype"),
    "negative shape": (raw({"a": entry("F32", [-1, -1], 0, 4)}, b"\0" * 4), "shape"),
    "bool in shape": (raw({"a": {**OK, "shape": [True]}}, b"\0" * 4), "shape"),
    "huge empty shape": (raw({"a": entry("F32", [0, 1 << 60], 0, 0)}), "impossible"),
    "too many dimensions": (raw({"a": entry("U8", [1] * 33, 0, 1)}, b"\0"), "impossible"),
    "float offset": (raw(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4.0]}}'), "integer"),
    "three offsets": (raw({"a": {**OK, "data_offsets": [0, 4, 8]}}, b"\0" * 4), "data_offsets"),
    "size is not the product": (raw({"a": entry("F32", [2], 0, 4)}, b"\0" * 4), "needs 8 bytes"),
    "end before begin": (raw({"a": entry("F32", [0], 4, 0)}, b"\0" * 4), "needs 0 bytes"),
    "overlap": (raw({"a": OK, "b": entry("F32", [1], 2, 6)}, b"\0" * 6), "overlaps"),
    "hole": (raw({"a": OK, "b": entry("F32", [1], 8, 12)}, b"\0" * 12), "hole"),
    "extra bytes": (raw({"a": OK}, b"\0" * 5), "cover 4 bytes"),
    "truncated data": (raw({"a": OK}, b"\0" * 3), "cover 4 bytes"),
    "metadata no strings": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata no object": (raw({"__metadata__": []}), "__metadata__"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_files_are_refused(tmp_path: Path, case: str) -> None:
    data, match = BAD[case]
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(BlobError, match=match) as caught:
        BlobReader(tmp_path / "x", where="the blob")
    assert caught.value.path == "the blob"


def test_the_cases_above_fail_for_their_own_reason(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(raw({"a": OK, "__metadata__": {"k": "v"}}, b"\0" * 4))
    assert BlobReader(tmp_path / "x", where="x").array("a").tolist() == [0.0]


def test_missing_tensor_and_bad_bool(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(raw({"a": entry("BOOL", [2], 0, 2)}, b"\1\2"))
    reader = BlobReader(tmp_path / "x", where="x")
    with pytest.raises(TensorMismatchError, match="'b' is missing"):
        reader.array("b")
    with pytest.raises(BlobError, match="0 and 1"):
        reader.array("a")


def test_digest_covers_every_byte(tmp_path: Path) -> None:
    digest = write(tmp_path / "x", {"a": np.arange(3.0)})
    data = (tmp_path / "x").read_bytes()
    BlobReader(tmp_path / "x", where="x").check_digest(digest)
    for position in (len(data) - 1, len(data) - 24):
        flipped = bytearray(data)
        flipped[position] ^= 1
        (tmp_path / "y").write_bytes(flipped)
        with pytest.raises(DigestMismatchError, match="damaged"):
            BlobReader(tmp_path / "y", where="y").check_digest(digest)
