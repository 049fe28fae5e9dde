"""Reads PEFT's `adapter_config.json`: ranks and scalings as PEFT has them, or a refusal."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from unmerge.errors import AdapterError, UnsupportedAdapterError
from unmerge.formats.base import excerpt
from unmerge.formats.peft_fields import FIELDS

__all__ = ["LARGEST_ALPHA", "LoraSettings", "parse_config", "parse_settings", "pattern_path"]

LARGEST_ALPHA = 1e300
"""Above it an alpha is refused, whatever its sign: scalings must be finite."""

NumberT = TypeVar("NumberT", int, float)

_BY_NAME = {field.name: field for field in FIELDS}

# Its results are cut to 60 characters; these limits only spare it writing out the rest.
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 100

_HARMLESS_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})

# PEFT adds these to modules_to_save by itself; releases before 0.11 did not write them down.
_TASK_HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What a PEFT configuration says about ranks, scalings and further tensors.

    Attributes:
        rank: Rank of the modules that no rank pattern matches.
        alpha: Alpha of the modules that no alpha pattern matches.
        rslora: Whether alpha is divided by the root of the rank.
        rank_pattern: Ranks by expression for module paths (see `_regex`), in the order of the file.
        alpha_pattern: Alphas likewise.
        bias: "none", "all" or "lora_only".
        saved_modules: Endings of the paths of the modules that are saved whole.
        token_rows: Number of trained rows by ending of the embedding's path. The one key is
            empty where the configuration leaves it to PEFT to find the input embedding.
        base_model: Id of the base model, if it is named.
        revision: Revision of the base model, if it is named.
    """

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[re.Pattern[str], int]
    alpha_pattern: Mapping[re.Pattern[str], float]
    bias: str
    saved_modules: tuple[str, ...]
    token_rows: Mapping[str, int]
    base_model: str | None
    revision: str | None

    def rank_of(self, path: str) -> int:
        """Return the rank that PEFT gives the module at `path`; see `_lookup` for the rule."""
        return _lookup(self.rank_pattern, path, self.rank)

    def scaling_of(self, path: str) -> float:
        """Return `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA, of the module at `path`."""
        rank = self.rank_of(path)
        alpha = _lookup(self.alpha_pattern, path, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def parse_config(document: Mapping[str, Any], where: str) -> LoraSettings:
    """Check every field of a PEFT configuration and return what the reader needs of it.

    Args:
        document: The parsed `adapter_config.json`.
        where: The file, for messages.

    Raises:
        UnsupportedAdapterError: A field that changes the delta is set, or an unknown one is.
        AdapterError: A field has a value of the wrong type or range, or r, lora_alpha or
            peft_type is missing.
    """
    peft_type = _string(document, "peft_type", where)
    if peft_type is None:
        raise AdapterError(
            f'{where}: peft_type is missing; expected "LORA"; this is no PEFT adapter\'s '
            "configuration, save the adapter again with PEFT"
        )
    if peft_type != "LORA":
        raise UnsupportedAdapterError(
            f"{where}: peft_type is {_short(peft_type)}; only LORA adapters can be read; train or "
            "convert the adapter to plain LoRA",
            feature="peft_type",
        )
    for name, value in document.items():
        _refuse_unless_harmless(name, value, where)
    _check_init(document.get("init_lora_weights"), where)
    return parse_settings(document, where)


def parse_settings(document: Mapping[str, Any], where: str) -> LoraSettings:
    """Return what a PEFT configuration says, without judging what the reader supports of it.

    Args:
        document: The parsed `adapter_config.json`.
        where: The file, for messages.

    Raises:
        AdapterError: A field has a value of the wrong type or range, or r or lora_alpha is
            missing.
    """
    bias = _string(document, "bias", where) or "none"
    if bias not in ("none", "all", "lora_only"):
        raise AdapterError(
            f"{where}: bias is {_short(bias)}; expected none, all or lora_only; correct the file"
        )
    return LoraSettings(
        rank=_rank(_required(document, "r", where), f"{where}: r"),
        alpha=_alpha(_required(document, "lora_alpha", where), f"{where}: lora_alpha"),
        rslora=_flag(document, "use_rslora", where),
        rank_pattern=_pattern(document, "rank_pattern", where, _rank),
        alpha_pattern=_pattern(document, "alpha_pattern", where, _alpha),
        bias=bias,
        saved_modules=_saved_modules(document, where),
        token_rows=_token_rows(document, where),
        base_model=_string(document, "base_model_name_or_path", where),
        revision=_string(document, "revision", where),
    )


def _lookup(pattern: Mapping[re.Pattern[str], NumberT], path: str, default: NumberT) -> NumberT:
    """Return `pattern`'s value for the module at `path`, by the rule of PEFT 0.15 and later.

    The first key, in the order of the file, that matches the end of the path as a regular
    expression decides; without one, a key that is the path itself does. The order of the *file*
    counts: PEFT sorts the keys when it saves, so overlapping patterns can load differently from
    how they were trained, here as in PEFT; a rank that then differs from the tensors is refused.
    Before 0.14, PEFT took the first match over both patterns for rank and alpha alike, and
    before 0.15 a pattern never matched a top-level module. What counts here is what today's PEFT
    loads.
    """
    path = pattern_path(path)
    for regex, value in pattern.items():
        if regex.match(path):
            return value
    exact = _regex(path)
    return next((value for regex, value in pattern.items() if regex.pattern == exact), default)


def pattern_path(path: str) -> str:
    """Return the path by which PEFT targets the module at `path` and looks up its patterns.

    An `nn.MultiheadAttention` is one target: its output projection shares its rank and alpha.
    """
    return path.removesuffix(".base_layer.out_proj")


def _regex(key: str) -> str:
    """Return PEFT's regular expression for the module paths that a pattern's key means."""
    return rf"(.*\.)?({key})$"


def _refuse_unless_harmless(name: str, value: Any, where: str) -> None:
    field = _BY_NAME.get(name)
    if field is not None and field.treatment != "refused":
        return
    if value is None or value is False or value in ("", [], {}):
        return
    if field is None:
        raise UnsupportedAdapterError(
            f"{where}: unknown field {_short(name)} is {_short(value)}; it may change the delta, "
            "so only null, false or empty is accepted; check what it means, and remove it if it "
            "has no effect on the weights",
            feature=name,
        )
    raise UnsupportedAdapterError(
        f"{where}: {name} is {_short(value)}, which is not supported: {field.because}; "
        "use an adapter trained without it",
        feature=name,
    )


def _check_init(value: Any, where: str) -> None:
    if value is None or isinstance(value, bool):
        return
    if not isinstance(value, str):
        raise AdapterError(
            f"{where}: init_lora_weights is {_short(value)}; expected true, false or a name; "
            "correct the file"
        )
    if value.lower() not in _HARMLESS_INITS:
        raise UnsupportedAdapterError(
            f"{where}: init_lora_weights is {_short(value)}, which is not supported: it changes "
            "the base weights (or is unknown), so that the factors are no update of the original "
            "base model; save the adapter with PEFT's "
            "save_pretrained(…, path_initial_model_for_weight_conversion=…), which turns it into "
            "plain LoRA",
            feature="init_lora_weights",
        )


def _saved_modules(document: Mapping[str, Any], where: str) -> tuple[str, ...]:
    value = document.get("modules_to_save")
    # An empty name would be the ending of every path and so explain any tensor whatever.
    if value is not None and not (
        isinstance(value, list) and all(isinstance(item, str) and item for item in value)
    ):
        raise AdapterError(
            f"{where}: modules_to_save is {_short(value)}; expected null or a list of module "
            "names; correct the file"
        )
    heads = _TASK_HEADS.get(_string(document, "task_type", where) or "", ())
    return tuple(dict.fromkeys([*(value or ()), *heads]))


def _token_rows(document: Mapping[str, Any], where: str) -> dict[str, int]:
    value = document.get("trainable_token_indices")
    by_ending: dict[str, Any] = value if isinstance(value, dict) else {"": value} if value else {}
    for ending, indices in by_ending.items():
        numbers = isinstance(indices, list) and all(type(index) is int for index in indices)
        if not numbers or (not ending and isinstance(value, dict)):
            raise AdapterError(
                f"{where}: trainable_token_indices is {_short(value)}; expected null, a list of "
                "token numbers, or an object from names of embeddings to such lists; correct the "
                "file"
            )
    return {ending: len(indices) for ending, indices in by_ending.items()}


def _required(document: Mapping[str, Any], name: str, where: str) -> Any:
    if document.get(name) is None:
        raise AdapterError(
            f"{where}: {name} is missing; without it the scaling is unknown; "
            "save the adapter again with PEFT"
        )
    return document[name]


def _rank(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise AdapterError(
            f"{where} is {_short(value)}; expected a whole number above 0; correct the file"
        )
    return value


def _alpha(value: Any, where: str) -> float:
    # Not converted to float: int / int rounds once, as in PEFT. A whole number too large for
    # float would overflow in the division.
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if not numeric or not abs(value) <= LARGEST_ALPHA:
        raise AdapterError(
            f"{where} is {_short(value)}; expected a finite number; correct the file"
        )
    number: float = value
    return number


def _flag(document: Mapping[str, Any], name: str, where: str) -> bool:
    value = document.get(name)
    if value is not None and not isinstance(value, bool):
        raise AdapterError(
            f"{where}: {name} is {_short(value)}; expected true or false; correct the file"
        )
    return bool(value)


def _string(document: Mapping[str, Any], name: str, where: str) -> str | None:
    value = document.get(name)
    if value is not None and not isinstance(value, str):
        raise AdapterError(
            f"{where}: {name} is {_short(value)}; expected text or null; correct the file"
        )
    return value or None


def _pattern(
    document: Mapping[str, Any], name: str, where: str, number: Callable[[Any, str], NumberT]
) -> dict[re.Pattern[str], NumberT]:
    value = document.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise AdapterError(
            f"{where}: {name} is {_short(value)}; expected an object from module names or "
            "regular expressions to numbers; correct the file"
        )
    pattern = {}
    for key, item in value.items():
        try:
            regex = re.compile(_regex(key))
        except Exception as error:
            # Not only re.error: also OverflowError, RecursionError, warnings turned into errors.
            raise AdapterError(
                f"{where}: {name} has the key {_short(key)}, which is no regular expression "
                f"({excerpt(str(error))}); correct the file"
            ) from error
        pattern[regex] = number(item, f"{where}: {name}[{_short(key)}]")
    return pattern


def _short(value: Any) -> str:
    # Not repr: it recurses as deep as the value is nested.
    return excerpt(_REPR.repr(value), 60)
