"""What each field of PEFT's `adapter_config.json` means for a delta: used, kept, or refused."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from unmerge.errors import AdapterError, UnsupportedAdapterError
from unmerge.formats.base import excerpt

__all__ = ["FIELDS", "ConfigField", "LoraSettings", "parse_config"]

NumberT = TypeVar("NumberT", int, float)
Treatment = Literal["used", "kept", "refused"]


@dataclass(frozen=True, slots=True)
class ConfigField:
    """One field of `adapter_config.json`.

    Attributes:
        name: The field.
        treatment: "used": its value is checked and enters the delta or decides which tensors
            are expected. "kept": any value is accepted and travels in `Adapter.config`.
            "refused": anything but null, false or empty is an `UnsupportedAdapterError`.
        because: Why, as a phrase that can end an error message.
    """

    name: str
    treatment: Treatment
    because: str


# docs/adapters.md shows this table; a test keeps the two equal.
FIELDS: tuple[ConfigField, ...] = (
    ConfigField("peft_type", "used", "only LORA is read; every other method has another delta"),
    ConfigField("r", "used", "the rank of every module that no rank_pattern matches"),
    ConfigField("lora_alpha", "used", "the numerator of the scaling; may be a fraction"),
    ConfigField("use_rslora", "used", "divides alpha by the root of the rank"),
    ConfigField("rank_pattern", "used", "ranks by module; the tensors must agree"),
    ConfigField("alpha_pattern", "used", "alphas by module"),
    ConfigField(
        "init_lora_weights",
        "used",
        "true, false, gaussian, eva, orthogonal and mica leave the base weights alone; any other "
        "value is refused, because PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ change them, so that "
        "the factors are no update of the original base model",
    ),
    ConfigField("bias", "used", "decides which bias tensors are expected and kept verbatim"),
    ConfigField("modules_to_save", "used", "decides which full weights are kept verbatim"),
    ConfigField("task_type", "used", "names the task head that PEFT saves without being told"),
    ConfigField("base_model_name_or_path", "used", "becomes the adapter's base model"),
    ConfigField("revision", "used", "becomes the revision of the base model"),
    ConfigField(
        "fan_in_fan_out",
        "kept",
        "only the base weight is stored transposed; A and B keep their shapes and meaning",
    ),
    ConfigField("target_modules", "kept", "the tensors say which modules are adapted"),
    ConfigField("exclude_modules", "kept", "the tensors say which modules are adapted"),
    ConfigField("layers_to_transform", "kept", "the tensors say which modules are adapted"),
    ConfigField("layers_pattern", "kept", "the tensors say which modules are adapted"),
    ConfigField("lora_dropout", "kept", "acts in training only"),
    ConfigField("inference_mode", "kept", "acts in training only"),
    ConfigField("runtime_config", "kept", "says where PEFT computes, not what"),
    ConfigField("merge_weights", "kept", "says when PEFT 0.2 added the delta, not what it was"),
    ConfigField("auto_mapping", "kept", "names the base model's class"),
    ConfigField("peft_version", "kept", "the version that saved the adapter"),
    ConfigField("megatron_core", "kept", "has no effect without megatron_config"),
    ConfigField("qalora_group_size", "kept", "has no effect without use_qalora"),
    ConfigField("eva_config", "kept", "EVA chooses the first A; the base weights stay"),
    ConfigField("corda_config", "kept", "init_lora_weights says whether CorDA was used"),
    ConfigField("lora_ga_config", "kept", "init_lora_weights says whether LoRA-GA was used"),
    ConfigField("ensure_weight_tying", "kept", "tied modules are saved under their own keys"),
    ConfigField(
        "use_dora", "refused", "DoRA rescales the updated weight, so there is no low-rank delta"
    ),
    ConfigField("lora_bias", "refused", "a bias inside factor B is no part of a low-rank delta"),
    ConfigField(
        "kasa_config",
        "refused",
        "KaSA puts a diagonal between B and A and truncates the base weights",
    ),
    ConfigField(
        "alora_invocation_tokens",
        "refused",
        "activated LoRA applies to some tokens only, so it is no change of the weights",
    ),
    ConfigField("use_qalora", "refused", "QALoRA pools the inputs before A"),
    ConfigField("use_bdlora", "refused", "BD-LoRA stores the blocks of block-diagonal factors"),
    ConfigField(
        "velora_config",
        "refused",
        "VeLoRA saves training state beside the factors, which only PEFT can use",
    ),
    ConfigField(
        "monteclora_config",
        "refused",
        "MonteCLoRA saves a distribution around A; its mean is the delta, the rest would be lost",
    ),
    ConfigField("arrow_config", "refused", "Arrow routes every token between adapters"),
    ConfigField(
        "target_parameters",
        "refused",
        "factors of bare parameters hold several experts and their keys name no module",
    ),
    ConfigField(
        "layer_replication", "refused", "the module paths are those of a base model made larger"
    ),
    ConfigField(
        "trainable_token_indices", "refused", "trained rows of an embedding are no low-rank delta"
    ),
    ConfigField("megatron_config", "refused", "Megatron's parallel layers split the factors"),
    ConfigField("loftq_config", "refused", "LoftQ replaces the base weights by quantised ones"),
    ConfigField("enable_lora", "refused", "PEFT 0.2 stored fused projections as convolutions"),
)

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
    # An nn.MultiheadAttention is one target: its output projection shares its rank and alpha.
    path = path.removesuffix(".base_layer.out_proj")
    for regex, value in pattern.items():
        if regex.match(path):
            return value
    exact = _regex(path)
    return next((value for regex, value in pattern.items() if regex.pattern == exact), default)


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
    if not numeric or not abs(value) <= 1e300:
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
