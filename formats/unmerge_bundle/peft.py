"""Writes PEFT adapter directories that load everywhere with the delta the bundle holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unmerge_bundle.arrays import FLOAT_DTYPES, Array, FloatDtype, all_finite, round_to
from unmerge_bundle.blob import Held, write_safetensors
from unmerge_bundle.errors import InvalidInputError, ManifestError, NonFiniteError
from unmerge_bundle.jsontext import parse_object
from unmerge_bundle.publish import OutputDirectory, write_file

__all__ = [
    "PeftModule",
    "original_tensors",
    "parse_config",
    "portable_config",
    "portable_tensors",
    "write_directory",
]

_CONFIG = "adapter_config.json"

# What an original configuration says besides ranks and scalings, and the portable one keeps.
_KEPT = {"task_type": None, "modules_to_save": None, "fan_in_fan_out": False, "bias": "none"}


@dataclass(frozen=True, slots=True)
class PeftModule:
    """One module to write: `delta = scaling · B @ A`."""

    A: Array
    B: Array
    scaling: float


def original_tensors(
    modules: Mapping[str, PeftModule], dtype: FloatDtype | None
) -> dict[str, Array]:
    """Return the factors under PEFT's keys, for use with the original configuration.

    Raises:
        NonFiniteError: A value overflows `dtype`.
    """
    tensors: dict[str, Array] = {}
    for path, module in modules.items():
        target = FLOAT_DTYPES[dtype] if dtype else module.A.dtype
        tensors[_key(path, "A")] = _rounded(module.A, target, path)
        tensors[_key(path, "B")] = _rounded(module.B, target, path)
    return tensors


def portable_tensors(
    modules: Mapping[str, PeftModule], dtype: FloatDtype | None
) -> tuple[dict[str, Array], int]:
    """Return factors that need no scaling, padded with zeros to one rank, and that rank.

    B is multiplied by its scaling in float32 and rounded once.

    Raises:
        NonFiniteError: A value overflows its dtype.
    """
    rank = max(len(module.A) for module in modules.values())
    tensors: dict[str, Array] = {}
    for path, module in modules.items():
        target = FLOAT_DTYPES[dtype] if dtype else module.A.dtype
        missing = rank - len(module.A)
        with np.errstate(over="ignore", under="ignore"):  # judged after rounding
            B = module.B.astype(np.float32) * np.float32(module.scaling)
        A = np.pad(module.A.astype(np.float32), ((0, missing), (0, 0)))
        tensors[_key(path, "A")] = _rounded(A, target, path)
        tensors[_key(path, "B")] = _rounded(np.pad(B, ((0, 0), (0, missing))), target, path)
    return tensors, rank


def parse_config(text: str) -> dict[str, Any]:
    """Return an original PEFT configuration as an object; the empty text gives an empty one.

    Raises:
        ManifestError: It is no JSON object.
    """
    if not text:
        return {}
    return parse_object(
        text.encode("utf-8"), where=f"original {_CONFIG}", error=ManifestError, floats=True
    )


def portable_config(
    *,
    paths: list[str],
    rank: int,
    base_model: str | None,
    revision: str | None,
    original: Mapping[str, Any],
) -> bytes:
    """Return a configuration under which every reader uses the scaling 1.

    Args:
        paths: The modules, by full path.
        rank: Rank of every module, and `lora_alpha`.
        base_model: Id of the base model.
        revision: Its revision.
        original: The source's configuration, or empty; task type, saved modules, bias and
            `fan_in_fan_out` are kept from it.
    """
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted(paths),
        **{key: original.get(key, default) for key, default in _KEPT.items()},
    }
    text = json.dumps(config, ensure_ascii=False, allow_nan=False, indent=2, sort_keys=True)
    return f"{text}\n".encode()


def write_directory(
    directory: Path,
    *,
    config: bytes,
    tensors: Mapping[str, Array],
    verbatim: Mapping[str, Array],
    card: str,
    overwrite: bool,
) -> None:
    """Write the directory whole, or leave its path as it was.

    Raises:
        OutputExistsError: The directory exists and may not be replaced.
        InvalidInputError: A verbatim tensor has the key of a factor.
    """
    if clash := sorted(tensors.keys() & verbatim.keys()):
        raise InvalidInputError(
            "a verbatim tensor has the key of a restored factor; the source was read wrongly",
            path=clash[0],
        )
    held = {key: Held.of(array, name=key) for key, array in {**tensors, **verbatim}.items()}
    with OutputDirectory(
        directory, overwrite=overwrite, marker=_CONFIG, what="an adapter directory"
    ) as output:
        write_safetensors(output.partial / "adapter_model.safetensors", held, {"format": "pt"})
        write_file(output.partial / "README.md", card.encode("utf-8"))
        write_file(output.partial / _CONFIG, config)
        output.publish()


def _key(path: str, factor: str) -> str:
    return f"base_model.model.{path}.lora_{factor}.weight"


def _rounded(array: Array, dtype: np.dtype[Any], path: str) -> Array:
    result = round_to(array, dtype)
    if not all_finite(result):
        raise NonFiniteError(
            f"a factor has values beyond {dtype}; write it in a wider dtype", path=path
        )
    return result
