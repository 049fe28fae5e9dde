"""Reads and writes LoRA files as diffusers saves them: the delta it applies, or an error."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from unmerge.adapter import Adapter, Factors
from unmerge.errors import AdapterError, UnsupportedAdapterError
from unmerge.formats.base import AdapterFormat
from unmerge.formats.checks import adapter_name, own_name, save_tensors
from unmerge.formats.diffusers_keys import (
    ALPHA,
    COMPONENTS,
    Component,
    component_of,
    is_diffusers,
    keys_of,
    sort_tensors,
)
from unmerge.formats.files import load_safetensors, parse_json_object, read_header
from unmerge.formats.kohya import KohyaFormat, is_kohya
from unmerge.formats.peft_config import LoraSettings, parse_config
from unmerge.formats.peft_write import converted_config
from unmerge.formats.single_file import (
    FileRecord,
    check_convertible,
    check_scaling,
    factors_of,
    header_at,
    holds_other_adapter,
    is_file,
    only_file,
    require,
    tensors_of,
)

__all__ = ["DiffusersFormat"]

FILE = "pytorch_lora_weights.safetensors"
SETTINGS = "lora_adapter_metadata"

# What PEFT's LoraConfig has where the settings in a file leave a field out.
_DEFAULTS: Mapping[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 8}


class DiffusersFormat(AdapterFormat):
    """Single files as diffusers' `save_lora_weights` and its predecessors save them.

    Module paths begin with the part of the pipeline, `unet.down_blocks.0.…to_q`, whatever the age
    of the file: names of older releases lead to the path that today's release gives the module.
    Files of one model alone, without such a part in front, keep their paths as they are.

    Sources: huggingface/diffusers `loaders/lora_base.py` (`_save_lora_weights`,
    `_load_lora_into_text_encoder`), `loaders/peft.py` (`load_lora_adapter`),
    `utils/peft_utils.py` (`get_peft_kwargs`, `_create_lora_config`),
    `utils/state_dict_utils.py` (the older names).
    """

    format: ClassVar[str] = "diffusers"
    looks_for: ClassVar[str] = (
        f"a directory with {FILE}, or a .safetensors file with tensors such as "
        "unet.<module>.lora_A.weight or <module>.lora.down.weight"
    )

    component: Component | None = Field(
        None,
        description="part of the pipeline that another format's modules are written under, where "
        "their path does not begin with one",
    )

    def recognises(self, path: Path) -> bool:
        """Return whether `path` is such a file, or a directory with one of the standard name.

        Tensors without a part of the pipeline in front may be another format's, so a file with
        PEFT's names for them is recognised by its directory only.
        """
        inside = is_file(path / FILE) and not holds_other_adapter(path)
        if not inside and only_file(path) != path:
            return False
        file = path / FILE if inside else path
        header = header_at(file)
        if header is None:
            return file.name == FILE
        if is_kohya(header) or any(name.startswith("base_model.") for name in header.tensors):
            return False
        return inside or is_diffusers(header)

    def read(self, path: Path, name: str | None) -> Adapter:
        """Return the adapter at `path`, named after the directory or the file unless told.

        The scaling is that of the settings that newer releases keep in the file's header, by
        PEFT's rules; else alpha over rank where there are alphas; else 1, because diffusers then
        takes the rank for alpha.

        Raises:
            AdapterError: There is no such file, it is damaged, a factor has no partner, the wrong
                shape, rank or dtype, settings are malformed, or the name is not allowed.
            UnsupportedAdapterError: A tensor that `REFUSED_NAMES` lists or that is unknown; a
                setting that `docs/adapters.md` lists as refused; settings or alphas for some
                modules only, or both; names with a part of the pipeline beside names without.
            NonFiniteError: A tensor holds NaN or an infinity.
        """
        standard = path / FILE
        file = standard if is_file(standard) else require(only_file(path), path, self.looks_for)
        name = adapter_name(_own_name(path, file) if name is None else name, path)
        tensors = load_safetensors(file)
        found = sort_tensors(tensors, file)
        record = FileRecord(
            file=file.name,
            metadata=dict(read_header(file).metadata),
            alphas=found.alphas,
            keys=found.keys,
        )
        # Not 0, by which alpha cannot be divided; such factors are refused just below.
        ranks = {
            module: max(1, A.shape[0] if A.ndim else 1) for module, A in sorted(found.A.items())
        }
        settings = _settings(record, ranks, str(file))
        modules = {
            module: factors_of(
                found.A[module],
                found.B[module],
                _scaling(module, rank, settings, record, str(file)),
                path=module,
                adapter=name,
            )
            for module, rank in ranks.items()
        }
        return Adapter(
            name=name,
            modules=modules,
            config=record.text(),
            format=self.format,
            base_model=_only(part.base_model for part in settings.values()),
            revision=_only(part.revision for part in settings.values()),
            source=str(path),
        )

    def write(self, adapter: Adapter, directory: Path) -> None:
        """Write one file: the one that was read, or the adapter of another format converted.

        A converted adapter has its ranks and alphas as settings in the header, as diffusers 0.34
        and later read them.

        Raises:
            UnsupportedAdapterError: The adapter holds verbatim tensors or embeddings; a module's
                path begins with no part of the pipeline and `component` is not given, or is
                flattened as in kohya's format; PEFT can compute a scaling from no alpha.
            AdapterError: The configuration is not that of the adapter.
            OSError: The disk refuses.
        """
        check_convertible(adapter, self.format)
        if adapter.format == self.format:
            record = FileRecord.of(adapter)
            names = {path: path for path in adapter.modules}
        else:
            names = self._names(adapter)
            record = _converted_record(adapter, names)
        ranks = {names[path]: factors.rank for path, factors in adapter.modules.items()}
        where = f'configuration of adapter "{adapter.name}" ({adapter.format})'
        settings = _settings(record, ranks, where)
        tensors: dict[str, torch.Tensor] = {}
        for path, factors in adapter.modules.items():
            name = names[path]
            check_scaling(adapter, path, _scaling(name, factors.rank, settings, record, where))
            key_A, key_B = record.keys.get(name, keys_of(name))
            tensors[key_A], tensors[key_B] = tensors_of(factors, path)
            if name in record.alphas:
                tensors[name + ALPHA] = record.alphas[name].tensor()
        save_tensors(tensors, directory / record.file, record.metadata)

    def _names(self, adapter: Adapter) -> dict[str, str]:
        names = {}
        for path in adapter.modules:
            where = f'{path}: adapter "{adapter.name}" cannot be written as {self.format}'
            if adapter.format == KohyaFormat.format and "." not in path:
                raise UnsupportedAdapterError(
                    f"{where}: its name was flattened, and which underscores were dots is not "
                    "known; export it as kohya, which diffusers loads too",
                    feature="flattened names",
                )
            names[path] = path
            if not component_of(path):
                if self.component is None:
                    raise UnsupportedAdapterError(
                        f"{where}: the path begins with no part of a pipeline "
                        f"({', '.join(COMPONENTS)}); say which one the adapter is for (the "
                        "format's option `component`)",
                        feature="component",
                    )
                names[path] = f"{self.component}.{path}"
        if len(set(names.values())) < len(names):
            raise UnsupportedAdapterError(
                f'adapter "{adapter.name}" cannot be written as {self.format}: with and without '
                f'"{self.component}." in front, two of its modules are the same; export it in its '
                "own format",
                feature="component",
            )
        return names


def _own_name(path: Path, file: Path) -> str:
    if file != path:
        return own_name(path)
    # Every file of diffusers has this name, so it tells nothing.
    return own_name(path.absolute().parent) if file.name == FILE else file.stem


def _settings(record: FileRecord, modules: Iterable[str], where: str) -> dict[str, LoraSettings]:
    """Return what the file's header says of ranks and alphas by part of the pipeline, if it does.

    The settings are one JSON object with the fields of PEFT's LoraConfig, behind the part's name
    and a dot where the tensors have it too. Fields that are left out have PEFT's defaults.
    """
    text = record.metadata.get(SETTINGS)
    if not text:
        return {}
    where = f"{where} ({SETTINGS} in the header)"
    if record.alphas:
        raise UnsupportedAdapterError(
            f"{where}: the file has alpha tensors as well, and diffusers accepts one or the other; "
            "remove those that do not count",
            feature=SETTINGS,
        )
    document = parse_json_object(text.encode(), where)
    found = {}
    for component in sorted({component_of(path) for path in modules}):
        prefix = f"{component}." if component else ""
        fields = {
            name.removeprefix(prefix): value
            for name, value in document.items()
            if name.startswith(prefix)
        }
        if not fields:
            raise UnsupportedAdapterError(
                f"{where}: has no field of {component}, of which there are tensors; their scaling "
                f'is unknown; expected "{prefix}lora_alpha" and others; add them',
                feature=SETTINGS,
            )
        settings = parse_config({**_DEFAULTS, **fields}, f"{where}, {component or 'all'}")
        for name, value in (
            ("modules_to_save", fields.get("modules_to_save")),
            ("trainable_token_indices", fields.get("trainable_token_indices")),
        ):
            if value:
                raise UnsupportedAdapterError(
                    f"{where}: {prefix}{name} is set, which is not supported: the weights it "
                    "names are no factors and are not in the file; use an adapter trained without",
                    feature=name,
                )
        found[component] = settings
    return found


def _scaling(
    path: str, rank: int, settings: Mapping[str, LoraSettings], record: FileRecord, where: str
) -> float:
    component = component_of(path)
    if settings:
        found, inner = settings[component], path.removeprefix(f"{component}.")
        if found.rank_of(inner) != rank:
            raise AdapterError(
                f"{path}: factors have rank {rank} in {where}, its {SETTINGS} says "
                f"{found.rank_of(inner)}; expected one and the same; correct r or rank_pattern"
            )
        return found.scaling_of(inner)
    alpha = record.alphas.get(path)
    return 1.0 if alpha is None else alpha.value / rank


def _converted_record(adapter: Adapter, names: Mapping[str, str]) -> FileRecord:
    """Return the record of the file that another format's adapter becomes."""
    parts: dict[str, dict[str, Factors]] = {}
    for path, factors in adapter.modules.items():
        component, _, inner = names[path].partition(".")
        parts.setdefault(component, {})[inner] = factors
    packed: dict[str, Any] = {}
    for component, modules in parts.items():
        part = replace(adapter, modules=modules)
        # diffusers hands these fields to PEFT as they are, so PEFT's own rules find them.
        fields = parse_json_object(converted_config(part, {}), f"settings of {component}")
        packed |= {f"{component}.{name}": value for name, value in fields.items()}
    text = json.dumps(packed, indent=2, sort_keys=True)
    return FileRecord(file=FILE, metadata={"format": "pt", SETTINGS: text})


def _only(values: Iterable[str | None]) -> str | None:
    named = {value for value in values if value}
    return named.pop() if len(named) == 1 else None
