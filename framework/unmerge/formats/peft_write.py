"""Writes adapters as PEFT directories: PEFT's own as they came, others if nothing is lost."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from unmerge.adapter import Adapter, Factors
from unmerge.arrays import to_numpy
from unmerge.errors import AdapterError, UnsupportedAdapterError
from unmerge.formats.base import excerpt
from unmerge.formats.files import parse_json_object
from unmerge.formats.peft_config import (
    LARGEST_ALPHA,
    LoraSettings,
    parse_config,
    parse_settings,
    pattern_path,
)
from unmerge.formats.peft_factors import written_tensors
from unmerge.formats.peft_keys import CONFIG_FILE, PREFIX, sort_tensors
from unmerge_bundle.blob import Held, write_safetensors
from unmerge_bundle.publish import write_file

__all__ = ["SAFETENSORS_FILE", "converted_config", "write_directory"]

SAFETENSORS_FILE = "adapter_model.safetensors"

# How sd-scripts and LyCORIS name modules. PEFT keeps "lora_" in names for its own, too.
_JOINED_PATH = re.compile(r"(lora|lycoris)_")

ValueT = TypeVar("ValueT", int, float)


def write_directory(adapter: Adapter, directory: Path, *, native: bool) -> None:
    """Write a PEFT directory; see `PeftFormat.write`.

    Args:
        adapter: The adapter.
        directory: A directory that is there and empty.
        native: The configuration is PEFT's own, and verbatim tensors have PEFT's keys.

    Raises:
        AdapterError: The adapter contradicts its own configuration.
        UnsupportedAdapterError: Something has no exact counterpart in PEFT.
        OSError: The disk refuses.
    """
    if native:
        config, verbatim = adapter.config.encode("utf-8"), dict(adapter.verbatim)
        _check_config(adapter)
    else:
        _check_paths(adapter)
        verbatim, changes = _converted_verbatim(adapter)
        config = converted_config(adapter, changes)
    tensors: dict[str, torch.Tensor] = {}
    for path, factors in adapter.modules.items():
        tensors.update(written_tensors(path, factors))
    if clash := sorted(tensors.keys() & verbatim.keys()):
        raise AdapterError(
            f'adapter "{adapter.name}": the verbatim tensor {excerpt(clash[0])} has the key of a '
            "factor; it was read wrongly, read it again"
        )
    if not native:
        # What a reader would refuse, by its name or among these fields, is not written.
        settings = parse_config(parse_json_object(config, CONFIG_FILE), CONFIG_FILE)
        sort_tensors({**tensors, **verbatim}, settings, directory / SAFETENSORS_FILE)
    held = {
        key: Held.of(to_numpy(tensor), name=key) for key, tensor in {**tensors, **verbatim}.items()
    }
    write_safetensors(directory / SAFETENSORS_FILE, held, {"format": "pt"})
    write_file(directory / CONFIG_FILE, config)


def _check_config(adapter: Adapter) -> None:
    """Refuse an adapter whose configuration would give its factors another scaling or rank."""
    where = f'adapter "{adapter.name}" ({CONFIG_FILE})'
    # Not judged anew: what could be read once can be given back, whatever is refused by now.
    settings = parse_settings(parse_json_object(adapter.config.encode("utf-8"), where), where)
    if path := _first_difference(settings, adapter.modules):
        factors = adapter.modules[path]
        raise AdapterError(
            f"{path}: {where} says rank {settings.rank_of(path)} and scaling "
            f"{settings.scaling_of(path)!r}, the factors have {factors.rank} and "
            f"{factors.scaling!r}; the configuration is not this adapter's, read it again"
        )


def _first_difference(settings: LoraSettings, modules: Mapping[str, Factors]) -> str | None:
    """Return a module that the settings give another rank or scaling, if there is one."""
    for path, factors in modules.items():
        # As text: minus zero is another scaling than zero.
        same = settings.scaling_of(path).hex() == float(factors.scaling).hex()
        if settings.rank_of(path) != factors.rank or not same:
            return path
    return None


def _check_paths(adapter: Adapter) -> None:
    for path in adapter.modules:
        if _JOINED_PATH.match(path):
            raise UnsupportedAdapterError(
                f'{path}: the module of adapter "{adapter.name}" (format {adapter.format}) cannot '
                "be named for PEFT: the name joins the parts of a path by underscores, which does "
                "not say what the base model calls the module; keep the format",
                feature=path,
            )


def _converted_verbatim(adapter: Adapter) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the verbatim tensors under PEFT's keys, and the fields that explain them to PEFT."""
    tensors: dict[str, torch.Tensor] = {}
    parameters: dict[str, set[str]] = {}
    biases = False
    for key, tensor in adapter.verbatim.items():
        owner, _, parameter = key.removeprefix(PREFIX).rpartition(".")
        written = f"{PREFIX}{owner}.{parameter}"
        if owner in adapter.modules and parameter == "bias":
            biases = True
            written = f"{PREFIX}{owner}.base_layer.bias"
        elif not owner or any(_nested(owner, path) for path in adapter.modules):
            raise _no_place(adapter, key, "PEFT keeps whole modules, and none with adapted layers")
        else:
            parameters.setdefault(owner, set()).add(parameter)
        if written in tensors:
            raise _no_place(adapter, key, f"another one is to be {excerpt(written)} as well")
        tensors[written] = tensor
    for owner, names in parameters.items():
        if "weight" not in names:
            key = f"{owner}.{min(names)}"
            raise _no_place(adapter, key, "PEFT keeps whole modules, and the weight is not there")
    changes = {
        "modules_to_save": sorted(parameters) or None,
        "bias": "lora_only" if biases else "none",
    }
    return tensors, changes


def _nested(path: str, other: str) -> bool:
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")


def _no_place(adapter: Adapter, key: str, because: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        f'{excerpt(key)}: this tensor of adapter "{adapter.name}" (format {adapter.format}) is no '
        f"low-rank update and has no place in a PEFT directory: {because}; choose another format",
        feature=key,
    )


def converted_config(adapter: Adapter, changes: Mapping[str, Any]) -> bytes:
    """Return a configuration from which PEFT gets the ranks and scalings of the factors.

    Args:
        adapter: The adapter, whose own configuration does not count.
        changes: Fields that the configuration has besides or instead.

    Raises:
        UnsupportedAdapterError: There is none, or there are no factors.
    """
    if not adapter.modules:
        raise UnsupportedAdapterError(
            f'adapter "{adapter.name}" (format {adapter.format}) cannot be written for PEFT: it '
            "has no module, and PEFT loads none without factors; choose another format",
            feature="modules",
        )
    different = None
    for document in _candidates(adapter, changes):
        text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=2, sort_keys=True)
        data = f"{text}\n".encode()
        # Judged by what a reader makes of it: keys of patterns are regular expressions.
        settings = parse_settings(parse_json_object(data, CONFIG_FILE), CONFIG_FILE)
        different = _first_difference(settings, adapter.modules)
        if different is None:
            return data
    path = different or next(
        p for p, f in adapter.modules.items() if _alpha(f, rslora=False) is None
    )
    factors = adapter.modules[path]
    raise UnsupportedAdapterError(
        f'{path}: adapter "{adapter.name}" (format {adapter.format}) has the scaling '
        f"{factors.scaling!r} at rank {factors.rank}; PEFT divides a lora_alpha by the rank or by "
        "its root, and none gives that number exactly; choose another format",
        feature="scaling",
    )


def _candidates(adapter: Adapter, changes: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield configurations to try, those first that most readers understand."""
    modules: dict[str, Factors] = {pattern_path(path): f for path, f in adapter.modules.items()}
    spellable = all(re.fullmatch(r"[\w.-]+", path) for path in modules)
    for rslora in (False, True):
        alphas = {path: _alpha(factors, rslora=rslora) for path, factors in modules.items()}
        known = {path: alpha for path, alpha in alphas.items() if alpha is not None}
        if len(known) < len(alphas):
            continue
        ranks = {path: factors.rank for path, factors in modules.items()}
        # Readers that know no regular expressions take a plain path for itself; PEFT lets it
        # match the end of a longer path too, which is then one the anchored spelling tells apart.
        for anchored in (False, True):
            if not (anchored or spellable):
                continue
            rank, rank_pattern = _pattern(ranks, anchored=anchored)
            alpha, alpha_pattern = _pattern(known, anchored=anchored)
            yield {
                "peft_type": "LORA",
                "base_model_name_or_path": adapter.base_model,
                "revision": adapter.revision,
                "inference_mode": True,
                "r": rank,
                "lora_alpha": alpha,
                "lora_dropout": 0.0,
                "use_rslora": rslora,
                "use_dora": False,
                "rank_pattern": rank_pattern,
                "alpha_pattern": alpha_pattern,
                "target_modules": sorted(modules),
                "fan_in_fan_out": False,
                "task_type": None,
                **changes,
            }


def _pattern(values: Mapping[str, ValueT], *, anchored: bool) -> tuple[ValueT, dict[str, ValueT]]:
    """Return the commonest value, and the others by expression for the module."""
    counts = Counter(values.values())
    common = max(counts, key=lambda value: (counts[value], value))
    return common, {
        f"^{re.escape(path)}" if anchored else path: value
        for path, value in values.items()
        if value != common
    }


def _alpha(factors: Factors, *, rslora: bool) -> float | None:
    """Return the alpha from which PEFT's division gives exactly the scaling, if there is one."""
    divisor = math.sqrt(factors.rank) if rslora else factors.rank
    near = factors.scaling * divisor
    if not abs(near) <= LARGEST_ALPHA:
        return None
    # The whole number that somebody chose may lie beside the rounded product; both divide alike.
    for alpha in (float(round(near)), near):
        if (alpha / divisor).hex() == float(factors.scaling).hex():
            whole = int(alpha)
            exact = abs(whole) < 2**53 and float(whole).hex() == alpha.hex()
            return whole if exact else alpha
    return None
