"""Reading JSON and tensor files that others wrote, strictly: an error for whatever is not clear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from unmerge.errors import AdapterError
from unmerge.formats.base import excerpt
from unmerge_bundle.errors import BundleError
from unmerge_bundle.jsontext import parse_object

__all__ = [
    "Header",
    "load_pickled",
    "load_safetensors",
    "parse_json_object",
    "read_bytes",
    "read_header",
]

# Real ones have a few thousand; nobody's adapter should be able to fill the memory.
_MAX_SMALL_BYTES = 10_000_000
# safetensors' own limit; read before the header is believed.
_MAX_HEADER_BYTES = 100_000_000
_ZIP_MAGIC = b"PK\x03\x04"


def read_bytes(path: Path) -> bytes:
    """Return the content of a small file.

    Raises:
        AdapterError: The file cannot be read, or is not small.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_SMALL_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(data) > _MAX_SMALL_BYTES:
        raise AdapterError(
            f"{path}: has more than {_MAX_SMALL_BYTES} bytes, expected a few thousand; "
            "the file is damaged, get it again"
        )
    return data


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse one JSON object, refusing what parsers usually let through.

    Args:
        data: The bytes, which must be UTF-8.
        where: The file, for messages.

    Raises:
        AdapterError: Not UTF-8, not JSON, not an object, a key given twice, or a number that is
            NaN or infinite.
    """
    try:
        return parse_object(data, where=where, error=BundleError, floats=True)
    except BundleError as error:
        message = excerpt(str(error), len(where) + 300)
        raise AdapterError(f"{message}; the file is damaged, get it again") from error


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says of itself.

    Attributes:
        tensors: What the header has for each tensor (`dtype`, `shape`, `data_offsets`), unchecked.
        metadata: Its free text by key.
        size: Bytes before the first tensor's data; offsets count from there.
    """

    tensors: Mapping[str, Any]
    metadata: Mapping[str, Any]
    size: int


def read_header(path: Path) -> Header:
    """Return the header of a safetensors file; names only are looked at, no tensor.

    Raises:
        AdapterError: It cannot be read, is cut off, is no JSON, or names one tensor twice, which
            the safetensors library accepts.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(min(size, _MAX_HEADER_BYTES))
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(header) < max(size, 1):
        raise AdapterError(
            f"{path}: no readable safetensors file: its header is said to have {size} bytes, "
            f"{len(header)} are there; it is truncated or damaged, get it again"
        )
    tensors = parse_json_object(header, f"{path} (header)")
    metadata = tensors.pop("__metadata__", {})
    return Header(tensors, metadata if isinstance(metadata, dict) else {}, 8 + size)


def load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file, by name, mapped from the file without a copy.

    The file must stay as it is while the tensors are in use.

    Raises:
        AdapterError: The file is truncated or malformed, names a tensor twice, or holds a dtype
            that torch does not have.
    """
    read_header(path)
    tensors = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors handle cannot be iterated)
                tensors[key] = file.get_tensor(key)
    except OSError as error:
        raise _unreadable(path, error) from error
    except Exception as error:
        # safetensors has an error class of its own for files; conversions to torch raise others.
        raise AdapterError(
            f"{path}: no readable safetensors file: {excerpt(str(error), 300)}; it is truncated "
            "or damaged, get it again"
        ) from error
    return tensors


def load_pickled(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a `torch.save` file, by name, through torch's restricted unpickler.

    Only tensors and plain containers can be in such a file; code in it is never run.

    Raises:
        AdapterError: The file is truncated, holds anything but named dense tensors, or asks for
            code to be run.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        document = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        # The unpickler meets arbitrary bytes, so it can raise almost anything. Its text is not
        # repeated: it recommends loading without the restriction.
        raise AdapterError(
            f"{path}: no tensors that can be loaded safely ({type(error).__name__}); the file is "
            "truncated, or holds more than tensors, which may be code that runs on loading; get "
            "it again, as safetensors if there is a choice"
        ) from error
    if not isinstance(document, dict):
        raise AdapterError(
            f"{path}: holds a {type(document).__name__}; expected a dictionary from names to "
            "tensors; save the adapter again with PEFT"
        )
    tensors = {}
    for key, value in document.items():
        where = f"{path}: entry {excerpt(repr(key))}"
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise AdapterError(
                f"{where} is a {type(value).__name__}; expected named tensors only; "
                "save the adapter again with PEFT"
            )
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise AdapterError(
                f"{where} is a sparse, quantised or empty-shell tensor; expected a dense one; "
                "save the adapter again with dense tensors"
            )
        tensors[key] = value.detach()
    return tensors


def _unreadable(path: Path, error: OSError) -> AdapterError:
    return AdapterError(
        f"{path}: cannot be read: {error.strerror or error}; check that it is there and readable"
    )
