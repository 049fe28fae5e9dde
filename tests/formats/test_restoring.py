"""Every restoring encoding through writer, reader, verify and PEFT, and what spoils one."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import unmerge_bundle
from formats.kinds import D_IN, D_OUT, KINDS, NAMES, RANKS, SCALINGS, dense, encode, fill, originals
from unmerge_bundle import (
    BlobError,
    InvalidInputError,
    ManifestError,
    ModuleErrors,
    NonFiniteError,
    QuantisedMatrix,
    RestoredDelta,
    RestoredModule,
    TensorMismatchError,
    WrongKindError,
    measure,
    reconstruct,
    verify,
)
from unmerge_bundle.arrays import FLOAT_DTYPES, FloatDtype
from unmerge_bundle.blob import BlobReader, Held, write_safetensors
from unmerge_bundle.jsontext import canonical_bytes
from unmerge_bundle.model import sha256

Make = Callable[..., Any]

RESTORED_RANKS = {"affine": 3, "core": 2, "diagonal": 3, "tall": 2, "masked": None}
DELTA_ONLY = ("core", "diagonal", "tall", "masked")


@pytest.fixture
def mixed(tmp_path: Path, make_zoo: Make) -> Path:
    """A bundle that holds every kind, a module each; "sql" lacks the masked one."""
    fill(make_zoo(config="{}"), lacking={"sql": "masked"}).write(tmp_path / "mixed.rmb")
    return tmp_path / "mixed.rmb"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(FLOAT_DTYPES))
def test_what_comes_back_is_what_the_formula_says(kind: str, dtype: FloatDtype) -> None:
    encoding = encode(kind, originals(), dtype)
    for name in NAMES:
        restored = reconstruct(encoding, name, dtype="float32", path=kind)
        rank = encoding.restored_rank(name)
        if isinstance(restored, tuple):
            A, B = restored
            assert (len(A), B.shape[1]) == (rank, rank)
            assert rank == RESTORED_RANKS.get(kind, RANKS[name])
            delta = SCALINGS[name] * B.astype(np.float64) @ A.astype(np.float64)
        else:
            assert rank is None
            delta = restored
        np.testing.assert_allclose(delta, dense(encoding, name), rtol=2e-5, atol=2e-5)


def test_masked_deltas_and_integers_are_defined_bit_for_bit() -> None:
    masked = encode("masked", originals())
    unified, mask = masked.shared_tensors()["unified"], masked.adapter_tensors("sql")["mask"]
    expected = np.zeros((D_OUT, D_IN), np.float32)
    for i, j in np.ndindex(D_OUT, D_IN):
        if mask[i, j // 8] >> (j % 8) & 1:
            expected[i, j] = np.float32(unified[i, j]) * np.float32(1.25)
    delta = reconstruct(masked, "sql", dtype="float32")
    assert isinstance(delta, np.ndarray)
    assert delta.tobytes() == expected.tobytes()  # +0 where the mask is 0
    half = reconstruct(masked, "sql", dtype="bfloat16")
    assert isinstance(half, np.ndarray)
    assert half.tobytes() == expected.astype(FLOAT_DTYPES["bfloat16"]).tobytes()

    own = encode("quantised8", originals())
    tensors = own.adapter_tensors("math")
    A, B = reconstruct(own, "math", dtype="float32")
    for factor, name in ((A, "A"), (B.T, "B_transposed")):
        codes, scales = tensors[f"{name}.codes"], tensors[f"{name}.scales"]
        for i, j in np.ndindex(*factor.shape):
            value = np.float32(int(codes[i, j]) - 128) * np.float32(scales[i, j // 4])
            assert factor[i, j] == value
    assert B.flags.c_contiguous

    diagonal = encode("diagonal", originals())
    core = diagonal.adapter_tensors("code")["core"]
    A, B = reconstruct(diagonal, "code", dtype="float32")
    assert A.tobytes() == (core[:, None] * diagonal.shared_tensors()["V"]).tobytes()
    assert B.tobytes() == diagonal.shared_tensors()["U"].tobytes()


def test_a_full_core_goes_into_the_factor_with_more_components() -> None:
    wide = encode("core", originals())
    assert reconstruct(wide, "code", dtype="float32")[1].tobytes() == (
        wide.shared_tensors()["U"].tobytes()
    )
    tall = encode("tall", originals())
    assert reconstruct(tall, "code", dtype="float32")[0].tobytes() == (
        tall.shared_tensors()["V"].tobytes()
    )
    # Summed in float64 and rounded once.
    U, V = (tall.shared_tensors()[k].astype(np.float64) for k in "UV")
    core = tall.adapter_tensors("code")["core"].astype(np.float64)
    found = reconstruct(tall, "code", dtype="float32")[1]
    np.testing.assert_allclose(found, U @ core, rtol=6e-8)
    assert V.shape == (2, D_IN)


@pytest.mark.parametrize("dtype", list(FLOAT_DTYPES))
@pytest.mark.parametrize("source_dtype", ["float32", "bfloat16"])
def test_bundles_of_every_kind_round_trip(
    tmp_path: Path, make_zoo: Make, dtype: FloatDtype, source_dtype: FloatDtype
) -> None:
    zoo = fill(make_zoo(), dtype=dtype, source_dtype=source_dtype, lacking={"sql": "masked"})
    size = zoo.write(tmp_path / "out.rmb")
    bundle = unmerge_bundle.open(tmp_path / "out.rmb")
    assert bundle.restores == "delta"
    assert size == bundle.size()
    for name in NAMES:
        adapter = bundle.restore(name)
        assert list(adapter.modules) == sorted(zoo.originals[name])
        for path, module in adapter.modules.items():
            encoding = zoo.encodings[path]
            expected = reconstruct(encoding, name, dtype=source_dtype)
            assert module.source_dtype == source_dtype
            assert module.errors == zoo.errors[path][name] == bundle.errors(name)[path]
            assert (module.errors.factors is None) == (path in DELTA_ONLY)
            if isinstance(module, RestoredDelta):
                assert path == "masked"
                assert isinstance(expected, np.ndarray)
                assert module.delta.tobytes() == expected.tobytes()
                assert module.delta.dtype == FLOAT_DTYPES[source_dtype]
            else:
                assert (module.A.tobytes(), module.B.tobytes()) == (
                    expected[0].tobytes(),
                    expected[1].tobytes(),
                )
                assert module.scaling == SCALINGS[name]
            tolerance = 3e-2 if source_dtype == "bfloat16" else 2e-5
            np.testing.assert_allclose(
                adapter.delta(path), dense(encoding, name), rtol=tolerance, atol=tolerance * 5
            )
            assert adapter.delta(path).dtype == np.float32
    report = verify(tmp_path / "out.rmb", "reconstruction", zoo.originals.__getitem__)
    assert (report.problems, report.compared, report.adapters) == ((), 3, 3)


def test_facts_and_blobs_are_in_the_manifest(mixed: Path) -> None:
    bundle = unmerge_bundle.open(mixed)
    for path, entry in bundle.modules.items():
        assert entry.facts == {"iterations": 12.0, "objective": 0.25 * len(path)}
        own = path in ("own", "quantised4", "quantised8")
        assert entry.blob == (None if own else 0)
    raw = json.loads((mixed / bundle.generations[0].document.file).read_bytes())
    entries = {module["path"]: module for module in raw["modules"]}
    assert entries["own"]["quantisation"] is None
    assert entries["quantised4"]["quantisation"] == {"bits": 4, "group_size": 4}
    assert entries["diagonal"]["diagonal"] is True
    assert (entries["tall"]["rank_out"], entries["tall"]["rank_in"]) == (4, 2)


def test_a_bundle_may_share_nothing(tmp_path: Path, make_zoo: Make) -> None:
    zoo = fill(make_zoo(), kinds=("own", "quantised4"))
    size = zoo.write(tmp_path / "out.rmb")
    bundle = unmerge_bundle.open(tmp_path / "out.rmb")
    assert bundle.generation.shared == ()
    assert (size.shared.elements, bundle.restores) == (0, "factors")
    for name, (A, B) in originals(0).items():
        module = bundle.restore(name).modules["own"]
        assert isinstance(module, RestoredModule)
        assert (module.A.tobytes(), module.B.tobytes()) == (A.tobytes(), B.tobytes())
        assert module.errors == ModuleErrors(factors=0.0, delta=0.0)
    for depth in ("structure", "digests", "reconstruction"):
        assert verify(tmp_path / "out.rmb", depth).ok


def changed(**changes: Any) -> Callable[[Any], Any]:
    return lambda encoding: dataclasses.replace(encoding, **changes)


def edited(name: str, edit: Callable[[Any], None]) -> Callable[[Any], Any]:
    def change(encoding: Any) -> Any:
        tensor = getattr(encoding, name).copy()
        edit(tensor)
        return dataclasses.replace(encoding, **{name: tensor})

    return change


def matrix(edit: Callable[[QuantisedMatrix[Any]], Any]) -> Callable[[Any], Any]:
    def change(encoding: Any) -> Any:
        first = edit(encoding.A[0])
        return dataclasses.replace(encoding, A=(first, *encoding.A[1:]))

    return change


def quantised(**changes: Any) -> Callable[[Any], Any]:
    return matrix(lambda found: dataclasses.replace(found, **changes))


def set_to(value: float) -> Callable[[Any], None]:
    def edit(tensor: Any) -> None:
        tensor.reshape(-1)[-1] = value

    return edit


@pytest.mark.parametrize(
    ("kind", "change", "error", "match"),
    [
        ("core", edited("U", set_to(np.nan)), NonFiniteError, "tensor U"),
        ("core", edited("cores", set_to(np.inf)), NonFiniteError, "'sql', tensor core"),
        ("core", changed(cores=np.zeros((3, 3, 2), np.float32)), TensorMismatchError, r"\(3, 2\)"),
        ("core", changed(U=np.zeros(D_OUT, np.float32)), TensorMismatchError, "shapes"),
        ("core", changed(cores=np.zeros((3, 2), np.float32)), InvalidInputError, "diagonal"),
        ("core", changed(V=np.zeros((3, D_IN))), TensorMismatchError, "float64"),
        ("diagonal", changed(cores=np.zeros((3, 2), np.float32)), TensorMismatchError, "core"),
        ("masked", edited("unified", set_to(np.inf)), NonFiniteError, "unified"),
        ("masked", edited("masks", set_to(8)), TensorMismatchError, "beyond the 11"),
        ("masked", changed(masks=np.zeros((3, D_OUT, 1), np.uint8)), TensorMismatchError, "mask"),
        ("masked", changed(masks=np.zeros((3, D_OUT, 2), bool)), TensorMismatchError, "bool"),
        ("own", matrix(lambda A: A[:0]), TensorMismatchError, "keeps 0 components"),
        ("own", matrix(lambda A: A[:, 1:]), TensorMismatchError, r"\(2, 10\)"),
        ("own", matrix(lambda A: A[:1]), TensorMismatchError, r"B_transposed.*\(2, 5\)"),
        ("core", lambda e: dataclasses.replace(e, cores=e.cores[1:]), TensorMismatchError, "for 2"),
        ("masked", lambda e: dataclasses.replace(e, masks=e.masks[1:]), TensorMismatchError, "2"),
        ("own", matrix(lambda A: A * np.inf), NonFiniteError, "'code', tensor A"),
        ("own", lambda e: dataclasses.replace(e, A=e.A[:2]), TensorMismatchError, "own for 2 in"),
        ("quantised8", matrix(lambda _: np.zeros((2, D_IN))), TensorMismatchError, "all raw"),
        ("quantised8", quantised(bits=4), TensorMismatchError, "one bits"),
        ("quantised8", quantised(group_size=3), TensorMismatchError, "one group_size"),
        ("quantised8", quantised(columns=10), TensorMismatchError, "10 columns, expected 11"),
        ("quantised8", quantised(scales=np.zeros((2, 2), np.float32)), TensorMismatchError, "A.sc"),
        (
            "quantised8",
            quantised(scales=np.full((2, 3), -1, np.float32)),
            TensorMismatchError,
            "NaN or negative",
        ),
        (
            "quantised8",
            quantised(scales=np.full((2, 3), np.nan, np.float32)),
            NonFiniteError,
            "A.scales",
        ),
        (
            "quantised4",
            quantised(codes=np.full((2, 6), 0x80, np.uint8)),
            TensorMismatchError,
            "beyond the 44",
        ),
        ("masked", changed(facts={"x": math.nan}), InvalidInputError, "finite"),
        ("masked", changed(facts={"a|b": 1.0}), InvalidInputError, "fact"),
        ("masked", changed(facts={"x": "1"}), InvalidInputError, "number"),
    ],
)
def test_malformed_encodings_are_not_written(
    tmp_path: Path, make_zoo: Make, kind: str, change: Any, error: type[Exception], match: str
) -> None:
    zoo = fill(make_zoo(), kinds=(kind,))
    zoo.encodings[kind] = change(zoo.encodings[kind])
    with pytest.raises(error, match=match) as caught:
        zoo.write(tmp_path / "out")
    assert type(caught.value) is error
    assert kind in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["masked", "own"])
def test_errors_must_be_of_what_comes_back(tmp_path: Path, make_zoo: Make, kind: str) -> None:
    zoo = fill(make_zoo(), kinds=(kind,))
    wrong = ModuleErrors(factors=0.5 if kind == "masked" else None, delta=0.5)
    zoo.errors[kind]["sql"] = wrong
    with pytest.raises(InvalidInputError, match=r"unmerge_bundle\.measure"):
        zoo.write(tmp_path / "out")


def swap(bundle_path: Path, name: str, change: Callable[[Any, dict[str, Any]], None]) -> None:
    """Replace an adapter's blob by a changed one, every digest made to fit."""
    bundle = unmerge_bundle.open(bundle_path)
    (index,) = [i for i, a in enumerate(bundle.generation.adapters) if a.name == name]
    reader = BlobReader(bundle_path / bundle.generation.adapters[index].blob.file, where="old")
    tensors = {n: reader.array(n).copy() for n in reader.tensors}
    metadata = json.loads(reader.metadata["unmerge"])
    change(tensors, metadata)
    held = {n: Held.of(t, name=n) for n, t in tensors.items()}
    text = canonical_bytes(metadata).decode()
    blob = write_safetensors(bundle_path / "new", held, {"unmerge": text})
    (bundle_path / "new").rename(bundle_path / "blobs" / f"{blob.digest[7:]}.safetensors")
    reseal(
        bundle_path,
        lambda document: document["adapters"][index]["blob"].update(
            digest=blob.digest, size=blob.size
        ),
    )


def reseal(bundle_path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((bundle_path / "bundle.json").read_bytes())
    descriptor = manifest["generations"][-1]["document"]
    document = json.loads((bundle_path / "blobs" / f"{descriptor['digest'][7:]}.json").read_bytes())
    edit(document)
    data = canonical_bytes(document)
    descriptor.update(digest=sha256(data), size=len(data))
    (bundle_path / "blobs" / f"{descriptor['digest'][7:]}.json").write_bytes(data)
    del manifest["digest"]
    sealed = {**manifest, "digest": sha256(canonical_bytes(manifest))}
    (bundle_path / "bundle.json").write_bytes(canonical_bytes(sealed))


def rank_of(path: str, value: Any) -> Callable[[Any, dict[str, Any]], None]:
    def change(_: Any, metadata: dict[str, Any]) -> None:
        (module,) = [m for m in metadata["modules"] if m["path"] == path]
        module["restored_rank"] = value

    return change


def without(name: str) -> Callable[[Any, dict[str, Any]], None]:
    return lambda tensors, _: tensors.pop(f"modules/{name}")


def with_last(name: str, value: float) -> Callable[[Any, dict[str, Any]], None]:
    return lambda tensors, _: set_to(value)(tensors[name])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (without("core/core"), TensorMismatchError, "core/core' is missing"),
        (without("masked/mask"), TensorMismatchError, "masked/mask' is missing"),
        (without("quantised4/A.scales"), TensorMismatchError, "A.scales' is missing"),
        (rank_of("affine", 2), BlobError, "affine restored_rank 2"),
        (rank_of("affine", None), BlobError, "affine restored_rank None"),
        (rank_of("core", 3), BlobError, "core restored_rank 3"),
        (rank_of("masked", 3), BlobError, "masked restored_rank 3"),
        (rank_of("own", None), BlobError, "own restored_rank None"),
        (rank_of("own", 0), BlobError, "greater than or equal to 1"),
        (rank_of("own", 2), TensorMismatchError, r"own/A.*\(2, 11\)"),
        (rank_of("quantised8", 4), TensorMismatchError, r"\(4, 11\)"),
        (with_last("modules/masked/mask", 0x10), TensorMismatchError, "beyond the 11"),
        (with_last("modules/quantised4/A.codes", 0x18), TensorMismatchError, "beyond the 44"),
        (with_last("modules/quantised4/A.scales", math.nan), TensorMismatchError, "NaN or neg"),
        (with_last("modules/quantised8/A.scales", -1.0), TensorMismatchError, "NaN or neg"),
        (with_last("errors/factors", 0.5), TensorMismatchError, "tall"),  # restores a delta
        (lambda t, _: set_to(math.nan)(t["errors/factors"][:1]), TensorMismatchError, "affine"),
        (with_last("errors/delta", math.nan), TensorMismatchError, "tall"),
    ],
)
def test_lies_in_an_adapters_blob_are_found(
    mixed: Path, change: Any, error: type[Exception], match: str
) -> None:
    swap(mixed, "math", change)
    with pytest.raises(error, match=match):
        unmerge_bundle.open(mixed).restore("math")
    unmerge_bundle.open(mixed).restore("code")
    assert not verify(mixed, "structure").ok


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        ({"blob": 0}, "blob"),
        ({"quantisation": {"bits": 3, "group_size": 4}}, "bits"),
        ({"quantisation": {"bits": 8, "group_size": 0}}, "group_size"),
        ({"facts": {"x": "1"}}, "facts"),
        ({"facts": None}, "facts"),
    ],
)
def test_bad_entries_of_adapter_factors(mixed: Path, edit: dict[str, Any], match: str) -> None:
    def change(document: dict[str, Any]) -> None:
        (module,) = [m for m in document["modules"] if m["path"] == "quantised8"]
        module.update(edit)

    reseal(mixed, change)
    with pytest.raises(ManifestError, match=match):
        unmerge_bundle.open(mixed)


@pytest.mark.parametrize(
    ("path", "edit", "match"),
    [
        ("masked", {"blob": None}, "blob"),
        ("diagonal", {"rank_in": 4}, "rank_out = rank_in"),
        ("core", {"diagonal": 0}, "diagonal"),
        ("core", {"rank_out": 0}, "rank_out"),
    ],
)
def test_bad_entries_of_shared_encodings(
    mixed: Path, path: str, edit: dict[str, Any], match: str
) -> None:
    def change(document: dict[str, Any]) -> None:
        (module,) = [m for m in document["modules"] if m["path"] == path]
        module.update(edit)

    reseal(mixed, change)
    with pytest.raises(ManifestError, match=match):
        unmerge_bundle.open(mixed)


@pytest.mark.parametrize(
    ("path", "field"),
    [("masked", "d_in"), ("quantised4", "d_in"), ("quantised8", "d_out"), ("core", "rank_in")],
)
def test_numbers_beyond_any_tensor_are_a_mismatch(mixed: Path, path: str, field: str) -> None:
    def change(document: dict[str, Any]) -> None:
        (module,) = [m for m in document["modules"] if m["path"] == path]
        module[field] = 10**400

    reseal(mixed, change)
    with pytest.raises((TensorMismatchError, BlobError), match=path):
        unmerge_bundle.open(mixed).restore("math")
    assert not verify(mixed, "structure").ok


@pytest.mark.parametrize("rank", [12, 10**15])
def test_a_source_rank_beyond_the_module_is_not_padded_to(
    tmp_path: Path, make_zoo: Make, rank: int
) -> None:
    fill(make_zoo(config='{"r": 3}'), kinds=("own",)).write(tmp_path / "own.rmb")

    def change(_: Any, metadata: dict[str, Any]) -> None:
        metadata["modules"][0]["rank"] = rank

    swap(tmp_path / "own.rmb", "math", change)
    adapter = unmerge_bundle.open(tmp_path / "own.rmb").restore("math")
    adapter.save_peft(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 3)  # the portable form


def test_a_delta_beyond_float32_is_an_error(tmp_path: Path, make_zoo: Make) -> None:
    fill(make_zoo(), kinds=("own",)).write(tmp_path / "own.rmb")

    def change(_: Any, metadata: dict[str, Any]) -> None:
        metadata["modules"][0]["scaling"] = 1e300

    swap(tmp_path / "own.rmb", "math", change)
    with pytest.raises(NonFiniteError, match=r"own: .*overflow"):
        unmerge_bundle.open(tmp_path / "own.rmb").restore("math").delta("own")


def test_infinity_behind_a_mask_is_found(tmp_path: Path, make_zoo: Make) -> None:
    zoo = fill(make_zoo(), kinds=("masked",))
    zoo.encodings["masked"].masks[:] = 0
    zoo.encodings["masked"].unified[0, 0] = 1234.5
    zoo.write(tmp_path / "out")
    bundle = unmerge_bundle.open(tmp_path / "out")
    (shared,) = bundle.generation.shared
    file = tmp_path / "out" / shared.file
    data = file.read_bytes().replace(np.float32(1234.5).tobytes(), np.float32("inf").tobytes())
    digest = sha256(data)
    (tmp_path / "out" / "blobs" / f"{digest[7:]}.safetensors").write_bytes(data)
    reseal(tmp_path / "out", lambda document: document["shared"][0].update(digest=digest))
    with pytest.raises(NonFiniteError, match="masked, adapter 'sql'"):
        unmerge_bundle.open(tmp_path / "out").restore("sql")


def test_a_scaling_beyond_float32_is_an_error() -> None:
    encoding = dataclasses.replace(encode("masked", originals()), scalings=(1e300, 1.0, 1.0))
    with pytest.raises(NonFiniteError, match="delta"):
        reconstruct(encoding, "code", dtype="float32")
    reconstruct(encoding, "sql", dtype="float32")


def test_dense_deltas_need_a_rank_and_say_what_it_costs(mixed: Path, tmp_path: Path) -> None:
    adapter = unmerge_bundle.open(mixed).restore("math")
    with pytest.raises(WrongKindError, match=r"1 of 8 modules .* masked; .*rank=16"):
        adapter.save_peft(tmp_path / "out")
    with pytest.raises(InvalidInputError, match="rank is 0"):
        adapter.save_peft(tmp_path / "out", rank=0)
    assert not (tmp_path / "out").exists()
    saved = adapter.save_peft(tmp_path / "out", rank=2)
    tensors = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_bytes())
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    worst = 0.0
    for path in adapter.modules:
        key = f"base_model.model.{path}.lora_"
        A, B = (tensors[f"{key}{f}.weight"].astype(np.float64) for f in "AB")
        exact = adapter.delta(path).astype(np.float64)
        values = np.linalg.svd(exact, compute_uv=False)
        best = float(np.linalg.norm(values[2:]) / np.linalg.norm(values))
        found = float(np.linalg.norm(B @ A - exact) / np.linalg.norm(exact))
        assert found == pytest.approx(best, rel=1e-4, abs=1e-6)
        worst = max(worst, found)
    assert saved.truncation == pytest.approx(worst, rel=1e-4)
    assert 0 <= saved.rounding < 1e-6
    card = (tmp_path / "out" / "README.md").read_text()
    assert "reduced to at most 2" in card
    assert f"{saved.truncation:.3g}" in card
    assert "| iterations | 12 | 12 | 12 |" in card


def test_a_large_enough_rank_loses_nothing(mixed: Path, tmp_path: Path) -> None:
    adapter = unmerge_bundle.open(mixed).restore("math")
    saved = adapter.save_peft(tmp_path / "out", rank=64)
    assert saved.truncation < 1e-6
    tensors = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    for path in adapter.modules:
        key = f"base_model.model.{path}.lora_"
        A, B = (tensors[f"{key}{f}.weight"] for f in "AB")
        assert len(A) == D_OUT  # the masked delta has no more, everything is padded to it
        np.testing.assert_allclose(B @ A, adapter.delta(path), rtol=1e-4, atol=1e-5)


def test_factors_alone_need_no_rank_and_delta_errors_have_no_row(
    tmp_path: Path, make_zoo: Make
) -> None:
    fill(make_zoo(config="{}"), kinds=("core",)).write(tmp_path / "out.rmb")
    adapter = unmerge_bundle.open(tmp_path / "out.rmb").restore("sql")
    # Rank 2 instead of 1: the original configuration does not hold any more.
    saved = adapter.save_peft(tmp_path / "dir")
    assert saved.truncation == 0.0
    assert json.loads((tmp_path / "dir" / "adapter_config.json").read_bytes())["r"] == 2
    card = (tmp_path / "dir" / "README.md").read_text()
    assert "| delta |" in card
    assert "| factors |" not in card


def test_a_smaller_rank_keeps_the_original_configuration(tmp_path: Path, make_zoo: Make) -> None:
    zoo = fill(make_zoo(config='{"r": 3}'), kinds=("own",))
    A, B = originals(0)["math"]
    encoding = zoo.encodings["own"]
    zoo.encodings["own"] = dataclasses.replace(
        encoding,
        A=(encoding.A[0], A[:2], encoding.A[2]),
        B_transposed=(encoding.B_transposed[0], B.T[:2], encoding.B_transposed[2]),
    )
    zoo.errors["own"]["math"] = measure(
        zoo.encodings["own"], "math", (A, B), source_scaling=0.5, dtype="float32"
    )
    zoo.write(tmp_path / "out.rmb")
    adapter = unmerge_bundle.open(tmp_path / "out.rmb").restore("math")
    assert len(adapter.modules["own"].A) == 2  # type: ignore[union-attr]
    saved = adapter.save_peft(tmp_path / "dir")
    assert (saved.rounding, saved.truncation) == (0.0, 0.0)
    assert (tmp_path / "dir" / "adapter_config.json").read_bytes() == b'{"r": 3}'
    tensors = safetensors.numpy.load_file(tmp_path / "dir" / "adapter_model.safetensors")
    padded = np.zeros_like(A)
    padded[:2] = A[:2]
    np.testing.assert_array_equal(tensors["base_model.model.own.lora_A.weight"], padded)
    assert tensors["base_model.model.own.lora_B.weight"].shape == (D_OUT, 3)
    small = adapter.save_peft(tmp_path / "small", rank=1, dtype="float16")
    assert small.truncation > 0.0
    assert json.loads((tmp_path / "small" / "adapter_config.json").read_bytes())["r"] == 1


def test_merged_deltas_are_reduced(tmp_path: Path, make_merged: Make) -> None:
    make_merged(dense=True).write(tmp_path / "out.rmb")
    merged = unmerge_bundle.open(tmp_path / "out.rmb").merged()
    saved = merged.save_peft(tmp_path / "dir", rank=1)
    tensors = safetensors.numpy.load_file(tmp_path / "dir" / "adapter_model.safetensors")
    worst = 0.0
    for path in merged.modules:
        key = f"base_model.model.{path}.lora_"
        A, B = (tensors[f"{key}{f}.weight"].astype(np.float64) for f in "AB")
        exact = merged.delta(path).astype(np.float64)
        assert len(A) == 1
        worst = max(worst, float(np.linalg.norm(B @ A - exact) / np.linalg.norm(exact)))
    assert saved.truncation == pytest.approx(worst, rel=1e-5)
    assert "reduced to at most 1" in (tmp_path / "dir" / "README.md").read_text()
    exact_rank = merged.save_peft(tmp_path / "all", rank=3)
    assert exact_rank.truncation < 1e-6


def test_measure_is_the_error_of_the_dense_delta() -> None:
    for kind in KINDS:
        encoding = encode(kind, originals())
        for name, (A, B) in originals(9).items():
            errors = measure(encoding, name, (A, B), source_scaling=3.0, dtype="float32")
            original = 3.0 * B.astype(np.float64) @ A.astype(np.float64)
            difference = dense(encoding, name) - original
            expected = np.linalg.norm(difference) / np.linalg.norm(original)
            assert errors.delta == pytest.approx(expected, rel=1e-5)
            assert (errors.factors is None) == (kind in DELTA_ONLY)


def test_reconstruct_refuses_what_does_not_fit() -> None:
    encoding = dataclasses.replace(encode("own", originals()), d_in=7)
    with pytest.raises(TensorMismatchError, match=r"\(2, 7\)"):
        reconstruct(encoding, "code", dtype="float32")
    with pytest.raises(KeyError):
        reconstruct(encode("own", originals()), "nobody", dtype="float32")
    with pytest.raises(TensorMismatchError, match="float64"):
        reconstruct(
            dataclasses.replace(encode("core", originals()), U=np.zeros((D_OUT, 2))),
            "code",
            dtype="float32",
        )
