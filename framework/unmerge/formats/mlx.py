"""Reads and writes LoRA adapters as MLX (mlx-lm) saves them: transposed factors and one scale.

What mlx-lm computes is read off its sources (ml-explore/mlx-lm, `tuner/lora.py`,
`tuner/utils.py`, and their history in ml-explore/mlx-examples): a linear layer gains
`scale · (lora_a @ lora_b)ᵀ`, an embedding `scale · lora_a @ lora_b`, with `lora_a` of shape
`(d_in, rank)` and `lora_b` of shape `(rank, d_out)`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field

from unmerge.adapter import Adapter, Factors
from unmerge.errors import AdapterError, UnsupportedAdapterError
from unmerge.formats.base import AdapterFormat, describe, excerpt
from unmerge.formats.checks import (
    adapter_name,
    build_factors,
    check_partners,
    module_path,
    own_name,
    save_tensors,
    shape_text,
)
from unmerge.formats.files import (
    load_safetensors,
    parse_json_object,
    read_bytes,
    read_header,
)
from unmerge.formats.mlx_config import MlxSettings, parse_config
from unmerge.formats.single_file import check_scaling, is_file
from unmerge_bundle.jsontext import canonical_bytes
from unmerge_bundle.kinds import LINEAR

__all__ = ["EMBEDDINGS", "MlxFormat"]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapters.safetensors"
# What mlx-lm wrote until April 2024, without any configuration.
_OLD_WEIGHTS_FILE = "adapters.npz"
# A directory with these is PEFT's; both tools call their configuration alike.
_PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")

EMBEDDINGS = frozenset(
    {
        "embed_in",
        "embed_tokens",
        "embed_tokens_per_layer",
        "embedders",
        "embedding",
        "embeddings",
        "tok_embeddings",
        "token_embeddings",
        "word_embeddings",
        "wpe",
        "wte",
    }
)
"""Names that mlx-lm's models give to embeddings, whose factors its files do not tell from those of
linear layers. The last part of the path that is no number counts."""

_A, _B = ".lora_a", ".lora_b"
_PART_OF_FUSED = re.compile(r".*\.lora_[ab]\.[0-9]+")


class MlxFormat(AdapterFormat):
    """The directories that mlx-lm's training writes, and their single checkpoints.

    Attributes:
        scale: The scale the adapter was trained with, where its configuration is missing or can
            be read in two ways.
    """

    format: ClassVar[str] = "mlx"
    looks_for: ClassVar[str] = f"a directory with {CONFIG_FILE} and {WEIGHTS_FILE}"

    scale: float | None = Field(
        None,
        allow_inf_nan=False,
        description="the scale the adapter was trained with, if its configuration does not say",
    )

    def recognises(self, path: Path) -> bool:
        """Return whether `path` is a directory with MLX weights, or a file with MLX factors."""
        try:
            if path.is_dir():
                ours = any((path / file).is_file() for file in (WEIGHTS_FILE, _OLD_WEIGHTS_FILE))
                return ours and not any((path / file).is_file() for file in _PEFT_FILES)
            if path.suffix != ".safetensors" or not path.is_file():
                return False
            return path.name == WEIGHTS_FILE or any(
                key.endswith((_A, _B)) for key in read_header(path).tensors
            )
        except (OSError, ValueError):  # AdapterError is a ValueError, as is a path with a NUL
            return False

    def read(self, path: Path, name: str | None) -> Adapter:
        """Return the adapter at `path`, its factors transposed views of the file.

        Args:
            path: The directory, or a file of factors in it (a checkpoint of the training).
            name: The adapter's name; by default that of the directory, or of the checkpoint.

        Raises:
            AdapterError: Files are missing or malformed, the scale is unknown or can be read in
                two ways, or factors do not fit to each other or to the rank.
            UnsupportedAdapterError: DoRA, full fine-tuning, layers of experts, fused projections,
                a parameter that is not known, or a tensor that is no factor.
            NonFiniteError: A factor holds NaN or an infinity.
        """
        whole = not is_file(path)
        directory, weights = (path, path / WEIGHTS_FILE) if whole else (path.parent, path)
        derived = directory if weights.name == WEIGHTS_FILE else weights.with_suffix("")
        chosen = adapter_name(own_name(derived) if name is None else name, path)
        if not is_file(weights):
            raise _no_weights(path, directory)
        config_file = directory / CONFIG_FILE
        data = read_bytes(config_file) if is_file(config_file) else None
        settings = self._settings(data, config_file)
        tensors = load_safetensors(weights)
        return Adapter(
            name=chosen,
            modules=_modules(tensors, settings, weights, chosen),
            config=canonical_bytes(
                {
                    "adapter_config": None if data is None else data.decode("utf-8"),
                    "metadata": dict(read_header(weights).metadata),
                    "scale": self.scale,
                }
            ).decode(),
            format=self.format,
            base_model=settings.base_model,
            revision=settings.revision,
            source=str(path),
        )

    def write(self, adapter: Adapter, directory: Path) -> None:
        """Write the adapter as `adapters.safetensors` and `adapter_config.json`.

        An adapter that was read as MLX gets its tensors and its configuration back; a checkpoint
        becomes `adapters.safetensors`. Another one is converted by transposing its factors. Its
        modules become `keys`, under their full paths, so that mlx-lm adapts them and no others.

        Raises:
            AdapterError: The configuration is not that of the adapter.
            UnsupportedAdapterError: MLX cannot hold what the adapter has: modules of several
                ranks or scalings, convolutions, verbatim tensors, flattened module names, or an
                embedding or linear layer that its name would make the other.
            OSError: The disk refuses.
        """
        metadata: Mapping[str, str]
        if adapter.format == self.format:
            text, metadata, scale = _kept(adapter)
            for path in adapter.modules:
                check_scaling(adapter, path, scale)
        else:
            text, metadata = _converted_config(adapter), {"format": "mlx"}
        tensors = {}
        for path, factors in adapter.modules.items():
            tensors[path + _A] = factors.A.T
            tensors[path + _B] = factors.B.T
        save_tensors(tensors, directory / WEIGHTS_FILE, metadata)
        if text is not None:
            (directory / CONFIG_FILE).write_bytes(text.encode())

    def reader_of(self, adapter: Adapter) -> MlxFormat:
        """Return the format with the scale that it was told when it read the adapter, if any."""
        if adapter.format != self.format:
            return MlxFormat()
        where = f'"{adapter.name}" (config)'
        return MlxFormat(scale=parse_json_object(adapter.config.encode(), where)["scale"])

    def _settings(self, data: bytes | None, where: Path) -> MlxSettings:
        if data is not None:
            return parse_config(parse_json_object(data, str(where)), self.scale, str(where))
        if self.scale is None:
            raise AdapterError(
                f"{where}: is missing; without it the scale is unknown; get it from where the "
                'weights came from, or give the option "scale" (20 was the default before April '
                "2024)"
            )
        return MlxSettings(rank=None, scale=self.scale, base_model=None, revision=None)


def _kept(adapter: Adapter) -> tuple[str | None, Mapping[str, str], float]:
    """Return the configuration, the header's text and the scale of an adapter that was read.

    Nothing is judged anew: what could be read once can be given back.
    """
    where = f'configuration of adapter "{adapter.name}" ({adapter.format})'
    record = parse_json_object(adapter.config.encode(), where)
    try:
        text, metadata, scale = (record[key] for key in ("adapter_config", "metadata", "scale"))
        if scale is None:
            scale = parse_json_object(text.encode(), where)["lora_parameters"]["scale"]
        return text, metadata, float(scale)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise AdapterError(
            f"{where}: is not what reading the adapter gave; read it again"
        ) from error


def _no_weights(path: Path, directory: Path) -> AdapterError:
    if is_file(directory / _OLD_WEIGHTS_FILE):
        return UnsupportedAdapterError(
            f"{directory}: {_OLD_WEIGHTS_FILE} is what mlx-lm wrote before April 2024, which is "
            f"not supported; save its arrays as {WEIGHTS_FILE} with mlx.core.save_safetensors, "
            'and give the option "scale"',
            feature=_OLD_WEIGHTS_FILE,
        )
    return AdapterError(
        f"{path}: no MLX adapter; looked for {MlxFormat.looks_for}; found {describe(path)}; pass "
        "the directory that the adapter was saved to"
    )


def _modules(
    tensors: Mapping[str, torch.Tensor], settings: MlxSettings, weights: Path, name: str
) -> dict[str, Factors]:
    factors_A: dict[str, torch.Tensor] = {}
    factors_B: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if not key.endswith((_A, _B)):
            raise _refusal(key, weights)
        if tensor.ndim == 3:
            raise UnsupportedAdapterError(
                f'{weights}: tensor "{excerpt(key)}" has shape {shape_text(tensor)}: factors of '
                "several experts (LoRASwitchLinear) are not supported; use an adapter that leaves "
                "the experts alone",
                feature="LoRASwitchLinear",
            )
        half = factors_A if key.endswith(_A) else factors_B
        # Both endings have one length; transposing a matrix of other dimensions means nothing.
        half[module_path(key[: -len(_A)], key, weights)] = tensor.T if tensor.ndim == 2 else tensor
    check_partners(factors_A, factors_B, weights, names=f'"<module>{_A}" and "…{_B}"')
    modules = {}
    for path in sorted(factors_A):
        modules[path] = build_factors(
            factors_A[path],
            factors_B[path],
            settings.scale,
            path=path,
            adapter=name,
            kind=_kind(path),
        )
        if settings.rank not in (None, modules[path].rank):
            raise AdapterError(
                f'{path}: factors of adapter "{name}" have rank {modules[path].rank}, '
                f"{CONFIG_FILE} says {settings.rank}; correct it to what the adapter was trained "
                "with"
            )
    return modules


def _refusal(key: str, weights: Path) -> UnsupportedAdapterError:
    feature, because = key, "it is no factor of a LoRA layer; remove it if the model has it anyway"
    if key.rpartition(".")[2] == "m":
        feature, because = (
            "m",
            "DoRA rescales the updated weights; use an adapter trained with lora",
        )
    elif _PART_OF_FUSED.fullmatch(key):
        feature = "FusedLoRALinear"
        because = "a fused projection has several pairs of factors; fuse the adapter with MLX"
    return UnsupportedAdapterError(
        f'{weights}: tensor "{excerpt(key)}" is not supported: {because}', feature=feature
    )


def _kind(path: str) -> str:
    named = [part for part in path.split(".") if not part.isdecimal()]
    return "embedding" if named and named[-1] in EMBEDDINGS else LINEAR


def _converted_config(adapter: Adapter) -> str:
    if adapter.verbatim:
        raise _not_in_mlx(
            adapter,
            f"{next(iter(adapter.verbatim))}: it has tensors that are no factors",
            "verbatim",
        )
    for path in adapter.modules:
        flat = adapter.format == "kohya" and "." not in path
        if flat or any(part.startswith("lora_") for part in path.split(".")):
            raise _not_in_mlx(adapter, f"{path}: the name is flattened, MLX needs its dots", path)
    first = next(iter(adapter.modules), None)
    if first is None:
        raise _not_in_mlx(adapter, "it has no module", "modules")
    rank, scaling = adapter.modules[first].rank, adapter.modules[first].scaling
    for path, factors in adapter.modules.items():
        if factors.kind != _kind(path):
            raise _not_in_mlx(
                adapter,
                f"{path}: its kind is {factors.kind}, and MLX takes a module of that name for "
                f"{_kind(path)}",
                "kind",
            )
        if factors.rank != rank:
            raise _not_in_mlx(
                adapter, f"{first} has rank {rank}, {path} has rank {factors.rank}", "rank"
            )
        if factors.scaling != scaling:
            raise _not_in_mlx(
                adapter, f"{first} has scaling {scaling}, {path} has {factors.scaling}", "scaling"
            )
    config = {
        "fine_tune_type": "lora",
        "lora_parameters": {
            "dropout": 0.0,
            "keys": sorted(adapter.modules),
            "rank": rank,
            "scale": scaling,
        },
        "model": adapter.base_model,
        # All layers: which of them are adapted is for `keys` to say.
        "num_layers": -1,
        # mlx-lm has no revision of the base model and ignores what it does not know.
        **({} if adapter.revision is None else {"revision": adapter.revision}),
    }
    return json.dumps(config, indent=4, sort_keys=True)


def _not_in_mlx(adapter: Adapter, what: str, feature: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        f'adapter "{adapter.name}" cannot be written as mlx: {what}; MLX has linear layers and '
        "embeddings with one rank and one scale for all; choose another format",
        feature=feature,
    )
