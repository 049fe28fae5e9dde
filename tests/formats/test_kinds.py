"""The kind of a module: which ones there are, and that writer, reader and appending agree on it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import unmerge_bundle
from formats.conftest import digest_of
from unmerge_bundle import (
    AdapterRecord,
    BundleWriter,
    DeltaEncoding,
    InvalidInputError,
    ManifestError,
    RecordedModule,
    RefitError,
    append_adapter,
    check_kernel,
    check_kind,
    kernel_of,
)

Make = Callable[..., Any]
Edit = Callable[[dict[str, Any]], None]
# The modules of `make_zoo` and `make_merged`, of shapes (6, 4) and (3, 5).
KINDS = {"layers.0.q_proj": "conv2d:2x2", "layers.1.v_proj": "embedding"}
SPEC = Path(__file__).parents[2] / "docs" / "spec" / "bundle-v1.md"


@pytest.mark.parametrize(
    ("kind", "kernel"),
    [
        ("linear", ()),
        ("embedding", ()),
        ("conv1d:3", (3,)),
        ("conv2d:1x1", (1, 1)),
        ("conv2d:3x5", (3, 5)),
        ("conv3d:10x2x9999", (10, 2, 9999)),
    ],
)
def test_kinds_and_their_kernels(kind: str, kernel: tuple[int, ...]) -> None:
    assert check_kind(kind) == kind
    assert kernel_of(kind) == kernel


@pytest.mark.parametrize(
    "kind",
    [
        "",
        "Linear",
        "linear ",
        "conv2d",
        "conv2d:",
        "conv2d:3",
        "conv1d:3x3",
        "conv3d:3x3",
        "conv2d:0x3",
        "conv2d:03x3",
        "conv2d:3x3x",
        "conv2d:3x-3",
        "conv2d:3x10000",
        "conv2d:٣x٣",  # digits to int(), and none of the format's
        "conv4d:1x1x1x1",
        "embedding\n",
    ],
)
def test_what_is_no_kind(kind: str) -> None:
    with pytest.raises(ValueError, match=r"expected linear, embedding, or a convolution"):
        check_kind(kind)


@pytest.mark.parametrize(
    ("kind", "d_in"), [("linear", 7), ("embedding", 7), ("conv2d:2x3", 6), ("conv1d:3", 30)]
)
def test_whole_kernels(kind: str, d_in: int) -> None:
    check_kernel(kind, d_in)


@pytest.mark.parametrize(("kind", "d_in"), [("conv2d:2x3", 9), ("conv1d:3", 2), ("conv1d:8", 4)])
def test_cut_kernels(kind: str, d_in: int) -> None:
    with pytest.raises(ValueError, match=rf"{kind} needs a d_in .* divides, got {d_in}"):
        check_kernel(kind, d_in)


def of_kinds(zoo: Any, kinds: dict[str, str] | None = None) -> Any:
    """Make the modules of a `conftest.Zoo` layers of these kinds, in its records too."""
    zoo.kinds = KINDS if kinds is None else kinds
    zoo.records = {
        name: record.model_copy(
            update={
                "modules": tuple(
                    module.model_copy(update={"kind": zoo.kinds[module.path]})
                    for module in record.modules
                )
            }
        )
        for name, record in zoo.records.items()
    }
    return zoo


@pytest.fixture
def of_kinds_path(tmp_path: Path, make_zoo: Make) -> Path:
    of_kinds(make_zoo()).write(tmp_path / "kinds.rmb")
    return tmp_path / "kinds.rmb"


def test_what_is_restored_knows_its_kind(of_kinds_path: Path, bundle_path: Path) -> None:
    bundle = unmerge_bundle.open(of_kinds_path)
    document = json.loads((of_kinds_path / bundle.generations[-1].document.file).read_bytes())
    assert {m["path"]: m["kind"] for m in document["modules"]} == KINDS
    restored = bundle.restore("math")
    assert {path: module.kind for path, module in restored.modules.items()} == KINDS
    assert {path: module.kind for path, module in restored.exact()} == KINDS
    plain = unmerge_bundle.open(bundle_path).restore("math")
    assert {module.kind for module in plain.modules.values()} == {"linear"}
    # The numbers are those of the matrix, whatever the layer.
    for path, module in restored.modules.items():
        assert restored.delta(path).tobytes() == plain.delta(path).tobytes(), path
        assert module.errors == plain.modules[path].errors


@pytest.mark.parametrize("dense", [False, True])
def test_a_merged_result_knows_its_kinds(tmp_path: Path, make_merged: Make, dense: bool) -> None:
    zoo = make_merged(dense=dense)
    zoo.kinds = KINDS
    zoo.write(tmp_path / "out.rmb")
    merged = unmerge_bundle.open(tmp_path / "out.rmb").merged()
    assert merged.kinds == KINDS
    assert merged.modules.keys() == KINDS.keys()


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("conv2d:3x3", "layers.0.q_proj: kind conv2d:3x3 needs a d_in .* got 4"),
        ("lookup", "layers.0.q_proj: kind: kind 'lookup': expected linear"),
    ],
)
def test_the_writer_takes_no_other(
    tmp_path: Path, make_merged: Make, kind: str, match: str
) -> None:
    zoo = make_merged()
    zoo.kinds = {"layers.0.q_proj": kind}
    with pytest.raises(InvalidInputError, match=match):
        zoo.write(tmp_path / "out.rmb")
    assert not (tmp_path / "out.rmb").exists()


def test_a_record_of_another_kind_is_refused(tmp_path: Path, make_zoo: Make) -> None:
    zoo = of_kinds(make_zoo())
    zoo.kinds = {**KINDS, "layers.1.v_proj": "linear"}
    with pytest.raises(
        InvalidInputError,
        match=r"layers\.1\.v_proj, adapter 'code': its record says kind embedding, .* as linear",
    ):
        zoo.write(tmp_path / "out.rmb")
    assert not (tmp_path / "out.rmb").exists()


def set_kind(kind: Any) -> Edit:
    return lambda document: document["modules"][0].update(kind=kind)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("conv2d:3x3", "modules.0.*kind conv2d:3x3 needs a d_in .* got 4"),
        ("conv2d:2", "modules.0.*kind 'conv2d:2': expected"),
        ("rotary", "modules.0.*kind 'rotary': expected"),
        (None, r"modules.0.*kind"),
        (2, r"modules.0.*kind"),
    ],
)
def test_the_reader_takes_no_other(
    bundle_path: Path, reseal: Callable[[Edit], None], kind: Any, match: str
) -> None:
    reseal(set_kind(kind))
    with pytest.raises(ManifestError, match=match):
        unmerge_bundle.open(bundle_path)


def test_a_document_without_kinds_means_linear_layers(
    bundle_path: Path, reseal: Callable[[Edit], None]
) -> None:
    def drop(document: dict[str, Any]) -> None:
        for module in document["modules"]:
            del module["kind"]

    reseal(drop)
    bundle = unmerge_bundle.open(bundle_path)
    assert {module.kind for module in bundle.modules.values()} == {"linear"}


def new_record(kinds: dict[str, str]) -> AdapterRecord:
    return AdapterRecord(
        name="new",
        format="peft",
        config="{}",
        digest=digest_of("new"),
        modules=tuple(
            RecordedModule(path=path, rank=1, source_scaling=1.0, dtype="float32", kind=kind)
            for path, kind in kinds.items()
        ),
    )


FACTORS = {
    "layers.0.q_proj": (np.ones((1, 4), np.float32), np.ones((6, 1), np.float32)),
    "layers.1.v_proj": (np.ones((1, 5), np.float32), np.ones((3, 1), np.float32)),
}


def test_an_appended_adapter_agrees_on_kinds(of_kinds_path: Path) -> None:
    before = (of_kinds_path / "bundle.json").read_bytes()
    for kinds in (
        {**KINDS, "layers.0.q_proj": "linear"},
        {**KINDS, "layers.0.q_proj": "conv1d:4"},
    ):
        with pytest.raises(
            RefitError,
            match=rf"layers\.0\.q_proj: adapter 'new' has the module as {kinds['layers.0.q_proj']},"
            r" the bundle as conv2d:2x2; .* another base model",
        ):
            append_adapter(of_kinds_path, new_record(kinds), FACTORS, {})
    assert (of_kinds_path / "bundle.json").read_bytes() == before
    append_adapter(of_kinds_path, new_record(KINDS), FACTORS, {})
    restored = unmerge_bundle.open(of_kinds_path).restore("new")
    assert {path: module.kind for path, module in restored.modules.items()} == KINDS


def test_a_kind_given_to_one_module_is_no_other_modules(tmp_path: Path, make_merged: Make) -> None:
    zoo = make_merged()
    with BundleWriter(tmp_path / "out.rmb", info=zoo.info) as writer:
        writer.add_module("b", DeltaEncoding(delta=np.ones((2, 9), np.float32)), kind="conv2d:3x3")
        writer.add_module("a", DeltaEncoding(delta=np.ones((2, 9), np.float32)))
        writer.finish()
    merged = unmerge_bundle.open(tmp_path / "out.rmb").merged()
    assert merged.kinds == {"a": "linear", "b": "conv2d:3x3"}


def test_the_spec_has_every_kind() -> None:
    text = SPEC.read_text(encoding="utf-8").split("## Kinds of modules\n")[1].split("\n## ")[0]
    for start in ("`linear`", "`embedding`", "`conv1d:", "`conv2d:", "`conv3d:"):
        assert f"| {start}" in text or f", {start}" in text, start
