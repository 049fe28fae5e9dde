"""Reads the configuration of an MLX adapter: one rank and one scale, or a refusal."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from unmerge.errors import AdapterError, UnsupportedAdapterError
from unmerge.formats.base import excerpt

__all__ = ["MlxSettings", "parse_config"]

_PARAMETERS = frozenset({"rank", "scale", "alpha", "dropout", "keys"})


@dataclass(frozen=True, slots=True)
class MlxSettings:
    """What counts of the configuration of an MLX adapter.

    Attributes:
        rank: Rank of all modules; `None` where there is no configuration.
        scale: What multiplies `B @ A` in all modules.
        base_model: Id or path of the base model, if it is named.
        revision: Revision of the base model, if it is named.
    """

    rank: int | None
    scale: float
    base_model: str | None
    revision: str | None


def parse_config(document: Mapping[str, Any], scale: float | None, where: str) -> MlxSettings:
    """Return what counts of a configuration, which is all the arguments of a training run.

    `fine_tune_type` came in September 2024, in place of `use_dora`; before that all was LoRA.
    `lora_parameters` came in April 2024 with rank, alpha and scale, and mlx-lm multiplied by
    `scale · alpha / rank`. Since June 2024 it multiplies by `scale` and ignores an alpha. A file
    does not say by which version it was trained, so an alpha other than the rank is refused.

    Args:
        document: The parsed `adapter_config.json`.
        scale: The scale, if the caller knows it better.
        where: The file, for messages.

    Raises:
        AdapterError: Rank or scale are missing or malformed, or the scale can be read in two ways.
        UnsupportedAdapterError: It was no training of plain LoRA, or a parameter is not known.
    """
    kind = document.get("fine_tune_type") or ("dora" if document.get("use_dora") else "lora")
    if kind != "lora":
        raise UnsupportedAdapterError(
            f"{where}: fine_tune_type is {_short(kind)}, which is not supported: DoRA rescales the "
            "updated weights and full fine-tuning replaces them; use an adapter trained with lora, "
            "or fuse it with mlx_lm.fuse and read the model as a checkpoint",
            feature="fine_tune_type",
        )
    given = document.get("lora_parameters")
    if not isinstance(given, dict):
        raise AdapterError(
            f"{where}: lora_parameters is {_short(given)}; expected an object with rank and scale, "
            "as mlx-lm writes it; get the configuration from where the weights came from"
        )
    for key in sorted(given.keys() - _PARAMETERS):
        if given[key] not in (None, False):
            raise UnsupportedAdapterError(
                f"{where}: unknown entry {_short(key)} of lora_parameters is {_short(given[key])}; "
                "it may change the delta; check what it means, and remove it if it has no effect "
                "on the weights",
                feature=key,
            )
    rank = given.get("rank")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
        raise AdapterError(
            f"{where}: rank is {_short(rank)}; expected a whole number above 0; correct the file"
        )
    return MlxSettings(
        rank=rank,
        scale=_scale(given, rank, where) if scale is None else scale,
        base_model=_text(document, "model"),
        revision=_text(document, "revision"),
    )


def _scale(given: Mapping[str, Any], rank: int, where: str) -> float:
    scale, alpha = given.get("scale"), given.get("alpha")
    if not _is_number(scale):
        raise AdapterError(
            f"{where}: scale is {_short(scale)}; expected a finite number; correct the file, or "
            'give the option "scale"'
        )
    if alpha is not None and alpha != rank:
        raise AdapterError(
            f"{where}: lora_parameters has scale {_short(scale)} and alpha {_short(alpha)} at rank "
            f"{rank}, which mlx-lm read as scale · alpha / rank before June 2024 and reads as "
            'scale since; give the option "scale" with the product that the adapter was trained '
            "with"
        )
    return float(scale)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= 1e300
        and math.isfinite(value)
    )


def _text(document: Mapping[str, Any], key: str) -> str | None:
    value = document.get(key)
    return value if isinstance(value, str) and value else None


def _short(value: Any) -> str:
    # Not repr: it recurses as deep as the value is nested.
    return excerpt(reprlib.repr(value), 60)
