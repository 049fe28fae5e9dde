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
from unmerge_bundle.kinds import EMBEDDING, kernel_of
from unmerge_bundle.publish import ADAPTER_DIRECTORY, OutputDirectory, write_file

__all__ = [
    "PEFT",
    "VERBATIM_FILE",
    "named_factors",
    "parse_config",
    "portable_config",
    "write_directory",
    "written_factors",
]

PEFT = "peft"
"""The format whose configuration and tensor names the directories written here have."""

VERBATIM_FILE = "verbatim.safetensors"
"""File for the tensors of another format's adapter that have no place in a PEFT directory."""

_CONFIG = "adapter_config.json"

# What an original configuration says besides ranks and scalings, and the portable one keeps.
_KEPT = {"task_type": None, "modules_to_save": None, "fan_in_fan_out": False, "bias": "none"}
# Kept where it is set: readers older than the field then do not meet it without need.
_KEPT_IF_SET = ("trainable_token_indices",)


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


def named_factors(path: str, kind: str, A: Array, B: Array) -> dict[str, Array]:
    """Return A and B under the keys, and in the shapes, that PEFT has for a layer.

    Embeddings have keys of their own. Of a convolution, A is one of its kernel's size and B one of
    size 1; both are row-major, so that no number moves.

    Args:
        path: The module.
        kind: The layer it is, see `unmerge_bundle.check_kind`.
        A: `(r, d_in)`.
        B: `(d_out, r)`.
    """
    start = f"base_model.model.{path}.lora_"
    if kind == EMBEDDING:
        return {f"{start}embedding_A": A, f"{start}embedding_B": B}
    kernel = kernel_of(kind)
    return {
        f"{start}A.weight": A.reshape(len(A), -1, *kernel),
        f"{start}B.weight": B.reshape(*B.shape, *(1 for _ in kernel)),
    }


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
        original: The source's configuration, or empty; task type, saved modules, bias,
            `fan_in_fan_out` and trainable tokens are kept from it.
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
        **{key: original[key] for key in _KEPT_IF_SET if original.get(key)},
    }
    text = json.dumps(config, ensure_ascii=False, allow_nan=False, indent=2, sort_keys=True)
    return f"{text}\n".encode()


def write_directory(
    directory: Path,
    *,
    config: bytes,
    factors: Mapping[str, tuple[Array, Array]],
    kinds: Mapping[str, str],
    verbatim: Mapping[str, Array],
    beside: Mapping[str, Array],
    card: str,
    overwrite: bool,
) -> None:
    """Write the directory whole, or leave its path as it was.

    Args:
        directory: The directory.
        config: Bytes of its configuration file.
        factors: A and B by module path.
        kinds: The layer each of these modules is.
        verbatim: PEFT's other tensors, by their key.
        beside: Tensors that are none of PEFT's, by their key, for `VERBATIM_FILE`.
        card: Text of its model card.
        overwrite: Replace an existing adapter directory.

    Raises:
        OutputExistsError: The directory exists and may not be replaced.
        InvalidInputError: A verbatim tensor has the key of a factor, or `directory` cannot be a
            path.
    """
    tensors: dict[str, Array] = {}
    for path, (A, B) in factors.items():
        tensors |= named_factors(path, kinds[path], A, B)
    if clash := sorted(tensors.keys() & verbatim.keys()):
        raise InvalidInputError(
            "a verbatim tensor has the key of a restored factor; the source was read wrongly",
            path=clash[0],
        )
    held = {key: Held.of(array, name=key) for key, array in {**tensors, **verbatim}.items()}
    with OutputDirectory(directory, overwrite=overwrite, kind=ADAPTER_DIRECTORY) as output:
        write_safetensors(output.partial / "adapter_model.safetensors", held, {"format": "pt"})
        if beside:
            others = {key: Held.of(array, name=key) for key, array in beside.items()}
            write_safetensors(output.partial / VERBATIM_FILE, others, {"format": "pt"})
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
