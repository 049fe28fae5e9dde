"""The fields of PEFT's `adapter_config.json`: which are used, kept or refused, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["FIELDS", "ConfigField"]

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
    ConfigField(
        "trainable_token_indices",
        "used",
        "decides which trained rows of embeddings are kept verbatim; they replace rows, so they "
        "are no delta",
    ),
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
        "one pair of factors holds all experts of a bare parameter, and its keys do not say which "
        "parameter of the module that is",
    ),
    ConfigField(
        "layer_replication", "refused", "the module paths are those of a base model made larger"
    ),
    ConfigField("megatron_config", "refused", "Megatron's parallel layers split the factors"),
    ConfigField("loftq_config", "refused", "LoftQ replaces the base weights by quantised ones"),
    ConfigField("enable_lora", "refused", "PEFT 0.2 stored fused projections as convolutions"),
)
