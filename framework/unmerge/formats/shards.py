"""Reads the weights of a whole model, in one safetensors file or many, one tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from unmerge.arrays import dtype_name
from unmerge.errors import AdapterError
from unmerge.formats.base import describe, entries, excerpt
from unmerge.formats.files import parse_json_object, read_bytes, read_header

__all__ = ["WEIGHTS", "Shards", "weights_files"]

WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
"""What transformers and diffusers call a model's weights; in shards, `….index.json` beside them."""

_INDEX_SUFFIX = ".index.json"


def weights_files(directory: Path) -> list[Path]:
    """Return the files of `WEIGHTS`, and indexes of such, that are in the directory."""
    names = {entry.name for entry in entries(directory)}
    wanted = [name + suffix for name in WEIGHTS for suffix in ("", _INDEX_SUFFIX)]
    return [directory / name for name in wanted if name in names]


class Shards:
    """The tensors of one model, mapped from its files when they are asked for.

    Opening reads headers only. The files must stay as they are while tensors are in use.

    Args:
        directory: Holds `model.safetensors`, or the shards that `model.safetensors.index.json`
            names; `diffusion_pytorch_model` likewise.

    Raises:
        AdapterError: There are no such files, or two kinds of them; a shard is missing, damaged or
            elsewhere; index and shards do not name the same tensors.
    """

    def __init__(self, directory: Path) -> None:
        found = weights_files(directory)
        if len(found) != 1:
            raise AdapterError(
                f"{directory}: expected one of {', '.join(WEIGHTS)} or its index, found "
                f"{' and '.join(path.name for path in found) or describe(directory)}; "
                + (
                    "they may hold different weights: remove those that are not meant"
                    if found
                    else "pass a model's directory; save older .bin weights as safetensors first"
                )
            )
        self.directory = directory
        first = found[0]
        if first.name.endswith(_INDEX_SUFFIX):
            self._file_of = _read_index(first)
            _check_shards(first, self._file_of)
        else:
            self._file_of = dict.fromkeys(read_header(first).tensors, first.name)
        files = sorted(set(self._file_of.values()))
        self._files = {file: _open(directory / file) for file in files}
        self.names: tuple[str, ...] = tuple(sorted(self._file_of))

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from the header."""
        return tuple(self._files[self._file_of[name]].get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor, mapped from its file without a copy.

        Raises:
            AdapterError: Its dtype is one that torch does not have.
        """
        try:
            tensor: torch.Tensor = self._files[self._file_of[name]].get_tensor(name)
        except Exception as error:
            # safetensors raises its own class, torch several.
            raise AdapterError(
                f"{self.where(name)} cannot be read: {excerpt(str(error), 300)}; save the model "
                "again in float32, float16 or bfloat16"
            ) from error
        return tensor

    def where(self, name: str) -> str:
        """Return file and tensor, as messages begin."""
        return f'{self.directory / self._file_of[name]}: tensor "{excerpt(name)}"'

    def digest(self) -> str:
        """Return `sha256:…` over names, dtypes, shapes and bytes, however they are sharded."""
        total = hashlib.sha256()
        for name in self.names:
            tensor = self.tensor(name)
            shape = "x".join(str(size) for size in tensor.shape)
            total.update(f"{name} {dtype_name(tensor.dtype)} {shape}\n".encode())
            total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return f"sha256:{total.hexdigest()}"


def _read_index(path: Path) -> dict[str, str]:
    """Return the file of every tensor, by name, as the index has it."""
    weight_map = parse_json_object(read_bytes(path), str(path)).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise AdapterError(
            f"{path}: weight_map is missing or empty; expected an object from tensor names to "
            "files; the file is damaged, get it again"
        )
    for name, file in weight_map.items():
        # The index decides which files are opened: none outside its directory.
        plain = isinstance(file, str) and Path(file).name == file
        if not plain or not file.endswith(".safetensors"):
            raise AdapterError(
                f'{path}: tensor "{excerpt(name)}" is said to be in {excerpt(repr(file))}; '
                "expected the name of a .safetensors file beside the index; get the index again"
            )
    return dict(weight_map)


def _check_shards(index: Path, file_of: Mapping[str, str]) -> None:
    for file in sorted(set(file_of.values())):
        there = read_header(index.parent / file).tensors.keys()
        said = {name for name, where in file_of.items() if where == file}
        for name in sorted(there ^ said):
            problem = "is not in" if name in said else "is not named by the index, but is in"
            raise AdapterError(
                f'{index}: tensor "{excerpt(name)}" {problem} {file}; index and shards are of '
                "different models; get all of them again from one place"
            )


def _open(path: Path) -> Any:
    """Return safetensors' handle, which checks the header and maps the file."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except Exception as error:
        # safetensors has an error class of its own for files.
        raise AdapterError(
            f"{path}: no readable safetensors file: {excerpt(str(error), 300)}; it is truncated "
            "or damaged, get it again"
        ) from error
