import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import unmerge_bundle
from unmerge_bundle import (
    BundleWriter,
    InvalidInputError,
    ManifestError,
    ModuleErrors,
    NonFiniteError,
    OutputExistsError,
    TensorMismatchError,
    check_message,
)
from unmerge_bundle.encodings import Encoding

MakeZoo = Callable[..., Any]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_equal_inputs_give_equal_bytes(tmp_path: Path, make_zoo: MakeZoo) -> None:
    make_zoo().write(tmp_path / "a")
    zoo = make_zoo()
    # Another order of modules and adapters changes nothing.
    with BundleWriter(tmp_path / "b", info=zoo.info) as writer:
        for path in reversed(zoo.encodings):
            writer.add_module(path, zoo.encodings[path], errors=zoo.errors[path])
        for name in reversed(zoo.records):
            writer.add_adapter(zoo.records[name], zoo.verbatim.get(name, {}))
        writer.finish(created=datetime(2027, 1, 1, tzinfo=UTC), message="later")
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert a.pop("bundle.json") != b.pop("bundle.json")
    assert a == b
    assert sum(name.endswith(".safetensors") for name in a) == 4


def test_nothing_is_left_but_the_bundle(tmp_path: Path, make_zoo: MakeZoo) -> None:
    size = make_zoo().write(tmp_path / "out.rmb")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.rmb"]
    names = sorted(entry.name for entry in (tmp_path / "out.rmb").iterdir())
    assert names == ["blobs", "bundle.json"]
    assert size.total == sum(len(data) for data in files(tmp_path / "out.rmb").values())
    assert size == unmerge_bundle.open(tmp_path / "out.rmb").size()


def test_the_size_counts_every_element(tmp_path: Path, make_zoo: MakeZoo) -> None:
    zoo = make_zoo(dtype="float16")
    size = zoo.write(tmp_path / "out.rmb")
    shared = sum(t.size for e in zoo.encodings.values() for t in e.shared_tensors().values())
    assert (size.shared.elements, size.shared.bytes) == (shared, 2 * shared)
    for name in zoo.records:
        own = sum(
            t.size
            for e in zoo.encodings.values()
            if name in e.adapters
            for t in e.adapter_tensors(name).values()
        )
        assert (size.adapters[name].elements, size.adapters[name].bytes) == (own, 2 * own)
    assert (size.verbatim["math"].elements, size.verbatim["math"].bytes) == (9, 53)
    tensors = [size.shared, *size.adapters.values(), *size.verbatim.values()]
    assert size.overhead == size.total - sum(amount.bytes for amount in tensors) > 0


def test_shared_tensors_are_grouped_by_size(tmp_path: Path, make_zoo: MakeZoo) -> None:
    zoo = make_zoo()
    zoo.write(tmp_path / "one")
    zoo.write(tmp_path / "two", shared_blob_bytes=1)
    one, two = (unmerge_bundle.open(tmp_path / name) for name in ("one", "two"))
    assert [module.blob for module in one.generation.modules] == [0, 0]
    assert [module.blob for module in two.generation.modules] == [0, 1]
    assert len(two.generation.shared) == 2
    restored = one.restore("math"), two.restore("math")
    for path in zoo.encodings:
        assert restored[0].modules[path].A.tobytes() == restored[1].modules[path].A.tobytes()


def test_the_grouping_does_not_depend_on_the_order_of_arrival(
    tmp_path: Path, make_merged: MakeZoo
) -> None:
    zoo = make_merged()
    tall, wide = zoo.encodings.values()  # 80 and 96 bytes
    modules = {"a": tall, "b": wide, "c": tall}
    for name, order in (("up", "abc"), ("down", "cba"), ("mixed", "acb")):
        with BundleWriter(tmp_path / name, info=zoo.info, shared_blob_bytes=176) as writer:
            for path in order:
                writer.add_module(path, modules[path])
            writer.finish(created=datetime(2026, 1, 1, tzinfo=UTC))
        generation = unmerge_bundle.open(tmp_path / name).generation
        assert [(module.path, module.blob) for module in generation.modules] == [
            ("a", 0),
            ("b", 0),  # fits exactly
            ("c", 1),
        ]
    assert files(tmp_path / "up") == files(tmp_path / "down") == files(tmp_path / "mixed")


@pytest.mark.parametrize(
    ("message", "match"), [("x" * 4097, "4097 characters"), ("ok\ud800", "position 2")]
)
def test_bad_messages_are_refused_before_anything_is_assembled(
    tmp_path: Path, make_merged: MakeZoo, message: str, match: str
) -> None:
    with pytest.raises(InvalidInputError, match=match) as caught:
        check_message(message)
    assert str(caught.value).isprintable()
    zoo = make_merged()
    with BundleWriter(tmp_path / "out", info=zoo.info) as writer:
        for path, encoding in zoo.encodings.items():
            writer.add_module(path, encoding)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InvalidInputError, match=match):
            writer.finish(message=message)
        assert sorted(tmp_path.rglob("*")) == before
        writer.finish(message="é" * 4096)  # nothing is lost by the mistake
    (entry,) = unmerge_bundle.open(tmp_path / "out").generations
    assert entry.message == check_message("é" * 4096)


def test_creation_time_is_kept_in_utc(tmp_path: Path, make_merged: MakeZoo) -> None:
    zoo = make_merged()
    with BundleWriter(tmp_path / "out", info=zoo.info) as writer:
        for path, encoding in zoo.encodings.items():
            writer.add_module(path, encoding)
        there = timezone(timedelta(hours=2))
        writer.finish(created=datetime(2026, 1, 1, 1, 2, 3, 999, tzinfo=there))
    assert unmerge_bundle.open(tmp_path / "out").generations[0].created == "2025-12-31T23:02:03Z"
    with BundleWriter(tmp_path / "naive", info=zoo.info) as writer:
        for path, encoding in zoo.encodings.items():
            writer.add_module(path, encoding)
        with pytest.raises(InvalidInputError, match="time zone"):
            writer.finish(created=datetime(2026, 1, 1))  # noqa: DTZ001 - the refused case


@pytest.mark.parametrize("existing", ["file", "directory", "bundle", "link"])
def test_existing_output_is_refused_and_untouched(
    tmp_path: Path, make_zoo: MakeZoo, existing: str
) -> None:
    path = tmp_path / "out"
    match existing:
        case "file":
            path.write_text("x")
        case "directory":
            path.mkdir()
        case "bundle":
            make_zoo(seed=1).write(path)
        case "link":
            path.symlink_to(tmp_path / "nowhere")
    before = files(path)
    with pytest.raises(OutputExistsError) as caught:
        BundleWriter(path, info=make_zoo().info)
    assert str(path) in str(caught.value)
    assert files(path) == before
    assert len(list(tmp_path.iterdir())) == 1


def test_only_bundles_and_empty_directories_are_overwritten(
    tmp_path: Path, make_zoo: MakeZoo
) -> None:
    make_zoo(seed=1).write(tmp_path / "bundle")
    (tmp_path / "empty").mkdir()
    for name in ("bundle", "empty"):
        make_zoo(seed=2).write(tmp_path / name, overwrite=True)
    assert files(tmp_path / "bundle") == files(tmp_path / "empty")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "bundle")
    for name in ("mine", "file", "link"):
        with pytest.raises(OutputExistsError, match="not overwritten"):
            BundleWriter(tmp_path / name, info=make_zoo().info, overwrite=True)
    left = sorted(entry.name for entry in tmp_path.iterdir())
    assert left == ["bundle", "empty", "file", "link", "mine"]


def test_a_failed_overwrite_keeps_the_old_bundle(tmp_path: Path, make_zoo: MakeZoo) -> None:
    make_zoo(seed=1).write(tmp_path / "out")
    before = files(tmp_path)
    zoo = make_zoo(seed=2)
    del zoo.records["sql"]
    with pytest.raises(InvalidInputError, match="never announced"):
        zoo.write(tmp_path / "out", overwrite=True)
    assert files(tmp_path) == before


def test_an_exception_leaves_nothing_behind(tmp_path: Path, make_zoo: MakeZoo) -> None:
    zoo = make_zoo()
    (tmp_path / "here").mkdir()
    out = tmp_path / "here" / "a" / "b" / "out"

    def interrupted() -> None:
        with BundleWriter(out, info=zoo.info) as writer:
            path = "layers.0.q_proj"
            writer.add_module(path, zoo.encodings[path], errors=zoo.errors[path])
            assert out.parent.exists()
            assert not out.exists()
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        interrupted()
    assert list((tmp_path / "here").iterdir()) == []


def test_leaving_without_finish_writes_nothing(tmp_path: Path, make_merged: MakeZoo) -> None:
    zoo = make_merged()
    with BundleWriter(tmp_path / "out", info=zoo.info) as writer:
        writer.add_module("layers.0.q_proj", zoo.encodings["layers.0.q_proj"])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InvalidInputError, match="not open"):
        writer.finish()


def test_output_that_appears_meanwhile_is_kept(tmp_path: Path, make_merged: MakeZoo) -> None:
    zoo = make_merged()
    with BundleWriter(tmp_path / "out", info=zoo.info) as writer:
        for path, encoding in zoo.encodings.items():
            writer.add_module(path, encoding)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "x").write_text("theirs")
        with pytest.raises(OutputExistsError):
            writer.finish()
    assert files(tmp_path) == {str(Path("out", "x")): b"theirs"}


class Foreign(Encoding[Any]):
    kind = "foreign"
    restores = None

    @property
    def shape(self) -> tuple[int, int]:
        return (6, 4)

    def shared_tensors(self) -> dict[str, Any]:
        return {"code": np.zeros(3, dtype=np.float32)}

    def map(self, convert: Callable[[Any], Any]) -> Encoding[Any]:
        return self


def replace(**changes: Any) -> Callable[[Any], Any]:
    return lambda encoding: dataclasses.replace(encoding, **changes)


def spoil(name: str, value: float) -> Callable[[Any], Any]:
    def change(encoding: Any) -> Any:
        tensor = getattr(encoding, name).copy()
        tensor.reshape(-1)[-1] = value
        return dataclasses.replace(encoding, **{name: tensor})

    return change


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (spoil("mean_A", np.nan), NonFiniteError, "tensor mean_A"),
        (spoil("basis_B", np.inf), NonFiniteError, "tensor basis_B"),
        (spoil("coefficients_A", -np.inf), NonFiniteError, "'sql', tensor coefficients_A"),
        (replace(scalings=(1.0, np.inf, 1.0)), NonFiniteError, "scaling is inf"),
        (replace(scalings=(1.0,)), InvalidInputError, "3 adapters, but 1 scalings"),
        (replace(names=("code", "sql")), InvalidInputError, "one measured error each"),
        (replace(names=("code", "math", "math")), InvalidInputError, "distinct"),
        (replace(mean_A=np.zeros((2, 4))), TensorMismatchError, "float64"),
        (replace(mean_A=np.zeros((3, 4), np.float32)), TensorMismatchError, r"\(3, 4\)"),
        (replace(mean_B=np.zeros(6, np.float32)), TensorMismatchError, "mean_B"),
        (replace(basis_A=np.zeros((2, 4), np.float32)), TensorMismatchError, "basis_A"),
        (replace(basis_B=np.zeros((1, 6, 2), np.float32)), TensorMismatchError, "basis_B"),
        (replace(coefficients_A=np.zeros((3, 2, 9), np.float32)), TensorMismatchError, "code"),
    ],
)
def test_bad_modules_are_refused(
    tmp_path: Path, make_zoo: MakeZoo, change: Any, error: type[Exception], match: str
) -> None:
    zoo = make_zoo()
    zoo.encodings["layers.0.q_proj"] = change(zoo.encodings["layers.0.q_proj"])
    with pytest.raises(error, match=match) as caught:
        zoo.write(tmp_path / "out")
    assert type(caught.value) is error
    assert "layers.0.q_proj" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_paths_kinds_and_errors_are_checked(
    tmp_path: Path, make_zoo: MakeZoo, make_merged: MakeZoo
) -> None:
    zoo, merged = make_zoo(), make_merged()
    encoding = zoo.encodings["layers.0.q_proj"]
    errors = zoo.errors["layers.0.q_proj"]
    with BundleWriter(tmp_path / "out", info=zoo.info) as writer:
        with pytest.raises(InvalidInputError, match="not allowed"):
            writer.add_module("a/b", encoding, errors=errors)
        with pytest.raises(InvalidInputError, match="foreign"):
            writer.add_module("layers.0", Foreign())
        with pytest.raises(InvalidInputError, match="errors of \\[\\]"):
            writer.add_module("layers.0", encoding)
        writer.add_module("layers.0", encoding, errors=errors)
        with pytest.raises(InvalidInputError, match="added twice"):
            writer.add_module("layers.0", encoding, errors=errors)
        with pytest.raises(InvalidInputError, match="cannot be mixed"):
            writer.add_module("layers.1", merged.encodings["layers.0.q_proj"])
        writer.add_adapter(zoo.records["code"], {})
        with pytest.raises(InvalidInputError, match="announced twice"):
            writer.add_adapter(zoo.records["code"], {})
        with pytest.raises(InvalidInputError, match=r"differ in 'layers\.0'"):
            writer.finish()
    with pytest.raises(InvalidInputError, match="not open"):
        BundleWriter(tmp_path / "out", info=zoo.info).add_module("a", encoding, errors=errors)


@pytest.mark.parametrize(
    ("verbatim", "error", "match"),
    [
        ({"a\n": np.zeros(1)}, InvalidInputError, "not allowed"),
        ({"a": np.array([np.nan], dtype=np.float16)}, NonFiniteError, "'a'"),
        ({"a": np.array([np.inf], dtype=ml_dtypes.bfloat16)}, NonFiniteError, "'a'"),
        ({"a": np.array(np.nan, dtype=ml_dtypes.bfloat16)}, NonFiniteError, "'a'"),
        ({"a": np.array(["x"], dtype=object)}, InvalidInputError, "object"),
        ({"a": np.zeros(1, dtype=np.complex64)}, InvalidInputError, "complex64"),
    ],
)
def test_bad_verbatim_tensors(
    tmp_path: Path, make_zoo: MakeZoo, verbatim: Any, error: type[Exception], match: str
) -> None:
    zoo = make_zoo(verbatim={"ok": np.zeros(2), **verbatim})
    with pytest.raises(error, match=match):
        zoo.write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_adapters_sources_and_absences_must_agree(tmp_path: Path, make_zoo: MakeZoo) -> None:
    def refused(match: str, **changes: Any) -> None:
        zoo = make_zoo()
        zoo.info = zoo.info.model_copy(update=changes)
        with pytest.raises(InvalidInputError, match=match):
            zoo.write(tmp_path / "out")

    sources = make_zoo().info.sources
    refused("no source has that name", sources=sources[:2])
    other = sources[0].model_copy(update={"digest": f"sha256:{'1' * 64}"})
    refused("got sha256:1111", sources=(other, *sources[1:]))
    refused("two sources have one name", sources=(sources[0], *sources))
    refused("info.absent gives", absent={})
    refused("info.absent gives", absent={"math": ("layers.0.q_proj",)})
    refused("not among the sources", unmerged={"nobody": ("k",)})
    refused("finite", recipe={"x": float("nan")})
    zoo = make_zoo()
    record = zoo.records["math"]
    zoo.records["math"] = record.model_copy(update={"modules": record.modules[:1]})
    with pytest.raises(InvalidInputError, match=r"differ in 'layers\.1\.v_proj'"):
        zoo.write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_bundle_is_refused(tmp_path: Path, make_zoo: MakeZoo) -> None:
    with (
        pytest.raises(InvalidInputError, match="modules"),
        BundleWriter(tmp_path / "out", info=make_zoo().info) as writer,
    ):
        writer.finish()
    assert list(tmp_path.iterdir()) == []


def test_errors_are_numbers_that_mean_something() -> None:
    ModuleErrors(factors=0.0, delta=float("inf"))
    for bad in (float("nan"), -1e-9):
        with pytest.raises(ValueError, match="greater than or equal to 0"):
            ModuleErrors(factors=bad, delta=0.0)


def test_a_document_that_is_too_large_is_never_published(
    tmp_path: Path, make_merged: MakeZoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unmerge_bundle.documents.MAX_DOCUMENT_BYTES", 100)
    with pytest.raises(ManifestError, match="at most 100"):
        make_merged().write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
