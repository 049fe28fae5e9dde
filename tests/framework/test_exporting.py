"""What a store gives back is what it took: every format and dtype, whatever happened meanwhile."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_files import WRITERS, contents, source
from adapters import make_adapter, write_peft_directory
from unmerge import Adapter, AdapterStore, read_adapter
from unmerge.errors import (
    AdapterError,
    AdapterNotInStoreError,
    StoreError,
    UnknownFormatError,
    UnsupportedAdapterError,
)
from unmerge.exporting import export_adapter
from unmerge.formats import (
    DiffusersFormat,
    KohyaFormat,
    MlxFormat,
    PeftFileFormat,
    PeftFormat,
    default_formats,
)
from unmerge.importing import import_adapters
from unmerge_bundle import OutputExistsError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CASES = [f"{form}-{dtype}" for form in WRITERS for dtype in DTYPES]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose tag v1 has an adapter of every case, and whose newest version has them again.

    In between all were removed, others added and replaced, and the versions between forgotten and
    collected.
    """
    root = tmp_path_factory.mktemp("archive")
    for seed, case in enumerate(CASES):
        form, dtype = case.split("-")
        source(root / "sources" / case, form, 10 * seed, DTYPES[dtype])
    paths = [_given(root / "sources" / case) for case in CASES]
    store = AdapterStore.create(root / "zoo")
    for case, path in zip(CASES, paths, strict=True):
        import_adapters(store, [path], name=case)
    store.tag("v1")
    for case in CASES:
        store.remove(case)
    store.commit("all gone")
    for seed in (1, 2):
        for case in CASES:
            form, dtype = case.split("-")
            other = source(root / "others" / str(seed) / case, form, 1000 * seed, DTYPES[dtype])
            import_adapters(
                store, [other], name=f"other-{case}", replace=True, allow_duplicates=True
            )
    for case, path in zip(CASES, paths, strict=True):
        import_adapters(store, [path], name=case)
    before = store.version
    report = store.gc(forget_before=datetime.now(UTC))
    assert len(report.forgotten) > 50
    assert report.objects > 0
    assert before in report.forgotten
    return root


def _given(folder: Path) -> Path:
    file = folder / "style.safetensors"
    return file if file.exists() else folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("at", ["v1", None])
def test_every_bit_and_the_configuration_come_back(
    archive: Path, tmp_path: Path, case: str, at: str | None
) -> None:
    form, _ = case.split("-")
    store = AdapterStore.open(archive / "zoo", at=at)
    done = export_adapter(store, case, tmp_path / "out")
    original = archive / "sources" / case
    assert contents(tmp_path / "out") == contents(original)
    assert (done.format, done.converted, done.checked, done.options) == (form, False, True, {})
    assert done.files == tuple(sorted(p.name for p in original.iterdir()))


def test_what_was_replaced_comes_back_from_before_and_after(tmp_path: Path) -> None:
    store = AdapterStore.create(tmp_path / "zoo")
    for version in (1, 2):
        path = source(tmp_path / str(version) / "sql", "peft", version, torch.float32)
        import_adapters(store, [path], replace=True)
        store.tag(f"v{version}")
    for version in (1, 2):
        export_adapter(store.checkout(f"v{version}"), "sql", tmp_path / f"out{version}")
        assert contents(tmp_path / f"out{version}") == contents(tmp_path / str(version))


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    """A store with one adapter, "sql", of PEFT."""
    store = AdapterStore.create(tmp_path / "zoo")
    path = write_peft_directory(make_adapter("sql", seed=1), tmp_path / "adapters" / "sql")
    import_adapters(store, [path])
    return store


@pytest.mark.parametrize(
    "form",
    [
        DiffusersFormat(component="transformer"),
        KohyaFormat(prefix="lora_te"),
        MlxFormat(),
        PeftFileFormat(),
        PeftFormat(),
    ],
    ids=lambda form: form.format,
)
def test_conversions_hold_the_same_factors(
    store: AdapterStore, tmp_path: Path, form: PeftFormat
) -> None:
    done = export_adapter(store, "sql", tmp_path / "out", format=form)
    assert done.converted == (form.format != "peft")
    assert done.checked
    place = tmp_path / "out" / done.files[0] if form.format == "peft_file" else tmp_path / "out"
    again = read_adapter(place)
    assert again.format == form.format
    original = make_adapter("sql", seed=1)
    for (_, mine), (_, theirs) in zip(
        sorted(again.modules.items()), sorted(original.modules.items()), strict=True
    ):
        assert torch.equal(mine.A, theirs.A)
        assert torch.equal(mine.B, theirs.B)
        assert mine.scaling == theirs.scaling


def test_an_archive_of_one_format_is_a_peft_directory_that_peft_loads(tmp_path: Path) -> None:
    store = AdapterStore.create(tmp_path / "zoo")
    import_adapters(store, [source(tmp_path / "sql", "mlx", 4, torch.float16)])
    export_adapter(store, "sql", tmp_path / "out", format="peft")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_bytes())
    theirs = load_file(tmp_path / "sql" / "adapters.safetensors")
    assert config["lora_alpha"] / config["r"] == 20.0
    assert torch.equal(tensors["base_model.model.m.q.lora_A.weight"], theirs["m.q.lora_a"].T)
    assert torch.equal(tensors["base_model.model.m.q.lora_B.weight"], theirs["m.q.lora_b"].T)


def test_what_would_be_lost_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    store = AdapterStore.create(tmp_path / "zoo")
    import_adapters(store, [source(tmp_path / "sql", "peft", 4, torch.float16)])
    with pytest.raises(UnsupportedAdapterError, match=r"score\.weight") as caught:
        export_adapter(store, "sql", tmp_path / "deep" / "out", format="kohya")
    assert "score.weight" in caught.value.feature
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sql", "zoo"]


def test_what_only_can_be_read_names_the_others(store: AdapterStore, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapterError, match=r"only be read; choose one of .*\bpeft\b"):
        export_adapter(store, "sql", tmp_path / "out", format="checkpoint")
    assert not (tmp_path / "out").exists()


def test_names_that_are_not_there(store: AdapterStore, tmp_path: Path) -> None:
    with pytest.raises(AdapterNotInStoreError, match="sql"):
        export_adapter(store, "sq", tmp_path / "out")
    with pytest.raises(UnknownFormatError, match="did you mean kohya"):
        export_adapter(store, "sql", tmp_path / "out", format="kohia")
    assert not (tmp_path / "out").exists()


def test_the_format_of_a_plugin_that_is_gone(tmp_path: Path) -> None:
    store = AdapterStore.create(tmp_path / "zoo")
    store.add(replace(make_adapter("sql", seed=1), format="acme.box", config="{}"))
    store.commit("")
    with pytest.raises(UnsupportedAdapterError, match=r'"acme\.box", which no installed plugin'):
        export_adapter(store, "sql", tmp_path / "out")
    export_adapter(store, "sql", tmp_path / "out", format="mlx")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (PeftFileFormat(scaling=0.3), {"scaling": 0.3}),
        (PeftFileFormat(alpha=8, rslora=True), {"alpha": 8.0, "rslora": True}),
    ],
)
def test_what_the_reader_was_told_is_told_again(
    tmp_path: Path, options: PeftFileFormat, told: dict[str, object]
) -> None:
    tensors = {"q.lora_A.weight": torch.randn(2, 4), "q.lora_B.weight": torch.randn(3, 2)}
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "style.safetensors")
    store = AdapterStore.create(tmp_path / "zoo")
    import_adapters(store, [tmp_path / "in" / "style.safetensors"], format=options)
    done = export_adapter(store, "style", tmp_path / "out")
    assert done.options == told
    assert done.checked
    assert contents(tmp_path / "out") == contents(tmp_path / "in")


def test_an_mlx_checkpoint_without_a_configuration(tmp_path: Path) -> None:
    tensors = {"q.lora_a": torch.randn(4, 2), "q.lora_b": torch.randn(2, 3)}
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "adapters.safetensors", metadata={"format": "mlx"})
    store = AdapterStore.create(tmp_path / "zoo")
    import_adapters(store, [tmp_path / "in"], format=MlxFormat(scale=10.0), name="m")
    done = export_adapter(store, "m", tmp_path / "out")
    assert done.options == {"scale": 10.0}
    assert contents(tmp_path / "out") == contents(tmp_path / "in")


class Lossy(PeftFormat):
    """Writes another scaling than the adapter has."""

    format: ClassVar[str] = "lossy"

    def write(self, adapter: Adapter, directory: Path) -> None:
        """Double one module's alpha on the way."""
        [first, *others] = adapter.modules.items()
        path, factors = first
        wrong = {path: replace(factors, scaling=2 * factors.scaling), **dict(others)}
        super().write(replace(adapter, modules=wrong, format="other"), directory)


def test_a_format_that_changes_the_adapter_is_found_out(
    store: AdapterStore, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="not read back as the same"):
        export_adapter(store, "sql", tmp_path / "out", format=Lossy())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapters", "zoo"]


def test_a_reader_that_has_become_stricter_does_not_keep_adapters(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: PeftFormat, path: Path, name: str | None) -> Adapter:
        raise UnsupportedAdapterError("no longer", feature="x")

    monkeypatch.setattr(PeftFormat, "read", refuse)
    done = export_adapter(store, "sql", tmp_path / "out")
    assert not done.checked
    assert contents(tmp_path / "out") == contents(tmp_path / "adapters" / "sql")


def test_a_damaged_store_gives_nothing(store: AdapterStore, tmp_path: Path) -> None:
    chunk = max((tmp_path / "zoo" / "chunks").iterdir(), key=lambda p: p.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(StoreError):
        export_adapter(AdapterStore.open(tmp_path / "zoo"), "sql", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_an_export_of_the_same_files_is_replaced(store: AdapterStore, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_adapter(store, "sql", out)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        export_adapter(store, "sql", out)
    (out / "adapter_config.json").write_text("changed")
    export_adapter(store, "sql", out, overwrite=True)
    assert contents(out) == contents(tmp_path / "adapters" / "sql")
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    with pytest.raises(OutputExistsError, match=r"'notes\.txt' is not part of one"):
        export_adapter(store, "sql", out, overwrite=True)
    # A file of another adapter in the place where people keep theirs side by side.
    shelf = tmp_path / "shelf"
    export_adapter(store, "sql", shelf, format="kohya")
    (shelf / "sql.safetensors").rename(shelf / "precious.safetensors")
    with pytest.raises(OutputExistsError, match=r"'precious\.safetensors' is not part of one"):
        export_adapter(store, "sql", shelf, format="kohya", overwrite=True)
    assert contents(out) == before
    assert [p.name for p in shelf.iterdir()] == ["precious.safetensors"]
    assert not list(tmp_path.glob(".*"))


def test_a_link_is_never_replaced(store: AdapterStore, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_adapter(store, "sql", out)
    (out / "adapter_config.json").rename(tmp_path / "elsewhere.json")
    (out / "adapter_config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(OutputExistsError, match=r"'adapter_config\.json' is not part of one"):
        export_adapter(store, "sql", out, overwrite=True)
    assert (out / "adapter_config.json").is_symlink()


def test_what_an_adapter_is_linked_to_is_never_replaced(
    store: AdapterStore, tmp_path: Path
) -> None:
    place = write_peft_directory(make_adapter("linked", seed=2), tmp_path / "adapters" / "linked")
    import_adapters(store, [place], link=True)
    (tmp_path / "alias").symlink_to(place)
    before = contents(place)
    for name in ("linked", "sql"):
        for directory in (place, tmp_path / "alias"):
            with pytest.raises(StoreError, match=r'"linked" in .* is linked to') as caught:
                export_adapter(store, name, directory, overwrite=True)
            assert "\n" not in str(caught.value)
    assert contents(place) == before
    export_adapter(store, "linked", tmp_path / "out", overwrite=True)
    export_adapter(store, "linked", tmp_path / "out", overwrite=True)
    assert store.read_adapter("linked").digest() == store.info("linked").digest


@pytest.fixture
def open_to_the_group() -> Iterator[None]:
    """New files may be written by the group."""
    mask = os.umask(0o002)
    yield
    os.umask(mask)


class Private(PeftFormat):
    """Writes by safetensors' own `save_file`, which makes files that only their owner can read."""

    format: ClassVar[str] = "private"

    def write(self, adapter: Adapter, directory: Path) -> None:
        """Write twice."""
        super().write(replace(adapter, format="other"), directory)
        file = directory / "adapter_model.safetensors"
        tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
        save_file(tensors, file)
        assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("form", ["peft", "mlx", "kohya", "peft_file", Private()])
def test_files_have_the_rights_of_new_files(
    store: AdapterStore, tmp_path: Path, open_to_the_group: None, form: str | PeftFormat
) -> None:
    export_adapter(store, "sql", tmp_path / "out", format=form)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {0o664}


def test_every_built_in_format_is_tried_here() -> None:
    writable = {name for name, found in default_formats().items() if name != "checkpoint"}
    assert writable == set(WRITERS)
    assert all(found.distribution.startswith("unmerge ") for found in default_formats().values())
