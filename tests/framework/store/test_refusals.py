"""What a store refuses, by name and with nothing written."""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import icechunk
import pytest
import torch
import zarr

import unmerge_bundle
from unmerge.adapter import Adapter, Factors
from unmerge.errors import (
    AdapterError,
    AdapterExistsError,
    ConfigError,
    IncompatibleAdaptersError,
    NonFiniteError,
    StoreError,
    StoreExistsError,
)
from unmerge.store import AdapterStore, records
from unmerge.store.failures import backend
from unmerge.store.repository import StoreRepository

PATH = "layers.0.q_proj"


def _adapter(A: torch.Tensor, B: torch.Tensor, scaling: float = 1.0) -> Adapter:
    return Adapter("new", {PATH: Factors(A, B, scaling)})


def _with(value: float, dtype: torch.dtype, shape: tuple[int, int]) -> torch.Tensor:
    tensor = torch.zeros(shape, dtype=dtype)
    tensor[-1, -1] = value
    return tensor


A, B = torch.ones(2, 4), torch.ones(5, 2)

BAD = {
    "nan in A": (
        _adapter(_with(math.nan, torch.float32, (2, 4)), B),
        NonFiniteError,
        f'{PATH}: adapter "new": factor A has 1 of 8',
    ),
    "inf in B, fp16": (
        _adapter(A.half(), _with(math.inf, torch.float16, (5, 2))),
        NonFiniteError,
        "factor B",
    ),
    "-inf in A, bf16": (
        _adapter(_with(-math.inf, torch.bfloat16, (2, 4)), B),
        NonFiniteError,
        "factor A",
    ),
    "nan scaling": (_adapter(A, B, math.nan), NonFiniteError, "scaling nan"),
    "nan verbatim": (
        Adapter("new", {PATH: Factors(A, B, 1.0)}, {"head": torch.tensor(math.nan)}),
        NonFiniteError,
        'verbatim tensor "head"',
    ),
    "float64 factor": (_adapter(A.double(), B), AdapterError, "dtype float64"),
    "int factor": (_adapter(A, B.int()), AdapterError, "factor B is a strided tensor of dtype int"),
    "complex verbatim": (
        Adapter("new", {PATH: Factors(A, B, 1.0)}, {"head": torch.ones(1, dtype=torch.cfloat)}),
        AdapterError,
        "complex64",
    ),
    "sparse": (_adapter(A.to_sparse(), B), AdapterError, "sparse_coo tensor"),
    "meta": (_adapter(A.to("meta"), B), AdapterError, "meta tensor"),
    "ranks differ": (_adapter(torch.ones(3, 4), B), AdapterError, r"A of shape \(3, 4\) and B"),
    "rank 0": (_adapter(torch.ones(0, 4), torch.ones(5, 0)), AdapterError, "none of them 0"),
    "1-D": (_adapter(torch.ones(4), B), AdapterError, r"A of shape \(4,\)"),
    "no modules": (Adapter("new", {}), AdapterError, "no modules"),
    "other d_in": (
        _adapter(torch.ones(2, 9), B),
        IncompatibleAdaptersError,
        r"layers.0.q_proj: adapter \"new\" has \(d_out, d_in\) \(5, 9\).*\(5, 4\); check that both",
    ),
    "other d_out": (_adapter(A, torch.ones(9, 2)), IncompatibleAdaptersError, r"\(9, 4\)"),
    "bad name": (Adapter("../new", {PATH: Factors(A, B, 1.0)}), AdapterError, "adapter name"),
    "bad path": (Adapter("new", {"a/b": Factors(A, B, 1.0)}), AdapterError, "module path"),
    "empty key": (
        Adapter("new", {PATH: Factors(A, B, 1.0)}, {"": A}),
        AdapterError,
        "tensor key",
    ),
    "surrogate": (
        Adapter("new", {PATH: Factors(A, B, 1.0)}, config="\ud800"),
        AdapterError,
        "config is no valid Unicode",
    ),
    "name taken": (Adapter("sql", {PATH: Factors(A, B, 1.0)}), AdapterExistsError, '"sql".*--name'),
    "name staged": (Adapter("waiting", {PATH: Factors(A, B, 1.0)}), AdapterExistsError, "staged"),
    "other base": (
        Adapter("new", {PATH: Factors(A, B, 1.0)}, base_model="org/other"),
        IncompatibleAdaptersError,
        '"org/other".*"org/base"',
    ),
    "other revision": (
        Adapter("new", {PATH: Factors(A, B, 1.0)}, base_model="org/base", revision="2"),
        IncompatibleAdaptersError,
        'revision "2".*"1"',
    ),
    "unlike a staged one": (
        Adapter("new", {"staged.only": Factors(torch.ones(2, 9), B, 1.0)}),
        IncompatibleAdaptersError,
        "the staged set has",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_refused_adapter_changes_nothing(
    filled: AdapterStore, kit: SimpleNamespace, case: str
) -> None:
    filled.add(kit.make("base", base_model="org/base", revision="1"))
    filled.commit("name a base model")
    filled.add(kit.make("waiting", paths=("staged.only",)))
    before = kit.state(Path(filled.address))
    adapter, error, message = BAD[case]
    with pytest.raises(error, match=message) as caught:
        filled.add(adapter)
    assert "\n" not in str(caught.value)
    assert filled.staged == ("waiting",)
    assert kit.state(Path(filled.address)) == before
    filled.commit("the staged set is as it was")
    assert kit.content(filled.read_adapter("waiting")) == kit.content(
        kit.make("waiting", paths=("staged.only",))
    )


def test_unknown_base_models_are_no_contradiction(
    store: AdapterStore, kit: SimpleNamespace
) -> None:
    store.add(kit.make("a", base_model=""))
    store.add(kit.make("b", base_model="org/base"))
    store.add(kit.make("c"))
    store.commit("")
    store.add(kit.make("d"))
    store.commit("")
    assert store.base_model == "org/base"


@pytest.mark.parametrize("kind", ["file", "store", "other files"])
def test_create_refuses_what_is_there(tmp_path: Path, kit: SimpleNamespace, kind: str) -> None:
    path = tmp_path / "zoo"
    if kind == "file":
        path.write_text("mine")
    elif kind == "store":
        AdapterStore.create(path)
    else:
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    before = sorted((str(p), p.is_file() and p.read_bytes()) for p in tmp_path.rglob("*"))
    with pytest.raises(StoreExistsError, match="already exists"):
        AdapterStore.create(path)
    assert sorted((str(p), p.is_file() and p.read_bytes()) for p in tmp_path.rglob("*")) == before


def test_create_takes_an_empty_directory_and_makes_parents(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert AdapterStore.create(tmp_path / "empty").names() == ()
    store = AdapterStore.create(tmp_path / "a" / "b" / "zoo", base_model="org/m", revision="1")
    assert (store.base_model, store.revision, store.names()) == ("org/m", "1", ())
    assert store.modules() == {}
    assert store.list() == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "empty"]


def test_a_failing_create_leaves_nothing(tmp_path: Path) -> None:
    def fail(root: zarr.Group) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match="cannot create a store: No space left"):
        StoreRepository.create(tmp_path / "a" / "b" / "zoo", fail)
    assert list(tmp_path.iterdir()) == []


def test_losing_a_race_to_create(tmp_path: Path) -> None:
    path = tmp_path / "zoo"

    def meanwhile(root: zarr.Group) -> None:
        AdapterStore.create(path, base_model="theirs")

    with pytest.raises(StoreExistsError, match="already exists"):
        StoreRepository.create(path, meanwhile)
    assert [p.name for p in tmp_path.iterdir()] == ["zoo"]
    assert AdapterStore.open(path).base_model == "theirs"


def test_create_refuses_a_revision_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without a base model"):
        AdapterStore.create(tmp_path / "zoo", revision="1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["nothing", "file", "empty", "other files"])
def test_open_of_a_non_store(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "zoo"
    if kind == "file":
        path.write_text("mine")
    elif kind != "nothing":
        path.mkdir()
    if kind == "other files":
        (path / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match=r"zoo: .*(no adapter store|expected the directory)"):
        AdapterStore.open(path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("open_it", [AdapterStore.open, AdapterStore.create])
@pytest.mark.parametrize(
    "path", ["gs://bucket/zoo", Path("s3://bucket/zoo"), Path("git+ssh://host/zoo"), "a://b"]
)
def test_addresses_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    open_it: Callable[[str | Path], AdapterStore],
    path: str | Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match=f"^{re.escape(str(path))}: is an address"):
        open_it(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["c:/zoo", "a:zoo", "./s3:/zoo"])
def test_what_only_looks_like_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match="does not exist"):
        AdapterStore.open(name)


@pytest.mark.parametrize("open_it", [AdapterStore.open, AdapterStore.create])
@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_paths_that_no_system_has(
    tmp_path: Path, open_it: Callable[[str | Path], AdapterStore], name: str
) -> None:
    with pytest.raises(StoreError, match="no path can hold a NUL") as caught:
        open_it(tmp_path / "new" / name)
    assert str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("open_it", [AdapterStore.open, AdapterStore.create])
def test_a_path_too_long_to_ask_for(
    tmp_path: Path, open_it: Callable[[str | Path], AdapterStore]
) -> None:
    with pytest.raises(StoreError, match="File name too long"):
        open_it(tmp_path / ("x" * 300))


def test_a_directory_that_cannot_be_made_is_no_panic(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Makes the first directory of a store fail whoever runs it; permissions do not stop root.
    with pytest.raises(StoreError, match="cannot create a store: File name too long"):
        AdapterStore.create(tmp_path / "new" / ("x" * 250))
    assert capfd.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


def test_a_directory_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if not exist_ok:  # the parent is there: nobody may write into it
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr("unmerge.store.local.create_empty", lambda storage: pytest.fail("late"))
    with pytest.raises(StoreError, match="cannot create a store: Permission denied"):
        AdapterStore.create(tmp_path / "zoo")


def test_a_panic_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    storage = icechunk.local_filesystem_storage(str(tmp_path / "file" / "zoo"))
    with (
        pytest.raises(StoreError, match=r"^zoo: cannot create: ") as caught,
        backend("zoo: cannot create"),
    ):
        icechunk.Repository.create(storage)
    assert str(caught.value).isprintable()
    assert "SpanTrace" not in str(caught.value)


def test_a_panic_while_reading(filled: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    panic = type("PanicException", (BaseException,), {})

    def read_rows(*anything: object) -> None:
        raise panic("index out of bounds")

    monkeypatch.setattr("unmerge.store.view.read_rows", read_rows)
    with pytest.raises(StoreError, match='"math", "sql" cannot be read: index out of bounds'):
        filled.read_module(PATH, ["math", "sql"])


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_who_asks_to_stop_is_heard(stop: type[BaseException]) -> None:
    with pytest.raises(stop), backend("zoo: cannot be read"):
        raise stop


def test_tag_names_are_called_tags(filled: AdapterStore) -> None:
    with pytest.raises(StoreError, match=r"^[^']*: tag '\.\./v1' is not allowed") as caught:
        filled.tag("../v1")
    assert "adapter" not in str(caught.value)
    assert filled.tags() == {}


def test_classes_are_not_called_like_those_of_bundles() -> None:
    own = {name for name, value in vars(records).items() if _module(value) == records.__name__}
    assert "AdapterInfo" in own
    assert not own & set(unmerge_bundle.__all__)


def _module(value: object) -> str | None:
    return getattr(value, "__module__", None)


def test_a_later_store_format_is_refused(store: AdapterStore) -> None:
    repository = StoreRepository.open(Path(store.address))
    session = repository.session()
    repository.root(session).attrs["store_format"] = 3
    session.commit("from the future")
    with pytest.raises(StoreError, match="store_format 3, expected 2"):
        AdapterStore.open(store.address)


def test_an_icechunk_repository_of_other_things_is_refused(tmp_path: Path) -> None:
    StoreRepository.create(tmp_path / "zoo", lambda root: root.attrs.put({"mine": 1}))
    with pytest.raises(StoreError, match="store_format None"):
        AdapterStore.open(tmp_path / "zoo")


def test_a_relative_path_survives_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kit: SimpleNamespace
) -> None:
    monkeypatch.chdir(tmp_path)
    store = AdapterStore.create("zoo")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.add(kit.make("a"))
    store.commit("")
    assert list(Path.cwd().iterdir()) == []
    assert AdapterStore.open(tmp_path / "zoo").names() == ("a",)
