"""Adapters made by PEFT, through store and bundle, back into PEFT: logits equal deltas by hand."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import unmerge_bundle
from adapters import MODULES, TinyModel
from unmerge import AdapterStore, MergePipeline, read_adapter

# Each adapter mixes rsLoRA, alpha patterns and rank patterns differently; ranks agree a module,
# as RMM needs, but not between modules.
SETTINGS = {
    "plain": {"lora_alpha": 6, "rank_pattern": {"mlp.up": 2}},
    "rslora": {"lora_alpha": 6, "use_rslora": True, "rank_pattern": {"mlp.up": 2}},
    "alphas": {
        "lora_alpha": 3,
        "alpha_pattern": {r"layers\.1\.attn\.q_proj": 11, "v_proj": 5},
        "rank_pattern": {r"^layers\.\d+\.mlp\.up": 2},
    },
    "both": {
        "lora_alpha": 9,
        "use_rslora": True,
        "alpha_pattern": {"up": 7},
        "rank_pattern": {"up": 2},
    },
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("peft")
    made = {}
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        targets = ["q_proj", "v_proj", "up"]
        config = peft.LoraConfig(r=3, target_modules=targets, modules_to_save=["head"], **settings)
        model = peft.get_peft_model(TinyModel(), config)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        model.save_pretrained(folder / name)
        made[name] = folder / name
    return made


@pytest.fixture(scope="module")
def store(directories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    store = AdapterStore.create(tmp_path_factory.mktemp("store") / "zoo")
    for directory in directories.values():
        store.add(read_adapter(directory))
    store.commit("made by PEFT")
    return store


def inputs() -> torch.Tensor:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(99))


def deltas_by_hand(directory: Path) -> dict[str, torch.Tensor]:
    """scaling · B @ A from the files alone, in float64, by the documented rules of PEFT."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    deltas = {}
    for path in MODULES:
        A = tensors[f"base_model.model.{path}.lora_A.weight"].double()
        B = tensors[f"base_model.model.{path}.lora_B.weight"].double()
        alpha = config["lora_alpha"]
        for pattern, value in config["alpha_pattern"].items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                alpha = value
                break
        rank = A.shape[0]
        scaling = alpha / rank**0.5 if config["use_rslora"] else alpha / rank
        deltas[path] = scaling * B @ A
    return deltas


def logits_by_hand(
    deltas: dict[str, torch.Tensor], head: dict[str, torch.Tensor] | None = None
) -> torch.Tensor:
    model = copy.deepcopy(TinyModel()).double()
    for path, delta in deltas.items():
        model.get_submodule(path).weight.data += delta
    if head is not None:
        model.head.load_state_dict({key: value.double() for key, value in head.items()})
    return model(inputs().double())


def head_of(directory: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(directory / "adapter_model.safetensors")
    prefix = "base_model.model.head."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def peft_logits(directory: Path) -> torch.Tensor:
    return peft.PeftModel.from_pretrained(TinyModel(), directory).eval()(inputs()).double()


def close(mine: torch.Tensor, theirs: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return bool((mine - theirs).abs().max() <= tolerance * theirs.abs().max())


@pytest.mark.parametrize("name", SETTINGS)
def test_the_hand_computation_is_what_peft_computes(
    directories: dict[str, Path], name: str
) -> None:
    directory = directories[name]
    expected = logits_by_hand(deltas_by_hand(directory), head_of(directory))
    assert close(peft_logits(directory), expected)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("fold_scaling", [False, True])
def test_restored_adapters_give_the_originals_logits(
    directories: dict[str, Path],
    store: AdapterStore,
    tmp_path: Path,
    portable: bool,
    fold_scaling: bool,
) -> None:
    merger = {"method": "rmm", "basis_size": 3, "fold_scaling": fold_scaling}
    MergePipeline(store, merger).run(tmp_path / "out.rmb")
    bundle = unmerge_bundle.open(tmp_path / "out.rmb")
    for name, directory in directories.items():
        out = tmp_path / name
        bundle.restore(name).save_peft(out, portable=portable)
        expected = logits_by_hand(deltas_by_hand(directory), head_of(directory))
        assert close(peft_logits(out), expected), name
        config = json.loads((out / "adapter_config.json").read_text())
        original = json.loads((directory / "adapter_config.json").read_text())
        if portable or fold_scaling:
            assert config["lora_alpha"] == config["r"]
            assert not config["use_rslora"]
            assert not config["alpha_pattern"]
            assert not config["rank_pattern"]
        else:
            assert config == original


def test_lossy_restorations_give_the_logits_of_the_restored_deltas(
    directories: dict[str, Path], store: AdapterStore, tmp_path: Path
) -> None:
    MergePipeline(store, {"method": "rmm", "basis_size": 1}).run(tmp_path / "out.rmb")
    bundle = unmerge_bundle.open(tmp_path / "out.rmb")
    for name, directory in directories.items():
        restored = bundle.restore(name)
        restored.save_peft(tmp_path / name)
        deltas = {path: torch.from_numpy(restored.delta(path)).double() for path in MODULES}
        expected = logits_by_hand(deltas, head_of(directory))
        assert close(peft_logits(tmp_path / name), expected)
        exact = logits_by_hand(deltas_by_hand(directory), head_of(directory))
        assert not close(expected, exact, 1e-3)


@pytest.mark.parametrize(
    ("merger", "coefficients"),
    [
        ({"method": "task_arithmetic", "scale": 0.5}, dict.fromkeys(SETTINGS, 0.5)),
        ({"method": "average"}, dict.fromkeys(SETTINGS, 0.25)),
        ({"method": "mm_svd", "rank": 12}, dict.fromkeys(SETTINGS, 1.0)),
        ({"method": "mm_svd", "rank": 12, "split": "B"}, dict.fromkeys(SETTINGS, 1.0)),
        ({"method": "mm_svd", "rank": 4, "inner": {"method": "average"}}, None),
    ],
)
def test_exported_adapters_give_the_logits_of_the_merged_delta(
    directories: dict[str, Path],
    store: AdapterStore,
    tmp_path: Path,
    merger: dict[str, object],
    coefficients: dict[str, float] | None,
) -> None:
    MergePipeline(store, merger).run(tmp_path / "out.rmb")
    unmerge_bundle.open(tmp_path / "out.rmb").merged().save_peft(tmp_path / "merged")
    by_hand = {name: deltas_by_hand(directory) for name, directory in directories.items()}
    weights = coefficients or dict.fromkeys(SETTINGS, 0.25)
    merged = {path: sum(weights[n] * by_hand[n][path] for n in by_hand) for path in MODULES}
    if coefficients is None:  # truncated: the dense singular value decomposition, by hand
        for path, delta in merged.items():
            U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
            merged[path] = U[:, :4] @ torch.diag(S[:4]) @ Vh[:4]
    assert close(peft_logits(tmp_path / "merged"), logits_by_hand(merged))
