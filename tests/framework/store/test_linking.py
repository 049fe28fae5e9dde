"""Linked adapters come back bit for bit from files that stay, and never from files that change."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import icechunk
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import adapter_files
from adapters import make_adapter, write_peft_directory
from unmerge.adapter import Adapter, Factors
from unmerge.cli import cli
from unmerge.errors import AdapterError, DuplicateAdapterError, StoreError
from unmerge.exporting import export_adapter
from unmerge.formats import read_adapter
from unmerge.importing import import_adapters
from unmerge.store import AdapterStore, linking
from unmerge.store.records import StoredAdapter
from unmerge.store.repository import StoreRepository
from unmerge.store.view import StoreView

SHAPES = {"m.q": (12, 8), "m.up": (20, 8)}
HEAD = {"base_model.model.head.weight": torch.arange(6.0).reshape(2, 3)}
FILE = "adapter_model.safetensors"


def saved(folder: Path, name: str, seed: int, **options: Any) -> Path:
    """Write an adapter as PEFT would, and return the file with its tensors."""
    adapter = make_adapter(name, seed=seed, modules=SHAPES, **options)
    return write_peft_directory(adapter, folder / name) / FILE


def link(store: AdapterStore, *files: Path, message: str = "link") -> str:
    """Link the adapters that these files hold, in one commit."""
    return import_adapters(store, [f.parent for f in files], link=True, message=message).version


def changed(file: Path, at: int = -1) -> None:
    """Flip a bit, and let neither the file's size nor its time show it."""
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def view(store: AdapterStore) -> StoreView:
    return StoreView(StoreRepository.open(store.address), store.version)


def linked_tables(store: AdapterStore) -> dict[str, list[int]]:
    tables = view(store).index.tables
    return {path: rows for path, rows in tables.items() if path.endswith("-linked")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft", "peft_file"])
def test_formats_with_convolutions_and_embeddings_come_back_bit_for_bit(
    store: AdapterStore, tmp_path: Path, kit: SimpleNamespace, form: str, dtype: torch.dtype
) -> None:
    place = adapter_files.source(tmp_path / "source" / "one", form, 1, dtype)
    [imported] = import_adapters(store, [place], link=True).sources
    assert imported.name is not None
    again = AdapterStore.open(store.address)
    assert kit.content(again.read_adapter(imported.name)) == kit.content(read_adapter(place))
    info = again.info(imported.name)
    [(file, facts)] = info.files.items()
    assert Path(file).suffix == ".safetensors"
    assert facts.size == Path(file).stat().st_size
    export_adapter(again, imported.name, tmp_path / "out")
    source = place if place.is_dir() else place.parent
    assert adapter_files.contents(tmp_path / "out") == adapter_files.contents(source)
    assert again.verify().ok
    assert again.verify().adapters == 1


def test_transposed_factors_are_refused_by_name(store: AdapterStore, tmp_path: Path) -> None:
    before = store.version
    place = adapter_files.source(tmp_path / "one", "mlx", 1, torch.float32)
    with pytest.raises(AdapterError) as caught:
        import_adapters(store, [place], link=True)
    file = place / "adapters.safetensors"
    assert str(caught.value) == (
        'm.q: adapter "one" cannot be linked: factor A is not stored row by row in any of: '
        f"{file}; add it without --link"
    )
    assert AdapterStore.open(store.address).version == before
    assert store.staged == ()


def test_pickled_adapters_are_refused(store: AdapterStore, tmp_path: Path) -> None:
    file = saved(tmp_path, "a", 1)
    torch.save({"x": torch.zeros(2)}, file.with_name("adapter_model.bin"))
    file.unlink()
    with pytest.raises(AdapterError, match=r"a: cannot be linked: has no safetensors file"):
        import_adapters(store, [file.parent], link=True)


def test_adapters_on_the_hub_are_refused_before_they_are_downloaded(store: AdapterStore) -> None:
    with pytest.raises(AdapterError, match="cannot be linked: is on the hub"):
        import_adapters(store, ["hf://org/name"], link=True)


def test_linked_and_copied_adapters_side_by_side(
    store: AdapterStore, tmp_path: Path, kit: SimpleNamespace
) -> None:
    files = {n: saved(tmp_path, n, seed, verbatim=HEAD) for seed, n in enumerate("abcdef")}
    link(store, files["a"], files["b"])
    import_adapters(store, [files["c"].parent, files["d"].parent])
    link(store, files["e"])
    import_adapters(store, [files["f"].parent])
    again = AdapterStore.open(store.address)
    assert {info.name for info in again.list() if info.files} == {"a", "b", "e"}
    # Two commits, and still one array for all.
    assert set(map(tuple, linked_tables(again).values())) == {(3,)}
    expected = {name: read_adapter(file.parent) for name, file in files.items()}
    for path in SHAPES:
        module = again.read_module(path)
        assert [name for name, _ in module] == [*"abcdef"]
        for name, factors in module:
            assert kit.bits(factors.A) == kit.bits(expected[name].modules[path].A)
            assert kit.bits(factors.B) == kit.bits(expected[name].modules[path].B)
    assert [name for name, _ in again.read_module("m.q", ["e", "c"])] == ["c", "e"]
    for name, adapter in expected.items():
        assert kit.content(again.read_adapter(name)) == kit.content(adapter)
    report = again.verify()
    assert (report.ok, report.adapters, bool(report.dead)) == (True, 6, False)


def test_the_store_stays_small(store: AdapterStore, tmp_path: Path) -> None:
    shapes = {f"m.{i}": (4000, 4000) for i in range(4)}
    sizes = []
    for seed in range(2):
        adapter = make_adapter(f"a{seed}", seed=seed, modules=shapes, rank=16)
        sizes.append((write_peft_directory(adapter, tmp_path / adapter.name) / FILE).stat().st_size)
        link(store, tmp_path / adapter.name / FILE)
    used = sum(f.stat().st_size for f in Path(store.address).rglob("*") if f.is_file())
    assert used < 0.02 * sum(sizes)


def test_factors_in_several_files_among_others(
    store: AdapterStore, tmp_path: Path, kit: SimpleNamespace
) -> None:
    adapter = make_adapter("a", seed=1, modules=SHAPES)
    parts = []
    for number, (path, factors) in enumerate(adapter.modules.items()):
        parts.append(tmp_path / f"part-{number}.safetensors")
        save_file({f"{path}.A": factors.A, f"{path}.B": factors.B}, parts[-1])
    other = saved(tmp_path, "other", 2)
    store.add(adapter, link=[other, *parts, parts[0]])
    store.commit("link")
    assert list(store.info("a").files) == [str(part) for part in parts]
    assert kit.content(store.read_adapter("a")) == kit.content(adapter)
    parts[1].unlink()
    with pytest.raises(StoreError, match=rf'm\.up: factor A .* of "a" is linked to {parts[1]}'):
        store.read_module("m.up")


def test_equal_factors_share_their_bytes(
    store: AdapterStore, tmp_path: Path, kit: SimpleNamespace
) -> None:
    A, B = torch.ones(2, 4), torch.zeros(4, 2)
    modules = {"m.a": Factors(A, B, 1.0), "m.b": Factors(A.clone(), B.clone(), 2.0)}
    file = tmp_path / "f.safetensors"
    save_file({"A": A, "B": B}, file)
    store.add(Adapter("a", modules), link=[file])
    store.commit("link")
    assert kit.content(store.read_adapter("a")) == kit.content(Adapter("a", modules))


def test_equal_checksums_are_not_enough(
    store: AdapterStore, tmp_path: Path, kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linking, "crc32", lambda bits: 0)
    file = saved(tmp_path, "a", 1)
    adapter = read_adapter(file.parent)
    store.add(adapter, link=[saved(tmp_path, "b", 2), file])
    store.commit("link")
    assert list(store.info("a").files) == [str(file)]
    assert kit.content(store.read_adapter("a")) == kit.content(adapter)


@pytest.mark.parametrize("name", ["a b", "50%20", "a#b?c", "naïve ✓", "[x]~&+;=", "a..b"])
def test_names_of_files_and_directories_of_all_kinds(
    store: AdapterStore, tmp_path: Path, kit: SimpleNamespace, name: str
) -> None:
    adapter = make_adapter("a", seed=1, modules=SHAPES)
    folder = write_peft_directory(adapter, tmp_path / name)
    file = (folder / FILE).rename(folder / f"{name}.safetensors")
    store.add(adapter, link=[file])
    store.commit("link")
    assert kit.content(AdapterStore.open(store.address).read_adapter("a")) == kit.content(adapter)
    assert store.verify().ok


def test_the_command_line_links_and_shows_to_what(tmp_path: Path) -> None:
    zoo, file = tmp_path / "zoo", saved(tmp_path, "a", 1)

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    run("init", zoo)
    run("add", zoo, file.parent, "--link")
    assert f"linked to   {file}\n" in run("show", zoo, "a")
    shown = json.loads(run("show", zoo, "a", "--json"))["adapter"]["files"]
    facts = AdapterStore.open(zoo).info("a").files[str(file)]
    assert shown == {
        str(file): {"bytes": facts.size, "sha256": facts.sha256, "modified": facts.modified}
    }
    assert facts.sha256 == f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


def test_symbolic_links_are_followed_once(store: AdapterStore, tmp_path: Path) -> None:
    file = saved(tmp_path, "a", 1)
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown" / FILE).symlink_to(file)
    (tmp_path / "shown" / "adapter_config.json").symlink_to(file.with_name("adapter_config.json"))
    link(store, tmp_path / "shown" / FILE)
    assert list(store.info("shown").files) == [str(file)]


def test_what_is_removed_stays_in_tags_and_collection_leaves_the_rest_linked(
    store: AdapterStore, tmp_path: Path, kit: SimpleNamespace
) -> None:
    files = {n: saved(tmp_path, n, seed, verbatim=HEAD) for seed, n in enumerate("abcd")}
    expected = {name: kit.content(read_adapter(file.parent)) for name, file in files.items()}
    link(store, files["a"], files["b"])
    import_adapters(store, [files["c"].parent])
    store.tag("v1")
    link(store, files["d"])
    store.remove("a")
    store.remove("c")
    store.commit("remove one linked and one copied")
    report = store.gc(forget_before=datetime.now(UTC))
    assert report.compacted
    assert report.dropped.rows == 2 * len(SHAPES)  # those of c: the dead references of a are none
    for opened, names in ((AdapterStore.open(store.address), "bd"), (store.checkout("v1"), "abc")):
        assert opened.names() == tuple(names)
        for name in names:
            assert kit.content(opened.read_adapter(name)) == expected[name]
        assert opened.verify().ok
    assert set(map(tuple, linked_tables(store).values())) == {(3,)}
    # Its file may go now: nobody who is left needs it.
    files["a"].unlink()
    assert store.verify().ok
    again = store.gc(forget_before=datetime.now(UTC))
    assert again.compacted is None
    store.remove("b")
    store.remove("d")
    store.commit("remove the rest")
    store.gc(forget_before=datetime.now(UTC))
    assert linked_tables(store) == {}
    assert not store.verify().dead


def test_linking_goes_on_where_collection_left_off(
    store: AdapterStore, tmp_path: Path, kit: SimpleNamespace
) -> None:
    files = {n: saved(tmp_path, n, seed) for seed, n in enumerate("abc")}
    link(store, files["a"], files["b"])
    store.remove("a")
    store.commit("remove")
    store.gc(forget_before=datetime.now(UTC))
    link(store, files["c"])
    for name in "bc":
        expected = read_adapter(files[name].parent)
        assert kit.content(store.read_adapter(name)) == kit.content(expected)


def _moved(file: Path) -> None:
    file.rename(file.with_name("moved.safetensors"))


def _truncated(file: Path) -> None:
    times = file.stat()
    os.truncate(file, times.st_size - 1)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def _written_to(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data)
    later = file.stat().st_mtime_ns + 10**9
    os.utime(file, ns=(later, later))


def _fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (_moved, r"cannot be found \(No such file or directory\)"),
        (_truncated, r"has \d+ bytes, expected \d+"),
        (_written_to, "was written to after the adapter was linked to it"),
        (_fifo, "is no regular file"),
    ],
)
def test_files_that_are_not_what_they_were(
    store: AdapterStore,
    tmp_path: Path,
    kit: SimpleNamespace,
    harm: Callable[[Path], None],
    problem: str,
) -> None:
    files = {n: saved(tmp_path, n, seed) for seed, n in enumerate("abc")}
    link(store, files["a"], files["b"])
    import_adapters(store, [files["c"].parent])
    harm(files["b"])
    where = rf'm\.q: factor A \(rank 4, float32\) of "b" is linked to {files["b"]}, which {problem}'
    for read in (
        lambda: store.read_module("m.q"),
        lambda: store.read_adapter("b"),
        lambda: export_adapter(store, "b", tmp_path / "out"),
    ):
        with pytest.raises(StoreError, match=f"{where}; put the file back as it was"):
            read()
    assert not (tmp_path / "out").exists()
    assert [name for name, _ in store.read_module("m.q", ["a", "c"])] == ["a", "c"]
    expected = read_adapter(files["a"].parent)
    assert kit.content(store.read_adapter("a")) == kit.content(expected)
    report = store.verify()
    [found] = report.problems
    assert (found.adapters, report.adapters) == (("b",), 2)
    assert found.message.startswith(f'{files["b"]}, to which "b" is linked, ')


def test_a_changed_bit_that_nothing_else_shows(store: AdapterStore, tmp_path: Path) -> None:
    files = [saved(tmp_path, n, seed) for seed, n in enumerate("ab")]
    link(store, *files)
    changed(files[1])
    # The last bit of the file is one of the last tensor's, as safetensors orders them.
    message = r'm\.up: factor B .*, row 1, adapter "b": the numbers read do not have the CRC-32'
    for read in (lambda: store.read_module("m.up"), lambda: store.read_adapter("b")):
        with pytest.raises(StoreError, match=rf"{message}.*; linked to {files[1]}: put the file"):
            read()
    [found] = store.verify().problems
    assert found.adapters == ("b",)
    assert f"{files[1]}, to which" in found.message
    assert "has sha256:" in found.message


def test_verify_sees_changes_where_no_factor_is(store: AdapterStore, tmp_path: Path) -> None:
    file = saved(tmp_path, "a", 1)
    link(store, file)
    at = file.read_bytes().index(b'"pt"') + 1
    changed(file, at)
    store.read_adapter("a")
    [found] = store.verify().problems
    assert f"{file}, to which" in found.message


def test_progress_of_verifying_ends_at_its_total(store: AdapterStore, tmp_path: Path) -> None:
    files = [saved(tmp_path, n, seed) for seed, n in enumerate("ab")]
    link(store, *files)
    files[0].unlink()
    steps: list[tuple[int, int]] = []
    store.verify(progress=lambda done, total: steps.append((done, total)))
    total = steps[0][1]
    assert steps[-1] == (total, total)
    assert steps == sorted(steps)


def test_a_file_changed_between_add_and_commit(store: AdapterStore, tmp_path: Path) -> None:
    before = store.version
    file = saved(tmp_path, "a", 1)
    store.add(read_adapter(file.parent), link=[file])
    _written_to(file)
    with pytest.raises(StoreError, match=f'adapter "a" was linked to {file}, which was written to'):
        store.commit("link")
    assert AdapterStore.open(store.address).version == before
    assert store.staged == ("a",)


def test_a_file_changed_while_it_is_looked_through(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved(tmp_path, "a", 1)
    real = linking._sha256

    def hashed(opened: Any) -> str:
        _written_to(file)
        return real(opened)

    monkeypatch.setattr(linking, "_sha256", hashed)
    with pytest.raises(AdapterError, match=f"{file}: was written to while"):
        store.add(read_adapter(file.parent), link=[file])
    assert store.staged == ()


def test_refused_links_leave_what_is_staged_as_it_was(
    store: AdapterStore, tmp_path: Path, kit: SimpleNamespace
) -> None:
    files = [saved(tmp_path, n, 1) for n in "ab"]
    copied = make_adapter("copied", seed=3, modules=SHAPES)
    store.add(copied)
    store.add(read_adapter(files[0].parent), link=[files[0]])
    with pytest.raises(DuplicateAdapterError):
        store.add(read_adapter(files[1].parent), link=[files[1]])
    later = make_adapter("later", seed=4, modules=SHAPES)
    store.add(later)
    store.commit("three")
    assert store.names() == ("a", "copied", "later")
    for adapter in (copied, later):
        assert kit.content(store.read_adapter(adapter.name)) == kit.content(adapter)


def test_replacing_links_by_copies_and_by_other_links(store: AdapterStore, tmp_path: Path) -> None:
    file = saved(tmp_path, "a", 1)
    first = link(store, file)

    def again(*, linked: bool) -> str:
        report = import_adapters(store, [file.parent], link=linked, replace=True)
        return report.sources[0].status

    assert again(linked=True) == "unchanged"
    _written_to(file)
    with pytest.raises(StoreError):
        store.read_adapter("a")
    assert again(linked=True) == "replaced"
    store.read_adapter("a")
    assert again(linked=False) == "replaced"
    assert not store.info("a").files
    assert again(linked=False) == "unchanged"
    # Where the numbers lie makes no other adapter.
    assert store.diff(first).unchanged == 1
    assert again(linked=True) == "replaced"
    assert store.info("a").files


def test_s3_refuses_links(s3_address: str, tmp_path: Path) -> None:
    store = AdapterStore.create(s3_address)
    file = saved(tmp_path, "a", 1)
    with pytest.raises(StoreError, match="nothing can be linked to a store on S3"):
        store.add(read_adapter(file.parent), link=[file])
    assert store.staged == ()
    with pytest.raises(StoreError, match="holds linked adapters"):
        StoreRepository.open(s3_address).read_linked(store.version, [tmp_path])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("adapter.safetensors", "expected an absolute one"),
        ("{0}/x/../a.safetensors", "expected an absolute one"),
        ("{0}/a\nb.safetensors", "of printable characters"),
        ("/a.safetensors", "below a directory"),
        ("{0}/nothing.safetensors", "cannot be linked: No such file or directory"),
        ("{0}", "cannot be linked: is no regular file"),
    ],
)
def test_paths_that_cannot_be_linked(
    store: AdapterStore, tmp_path: Path, path: str, message: str
) -> None:
    with pytest.raises(AdapterError, match=message) as caught:
        store.add(make_adapter("a", seed=1, modules=SHAPES), link=[Path(path.format(tmp_path))])
    assert "\n" not in str(caught.value)


def test_no_file_at_all(store: AdapterStore) -> None:
    with pytest.raises(AdapterError, match="row by row in any of: no file"):
        store.add(make_adapter("a", seed=1, modules=SHAPES), link=[])


@pytest.mark.parametrize(
    "offsets", [[0, 10**30], [10**30, 10**30], [-4, 0], [8, 4], [0, "4"], None, [0, 1.5]]
)
def test_headers_that_lie(store: AdapterStore, tmp_path: Path, offsets: object) -> None:
    header = json.dumps({"x": {"dtype": "U8", "shape": [4], "data_offsets": offsets}}).encode()
    file = tmp_path / "f.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(AdapterError, match='no readable safetensors file: tensor "x" has data_off'):
        store.add(make_adapter("a", seed=1, modules=SHAPES), link=[file])


def test_overlapping_tensors_are_not_read_again_and_again(
    store: AdapterStore, tmp_path: Path
) -> None:
    entries = {f"x{i}": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]} for i in range(2)}
    header = json.dumps(entries).encode()
    file = tmp_path / "f.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(AdapterError, match='tensor "x1" has data_offsets'):
        store.add(make_adapter("a", seed=1, modules=SHAPES), link=[file])


def point(store: AdapterStore, table: str, row: int, file: Path, offset: int, length: int) -> None:
    """Do to a store what somebody else may have done: refer to any file there is."""
    repository = StoreRepository.open(store.address)
    session = repository.session()
    session.store.set_virtual_ref(
        f"{table}/c/{row}/0/0",
        file.as_uri(),
        offset=offset,
        length=length,
        validate_container=False,
    )
    session.commit("by a stranger")


def first_factor(file: Path) -> tuple[int, int]:
    """Return offset and length of `m.q`'s factor A in a file."""
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    begin, end = json.loads(data[8 : 8 + size])["base_model.model.m.q.lora_A.weight"][
        "data_offsets"
    ]
    return 8 + size + begin, end - begin


@pytest.mark.parametrize("linked", [True, False])
def test_references_elsewhere_are_not_followed_even_to_the_right_bytes(
    store: AdapterStore, tmp_path: Path, linked: bool
) -> None:
    file = saved(tmp_path, "a", 1)
    import_adapters(store, [file.parent], link=linked)
    copy = tmp_path / "elsewhere" / FILE
    copy.parent.mkdir()
    copy.write_bytes(file.read_bytes())
    table = "modules/m.q/A-r4-float32" + ("-linked" if linked else "")
    point(store, f"{table}.0", 0, copy, *first_factor(file))
    stranger = AdapterStore.open(store.address)
    with pytest.raises(StoreError, match="no virtual chunk container"):
        stranger.read_adapter("a")
    with pytest.raises(StoreError, match=r"m\.q: factor A .* of \"a\""):
        stranger.read_module("m.q")
    assert not stranger.verify().ok


def test_references_to_other_bytes_beside_are_found_out(
    store: AdapterStore, tmp_path: Path
) -> None:
    file = saved(tmp_path, "a", 1)
    link(store, file)
    secret = file.with_name("secret")
    secret.write_bytes(b"s" * 4096)
    offset, length = first_factor(file)
    point(store, "modules/m.q/A-r4-float32-linked.0", 0, secret, offset, length)
    with pytest.raises(StoreError, match="do not have the CRC-32"):
        AdapterStore.open(store.address).read_module("m.q")


def test_nothing_is_authorised_by_opening(store: AdapterStore, tmp_path: Path) -> None:
    """Neither by opening a store, nor by what its own configuration says."""
    file = saved(tmp_path, "a", 1)
    link(store, file)
    prefix = f"{tmp_path.as_uri()}/"
    storage = icechunk.local_filesystem_storage(store.address)
    config = icechunk.RepositoryConfig.default()
    config.set_virtual_chunk_container(
        icechunk.VirtualChunkContainer(prefix, icechunk.local_filesystem_store(str(tmp_path)))
    )
    icechunk.Repository.open(storage, config=config).save_config()
    root = StoreRepository.open(store.address).read(store.version)
    with pytest.raises(icechunk.IcechunkError, match="authorize"):
        np.asarray(root["modules/m.q/A-r4-float32-linked.0"][...])


@pytest.mark.parametrize("files", [{}, {"a.safetensors": None}, {"/x/../etc/a": None}])
def test_records_that_hide_what_they_are_linked_to(
    store: AdapterStore, tmp_path: Path, files: dict[str, None]
) -> None:
    link(store, saved(tmp_path, "a", 1))
    record = view(store).record("a").model_dump()
    [facts] = record["files"].values()
    StoredAdapter.model_validate(record)
    record["files"] = dict.fromkeys(files, facts)
    with pytest.raises(ValueError, match="linked"):
        StoredAdapter.model_validate(record)
