"""The oracle is PEFT itself: whatever it trains, saves and loads, the reader must agree with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from adapters import MODULES, TinyModel, make_adapter, peft_config, write_peft_directory
from unmerge.formats import read_peft

pytestmark = [
    # PEFT's own, about patterns that match nothing and about initialisations tested on purpose.
    pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def train(model: nn.Module, seed: int = 0, **config: Any) -> Any:
    """Return `model` with a LoRA whose every trained tensor is random."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(adapted.named_parameters()):
        if parameter.requires_grad or "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return adapted


def save(adapted: Any, directory: Path, **options: Any) -> Path:
    adapted.save_pretrained(directory, **options)
    return directory


def reload(model: nn.Module, directory: Path) -> Any:
    return peft.PeftModel.from_pretrained(model, directory)


def deltas(adapted: Any) -> dict[str, torch.Tensor]:
    """Return what PEFT adds to each base weight, as `(d_out, d_in)`, computed in float64."""
    result = {}
    for path, layer in adapted.double().base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            delta = layer.get_delta_weight("default")
            result[path] = delta.T if layer.fan_in_fan_out else delta
    return result


def read_deltas(directory: Path) -> dict[str, torch.Tensor]:
    return {
        path: factors.scaling * factors.B.double() @ factors.A.double()
        for path, factors in read_peft(directory).modules.items()
    }


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert sorted(got) == sorted(want)
    for path, delta in want.items():
        assert got[path].shape == delta.shape
        assert delta.abs().max() > 0
        error = torch.linalg.norm(got[path] - delta) / torch.linalg.norm(delta)
        assert error < 1e-12, path


ALL = ["q_proj", "v_proj", "up", "down"]

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ALL, "r": 4, "lora_alpha": 8},
    "fractional alpha": {"target_modules": ALL, "r": 3, "lora_alpha": 2.5},
    "negative alpha": {"target_modules": ALL, "r": 3, "lora_alpha": -4},
    "rank above both dimensions": {"target_modules": ["v_proj"], "r": 16, "lora_alpha": 8},
    "rslora": {"target_modules": ALL, "r": 3, "lora_alpha": 8, "use_rslora": True},
    "patterns by last name": {
        "target_modules": ALL,
        "r": 4,
        "rank_pattern": {"q_proj": 2, "up": 7},
        "alpha_pattern": {"v_proj": 3, "up": 0.5},
    },
    "patterns by end of path": {
        "target_modules": ALL,
        "r": 4,
        "rank_pattern": {"0.attn.q_proj": 2, "attn.v_proj": 3, "proj": 9},
        "alpha_pattern": {"1.mlp.up": 3},
    },
    "patterns by regular expression": {
        "target_modules": ALL,
        "r": 4,
        "use_rslora": True,
        "rank_pattern": {r"layers\.[0]\..*": 2, r"mlp\.(up|down)": 5},
        "alpha_pattern": {r"layers\.\d+\.attn\.(q|v)_proj": 32, r"mlp\.\w+": 1},
    },
    "patterns anchored at the start": {
        "target_modules": ALL,
        "r": 4,
        "rank_pattern": {"^layers.0.attn.q_proj": 2, "^attn.v_proj": 3},
        "alpha_pattern": {"^layers.1.attn.q_proj": 16, "^q_proj": 99},
    },
    "whole paths": {
        "target_modules": ALL,
        "r": 4,
        "rank_pattern": {"layers.1.mlp.down": 6},
        "alpha_pattern": {"layers.1.mlp.down": 6},
    },
    "a top-level module": {
        "target_modules": ["head", "q_proj"],
        "r": 4,
        "rank_pattern": {"head": 2},
        "alpha_pattern": {"head": 5},
    },
    "layers_to_transform": {
        "target_modules": ALL,
        "r": 4,
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "gaussian": {"target_modules": ALL, "init_lora_weights": "gaussian"},
    "random": {"target_modules": ALL, "init_lora_weights": False},
    "orthogonal": {"target_modules": ALL, "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": ALL, "init_lora_weights": "mica"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_delta_equals_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    adapted = train(TinyModel(), **settings)
    directory = save(adapted, tmp_path / "task")
    got = read_deltas(directory)
    assert_same(got, deltas(adapted))
    assert_same(got, deltas(reload(TinyModel(), directory)))


def test_first_matching_key_in_the_order_of_the_file_decides(tmp_path: Path) -> None:
    """PEFT sorts the keys on saving, so only a reloaded model is the oracle for overlaps."""
    adapted = train(
        TinyModel(),
        target_modules=ALL,
        r=4,
        alpha_pattern={"q_proj": 2, ".*0.attn.q_proj": 3, "attn.*": 5, ".*": 7},
    )
    directory = save(adapted, tmp_path / "task")
    got = read_deltas(directory)
    assert_same(got, deltas(reload(TinyModel(), directory)))
    scalings = {path: f.scaling for path, f in read_peft(directory).modules.items()}
    assert set(scalings.values()) == {7 / 4}, "'.*' sorts first and matches everything"

    text = (directory / "adapter_config.json").read_text()
    config = json.loads(text)
    config["alpha_pattern"] = {"q_proj": 2, ".*0.attn.q_proj": 3, "attn.*": 5, ".*": 7}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    assert_same(read_deltas(directory), deltas(reload(TinyModel(), directory)))
    assert read_peft(directory).modules["layers.0.attn.q_proj"].scaling == 2 / 4
    assert read_peft(directory).modules["layers.0.attn.v_proj"].scaling == 5 / 4


def test_a_path_that_is_no_match_of_itself_still_finds_its_own_key(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("q+proj", nn.Linear(6, 5))

    adapted = train(Odd(), target_modules=["q+proj"], r=4, alpha_pattern={"q+proj": 3})
    directory = save(adapted, tmp_path / "task")
    assert_same(read_deltas(directory), deltas(adapted))
    assert read_peft(directory).modules["q+proj"].scaling == 3 / 4


def test_conv1d_factors_keep_their_meaning(tmp_path: Path) -> None:
    adapted = train(
        TinyModel(conv1d=True),
        target_modules=["q_proj", "v_proj", "up"],
        fan_in_fan_out=True,
        r=3,
        lora_alpha=5,
    )
    directory = save(adapted, tmp_path / "task")
    assert_same(read_deltas(directory), deltas(adapted))
    factors = read_peft(directory).modules["layers.0.mlp.up"]
    assert (factors.d_out, factors.d_in, factors.rank) == (20, 12, 3)


def test_multihead_attention_shares_rank_and_alpha_with_its_output(tmp_path: Path) -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    adapted = train(
        model, target_modules=["attn"], r=4, rank_pattern={"attn": 2}, alpha_pattern={"attn": 6}
    )
    adapter = read_peft(save(adapted, tmp_path / "task"))
    assert set(adapter.modules) == {"attn", "attn.base_layer.out_proj"}
    attention = adapted.base_model.model["attn"]
    assert attention.base_layer.out_proj.scaling["default"] == 3
    assert {factors.scaling for factors in adapter.modules.values()} == {3.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stored_bits_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    adapted = train(TinyModel(), target_modules=["q_proj"]).to(dtype)
    directory = save(adapted, tmp_path / "task")
    raw = load_file(directory / "adapter_model.safetensors")
    for path, factors in read_peft(directory).modules.items():
        for label, tensor in (("A", factors.A), ("B", factors.B)):
            stored = raw[f"base_model.model.{path}.lora_{label}.weight"]
            assert tensor.dtype == dtype
            assert torch.equal(tensor.view(torch.uint8), stored.view(torch.uint8))


def test_pickled_weights_give_the_same_adapter(tmp_path: Path) -> None:
    adapted = train(TinyModel(), target_modules=ALL, modules_to_save=["head"])
    safe = read_peft(save(adapted, tmp_path / "safe"))
    directory = save(adapted, tmp_path / "pickled", safe_serialization=False)
    assert not (directory / "adapter_model.safetensors").exists()
    assert read_peft(directory).digest() == safe.digest()


def test_safetensors_win_over_pickle_as_in_peft(tmp_path: Path) -> None:
    directory = save(train(TinyModel(), target_modules=["q_proj"]), tmp_path / "task")
    expected = read_peft(directory).digest()
    (directory / "adapter_model.bin").write_bytes(b"not looked at")
    assert read_peft(directory).digest() == expected


# -- what is no low-rank update --------------------------------------------------------------


def verbatim_keys(directory: Path) -> set[str]:
    adapter = read_peft(directory)
    stored = load_file(directory / "adapter_model.safetensors")
    for key, tensor in adapter.verbatim.items():
        assert torch.equal(tensor, stored[key])
    assert len(adapter.verbatim) + 2 * len(adapter.modules) == len(stored)
    return {key.removeprefix("base_model.model.") for key in adapter.verbatim}


def test_modules_to_save_are_kept(tmp_path: Path) -> None:
    adapted = train(TinyModel(), target_modules=["q_proj"], modules_to_save=["head", "mlp.down"])
    assert verbatim_keys(save(adapted, tmp_path / "task")) == {
        "head.weight",
        "head.bias",
        "layers.0.mlp.down.weight",
        "layers.1.mlp.down.weight",
    }


def test_all_biases_are_kept(tmp_path: Path) -> None:
    adapted = train(TinyModel(), target_modules=["q_proj"], modules_to_save=["head"], bias="all")
    keys = verbatim_keys(save(adapted, tmp_path / "task"))
    assert "layers.0.attn.q_proj.base_layer.bias" in keys
    assert "norm.bias" in keys
    # PEFT saves the head's bias three times over.
    assert {"head.bias", "head.original_module.bias", "head.modules_to_save.bias"} <= keys


def test_biases_of_adapted_modules_are_kept(tmp_path: Path) -> None:
    adapted = train(TinyModel(), target_modules=["q_proj"], bias="lora_only")
    assert verbatim_keys(save(adapted, tmp_path / "task")) == {
        "layers.0.attn.q_proj.base_layer.bias",
        "layers.1.attn.q_proj.base_layer.bias",
    }


def tiny_llama(**changes: Any) -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        **changes,
    )
    return config, transformers


def test_resized_embeddings_saved_by_peft_are_kept(tmp_path: Path) -> None:
    config, transformers = tiny_llama()
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(20)
    adapted = train(model, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="has been resized"):
        directory = save(adapted, tmp_path / "task")
    assert verbatim_keys(directory) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert read_peft(directory).base_model == str(tmp_path / "base")


def test_targeted_output_embedding_is_a_module_and_its_base_weight_is_kept(tmp_path: Path) -> None:
    config, transformers = tiny_llama()
    adapted = train(
        transformers.LlamaForCausalLM(config),
        target_modules=["q_proj", "lm_head"],
        task_type="CAUSAL_LM",
    )
    with pytest.warns(UserWarning, match="embedding layers found in"):
        directory = save(adapted, tmp_path / "task")
    assert "lm_head" in read_peft(directory).modules
    assert verbatim_keys(directory) == {"lm_head.base_layer.weight"}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tied_embeddings_in_modules_to_save_are_kept(tmp_path: Path) -> None:
    config, transformers = tiny_llama(tie_word_embeddings=True)
    adapted = train(
        transformers.LlamaForCausalLM(config),
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
        task_type="CAUSAL_LM",
    )
    keys = verbatim_keys(save(adapted, tmp_path / "task"))
    assert keys == {"model.embed_tokens.weight", "lm_head.weight"}
    wrapped = verbatim_keys(save(adapted, tmp_path / "all", save_embedding_layers=True))
    assert "lm_head.modules_to_save.weight" in wrapped - keys


def test_task_head_that_peft_adds_by_itself_is_kept(tmp_path: Path) -> None:
    config, transformers = tiny_llama(num_labels=3, pad_token_id=0)
    adapted = train(
        transformers.LlamaForSequenceClassification(config),
        target_modules=["q_proj"],
        task_type="SEQ_CLS",
    )
    directory = save(adapted, tmp_path / "task")
    assert verbatim_keys(directory) == {"score.weight"}

    # Before 0.11 PEFT kept the head's name to itself.
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": None}))
    assert verbatim_keys(directory) == {"score.weight"}


def test_configuration_text_is_kept_byte_for_byte(tmp_path: Path) -> None:
    adapter = make_adapter("sql", seed=1)
    directory = write_peft_directory(adapter, tmp_path / "sql")
    text = adapter.config.replace("{", "{\r\n ", 1).replace("org/base", "örg/base") + "\n\n"
    (directory / "adapter_config.json").write_bytes(text.encode())
    got = read_peft(directory)
    assert got.config == text
    assert got.base_model == "örg/base"
    assert got.source == str(directory)
    assert got.format == "peft"


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_converted_to_plain_lora_is_the_change_since_the_start(init: str, tmp_path: Path) -> None:
    """PEFT's conversion doubles the rank and makes the update relative to the original base."""
    base = TinyModel().state_dict()
    adapted = peft.get_peft_model(
        TinyModel(), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init)
    )
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "start")
    adapted.peft_config["default"].init_lora_weights = init
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(3)
            )
    directory = save(
        adapted, tmp_path / "task", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    adapter = read_peft(directory)
    assert adapter.modules["layers.0.attn.q_proj"].rank == 8
    merged = adapted.merge_and_unload().state_dict()
    for path, delta in read_deltas(directory).items():
        change = merged[f"{path}.weight"].double() - base[f"{path}.weight"].double()
        assert torch.linalg.norm(delta - change) / torch.linalg.norm(change) < 1e-5


# -- the shared test helpers -----------------------------------------------------------------


def test_helper_writes_the_configuration_peft_writes(tmp_path: Path) -> None:
    written = peft.LoraConfig(base_model_name_or_path="org/base", inference_mode=True)
    assert peft_config(rank=8) == json.loads(json.dumps(written.to_dict()))


@pytest.mark.parametrize("rslora", [False, True])
def test_helper_adapters_load_in_peft(rslora: bool, tmp_path: Path) -> None:
    adapter = make_adapter(
        "sql",
        seed=1,
        rslora=rslora,
        ranks={"layers.0.attn.q_proj": 2},
        verbatim={
            "base_model.model.head.weight": torch.ones(3, 12),
            "base_model.model.head.bias": torch.ones(3),
        },
    )
    assert set(adapter.modules) == set(MODULES)
    directory = write_peft_directory(adapter, tmp_path / "sql")
    assert read_peft(directory).digest() == adapter.digest()
    loaded = reload(TinyModel(), directory)
    assert_same(read_deltas(directory), deltas(loaded))
