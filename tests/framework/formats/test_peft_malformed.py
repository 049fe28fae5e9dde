"""One test per way a PEFT directory can be broken: each is one error that says what and where."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapters import MODULES, make_adapter, peft_config, peft_tensors, write_peft_directory
from unmerge.errors import AdapterError, NonFiniteError, UnmergeError
from unmerge.formats import read_peft
from unmerge.formats.peft_config import parse_config

PATH = "layers.0.attn.q_proj"
KEY_A = f"base_model.model.{PATH}.lora_A.weight"
KEY_B = f"base_model.model.{PATH}.lora_B.weight"
HEAD = "base_model.model.head.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_peft_directory(make_adapter("sql", seed=0), tmp_path / "sql")


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = peft_tensors(read_peft(directory))
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")


def reconfigure(directory: Path, **changes: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def complaint(directory: Path, kind: type[UnmergeError] = AdapterError) -> str:
    with pytest.raises(kind) as caught:
        read_peft(directory)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- files -----------------------------------------------------------------------------------


def test_no_such_directory(tmp_path: Path) -> None:
    assert "found nothing there" in complaint(tmp_path / "sql")


def test_a_file_instead_of_a_directory(directory: Path) -> None:
    message = complaint(directory / "adapter_model.safetensors")
    assert "found a file; pass the directory" in message


def test_a_directory_without_an_adapter(tmp_path: Path) -> None:
    assert "found an empty directory" in complaint(tmp_path)
    for i in range(8):
        (tmp_path / f"file-{i}").touch()
    assert "a directory with file-0, file-1" in complaint(tmp_path)
    assert "and 2 more" in complaint(tmp_path)


def test_missing_configuration(directory: Path) -> None:
    (directory / "adapter_config.json").unlink()
    message = complaint(directory)
    assert "adapter_config.json is missing, found a directory with adapter_model" in message


def test_missing_weights(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()
    assert "the weights are missing; expected adapter_model.safetensors" in complaint(directory)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_safetensors(keep: int, directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = complaint(directory)
    assert message.startswith(str(file))
    assert "truncated or damaged, get it again" in message


def test_safetensors_that_is_something_else(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "truncated or damaged" in complaint(directory)
    header = b"[]      "
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    assert "expected a JSON object" in complaint(directory)


def test_safetensors_that_names_a_tensor_twice(directory: Path) -> None:
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f'{{"{HEAD}":{entry},"{HEAD}":{entry}}}'.encode()
    file = directory / "adapter_model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert f"the key '{HEAD}' appears twice" in complaint(directory)


def test_safetensors_with_a_dtype_torch_lacks(directory: Path) -> None:
    header = f'{{"{HEAD}":{{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}}}'.encode()
    header += b" " * (-len(header) % 8)
    file = directory / "adapter_model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(3))
    assert str(file) in complaint(directory)


# -- pickled weights -------------------------------------------------------------------------


class Malicious:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("owned",)


@pytest.fixture
def pickled(directory: Path) -> Path:
    (directory / "adapter_model.safetensors").unlink()
    return directory


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_runs_code(
    zipped: bool, pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = pickled / "adapter_model.bin"
    torch.save({KEY_A: Malicious()}, file, _use_new_zipfile_serialization=zipped)
    assert "no tensors that can be loaded safely" in complaint(pickled)
    file.write_bytes(pickle.dumps(Malicious()))
    assert "no tensors that can be loaded safely" in complaint(pickled)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"PK\x03\x04 and more", b"no pickle"])
def test_pickle_that_is_something_else(content: bytes, pickled: Path) -> None:
    (pickled / "adapter_model.bin").write_bytes(content)
    assert "no tensors that can be loaded safely" in complaint(pickled)


def test_truncated_pickle(pickled: Path) -> None:
    file = pickled / "adapter_model.bin"
    torch.save({KEY_A: torch.ones(4, 12)}, file)
    file.write_bytes(file.read_bytes()[:-200])
    assert "no tensors that can be loaded safely" in complaint(pickled)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([torch.ones(1)], "holds a list"),
        ({KEY_A: 1.5}, "is a float"),
        ({KEY_A: {"weight": torch.ones(1)}}, "is a dict"),
        ({1: torch.ones(1)}, "entry 1 is a Tensor"),
        ({KEY_A: torch.ones(4, 12).to_sparse()}, "sparse, quantised or empty-shell"),
    ],
)
def test_pickle_that_holds_more_than_tensors(document: Any, words: str, pickled: Path) -> None:
    torch.save(document, pickled / "adapter_model.bin")
    assert words in complaint(pickled)


def test_pickle_from_before_zip_archives(pickled: Path) -> None:
    adapter = make_adapter("sql", seed=0)
    torch.save(
        peft_tensors(adapter), pickled / "adapter_model.bin", _use_new_zipfile_serialization=False
    )
    assert read_peft(pickled).digest() == adapter.digest()


def test_pickled_parameters_become_plain_tensors(pickled: Path) -> None:
    adapter = make_adapter("sql", seed=0)
    parameters = {key: torch.nn.Parameter(t) for key, t in peft_tensors(adapter).items()}
    torch.save(parameters, pickled / "adapter_model.bin")
    got = read_peft(pickled)
    assert got.digest() == adapter.digest()
    assert not got.modules[PATH].A.requires_grad


# -- configuration ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b"[]",
        b'{"r": NaN}',
        b'{"r": 1e999}',
        b"[" * 100_000,
        b'{"r": ' + b"9" * 5000 + b"}",
        b'{"r": 4, "r": 8}',
        b'{"rank_pattern": {"a": 1, "a": 2}}',
    ],
)
def test_configuration_that_is_no_json_object(content: bytes, directory: Path) -> None:
    (directory / "adapter_config.json").write_bytes(content)
    message = complaint(directory)
    assert message.startswith(str(directory / "adapter_config.json"))
    assert "the file is damaged, get it again" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": None}, "peft_type is missing"),
        ({"peft_type": 3}, "peft_type is 3; expected text"),
        ({"r": None}, "r is missing"),
        ({"lora_alpha": None}, "lora_alpha is missing"),
        ({"r": 0}, "r is 0; expected a whole number above 0"),
        ({"r": -4}, "r is -4"),
        ({"r": 4.0}, "r is 4.0"),
        ({"r": True}, "r is True"),
        ({"r": "4"}, "r is '4'"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; expected a finite number"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"use_rslora": 1}, "use_rslora is 1; expected true or false"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] is 0"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is ['q_proj']; expected an object"),
        (
            {"rank_pattern": {"q(": 2}},
            "rank_pattern has the key 'q(', which is no regular expression",
        ),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern['q_proj'] is None"),
        ({"alpha_pattern": {"[": 2}}, "alpha_pattern has the key '['"),
        ({"bias": "some"}, "bias is 'some'; expected none, all or lora_only"),
        ({"bias": False}, "bias is False; expected text"),
        ({"init_lora_weights": 3}, "init_lora_weights is 3"),
        ({"modules_to_save": "head"}, "modules_to_save is 'head'"),
        ({"modules_to_save": [""]}, "modules_to_save is ['']"),
        ({"modules_to_save": [3]}, "modules_to_save is [3]"),
        ({"task_type": 1}, "task_type is 1"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path is ['x']"),
        ({"revision": 1}, "revision is 1"),
    ],
)
def test_configuration_with_a_wrong_value(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(AdapterError) as caught:
        parse_config(peft_config(changes=changes), "c.json")
    assert type(caught.value) is AdapterError
    assert f"c.json: {words}" in str(caught.value)


def test_old_configurations_without_newer_fields() -> None:
    settings = parse_config({"peft_type": "LORA", "r": 4, "lora_alpha": 8}, "c.json")
    assert settings.scaling_of("any.path") == 2
    assert settings.bias == "none"
    assert settings.base_model is None


# -- tensors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "there"), [(KEY_A, "B"), (KEY_B, "A")])
def test_missing_partner(key: str, there: str, directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors.pop(key))
    message = complaint(directory)
    assert message.startswith(f"{PATH}: factor {there} is there")


def test_no_module_at_all(directory: Path) -> None:
    reconfigure(directory, modules_to_save=["head"])
    save_file({HEAD: torch.ones(3, 12)}, directory / "adapter_model.safetensors")
    assert "holds no LoRA module" in complaint(directory)
    save_file({}, directory / "adapter_model.safetensors")
    assert "holds no LoRA module" in complaint(directory)


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        (KEY_A, (5, 12), "A is (5, 12), B is (12, 4); expected (rank, d_in) and (d_out, rank)"),
        (KEY_B, (4, 12), "A is (4, 12), B is (4, 12)"),
        (KEY_A, (48,), 'factor A of adapter "sql" has shape (48)'),
        (KEY_B, (0, 4), 'factor B of adapter "sql" has shape (0, 4)'),
    ],
)
def test_wrong_shape(key: str, shape: tuple[int, ...], words: str, directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors.update({key: torch.ones(shape)}))
    message = complaint(directory)
    assert message.startswith(PATH)
    assert words in message


def test_rank_that_the_configuration_contradicts(directory: Path) -> None:
    reconfigure(directory, rank_pattern={"attn.q_proj": 3})
    message = complaint(directory)
    assert message.startswith(f'{PATH}: factors of adapter "sql" have rank 4')
    assert "says 3" in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_factor_dtype(dtype: torch.dtype, directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors.update({KEY_B: torch.ones(12, 4).to(dtype)}))
    message = complaint(directory)
    assert f'{PATH}: factor B of adapter "sql" is {str(dtype).removeprefix("torch.")}' in message
    assert "expected one of float32, float16, bfloat16" in message


def test_factors_of_two_dtypes(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors.update({KEY_B: torch.ones(12, 4).half()}))
    assert f'{PATH}: factor A of adapter "sql" is float32, factor B is' in complaint(directory)


def test_modules_of_two_dtypes_are_fine(directory: Path) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: tensors[key].half() for key in (KEY_A, KEY_B)})

    rewrite(directory, halve)
    modules = read_peft(directory).modules
    assert modules[PATH].A.dtype == torch.float16
    assert modules["layers.1.attn.q_proj"].A.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factor_that_is_not_finite(value: float, dtype: torch.dtype, directory: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for key in (KEY_A, KEY_B):
            tensors[key] = tensors[key].to(dtype)
        tensors[KEY_B][7, 2] = value

    rewrite(directory, spoil)
    message = complaint(directory, NonFiniteError)
    assert message.startswith(f'{PATH}: factor B of adapter "sql" holds 1 entries')
    assert "[7, 2]" in message


def test_verbatim_tensor_that_is_not_finite(directory: Path) -> None:
    reconfigure(directory, modules_to_save=["head"])
    head = torch.ones(3, 12)
    head[0, 1] = float("nan")
    rewrite(directory, lambda tensors: tensors.update({HEAD: head}))
    assert complaint(directory, NonFiniteError).startswith(f'{HEAD}: tensor of adapter "sql"')


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint16, torch.bool])
def test_verbatim_tensor_of_any_usual_dtype(dtype: torch.dtype, directory: Path) -> None:
    reconfigure(directory, modules_to_save=["head"])
    head = torch.ones(3, 12).to(dtype)
    rewrite(
        directory, lambda tensors: tensors.update({HEAD: head, f"{HEAD}.0": head[0, 0].clone()})
    )
    verbatim = read_peft(directory).verbatim
    assert list(verbatim) == [HEAD, f"{HEAD}.0"]
    assert verbatim[HEAD].dtype == dtype
    assert torch.equal(verbatim[HEAD], head)


def test_verbatim_tensor_of_an_unusual_dtype(directory: Path) -> None:
    reconfigure(directory, modules_to_save=["head"])
    head = torch.ones(3, 12).to(torch.float8_e4m3fn)
    rewrite(directory, lambda tensors: tensors.update({HEAD: head}))
    assert f"{HEAD} is float8_e4m3fn" in complaint(directory)


@pytest.mark.parametrize("path", ["", "a..b", "a/b", "a\tb"])
def test_module_path_that_cannot_be_stored(path: str, directory: Path) -> None:
    dot = "." if path else ""
    tensors = {
        f"base_model.model.{path}{dot}lora_A.weight": torch.ones(4, 3),
        f"base_model.model.{path}{dot}lora_B.weight": torch.ones(3, 4),
    }
    save_file(tensors, directory / "adapter_model.safetensors")
    assert "names no module that can be stored" in complaint(directory)


def test_verbatim_key_that_cannot_be_stored(directory: Path) -> None:
    reconfigure(directory, modules_to_save=["head"])
    key = "base_model.model.head.we\night"
    rewrite(directory, lambda tensors: tensors.update({key: torch.ones(1)}))
    assert "rename the module" in complaint(directory)


# -- names -----------------------------------------------------------------------------------


def test_the_name_is_the_directory_s_unless_given(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_peft(directory).name == "sql"
    assert read_peft(f"{directory}/").name == "sql"
    assert read_peft(directory, name="other").name == "other"
    monkeypatch.chdir(directory)
    assert read_peft(".").name == "sql"
    link = directory.parent / "linked"
    link.symlink_to(directory)
    assert read_peft(link).name == "linked"


def test_a_name_that_is_not_allowed(directory: Path) -> None:
    with pytest.raises(AdapterError, match=r"adapter name 'a/b' is not allowed"):
        read_peft(directory, name="a/b")
    bad = directory.rename(directory.parent / ".hidden")
    with pytest.raises(AdapterError, match=r"adapter name '\.hidden' is not allowed"):
        read_peft(bad)
    assert read_peft(bad, name="shown").name == "shown"


# -- what is legal ---------------------------------------------------------------------------


def test_modules_come_sorted_and_bit_for_bit(directory: Path) -> None:
    adapter = read_peft(directory)
    assert list(adapter.modules) == sorted(MODULES)
    assert adapter.digest() == make_adapter("sql", seed=0).digest()


def test_rank_above_both_dimensions_is_legal(tmp_path: Path) -> None:
    adapter = make_adapter("wide", seed=0, rank=64)
    assert read_peft(write_peft_directory(adapter, tmp_path / "wide")).modules[PATH].rank == 64


def test_a_zero_alpha_is_legal(directory: Path) -> None:
    reconfigure(directory, lora_alpha=0)
    assert read_peft(directory).modules[PATH].scaling == 0
