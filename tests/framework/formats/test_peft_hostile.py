"""Files made to break a parser: each is one `AdapterError` of one readable line, nothing else."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters import make_adapter, peft_config, write_peft_directory
from unmerge.adapter import Adapter
from unmerge.errors import AdapterError
from unmerge.formats import read_adapter, read_peft
from unmerge.formats.peft_config import parse_config

PREFIX = "base_model.model."
KEY_A = f"{PREFIX}x.lora_A.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_peft_directory(make_adapter("sql", seed=0), tmp_path / "sql")


def check_refused(directory: Path, words: str) -> None:
    with pytest.raises(AdapterError) as caught:
        read_peft(directory)
    message = str(caught.value)
    assert words in message
    assert message.isprintable()
    assert len(message) - len(str(directory)) < 800


# -- configurations --------------------------------------------------------------------------


def config(field: str, raw: str) -> bytes:
    """A configuration in which `field` is the JSON text `raw`."""
    return json.dumps(peft_config(changes={field: "@"})).replace('"@"', raw).encode()


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


CONFIGS: dict[str, tuple[bytes, str]] = {
    "nested too deeply to parse": (nested(100_000).encode(), "nested too deeply"),
    "field nested too deeply": (config("mystery", nested(100_000)), "nested too deeply"),
    "number nested deeply": (config("lora_alpha", nested(400)), "lora_alpha is [[["),
    "int beyond Python's limit": (config("r", "9" * 5000), "limit (4300 digits)"),
    "int within Python's limit": (config("r", "9" * 4000), "says 99999999999999999999…"),
    "negative int": (config("r", "-" + "9" * 4000), "r is -999"),
    "float that overflows": (config("lora_alpha", "1e400"), "1e400 is out of range"),
    "long float that overflows": (config("r", "1e" + "9" * 2000), "the number 1e999"),
    "alpha that overflows": (config("alpha_pattern", f'{{".*": {"9" * 4000}}}'), "alpha_pattern"),
    "not a number": (config("lora_alpha", "NaN"), "NaN is no JSON"),
    "lone surrogate": (config("revision", r'"\ud800"'), "surrogates not allowed"),
    "lone surrogate as key": (config("rank_pattern", r'{"\udfff": 1}'), "surrogates not allowed"),
    "surrogate twice": (config("rank_pattern", r'{"\ud800": 1, "\ud800": 2}'), "appears twice"),
    "long key twice": (f'{{"{"k" * 10**6}": 1, "{"k" * 10**6}": 2}}'.encode(), "the key 'kkk"),
    "UTF-16": (json.dumps(peft_config()).encode("utf-16"), "not valid UTF-8 JSON"),
    "NUL bytes": (bytes(1000), "not valid UTF-8 JSON"),
    "more after the end": (config("r", "4") + b"{}", "Extra data"),
    "larger than any": (b" " * 10_000_001 + config("r", "4"), "has more than 10000000 bytes"),
    "line break in a value": (config("peft_type", r'"LO\nRA"'), r"peft_type is 'LO\nRA'"),
    "line break in a field": (config(r"my\nstery", "1").replace(rb"\\n", rb"\n"), r"'my\nstery'"),
    "long value": (config("peft_type", f'"{"x" * 10**6}"'), "peft_type is 'xxx"),
    "long field": (config("x" * 10**6, "1"), "unknown field 'xxx"),
    "long initialisation": (config("init_lora_weights", f'"{"x" * 10**6}"'), "is 'xxx"),
    "expression with a bracket": (config("rank_pattern", '{"(": 1}'), "unterminated subpattern"),
    "expression that overflows": (
        config("rank_pattern", f'{{"a{{{"9" * 30}}}": 1}}'),
        "no regular expression (the repetition number is too large)",
    ),
    "expression nested too deeply": (
        config("alpha_pattern", f'{{"{"(" * 5000}{")" * 5000}": 1}}'),
        "no regular expression (maximum recursion depth",
    ),
    "expression that warns": (config("rank_pattern", '{"[[a]": 1}'), "Possible nested set"),
    "expression with a line break": (config("rank_pattern", r'{"(\n": 1}'), r"the key '(\n'"),
    "expression looking behind": (config("rank_pattern", '{"(?<=a+)b": 1}'), "look-behind"),
    "expression with flags": (config("rank_pattern", '{"(?i)a": 1}'), "global flags"),
    "long expression": (config("rank_pattern", f'{{"({"a" * 10**6}": 1}}'), "the key '(aaa"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations(case: str, directory: Path) -> None:
    content, words = CONFIGS[case]
    (directory / "adapter_config.json").write_bytes(content)
    check_refused(directory, words)


def test_expressions_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # Compiled again for a module, one could fail where no file can be named.
    settings = parse_config(peft_config(changes={"rank_pattern": {"q_.*": 2}}), "c.json")
    for function in ("compile", "match"):
        monkeypatch.setattr(re, function, lambda *_: pytest.fail("compiled again"))
    assert settings.rank_of("layers.0.q_proj") == 2


# -- headers ---------------------------------------------------------------------------------


def file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(
    dtype: str = "F32", shape: tuple[float, ...] = (1,), offsets: tuple[int, ...] = (0, 4)
) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def one(key: str) -> bytes:
    return file({key: entry()}, bytes(4))


HEADERS: dict[str, tuple[bytes, str]] = {
    "size of all ones": (b"\xff" * 8 + b"{}", "said to have 18446744073709551615 bytes"),
    "size above the limit": (struct.pack("<Q", 200_000_000) + b"{}", "said to have 200000000"),
    "no header": (bytes(8), "said to have 0 bytes"),
    "a list": (file(b"[]"), "expected a JSON object"),
    "nested too deeply to parse": (file(nested(100_000).encode()), "nested too deeply"),
    "nested deeply": (file(b'{"a":' * 400 + b"1" + b"}" * 400), "invalid JSON in header"),
    "entry is a number": (file({"a": 1}), "invalid JSON in header"),
    "entry is null": (file({"a": None}), "invalid JSON in header"),
    "no dtype": (file({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)), "missing field"),
    "unknown dtype": (file({"a": entry("X9")}, bytes(4)), "unknown variant"),
    "line break in the dtype": (file({"a": entry("F3\n2")}, bytes(4)), r"F3\n2"),
    "long dtype": (file({"a": entry("F" * 10**6)}, bytes(4)), "unknown variant"),
    "negative shape": (file({"a": entry(shape=(-1,))}, bytes(4)), "invalid value"),
    "fractional shape": (file({"a": entry(shape=(1.5,))}, bytes(4)), "invalid type"),
    "shape that overflows": (file({"a": entry(shape=(2**62, 2**62))}, bytes(4)), "overflow"),
    "shape beyond 64 bits": (file({"a": entry(shape=(2**64,))}, bytes(4)), "invalid"),
    "int beyond Python's limit": (
        file(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}"),
        "limit (4300 digits)",
    ),
    "shape torch cannot hold": (
        file({KEY_A: entry(shape=(0, 2**63), offsets=(0, 0))}),
        "no readable safetensors file: reshape()",
    ),
    "many dimensions": (
        file(
            {
                KEY_A: entry(shape=(1,) * 10**5),
                KEY_A.replace("_A", "_B"): entry(shape=(1,) * 10**5, offsets=(4, 8)),
            },
            bytes(8),
        ),
        "A is (1, 1, 1,",
    ),
    "negative offsets": (file({"a": entry(offsets=(-4, 0))}, bytes(4)), "invalid value"),
    "offsets in reverse": (file({"a": entry(offsets=(4, 0))}, bytes(4)), "invalid offset"),
    "offsets past the end": (file({"a": entry(shape=(9,), offsets=(0, 36))}), "incomplete"),
    "offsets with a gap": (file({"a": entry(offsets=(4, 8))}, bytes(8)), "invalid offset"),
    "offsets that overlap": (file({"a": entry(), "b": entry()}, bytes(4)), "invalid offset"),
    "data nobody names": (file({"a": entry()}, bytes(400)), "incomplete"),
    "metadata of numbers": (file({"__metadata__": {"a": 1}}), "invalid type"),
    "lone surrogate": (
        file(rb'{"\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "surrogates not allowed",
    ),
    "line break in a foreign name": (one("a\nb"), r'"a\nb" is none of PEFT'),
    "line break in an unknown name": (one(f"{PREFIX}x.a\nb"), r'x.a\nb" is not explained'),
    "line break in a refused name": (one(f"{PREFIX}a\nb.lora_E.x"), r'a\nb.lora_E.x" holds lora_E'),
    "line break in half a factor": (one(f"{PREFIX}a\nb.lora_A.x"), r'a\nb.lora_A.x" is no factor'),
    "line break in a path": (one(f"{PREFIX}a\nb.lora_A.weight"), "names no module"),
    "NUL in a name": (one(f"{PREFIX}a\0b"), r"a\x00b"),
    "long name": (one("a" * 10**6), "has a name of 1000000 characters, expected at most 2048"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_safetensors_headers(case: str, directory: Path) -> None:
    content, words = HEADERS[case]
    (directory / "adapter_model.safetensors").write_bytes(content)
    check_refused(directory, words)


def test_modules_to_save_in_a_message(directory: Path) -> None:
    content = config("modules_to_save", json.dumps(["a\nb", "x" * 10**6]))
    (directory / "adapter_config.json").write_bytes(content)
    (directory / "adapter_model.safetensors").write_bytes(one(f"{PREFIX}head"))
    check_refused(directory, r"modules_to_save (a\nb, xxx")


# -- paths -----------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [read_peft, read_adapter])
@pytest.mark.parametrize("path", ["a\0b", "a\ud800b", "x" * 300])
def test_paths_that_no_system_has(read: Callable[[str], Adapter], path: str) -> None:
    with pytest.raises(AdapterError, match=r"[;,] found (nothing there|something that cannot)"):
        read(path)


def test_file_names_in_a_message(tmp_path: Path) -> None:
    (tmp_path / "a\nb").touch()
    with pytest.raises(AdapterError) as caught:
        read_peft(tmp_path)
    assert r"found a directory with a\nb; " in str(caught.value)
