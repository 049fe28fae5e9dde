"""Sharded weights are read as one model, and nothing that is not clear is read at all."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import gaussian, save_model
from unmerge.errors import AdapterError
from unmerge.formats.shards import Shards

TENSORS = {f"layers.{n}.weight": gaussian(4, 3, seed=n) for n in range(5)}
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", TENSORS, shards=2)


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_tensors(tmp_path: Path, shards: int, stem: str) -> None:
    opened = Shards(save_model(tmp_path / "model", TENSORS, shards=shards, stem=stem))
    assert opened.names == tuple(sorted(TENSORS))
    for name, tensor in TENSORS.items():
        assert opened.shape(name) == (4, 3)
        assert torch.equal(opened.tensor(name), tensor)
    assert "layers.0.weight" in opened
    assert "layers.9.weight" not in opened


def test_the_digest_is_of_what_is_in_them(tmp_path: Path) -> None:
    def digest(name: str, tensors: dict[str, torch.Tensor], shards: int = 1) -> str:
        return Shards(save_model(tmp_path / name, tensors, shards=shards)).digest()

    whole = digest("whole", TENSORS)
    assert whole == digest("sharded", TENSORS, shards=3)
    others = {
        "renamed": {name.replace("0", "7"): tensor for name, tensor in TENSORS.items()},
        "cast": {name: tensor.bfloat16() for name, tensor in TENSORS.items()},
        "turned": {name: tensor.T for name, tensor in TENSORS.items()},
        "reshaped": {name: tensor.reshape(3, 4) for name, tensor in TENSORS.items()},
        "negative": TENSORS | {"layers.0.weight": -TENSORS["layers.0.weight"]},
        "viewed": {name: tensor.view(torch.int32) for name, tensor in TENSORS.items()},
    }
    assert len({whole, *(digest(name, tensors) for name, tensors in others.items())}) == 7
    empty = {"none": torch.zeros(0, 3), "one": torch.tensor(1.0)}
    assert digest("empty", empty).startswith("sha256:")


def edit(place: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((place / INDEX).read_text())
    change(index)
    (place / INDEX).write_text(json.dumps(index))


def point(name: str, file: object) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["weight_map"].__setitem__(name, file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index.pop("weight_map"), "weight_map is missing"),
        (lambda index: index["weight_map"].clear(), "weight_map is missing or empty"),
        (lambda index: index.update(weight_map=[1]), "weight_map is missing"),
        (point("a", "../model.safetensors"), r"said to be in '\.\./model"),
        (point("a", "/etc/x.safetensors"), "said to be in '/etc/x"),
        (point("a", "sub/x.safetensors"), "said to be in 'sub/x"),
        (point("a", "model.bin"), r"said to be in 'model\.bin'"),
        (point("a\nb", 3), r'tensor "a\\nb" is said to be in 3'),
        (point("a", FIRST), f'tensor "a" is not in {FIRST}'),
        (point("layers.0.weight", SECOND), r'"layers\.0\.weight" is not named by the index, but'),
        (lambda index: index["weight_map"].pop("layers.3.weight"), f"but is in {SECOND}"),
        (point("a", "model-3.safetensors"), r"model-3\.safetensors: cannot be read"),
    ],
)
def test_an_index_that_does_not_fit(
    place: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    edit(place, change)
    with pytest.raises(AdapterError, match=words) as caught:
        Shards(place)
    assert str(caught.value).isprintable()


def test_an_index_that_names_a_tensor_twice(place: Path) -> None:
    text = (place / INDEX).read_text()
    spoilt = text.replace('"layers.1.weight"', '"layers.0.weight"')
    (place / INDEX).write_text(spoilt)
    with pytest.raises(AdapterError, match=r"'layers\.0\.weight' appears twice"):
        Shards(place)


def test_an_index_that_is_none(place: Path) -> None:
    (place / INDEX).write_text("[")
    with pytest.raises(AdapterError, match=r"index\.json.*not valid UTF-8 JSON"):
        Shards(place)


def test_one_model_twice(place: Path) -> None:
    save_file(TENSORS, place / "model.safetensors")
    with pytest.raises(AdapterError, match=r"found model\.safetensors and model\.safetensors\.ind"):
        Shards(place)


def test_no_model(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(AdapterError, match=r"found a directory with pytorch_model\.bin; .*\.bin w"):
        Shards(tmp_path)


@pytest.mark.parametrize("cut", [4, 60, -8])
def test_a_truncated_shard(place: Path, cut: int) -> None:
    data = (place / SECOND).read_bytes()
    (place / SECOND).write_bytes(data[:cut])
    with pytest.raises(AdapterError, match=f"{SECOND}: no readable safetensors file"):
        Shards(place)


def test_a_dtype_that_torch_has_not(tmp_path: Path) -> None:
    entry = {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}
    header = json.dumps({"x.weight": entry}).encode()
    data = struct.pack("<Q", len(header)) + header + bytes(3)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(AdapterError, match=r'tensor "x\.weight" cannot be read: .*float16'):
        Shards(tmp_path).tensor("x.weight")
