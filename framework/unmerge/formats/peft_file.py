"""Reads and writes single files with PEFT's tensor names and no configuration beside them.

Such a file has the factors and seldom says what scales them. What counts here is what is written
down: alpha tensors, the configuration that diffusers' `save_lora_adapter` puts into the header
(`loaders/peft.py`, huggingface/diffusers), or what the reader is told. Nothing is assumed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator

from unmerge.adapter import Adapter, Factors
from unmerge.errors import AdapterError, UnsupportedAdapterError
from unmerge.formats.base import AdapterFormat, describe, excerpt
from unmerge.formats.checks import adapter_name, own_name, save_tensors
from unmerge.formats.diffusers import DiffusersFormat
from unmerge.formats.diffusers_keys import is_of_pipeline
from unmerge.formats.files import (
    Header,
    load_safetensors,
    parse_json_object,
    read_bytes,
    read_header,
)
from unmerge.formats.kohya import is_kohya
from unmerge.formats.peft import PeftFormat, read_peft
from unmerge.formats.peft_config import LARGEST_ALPHA, LoraSettings, parse_config, parse_settings
from unmerge.formats.peft_factors import read_factors, read_verbatim, written_tensors
from unmerge.formats.peft_keys import CONFIG_FILE, FACTOR_NAMES, PREFIX, sort_tensors
from unmerge.formats.peft_write import SAFETENSORS_FILE
from unmerge.formats.single_file import SUFFIX, Alpha, FileRecord, check_scaling, header_at, is_file

__all__ = ["PeftFileFormat"]

METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers puts the configuration of the adapter, in the header's free text."""

_ALPHA = ".alpha"
_ENDINGS = tuple(f".{name}" for names in FACTOR_NAMES.values() for name in names)
# For sorting tensors where no configuration explains any but factors.
_NOTHING_SAID = LoraSettings(
    rank=1,
    alpha=1,
    rslora=False,
    rank_pattern={},
    alpha_pattern={},
    bias="none",
    saved_modules=(),
    token_rows={},
    base_model=None,
    revision=None,
)


class _Record(FileRecord):
    """What is kept of a file besides its tensors, and what the reader was told.

    Attributes:
        prefixed: Whether the names begin with PEFT's `base_model.model.`.
        alpha: The option.
        scaling: The option.
        rslora: The option.
    """

    prefixed: bool
    alpha: float | None
    scaling: float | None
    rslora: bool


class PeftFileFormat(AdapterFormat):
    """Single `.safetensors` files whose tensors are called as PEFT calls them.

    Names begin with `base_model.model.`, with nothing, or with what another tool puts there
    (`diffusion_model.`), which is then part of the module paths.

    Attributes:
        alpha: Alpha of all modules that the file gives none.
        scaling: What multiplies `B @ A` in all modules, in place of an alpha.
        rslora: Whether alphas are divided by the root of the rank.
    """

    format: ClassVar[str] = "peft_file"
    looks_for: ClassVar[str] = f"a {SUFFIX} file with PEFT's lora_A and lora_B"

    alpha: float | None = Field(
        None,
        ge=-LARGEST_ALPHA,
        le=LARGEST_ALPHA,
        description="alpha of the modules that the file gives none; the scaling is alpha / rank",
    )
    scaling: float | None = Field(
        None, allow_inf_nan=False, description="the scaling of all modules, in place of an alpha"
    )
    rslora: bool = Field(False, description="divide alphas by the root of the rank")

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> Self:
        if self.scaling is not None and (self.alpha is not None or self.rslora):
            raise ValueError("scaling says all; give it without alpha and rslora")
        return self

    def recognises(self, path: Path) -> bool:
        """Return whether `path` is a file with PEFT's factors that diffusers does not own."""
        if path.suffix.lower() != SUFFIX or not is_file(path):
            return False
        header = header_at(path)
        named = header is not None and any(key.endswith(_ENDINGS) for key in header.tensors)
        if not (named or _has_configuration(path)):
            return False
        foreign = DiffusersFormat().recognises(path) or (header is not None and is_kohya(header))
        return not foreign

    def read(self, path: Path, name: str | None) -> Adapter:
        """Return the adapter in the file, or in its directory if a configuration is beside it.

        `adapter_model.safetensors` with `adapter_config.json` beside it is a PEFT directory, and
        read as one: the adapter's format is then "peft".

        Raises:
            AdapterError: The file is malformed, does not say what scales its factors and no
                option does, or contradicts the options.
            UnsupportedAdapterError: The header's configuration has a feature that is refused, or
                a tensor is not explained by it.
            NonFiniteError: A tensor holds NaN or an infinity.
        """
        if _has_configuration(path):
            self._refuse_options(path)
            return read_peft(path.parent, name=name)
        if not is_file(path):
            raise AdapterError(
                f"{path}: no adapter here; looked for {self.looks_for}; found {describe(path)}; "
                "pass the file"
            )
        whole = path.name == SAFETENSORS_FILE
        derived = own_name(path.parent if whole else path.with_suffix(""))
        chosen = adapter_name(derived if name is None else name, path)
        header = read_header(path)
        tensors = load_safetensors(path)
        settings = _settings_in(header, path)
        prefixed = any(key.startswith(PREFIX) for key in tensors)
        prefix, added = (PREFIX, "") if prefixed else ("", PREFIX)
        alphas = {
            key.removeprefix(prefix).removesuffix(_ALPHA): Alpha.of(
                tensors.pop(key), f'{key}: tensor of adapter "{chosen}"'
            )
            for key in sorted(tensors)
            if key.startswith(prefix) and key.endswith(_ALPHA)
        }
        found, others = sort_tensors(
            {added + key: tensor for key, tensor in tensors.items()},
            settings or _NOTHING_SAID,
            path,
        )
        _check_alphas(alphas, found, settings, path)
        record = _Record(
            file=path.name,
            metadata=dict(header.metadata),
            alphas=alphas,
            prefixed=prefixed,
            alpha=self.alpha,
            scaling=self.scaling,
            rslora=self.rslora,
        )
        verbatim = {key.removeprefix(added): tensor for key, tensor in others.items()}
        return Adapter(
            name=chosen,
            modules=self._modules(found, settings, alphas, chosen, path),
            verbatim=read_verbatim(verbatim, chosen, path),
            config=record.text(),
            format=self.format,
            base_model=settings.base_model if settings else None,
            revision=settings.revision if settings else None,
            source=str(path),
        )

    def write(self, adapter: Adapter, directory: Path) -> None:
        """Write the adapter as one file.

        One that was read by this format gets its file back: name, metadata, every tensor. Another
        becomes `<name>.safetensors` with plain names and the configuration that PEFT would have
        in the header, where diffusers' `load_lora_adapter(…, prefix=None)` looks for it.

        Raises:
            AdapterError: The configuration is not that of the adapter.
            UnsupportedAdapterError: The adapter cannot be written for PEFT, or its module paths
                would be taken for parts of a pipeline, or for others behind PEFT's prefix.
            OSError: The disk refuses.
        """
        if adapter.format == self.format:
            record = _Record.of(adapter)
            self._check_scalings(adapter, record)
            prefix = PREFIX if record.prefixed else ""
            tensors = dict(adapter.verbatim)
            for path, factors in adapter.modules.items():
                for key, tensor in written_tensors(path, factors).items():
                    tensors[prefix + key.removeprefix(PREFIX)] = tensor
            for path, alpha in record.alphas.items():
                tensors[prefix + path + _ALPHA] = alpha.tensor()
            save_tensors(tensors, directory / record.file, record.metadata)
            return
        for path in adapter.modules:
            taken = "a part of a pipeline" if is_of_pipeline(path) else ""
            if path.startswith(PREFIX):
                taken = f"the module {path.removeprefix(PREFIX)}"
            if taken:
                raise UnsupportedAdapterError(
                    f'adapter "{adapter.name}" cannot be written as {self.format}: {path} would '
                    f"be taken for {taken}; write it as peft or diffusers",
                    feature=path,
                )
        with tempfile.TemporaryDirectory() as scratch:
            PeftFormat().write(adapter, Path(scratch))
            config = read_bytes(Path(scratch) / CONFIG_FILE).decode("utf-8")
            plain = {
                key.removeprefix(PREFIX): tensor
                for key, tensor in load_safetensors(Path(scratch) / SAFETENSORS_FILE).items()
            }
            metadata = {"format": "pt", METADATA_KEY: config}
            save_tensors(plain, directory / f"{adapter.name}{SUFFIX}", metadata)

    def reader_of(self, adapter: Adapter) -> PeftFileFormat:
        """Return the format with what it was told when it read the adapter."""
        if adapter.format != self.format:
            return PeftFileFormat()
        record = _Record.of(adapter)
        return PeftFileFormat(alpha=record.alpha, scaling=record.scaling, rslora=record.rslora)

    def _check_scalings(self, adapter: Adapter, record: _Record) -> None:
        """Refuse an adapter whose scalings are not those of its file and what was told of it."""
        where = f'configuration of adapter "{adapter.name}" ({adapter.format})'
        text = record.metadata.get(METADATA_KEY)
        # Not judged anew: what could be read once can be given back, whatever is refused by now.
        settings = parse_settings(parse_json_object(text.encode(), where), where) if text else None
        told = self.reader_of(adapter)
        for path, factors in adapter.modules.items():
            stated = told._scaling(
                path, factors.rank, settings, record.alphas.get(path), Path(record.file)
            )
            check_scaling(adapter, path, stated)

    def _modules(
        self,
        found: Mapping[str, Mapping[str, torch.Tensor]],
        settings: LoraSettings | None,
        alphas: Mapping[str, Alpha],
        name: str,
        weights: Path,
    ) -> dict[str, Factors]:
        if settings is not None or not found:
            modules = read_factors(found, settings or _NOTHING_SAID, name, weights)
        else:
            modules = {}
            for path, tensors in sorted(found.items()):
                # No configuration, so the rank is what the tensors say.
                A = next((tensors[a] for a, _ in FACTOR_NAMES.values() if a in tensors), None)
                rank = max(A.shape[0], 1) if A is not None and A.ndim else 1
                own = replace(_NOTHING_SAID, rank=rank)
                modules.update(read_factors({path: tensors}, own, name, weights))
        return {
            path: replace(
                factors,
                scaling=self._scaling(path, factors.rank, settings, alphas.get(path), weights),
            )
            for path, factors in modules.items()
        }

    def _scaling(
        self,
        path: str,
        rank: int,
        settings: LoraSettings | None,
        alpha: Alpha | None,
        weights: Path,
    ) -> float:
        """Return the scaling that the file states, or else the options; they may not differ."""
        told = self.scaling if self.alpha is None else _divided(self.alpha, rank, self.rslora)
        if settings is not None:
            stated = settings.scaling_of(path)
        elif alpha is not None:
            stated = _divided(alpha.value, rank, self.rslora)
        elif told is not None:
            return told
        else:
            raise AdapterError(
                f"{path}: {weights} does not say what scales its factors: expected a tensor "
                f'"{excerpt(path)}{_ALPHA}" or a configuration under {METADATA_KEY} in the header; '
                f"get {CONFIG_FILE} from where the file came from, or give one of the options "
                '"alpha" (with "rslora" if it was trained so) and "scaling" (on the command line '
                "--format peft_file --set alpha=16)"
            )
        contradicted = settings is not None and self.rslora and not settings.rslora
        if contradicted or (told is not None and told != stated):
            raise AdapterError(
                f"{path}: {weights} says that the scaling is {stated}, the options say "
                f"{'rslora' if told is None else told}; expected them to agree; leave the options "
                "away"
            )
        return stated

    def _refuse_options(self, path: Path) -> None:
        if self != PeftFileFormat():
            raise AdapterError(
                f"{path}: {CONFIG_FILE} is beside it and says what scales its factors; expected "
                "no options; leave them away, or copy the file to a directory of its own"
            )


def _has_configuration(path: Path) -> bool:
    return path.name == SAFETENSORS_FILE and is_file(path) and is_file(path.parent / CONFIG_FILE)


def _divided(alpha: float, rank: int, rslora: bool) -> float:
    return replace(_NOTHING_SAID, rank=rank, alpha=alpha, rslora=rslora).scaling_of("")


def _settings_in(header: Header, path: Path) -> LoraSettings | None:
    text = header.metadata.get(METADATA_KEY)
    if text is None:
        return None
    where = f"{path} ({METADATA_KEY})"
    return parse_config(parse_json_object(str(text).encode(), where), where)


def _check_alphas(
    alphas: Mapping[str, Alpha],
    found: Mapping[str, Mapping[str, torch.Tensor]],
    settings: LoraSettings | None,
    weights: Path,
) -> None:
    for path, alpha in alphas.items():
        where = f'{weights}: tensor "{excerpt(path)}{_ALPHA}"'
        if path not in found:
            raise AdapterError(
                f"{where} is the alpha of a module without factors; expected both; the file is "
                "incomplete, save the adapter again"
            )
        if not abs(alpha.value) <= LARGEST_ALPHA:
            raise AdapterError(
                f"{where} is {excerpt(str(alpha.value), 20)}; expected a number that a scaling "
                "can be made of; the file is damaged, get it again"
            )
        if settings is not None:
            raise AdapterError(
                f"{where} and {METADATA_KEY} in the header both say what scales the factors; "
                "expected one of them; remove the one that is wrong"
            )
