"""Reads and writes LoRA adapters as PEFT does: exactly the delta PEFT applies, or an error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from unmerge.adapter import Adapter
from unmerge.errors import AdapterError
from unmerge.formats.base import AdapterFormat, describe
from unmerge.formats.checks import adapter_name, own_name
from unmerge.formats.files import load_pickled, load_safetensors, parse_json_object, read_bytes
from unmerge.formats.peft_config import parse_config
from unmerge.formats.peft_factors import read_factors, read_verbatim
from unmerge.formats.peft_keys import CONFIG_FILE, sort_tensors
from unmerge.formats.peft_write import SAFETENSORS_FILE, write_directory

__all__ = ["PeftFormat", "read_peft"]

PICKLE_FILE = "adapter_model.bin"
_MLX_FILES = ("adapters.safetensors", "adapters.npz")


class PeftFormat(AdapterFormat):
    """The directories that PEFT's `save_pretrained` writes; see `read_peft`."""

    format: ClassVar[str] = "peft"
    looks_for: ClassVar[str] = f"a directory with {CONFIG_FILE} and {SAFETENSORS_FILE}"

    def recognises(self, path: Path) -> bool:
        """Return whether `path` is a directory with PEFT weights, or else a configuration.

        MLX calls its configuration alike, so one beside MLX weights alone is not PEFT's.
        """
        try:
            if any((path / file).is_file() for file in (SAFETENSORS_FILE, PICKLE_FILE)):
                return True
            foreign = any((path / file).is_file() for file in _MLX_FILES)
            return (path / CONFIG_FILE).is_file() and not foreign
        except OSError:
            return False

    def read(self, path: Path, name: str | None) -> Adapter:
        """Return `read_peft(path, name=name)`, with its errors."""
        return read_peft(path, name=name)

    def write(self, adapter: Adapter, directory: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` into an empty directory.

        An adapter that came from PEFT gets its configuration back byte for byte, and every tensor
        under its key with its shape, dtype and bits. One of another format gets a configuration
        under which PEFT uses its ranks and scalings: `lora_alpha = scaling · rank`, with patterns
        where modules differ. Factors keep their bits, so no scaling is folded into them. Its
        verbatim tensors are weights of whole modules and become `modules_to_save`; biases of
        adapted modules become `bias="lora_only"`.

        Raises:
            AdapterError: The adapter contradicts its own configuration.
            UnsupportedAdapterError: PEFT has no exact way to say a scaling, a module path or a
                verbatim tensor of another format; `feature` names it.
            OSError: The disk refuses.
        """
        write_directory(adapter, directory, native=adapter.format == self.format)


def read_peft(directory: str | os.PathLike[str], *, name: str | None = None) -> Adapter:
    """Read a LoRA adapter from the directory that PEFT saved it to.

    Per module, `A` is `(rank, d_in)`, `B` is `(d_out, rank)` and the delta PEFT applies is
    `scaling · B @ A` of shape `(d_out, d_in)`. That also holds with `fan_in_fan_out` (GPT-2's
    `Conv1D`): there the *base weight* is stored as `(d_in, d_out)`, and PEFT transposes the
    finished product when it adds it; A still maps inputs and B outputs, so nothing is transposed
    here. An embedding's delta is added transposed, a convolution's is its weight as a row-major
    matrix; `Factors.kind` says so. Ranks and alphas follow PEFT's pattern rule, per module.

    Weights are read from `adapter_model.safetensors`, mapped into memory, or, only where there
    is none, from `adapter_model.bin` through torch's restricted unpickler.

    Args:
        directory: The directory with `adapter_config.json` and the weights.
        name: The adapter's name; by default that of the directory.

    Returns:
        The adapter, factors in their stored dtype (float32, float16 or bfloat16; A and B of one
        module in the same one, because PEFT saves no other and the delta's dtype would be
        anyone's guess). Weights of modules_to_save, biases, whole embeddings and
        trained rows of embeddings are in `Adapter.verbatim`.

    Raises:
        AdapterError: Files are missing or malformed, a factor has no partner, the wrong shape,
            rank or dtype, or the name is not allowed.
        UnsupportedAdapterError: A feature that `docs/adapters.md` lists as refused, or a tensor
            that the configuration does not explain; its attribute `feature` names it.
        NonFiniteError: A tensor holds NaN or an infinity.
    """
    place = Path(directory)
    _check_place(place)
    name = adapter_name(own_name(place) if name is None else name, place)
    where = str(place / CONFIG_FILE)
    data = read_bytes(place / CONFIG_FILE)
    settings = parse_config(parse_json_object(data, where), where)
    weights = place / SAFETENSORS_FILE
    if weights.is_file():
        tensors = load_safetensors(weights)
    else:
        weights = place / PICKLE_FILE
        tensors = load_pickled(weights)
    found, others = sort_tensors(tensors, settings, weights)
    return Adapter(
        name=name,
        modules=read_factors(found, settings, name, weights),
        verbatim=read_verbatim(others, name, weights),
        config=data.decode("utf-8"),
        format=PeftFormat.format,
        base_model=settings.base_model,
        revision=settings.revision,
        source=os.fspath(directory),
    )


def _check_place(place: Path) -> None:
    if not PeftFormat().recognises(place):
        raise AdapterError(
            f"{place}: no PEFT adapter; looked for {PeftFormat.looks_for}; "
            f"found {describe(place)}; pass the directory that the adapter was saved to"
        )
    if not (place / CONFIG_FILE).is_file():
        raise AdapterError(
            f"{place}: {CONFIG_FILE} is missing, found {describe(place)}; without it rank and "
            "scaling are unknown; get it from where the weights came from"
        )
    if not any((place / file).is_file() for file in (SAFETENSORS_FILE, PICKLE_FILE)):
        raise AdapterError(
            f"{place}: the weights are missing; expected {SAFETENSORS_FILE} (or {PICKLE_FILE}), "
            f"found {describe(place)}; get them from where the configuration came from"
        )
