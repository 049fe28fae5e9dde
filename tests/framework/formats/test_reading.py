"""`read_adapter` finds the one format that applies and says what it looked for otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file

from adapters import make_adapter, random_collection, write_peft_directory
from unmerge.adapter import Adapter
from unmerge.errors import AdapterError, PluginError, UnknownFormatError, UnsupportedAdapterError
from unmerge.formats import (
    AdapterFormat,
    DiffusersFormat,
    Formats,
    KohyaFormat,
    PeftFileFormat,
    PeftFormat,
    default_formats,
    read_adapter,
)
from unmerge.hookspecs import hookimpl
from unmerge.plugins import get_plugin_manager


class SuffixFormat(AdapterFormat):
    """What another distribution would bring: a format of single files."""

    format: ClassVar[str] = "vendor.toy"
    looks_for: ClassVar[str] = "a file ending in .toy"

    seed: int = 0

    def recognises(self, path: Path) -> bool:
        return path.suffix == ".toy"

    def read(self, path: Path, name: str | None) -> Adapter:
        return make_adapter(name or path.stem, seed=self.seed)


class Greedy(SuffixFormat):
    format: ClassVar[str] = "vendor.greedy"

    def recognises(self, path: Path) -> bool:
        return True


def formats(*given: type[AdapterFormat]) -> Formats:
    class Plugin:
        @hookimpl
        def unmerge_formats(self) -> list[type[AdapterFormat]]:
            return [PeftFormat, *given]

    manager = get_plugin_manager(load_entry_points=False)
    manager.register(Plugin())
    return Formats(manager)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_peft_directory(make_adapter("sql", seed=0), tmp_path / "sql")


def message(path: str | Path, *given: type[AdapterFormat]) -> str:
    with pytest.raises(AdapterError) as caught:
        read_adapter(path, formats=formats(*given))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_reads_a_peft_directory(directory: Path) -> None:
    adapter = read_adapter(directory)
    assert (adapter.name, adapter.format) == ("sql", "peft")
    assert read_adapter(str(directory), name="other").name == "other"


def test_another_format_joins(tmp_path: Path) -> None:
    known = formats(SuffixFormat)
    assert read_adapter(tmp_path / "mine.toy", formats=known).name == "mine"
    assert read_adapter(tmp_path / "mine.toy", formats=known, name="x").name == "x"
    said = message(tmp_path / "a", SuffixFormat)
    assert "found nothing there" in said
    assert said.endswith("; or a file ending in .toy")


def test_a_format_can_be_forced_and_given_options(tmp_path: Path) -> None:
    known = formats(SuffixFormat)
    other = known.build("vendor.toy", {"seed": 1})
    place = tmp_path / "unrecognised"
    plain = read_adapter(place, format="vendor.toy", formats=known)
    assert plain.digest() == make_adapter("unrecognised", seed=0).digest()
    assert read_adapter(place, format=other).digest() == make_adapter("x", seed=1).digest()
    with pytest.raises(UnknownFormatError, match=r"did you mean vendor\.toy"):
        read_adapter(place, format="vendor.tony", formats=known)


def test_two_formats_that_both_claim_a_path(directory: Path) -> None:
    assert "several formats recognise this adapter: peft, vendor.greedy" in message(
        directory, Greedy
    )


def test_a_format_that_cannot_write_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapterError, match=r"vendor\.toy into .* can only be read"):
        SuffixFormat().write(make_adapter("sql", seed=0), tmp_path)


def test_the_built_in_formats_are_registered() -> None:
    assert default_formats()["peft"].format is PeftFormat
    assert default_formats()["peft"].distribution.startswith("unmerge ")


def test_a_name_registered_twice() -> None:
    with pytest.raises(PluginError, match='format "peft" is registered by'):
        formats(PeftFormat)


def test_a_hook_that_fails_is_the_plugins() -> None:
    class Broken:
        @hookimpl
        def unmerge_formats(self) -> Iterator[type[AdapterFormat]]:
            yield SuffixFormat
            raise KeyError("boom")

    manager = get_plugin_manager(load_entry_points=False)
    manager.register(Broken(), name="vendor")
    with pytest.raises(PluginError, match=r"vendor: unmerge_formats failed: KeyError: 'boom'"):
        Formats(manager)


def test_a_directory_of_adapters(tmp_path: Path) -> None:
    for adapter in random_collection(2):
        write_peft_directory(adapter, tmp_path / adapter.name)
    assert f"pass {tmp_path}/* or one of: adapter-00, adapter-01" in message(tmp_path)


def test_a_directory_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    text = message(tmp_path)
    assert "looked for a directory with adapter_config.json" in text
    assert "found a directory with model.gguf" in text


def test_a_path_no_file_system_takes() -> None:
    assert "found something that cannot be read (File name too long)" in message("x" * 5000)


def test_a_damaged_adapter_is_recognised(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()
    assert "the weights are missing" in message(directory)


@pytest.mark.parametrize("called", ["style\u00a02.safetensors", "a\u00ad\u200bb.safetensors"])
@pytest.mark.parametrize(
    ("form", "ends"),
    [
        (KohyaFormat(), ("lora_down", "lora_up")),
        (DiffusersFormat(), ("lora.down", "lora.up")),
        (PeftFileFormat(alpha=4), ("lora_A", "lora_B")),
    ],
)
def test_a_file_may_be_called_anything(
    tmp_path: Path, called: str, form: AdapterFormat, ends: tuple[str, str]
) -> None:
    tensors = {
        f"unet.a.{end}.weight": torch.ones(shape)
        for end, shape in zip(ends, ((4, 8), (6, 4)), strict=True)
    }
    save_file(tensors, tmp_path / called)
    adapter = form.read(tmp_path / called, "style")
    (tmp_path / "out").mkdir()
    form.write(adapter, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [called]


class Faulty(SuffixFormat):
    format: ClassVar[str] = "vendor.faulty"

    def read(self, path: Path, name: str | None) -> Adapter:
        raise KeyError("weight\nmissing")


def test_a_reader_that_fails_is_named(tmp_path: Path) -> None:
    text = message(tmp_path / "mine.toy", Faulty)
    assert "mine.toy: the reader of the format vendor.faulty failed: KeyError" in text
    assert "report it" in text
