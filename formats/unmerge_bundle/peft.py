"""Writes PEFT adapter directories that load everywhere with the delta the bundle holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unmerge_bundle.arrays import Array, all_finite, round_to
from unmerge_bundle.blob import Held, write_safetensors
from unmerge_bundle.errors import InvalidInputError, ManifestError, NonFiniteError
from unmerge_bundle.jsontext import parse_object
from unmerge_bundle.publish import ADAPTER_DIRECTORY, OutputDirectory, write_file

__all__ = [
    "parse_config",
    "portable_config",
    "write_directory",
    "written_factors",
]

_CONFIG = "adapter_config.json"

# What an original configuration says besides ranks and scalings, and the portable one keeps.
_KEPT = {"task_type": None, "modules_to_save": None, "fan_in_fan_out": False, "bias": "none"}


def written_factors(
    A: Array,
    B: Array,
    *,
    dtype: np.dtype[Any],
    scaling: float = 1.0,
    rank: int | None = None,
    path: str,
) -> tuple[Array, Array]:
    """Return A `(rank, d_in)` and B `(d_out, rank)` as they are written, each rounded once.

    Args:
        A: `(r, d_in)`; float32 where anything is to change, or the rounding is not the only one.
        B: `(d_out, r)`, likewise.
        dtype: What is written.
        scaling: Multiplied into B, in float32; 1 where the configuration holds the scaling.
        rank: Zeros are appended up to it; by default r.
        path: The module, for errors.

    Raises:
        NonFiniteError: A value overflows `dtype`.
    """
    missing = 0 if rank is None else rank - len(A)
    with np.errstate(over="ignore", under="ignore"):  # judged after rounding
        folded = B.astype(np.float32) * np.float32(scaling)
    return (
        _rounded(np.pad(A, ((0, missing), (0, 0))), dtype, path),
        _rounded(np.pad(folded, ((0, 0), (0, missing))), dtype, path),
    )


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
    factors: Mapping[str, tuple[Array, Array]],
    verbatim: Mapping[str, Array],
    card: str,
    overwrite: bool,
) -> None:
    """Write the directory whole, or leave its path as it was.

    Args:
        directory: The directory.
        config: Bytes of its configuration file.
        factors: A and B by module path.
        verbatim: Other tensors, by their key.
        card: Text of its model card.
        overwrite: Replace an existing adapter directory.

    Raises:
        OutputExistsError: The directory exists and may not be replaced.
        InvalidInputError: A verbatim tensor has the key of a factor, or `directory` cannot be a
            path.
    """
    tensors = {
        f"base_model.model.{path}.lora_{factor}.weight": array
        for path, both in factors.items()
        for factor, array in zip("AB", both, strict=True)
    }
    if clash := sorted(tensors.keys() & verbatim.keys()):
        raise InvalidInputError(
            "a verbatim tensor has the key of a restored factor; the source was read wrongly",
            path=clash[0],
        )
    held = {key: Held.of(array, name=key) for key, array in {**tensors, **verbatim}.items()}
    with OutputDirectory(directory, overwrite=overwrite, kind=ADAPTER_DIRECTORY) as output:
        write_safetensors(output.partial / "adapter_model.safetensors", held, {"format": "pt"})
        write_file(output.partial / "README.md", card.encode("utf-8"))
        write_file(output.partial / _CONFIG, config)
        output.publish()


def _rounded(array: Array, dtype: np.dtype[Any], path: str) -> Array:
    result = round_to(array, dtype)
    if not all_finite(result):
        raise NonFiniteError(
            f"a factor has values beyond {dtype}; write it in a wider dtype", path=path
        )
    return result
