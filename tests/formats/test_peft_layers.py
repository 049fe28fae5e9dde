"""Directories with embeddings and convolutions, and those of other formats, loaded by PEFT."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.torch
import torch

import unmerge_bundle
from layers import KINDS, Layers
from unmerge_bundle import (
    AdapterFactorsEncoding,
    AdapterRecord,
    BundleWriter,
    DeltaEncoding,
    Encoding,
    FactorsEncoding,
    GenerationInfo,
    OutputExistsError,
    RecordedModule,
    RestoredModule,
    measure,
)
from unmerge_bundle.peft import named_factors

Make = Callable[..., Any]
DIGEST = f"sha256:{'0' * 64}"
PREFIX = "base_model.model."


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 5},
    "patterns": {
        "r": 3,
        "lora_alpha": 6,
        "use_rslora": True,
        "rank_pattern": {"tokens": 2, "square": 4},
        "alpha_pattern": {"tokens": 5, "oblong": 7},
    },
    "rows": {"r": 2, "lora_alpha": 6, "trainable_token_indices": {"rows": [1, 4]}},
    "saved": {"r": 2, "lora_alpha": 6, "modules_to_save": ["rows"], "bias": "lora_only"},
}


def trained(directory: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Write an adapter with PEFT itself; return the weights of the merged model."""
    spec = peft.LoraConfig(target_modules=list(KINDS), **config)
    model = peft.get_peft_model(Layers(), spec)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(directory))
    return weights(model)


def load(directory: Path) -> Any:
    with warnings.catch_warnings():
        # What PEFT does not find, or does not expect, it reports in a warning.
        warnings.simplefilter("error")
        return peft.PeftModel.from_pretrained(Layers(), str(directory))


def weights(model: Any) -> dict[str, torch.Tensor]:
    merged = model.merge_and_unload().state_dict()
    return {key: tensor.detach().clone() for key, tensor in merged.items()}


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(directory / "adapter_model.safetensors")


def assert_close(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].shape == tensor.shape, key
        torch.testing.assert_close(found[key], tensor, rtol=tolerance, atol=tolerance, msg=key)


def read(source: Path) -> tuple[dict[str, tuple[Any, Any, float]], dict[str, torch.Tensor]]:
    """Return what a reader gives: per module its matrices and scaling, and the other tensors."""
    tensors = tensors_of(source)
    model = load(source).base_model.model
    factors = {}
    for path, kind in KINDS.items():
        start = f"{PREFIX}{path}.lora_"
        if kind == "embedding":
            A, B = tensors.pop(f"{start}embedding_A"), tensors.pop(f"{start}embedding_B")
        else:
            A, B = (tensors.pop(f"{start}{f}.weight").flatten(1) for f in "AB")
        scaling = model.get_submodule(path).scaling["default"]
        factors[path] = (A.numpy(), B.numpy(), scaling)
    return factors, tensors


def bundle_of(
    source: Path, path: Path, *, source_format: str = "peft", config: str | None = None
) -> None:
    """Put one PEFT adapter into a bundle that keeps its factors as they are."""
    factors, others = read(source)
    info = GenerationInfo.model_validate(
        {
            "strategy": {"method": "none", "version": 1, "distribution": "tests"},
            "recipe": {},
            "store_dtype": "float32",
            "sources": [{"name": "one", "digest": DIGEST, "weight": 1.0}],
        }
    )
    text = (source / "adapter_config.json").read_text() if config is None else config
    record = AdapterRecord(
        name="one",
        format=source_format,
        config=text,
        base_model="tiny/base",
        digest=DIGEST,
        modules=tuple(
            RecordedModule(
                path=module, rank=len(A), source_scaling=s, dtype="float32", kind=KINDS[module]
            )
            for module, (A, _, s) in factors.items()
        ),
    )
    with BundleWriter(path, info=info) as writer:
        writer.add_adapter(record, {key: tensor.numpy() for key, tensor in others.items()})
        for module, (A, B, scaling) in factors.items():
            encoding = AdapterFactorsEncoding(
                names=("one",),
                scalings=(scaling,),
                A=(A,),
                B_transposed=(np.ascontiguousarray(B.T),),
                d_out=len(B),
                d_in=A.shape[1],
            )
            errors = measure(
                encoding, "one", (A, B), source_scaling=scaling, dtype="float32", path=module
            )
            writer.add_module(module, encoding, kind=KINDS[module], errors={"one": errors})
        writer.finish()


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("portable", [False, True])
def test_peft_merges_a_restored_adapter_into_the_same_weights(
    tmp_path: Path, case: str, portable: bool
) -> None:
    expected = trained(tmp_path / "source", CONFIGS[case])
    bundle_of(tmp_path / "source", tmp_path / "out.rmb")
    restored = unmerge_bundle.open(tmp_path / "out.rmb").restore("one")
    saved = restored.save_peft(tmp_path / "dir", portable=portable)
    assert saved.beside == ()
    assert_close(weights(load(tmp_path / "dir")), expected)

    before, after = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "dir")
    assert after.keys() == before.keys()
    config = (tmp_path / "dir" / "adapter_config.json").read_bytes()
    original = (tmp_path / "source" / "adapter_config.json").read_bytes()
    assert (config == original) == (not portable)
    for key, tensor in before.items():
        if portable and "lora_" in key:
            assert tensor.dim() == after[key].dim(), key
        else:
            assert torch.equal(after[key], tensor), key
            assert after[key].dtype == tensor.dtype
    if portable:
        document = json.loads(config)
        ranks = [len(tensor) for key, tensor in before.items() if "lora_A" in key or "ing_A" in key]
        assert document["target_modules"] == sorted(KINDS)
        assert document["lora_alpha"] == document["r"] == max(ranks)
        assert ("trainable_token_indices" in document) == (case == "rows")


def test_the_matrices_are_the_weights_that_peft_adds(tmp_path: Path) -> None:
    """Against PEFT's own merge, and the layouts written out by hand for each kind."""
    merged = trained(tmp_path / "source", CONFIGS["patterns"])
    bundle_of(tmp_path / "source", tmp_path / "out.rmb")
    restored = unmerge_bundle.open(tmp_path / "out.rmb").restore("one")
    base = Layers().state_dict()
    for path, kind in KINDS.items():
        delta = torch.from_numpy(restored.delta(path))
        weight = base[f"{path}.weight"]
        added = merged[f"{path}.weight"] - weight
        if kind == "embedding":
            by_hand = delta.T
        elif kind == "linear":
            by_hand = delta
        else:
            by_hand = torch.empty(weight.shape)
            for index in np.ndindex(*weight.shape):
                column = 0
                for place, size in zip(index[1:], weight.shape[1:], strict=True):
                    column = column * size + place
                by_hand[index] = delta[index[0], column]
        torch.testing.assert_close(by_hand, added, rtol=1e-4, atol=1e-4, msg=path)


def test_what_the_restored_matrices_hold_is_unflattened_without_a_copy() -> None:
    A, B = np.arange(36.0).reshape(2, 18), np.arange(6.0).reshape(3, 2)
    named = named_factors("a.b", "conv2d:3x3", A, B)
    assert {key: array.shape for key, array in named.items()} == {
        "base_model.model.a.b.lora_A.weight": (2, 2, 3, 3),
        "base_model.model.a.b.lora_B.weight": (3, 2, 1, 1),
    }
    assert named["base_model.model.a.b.lora_A.weight"][1, 1, 0, 2] == 18 + 9 + 0 * 3 + 2
    assert np.shares_memory(named["base_model.model.a.b.lora_A.weight"], A)
    assert {key: array.shape for key, array in named_factors("e", "embedding", A, B).items()} == {
        "base_model.model.e.lora_embedding_A": (2, 18),
        "base_model.model.e.lora_embedding_B": (3, 2),
    }


@pytest.mark.parametrize("dense", [False, True])
def test_peft_merges_an_exported_adapter_into_the_merged_weights(
    tmp_path: Path, make_merged: Make, dense: bool
) -> None:
    zoo = make_merged()
    zoo.encodings.clear()
    zoo.kinds = KINDS
    rng = np.random.default_rng(0)
    deltas = {}
    base = Layers().state_dict()
    for path, kind in KINDS.items():
        weight = base[f"{path}.weight"]
        d_out, d_in = weight.flatten(1).shape if kind != "embedding" else weight.T.shape
        A = rng.standard_normal((2, d_in)).astype(np.float32)
        B = rng.standard_normal((d_out, 2)).astype(np.float32)
        encoding: Encoding[Any] = DeltaEncoding(delta=B @ A) if dense else FactorsEncoding(A=A, B=B)
        zoo.encodings[path] = encoding
        deltas[path] = torch.from_numpy(B @ A)
    zoo.write(tmp_path / "out.rmb")
    merged = unmerge_bundle.open(tmp_path / "out.rmb").merged()
    merged.save_peft(tmp_path / "dir", rank=2 if dense else None)
    found = weights(load(tmp_path / "dir"))
    expected = {key: tensor.clone() for key, tensor in base.items()}
    for path, kind in KINDS.items():
        delta = deltas[path].T if kind == "embedding" else deltas[path]
        expected[f"{path}.weight"] += delta.reshape(expected[f"{path}.weight"].shape)
    assert_close(found, expected, 2e-5)


PRIVATE = json.dumps(
    {"alphas": {"x": [6.0, "float16"]}, "r": 64, "bias": "all", "use_rslora": True}
)


@pytest.mark.parametrize("config", [PRIVATE, "no JSON at all"])
@pytest.mark.parametrize("asked", [False, True])
def test_another_formats_configuration_is_no_configuration_of_pefts(
    tmp_path: Path, config: str, asked: bool
) -> None:
    expected = trained(tmp_path / "source", CONFIGS["plain"])
    bundle_of(tmp_path / "source", tmp_path / "out.rmb", source_format="kohya", config=config)
    restored = unmerge_bundle.open(tmp_path / "out.rmb").restore("one")
    assert (restored.format, restored.config) == ("kohya", config)
    saved = restored.save_peft(tmp_path / "dir", portable=asked)
    assert_close(weights(load(tmp_path / "dir")), expected)
    document = json.loads((tmp_path / "dir" / "adapter_config.json").read_bytes())
    assert document["lora_alpha"] == document["r"] == 3
    assert (document["bias"], document["use_rslora"]) == ("none", False)
    assert "Original format: `kohya`" in (tmp_path / "dir" / "README.md").read_text()
    assert saved.beside == ()
    assert sorted(file.name for file in (tmp_path / "dir").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_peft_adapter_says_nothing_of_other_formats(tmp_path: Path) -> None:
    trained(tmp_path / "source", CONFIGS["saved"])
    bundle_of(tmp_path / "source", tmp_path / "out.rmb")
    unmerge_bundle.open(tmp_path / "out.rmb").restore("one").save_peft(tmp_path / "dir")
    card = (tmp_path / "dir" / "README.md").read_text()
    assert "Original format" not in card
    assert "Not loaded by PEFT" not in card


def test_another_formats_tensors_lie_beside_the_adapter(tmp_path: Path) -> None:
    """Their keys mean nothing to PEFT: in its file they would be ignored, or taken for others."""
    trained(tmp_path / "source", CONFIGS["saved"])
    _, others = read(tmp_path / "source")
    assert others
    bundle_of(tmp_path / "source", tmp_path / "out.rmb", source_format="vendor.own", config="{}")
    restored = unmerge_bundle.open(tmp_path / "out.rmb").restore("one")
    saved = restored.save_peft(tmp_path / "dir")
    assert saved.beside == tuple(sorted(others))
    load(tmp_path / "dir")
    assert not tensors_of(tmp_path / "dir").keys() & others.keys()
    beside = safetensors.torch.load_file(tmp_path / "dir" / "verbatim.safetensors")
    assert beside.keys() == others.keys()
    for key, tensor in others.items():
        assert torch.equal(beside[key], tensor)
        assert beside[key].dtype == tensor.dtype
    card = (tmp_path / "dir" / "README.md").read_text().split("## Not loaded by PEFT")[1]
    assert "`verbatim.safetensors`" in card
    for key in others:
        assert f"- `{key}`" in card


def test_a_directory_with_tensors_beside_it_can_be_replaced(tmp_path: Path) -> None:
    trained(tmp_path / "source", CONFIGS["saved"])
    bundle_of(tmp_path / "source", tmp_path / "own.rmb", source_format="vendor.own", config="{}")
    bundle_of(tmp_path / "source", tmp_path / "peft.rmb")
    own, native = (
        unmerge_bundle.open(tmp_path / name).restore("one") for name in ("own.rmb", "peft.rmb")
    )
    own.save_peft(tmp_path / "dir")
    with pytest.raises(OutputExistsError):
        native.save_peft(tmp_path / "dir")
    native.save_peft(tmp_path / "dir", overwrite=True)
    assert not (tmp_path / "dir" / "verbatim.safetensors").exists()


def test_a_key_of_an_embeddings_factor_is_taken(tmp_path: Path, make_zoo: Make) -> None:
    """A verbatim tensor of that name can only come from reading the source wrongly."""
    zoo = make_zoo(verbatim={"base_model.model.layers.0.q_proj.lora_embedding_A": np.zeros(2)})
    zoo.write(tmp_path / "linear.rmb")
    unmerge_bundle.open(tmp_path / "linear.rmb").restore("math").save_peft(tmp_path / "linear")
    zoo.kinds = {"layers.0.q_proj": "embedding"}
    for name, record in zoo.records.items():
        modules = tuple(
            module.model_copy(update={"kind": zoo.kinds.get(module.path, "linear")})
            for module in record.modules
        )
        zoo.records[name] = record.model_copy(update={"modules": modules})
    zoo.write(tmp_path / "embedding.rmb")
    adapter = unmerge_bundle.open(tmp_path / "embedding.rmb").restore("math")
    assert isinstance(adapter.modules["layers.0.q_proj"], RestoredModule)
    with pytest.raises(unmerge_bundle.InvalidInputError, match="key of a restored factor"):
        adapter.save_peft(tmp_path / "embedding")
