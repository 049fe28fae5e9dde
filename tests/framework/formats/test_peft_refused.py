"""Every feature the reader refuses, made with PEFT itself where PEFT can make it here."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from adapters import TinyModel, make_adapter, peft_config, peft_tensors, write_peft_directory
from unmerge.errors import UnsupportedAdapterError
from unmerge.formats import read_peft
from unmerge.formats.peft_config import parse_config
from unmerge.formats.peft_fields import FIELDS
from unmerge.formats.peft_keys import REFUSED_TENSORS


def save(directory: Path, config: Any, model: nn.Module | None = None) -> Path:
    with warnings.catch_warnings():
        # PEFT comments on most of these features.
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model or TinyModel(), config)
        adapted.save_pretrained(directory)
    return directory


def lora(**settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})


def refusal(directory: Path) -> UnsupportedAdapterError:
    with pytest.raises(UnsupportedAdapterError) as caught:
        read_peft(directory)
    assert caught.value.feature in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def made_with_peft() -> dict[str, tuple[str, Any]]:
    """Return, by test name, the feature refused and a function that saves an adapter with it."""
    tuners = peft.tuners.lora.config
    return {
        "DoRA": ("use_dora", lambda: lora(use_dora=True)),
        "bias in B": ("lora_bias", lambda: lora(lora_bias=True)),
        "PiSSA": ("init_lora_weights", lambda: lora(init_lora_weights="pissa")),
        "fast PiSSA": ("init_lora_weights", lambda: lora(init_lora_weights="pissa_niter_2")),
        "OLoRA": ("init_lora_weights", lambda: lora(init_lora_weights="olora")),
        "LoRA-GA": (
            "init_lora_weights",
            lambda: lora(init_lora_weights="lora_ga", lora_ga_config=tuners.LoraGAConfig()),
        ),
        "KaSA": ("kasa_config", lambda: lora(kasa_config=tuners.KasaConfig())),
        "VeLoRA": (
            "velora_config",
            lambda: lora(velora_config=tuners.VeloraConfig(num_groups=4, init_type="random")),
        ),
        "MonteCLoRA": (
            "monteclora_config",
            lambda: lora(monteclora_config=tuners.MontecloraConfig(buffer_size=1, num_samples=2)),
        ),
        "BD-LoRA": (
            "use_bdlora",
            lambda: lora(use_bdlora=tuners.BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)),
        ),
        "aLoRA": ("alora_invocation_tokens", lambda: lora(alora_invocation_tokens=[1, 2])),
        "bare parameters": (
            "target_parameters",
            lambda: lora(target_modules=[], target_parameters=["q_proj.weight"]),
        ),
        "AdaLoRA": (
            "peft_type",
            lambda: peft.AdaLoraConfig(total_step=5, init_r=2, target_modules=["q_proj"]),
        ),
        "LoHa": ("peft_type", lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"])),
    }


@pytest.mark.parametrize("case", made_with_peft())
def test_made_with_peft(case: str, tmp_path: Path) -> None:
    feature, config = made_with_peft()[case]
    assert refusal(save(tmp_path / "task", config())).feature == feature


def test_replicated_layers(tmp_path: Path) -> None:
    import transformers

    llama = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    config = lora(layer_replication=[[0, 2], [1, 2]], task_type="CAUSAL_LM")
    directory = save(tmp_path / "task", config, transformers.LlamaForCausalLM(llama))
    assert refusal(directory).feature == "layer_replication"


OFF: list[Any] = [None, False, "", [], {}]
REFUSED_VALUES: dict[str, Any] = {
    "use_dora": True,
    "lora_bias": True,
    "kasa_config": {"beta": 1e-4},
    "alora_invocation_tokens": [3],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "velora_config": {"scale": 1.0},
    "monteclora_config": {"num_samples": 8},
    "arrow_config": {"top_k": 3},
    "target_parameters": ["experts.up"],
    "layer_replication": [[0, 1]],
    "megatron_config": {"hidden_size": 1},
    "loftq_config": {"loftq_bits": 4},
    "enable_lora": [True],
}


def test_every_refused_field_is_tried() -> None:
    assert set(REFUSED_VALUES) == {f.name for f in FIELDS if f.treatment == "refused"}


@pytest.mark.parametrize("field", REFUSED_VALUES)
def test_refused_field(field: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match=f"c.json: {field} is") as caught:
        parse_config(peft_config(changes={field: REFUSED_VALUES[field]}), "c.json")
    assert caught.value.feature == field
    for off in OFF:
        parse_config(peft_config(changes={field: off}), "c.json")


def test_every_field_of_this_peft_is_in_the_table() -> None:
    """A new PEFT release may add a field that changes the delta: decide, then list it."""
    known = set(peft.LoraConfig().to_dict())
    assert known <= {field.name for field in FIELDS}
    parse_config(json.loads(json.dumps(peft.LoraConfig().to_dict())), "c.json")


@pytest.mark.parametrize("value", [True, 0, 0.0, 1, "x", [0], {"a": None}])
def test_unknown_field(value: Any) -> None:
    with pytest.raises(UnsupportedAdapterError, match="unknown field 'use_newest'") as caught:
        parse_config(peft_config(changes={"use_newest": value}), "c.json")
    assert caught.value.feature == "use_newest"


@pytest.mark.parametrize("value", OFF)
def test_unknown_field_that_is_off(value: Any) -> None:
    parse_config(peft_config(changes={"use_newest": value}), "c.json")


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_16", "PiSSA", "olora", "OLoRA", "corda", "loftq", "lora_ga", "x"]
)
def test_initialisations_that_change_the_base(init: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match=f"init_lora_weights is '{init}'"):
        parse_config(peft_config(changes={"init_lora_weights": init}), "c.json")


@pytest.mark.parametrize(
    "init", [None, True, False, "gaussian", "Gaussian", "eva", "orthogonal", "mica"]
)
def test_initialisations_that_leave_the_base_alone(init: Any) -> None:
    parse_config(peft_config(changes={"init_lora_weights": init}), "c.json")


def write_with(directory: Path, key: str, *, changes: dict[str, Any] | None = None) -> Path:
    """Write a plain adapter with one tensor more."""
    adapter = make_adapter("task", seed=0)
    write_peft_directory(adapter, directory)
    tensors = peft_tensors(adapter) | {f"base_model.model.{key}": torch.ones(2)}
    save_file(tensors, directory / "adapter_model.safetensors")
    config = json.loads(adapter.config) | (changes or {})
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("fragment", REFUSED_TENSORS)
@pytest.mark.parametrize("ending", ["", ".weight"])
def test_refused_tensor_that_the_configuration_hides(
    fragment: str, ending: str, tmp_path: Path
) -> None:
    directory = write_with(tmp_path / "task", f"layers.0.attn.q_proj.{fragment}{ending}")
    assert refusal(directory).feature == fragment


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("layers.0.attn.q_proj.weight", {}),
        ("head.weight", {}),
        ("head.weight", {"modules_to_save": ["classifier"]}),
        ("head.bias", {}),
        ("head.bias", {"bias": "lora_only"}),
        ("layers.0.attn.q_proj.base_layer.bias", {"bias": "none"}),
        ("layers.0.attn.q_proj.base_layer.weight", {"bias": "all"}),
        ("head", {"modules_to_save": ["head"]}),
        ("score.weight", {"task_type": "CAUSAL_LM"}),
        ("qa_outputs.weight", {"task_type": "SEQ_CLS"}),
        ("model.embed_tokens.running_mean", {}),
        ("model.not_embed_tokens.weight", {}),
        ("layers.0.attn.q_proj.lora_A.default.weight", {}),
        ("layers.0.attn.q_proj.lora_B.scale", {"bias": "all"}),
        ("layers.0.attn.q_proj.lora_embedding_A.default", {"bias": "all"}),
        ("wte.token_adapter.trainable_tokens_delta", {"trainable_token_indices": {"lm_head": [1]}}),
    ],
)
def test_tensor_that_nothing_explains(key: str, changes: dict[str, Any], tmp_path: Path) -> None:
    directory = write_with(tmp_path / "task", key, changes=changes)
    assert refusal(directory).feature == f"base_model.model.{key}"


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("head.weight", {"modules_to_save": ["head"]}),
        # PEFT matches the end of a path, not whole words.
        ("lm_thead.weight", {"modules_to_save": ["head"]}),
        ("a.head.b.c.weight", {"modules_to_save": ["a.head"]}),
        ("head.modules_to_save.weight", {"modules_to_save": ["head"]}),
        ("score.weight", {"task_type": "TOKEN_CLS"}),
        ("qa_outputs.bias", {"task_type": "QUESTION_ANS"}),
        ("norm.bias", {"bias": "all"}),
        ("layers.0.attn.q_proj.bias", {"bias": "lora_only"}),
        ("layers.0.attn.q_proj.base_layer.bias", {"bias": "lora_only"}),
        ("model.embed_tokens.weight", {}),
        ("lm_head.bias", {}),
    ],
)
def test_tensor_that_is_explained(key: str, changes: dict[str, Any], tmp_path: Path) -> None:
    directory = write_with(tmp_path / "task", key, changes=changes)
    assert set(read_peft(directory).verbatim) == {f"base_model.model.{key}"}


def test_tensor_without_the_prefix(tmp_path: Path) -> None:
    directory = write_peft_directory(make_adapter("task", seed=0), tmp_path / "task")
    key = "unet.q_proj.lora_A.weight"
    save_file({key: torch.ones(4, 3)}, directory / "adapter_model.safetensors")
    assert refusal(directory).feature == key
