"""What may be replaced: only directories all of which this package has written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import unmerge_bundle
from unmerge_bundle import BundleWriter, InvalidInputError, OutputExistsError

Make = Callable[..., Any]
HEX = "0123456789abcdef" * 4


def tree(root: Path) -> dict[str, str | bytes]:
    return {
        str(entry.relative_to(root)): (
            f"-> {entry.readlink()}"
            if entry.is_symlink()
            else entry.read_bytes()
            if entry.is_file()
            else "directory"
        )
        for entry in sorted(root.rglob("*"))
    }


def put(file: Path, text: str = "x") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def link(file: Path) -> None:
    """Put a link to something outside in the place of `file`."""
    outside = file.parent.parent / "outside"
    file.rename(outside)
    file.symlink_to(outside)


def refused(root: Path, foreign: str, make_merged: Make) -> None:
    before = tree(root)
    with pytest.raises(OutputExistsError, match="not overwritten") as caught:
        make_merged().write(root, overwrite=True)
    assert repr(foreign) in str(caught.value)
    assert str(root) in str(caught.value)
    assert tree(root) == before
    assert [entry.name for entry in root.parent.iterdir()] == [root.name]


@pytest.mark.parametrize(
    "manifest",
    [
        '{"entry": "src/main.js"}',
        '{"format": "esm", "files": [1.5]}',
        "[]",
        "{",
        "",
        '{"format": "unmerge-bundle"}' + " " * (1 << 20),
    ],
)
def test_other_programs_bundle_json_is_kept(
    tmp_path: Path, make_merged: Make, manifest: str
) -> None:
    put(tmp_path / "web" / "bundle.json", manifest)
    refused(tmp_path / "web", "bundle.json", make_merged)
    put(tmp_path / "web" / "src" / "main.js")
    refused(tmp_path / "web", "src", make_merged)


@pytest.mark.parametrize(
    ("spoil", "foreign"),
    [
        (lambda root: put(root / "notes.txt"), "notes.txt"),
        (lambda root: put(root / ".git" / "HEAD"), ".git"),
        (lambda root: put(root / "blobs" / "notes.txt"), "blobs/notes.txt"),
        (lambda root: put(root / "blobs" / f"{HEX}.bin"), f"blobs/{HEX}.bin"),
        (lambda root: put(root / "blobs" / f"{HEX.upper()}.json"), f"blobs/{HEX.upper()}.json"),
        (lambda root: put(root / "blobs" / f"{HEX}.json" / "x"), f"blobs/{HEX}.json"),
        (
            lambda root: (root / "blobs" / f"{HEX}.json").symlink_to(root / "bundle.json"),
            f"blobs/{HEX}.json",
        ),
        (lambda root: (root / "bundle.json").rename(root / "blobs" / f"{HEX}.json"), "bundle.json"),
        (lambda root: (root / "blobs").rename(root / "a"), "a"),
    ],
)
def test_anything_beside_a_bundle_keeps_it(
    tmp_path: Path, make_merged: Make, spoil: Callable[[Path], object], foreign: str
) -> None:
    make_merged(seed=1).write(tmp_path / "out")
    spoil(tmp_path / "out")
    refused(tmp_path / "out", foreign, make_merged)


@pytest.mark.parametrize("name", ["blobs", "bundle.json"])
def test_links_in_the_place_of_our_files_are_kept(
    tmp_path: Path, make_merged: Make, name: str
) -> None:
    make_merged(seed=1).write(tmp_path / "parent" / "out")
    target = tmp_path / name
    (tmp_path / "parent" / "out" / name).rename(target)
    (tmp_path / "parent" / "out" / name).symlink_to(target)
    refused(tmp_path / "parent" / "out", name, make_merged)


def test_bundles_of_any_version_are_replaced(tmp_path: Path, make_merged: Make) -> None:
    put(tmp_path / "out" / "bundle.json", '{"format": "unmerge-bundle", "format_version": 7.5}')
    put(tmp_path / "out" / "blobs" / f"{HEX}.safetensors")
    make_merged().write(tmp_path / "out", overwrite=True)
    assert unmerge_bundle.verify(tmp_path / "out").ok
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_what_appears_while_we_write_is_kept(tmp_path: Path, make_merged: Make) -> None:
    zoo = make_merged()
    zoo.write(tmp_path / "out")
    with BundleWriter(tmp_path / "out", info=zoo.info, overwrite=True) as writer:
        for path, encoding in zoo.encodings.items():
            writer.add_module(path, encoding)
        put(tmp_path / "out" / "thesis.tex")
        before = tree(tmp_path / "out")
        with pytest.raises(OutputExistsError, match=r"thesis\.tex"):
            writer.finish()
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("spoil", "foreign"),
    [
        (lambda root: put(root / "checkpoint-500" / "optimizer.pt"), "checkpoint-500"),
        (lambda root: put(root / "adapter_model.bin"), "adapter_model.bin"),
        (lambda root: put(root / "training_args.bin"), "training_args.bin"),
        (lambda root: (root / "adapter_config.json").unlink(), "adapter_config.json"),
        (lambda root: link(root / "README.md"), "README.md"),
    ],
)
def test_training_directories_are_kept(
    tmp_path: Path, bundle_path: Path, spoil: Callable[[Path], object], foreign: str
) -> None:
    adapter = unmerge_bundle.open(bundle_path).restore("sql")
    root = tmp_path / "adapter"
    adapter.save_peft(root)
    adapter.save_peft(root, overwrite=True)
    spoil(root)
    before = tree(root)
    with pytest.raises(OutputExistsError, match="not overwritten") as caught:
        adapter.save_peft(root, overwrite=True)
    assert repr(foreign) in str(caught.value)
    assert tree(root) == before


def test_the_way_to_overwrite_is_named(tmp_path: Path, bundle_path: Path) -> None:
    adapter = unmerge_bundle.open(bundle_path).restore("sql")
    adapter.save_peft(tmp_path / "adapter")
    with pytest.raises(OutputExistsError, match=r"--overwrite .*overwrite=True"):
        adapter.save_peft(tmp_path / "adapter")


@pytest.mark.parametrize("path", ["a\0b", "a/b\0/c", "/", "..", "new/..", "a\ud800", "\ud800/a"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_path_is_refused(
    tmp_path: Path,
    bundle_path: Path,
    make_merged: Make,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    overwrite: bool,
) -> None:
    make_merged().write(tmp_path / "merged.rmb")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    before = tree(tmp_path)
    restored = unmerge_bundle.open(bundle_path).restore("sql")
    merged = unmerge_bundle.open(tmp_path / "merged.rmb").merged()
    for write in (
        lambda: make_merged().write(Path(path), overwrite=overwrite),
        lambda: restored.save_peft(path, overwrite=overwrite),
        lambda: merged.save_peft(path, overwrite=overwrite),
    ):
        with pytest.raises(InvalidInputError, match="output path") as caught:
            write()
        assert str(caught.value).isprintable()
        assert json.dumps(str(caught.value), ensure_ascii=False).encode("utf-8")
    assert tree(tmp_path) == before
