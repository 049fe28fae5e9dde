"""`read_adapter` finds the one reader that applies and says what it looked for otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from adapters import make_adapter, random_collection, write_peft_directory
from unmerge.adapter import Adapter
from unmerge.errors import AdapterError
from unmerge.readers import BUILTIN_READERS, AdapterReader, PeftReader, read_adapter


class SuffixReader(AdapterReader):
    """What another distribution would bring: a format of single files."""

    format: ClassVar[str] = "vendor.toy"
    looks_for: ClassVar[str] = "a file ending in .toy"

    def recognises(self, path: Path) -> bool:
        return path.suffix == ".toy"

    def read(self, path: Path, name: str | None) -> Adapter:
        return make_adapter(name or path.stem, seed=0)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_peft_directory(make_adapter("sql", seed=0), tmp_path / "sql")


def message(path: str | Path, *readers: AdapterReader) -> str:
    with pytest.raises(AdapterError) as caught:
        read_adapter(path, readers=readers or BUILTIN_READERS)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_reads_a_peft_directory(directory: Path) -> None:
    adapter = read_adapter(directory)
    assert (adapter.name, adapter.format) == ("sql", "peft")
    assert read_adapter(str(directory), name="other").name == "other"


def test_another_reader_joins(tmp_path: Path) -> None:
    readers = (*BUILTIN_READERS, SuffixReader())
    assert read_adapter(tmp_path / "mine.toy", readers=readers).name == "mine"
    assert read_adapter(tmp_path / "mine.toy", readers=readers, name="x").name == "x"
    assert "or a file ending in .toy; found nothing there" in message(tmp_path / "a", *readers)


def test_two_readers_that_both_claim_a_path(directory: Path) -> None:
    assert "several readers recognise this adapter: peft, peft" in message(
        directory, PeftReader(), PeftReader()
    )


def test_a_file_of_weights_alone(directory: Path) -> None:
    text = message(directory / "adapter_model.safetensors")
    assert "found a file; a file of weights alone does not say rank and scaling" in text


def test_a_directory_of_adapters(tmp_path: Path) -> None:
    for adapter in random_collection(2):
        write_peft_directory(adapter, tmp_path / adapter.name)
    assert "pass one of: adapter-00, adapter-01" in message(tmp_path)


def test_a_directory_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    text = message(tmp_path)
    assert "looked for a directory with adapter_config.json" in text
    assert "found a directory with model.gguf" in text


def test_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "`hf download org/adapter --local-dir DIRECTORY`" in message("org/adapter")
    assert "hf download" not in message("adapter")


def test_a_path_no_file_system_takes() -> None:
    assert "found something that cannot be read (File name too long)" in message("x" * 5000)


def test_a_damaged_adapter_is_recognised(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()
    assert "the weights are missing" in message(directory)
