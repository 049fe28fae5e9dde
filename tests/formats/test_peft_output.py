"""Directories we write, loaded by PEFT itself."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from transformers.pytorch_utils import Conv1D

import unmerge_bundle
from unmerge_bundle import (
    AdapterRecord,
    AffineBasisEncoding,
    BundleWriter,
    FactorsEncoding,
    InvalidInputError,
    ManifestError,
    MissingBlobError,
    ModuleErrors,
    NonFiniteError,
    OutputExistsError,
    RecordedModule,
    RestoredAdapter,
    SavedAdapter,
    WrongKindError,
    reconstruct,
)
from unmerge_bundle.arrays import FLOAT_DTYPES, FloatDtype
from unmerge_bundle.blob import BlobReader

Make = Callable[..., Any]
SHAPES = ("layers.0.q_proj", "layers.1.v_proj")  # the modules of `make_zoo` and `make_merged`
DIGEST = f"sha256:{'0' * 64}"


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(), Layer()])
        self.head = torch.nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(5, 7)
        self.down = torch.nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(torch.tanh(self.up(x)))


def peft_deltas(model: Any) -> dict[str, Any]:
    layers: list[tuple[str, Any]] = [
        (name.removeprefix("base_model.model."), module)
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    ]
    return {
        name: layer.get_delta_weight("default").detach().double().numpy() for name, layer in layers
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"layers.0.up": 2, "down": 3},
        "alpha_pattern": {"layers.1.up": 5},
    },
    "head": {"r": 2, "lora_alpha": 3, "modules_to_save": ["head"]},
    "bias": {"r": 2, "lora_alpha": 6, "bias": "lora_only"},
}


def trained(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Write an adapter with PEFT itself; return its deltas."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Tiny(), peft.LoraConfig(target_modules=["up", "down"], **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(str(directory))
    return peft_deltas(model)


def bundle_of(source: Path, path: Path, *, fold: bool = False) -> None:
    """Put one PEFT adapter into a bundle whose mean is the adapter: an exact restoration."""
    config = (source / "adapter_config.json").read_text()
    tensors = safetensors.torch.load_file(source / "adapter_model.safetensors")
    spec = peft.LoraConfig.from_pretrained(str(source))
    paths = sorted(
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        for key in tensors
        if key.endswith(".lora_A.weight")
    )
    encodings: dict[str, Any] = {}
    modules = []
    for module in paths:
        A, B = (
            tensors.pop(f"base_model.model.{module}.lora_{f}.weight").numpy() for f in ("A", "B")
        )
        alpha = next(
            (a for key, a in spec.alpha_pattern.items() if module.endswith(key)), spec.lora_alpha
        )
        scaling = alpha / (len(A) ** 0.5 if spec.use_rslora else len(A))
        if fold:
            B = B * np.float32(scaling)
        modules.append(
            RecordedModule(path=module, rank=len(A), source_scaling=scaling, dtype="float32")
        )
        encodings[module] = AffineBasisEncoding(
            names=("one",),
            scalings=(1.0 if fold else scaling,),
            mean_A=A,
            basis_A=np.zeros((0, *A.shape), np.float32),
            coefficients_A=np.zeros((1, 0, A.shape[1]), np.float32),
            mean_B=B,
            basis_B=np.zeros((0, *B.shape), np.float32),
            coefficients_B=np.zeros((1, 0, B.shape[0]), np.float32),
        )
    info = unmerge_bundle.GenerationInfo.model_validate(
        {
            "strategy": {"method": "rmm", "version": 1, "distribution": "unmerge"},
            "recipe": {},
            "store_dtype": "float32",
            "sources": [{"name": "one", "digest": DIGEST, "weight": 1.0}],
        }
    )
    record = AdapterRecord(
        name="one",
        format="peft",
        config=config,
        base_model="tiny/base",
        revision="v1",
        digest=DIGEST,
        modules=tuple(modules),
    )
    with BundleWriter(path, info=info) as writer:
        writer.add_adapter(record, {key: tensor.numpy() for key, tensor in tensors.items()})
        for module, encoding in encodings.items():
            writer.add_module(
                module, encoding, errors={"one": ModuleErrors(factors=0.0, delta=0.125)}
            )
        writer.finish()


def load(directory: Path) -> Any:
    return peft.PeftModel.from_pretrained(Tiny(), str(directory))


def keys(directory: Path) -> set[str]:
    return set(safetensors.torch.load_file(directory / "adapter_model.safetensors"))


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("form", ["original", "portable", "folded"])
def test_peft_loads_a_restored_adapter(tmp_path: Path, case: str, form: str) -> None:
    expected = trained(tmp_path / "source", CONFIGS[case])
    bundle_of(tmp_path / "source", tmp_path / "out.rmb", fold=form == "folded")
    restored = unmerge_bundle.open(tmp_path / "out.rmb").restore("one")
    for path, delta in expected.items():
        np.testing.assert_allclose(restored.delta(path), delta, rtol=1e-5, atol=1e-5)
    restored.save_peft(tmp_path / "restored", portable=form == "portable")

    model = load(tmp_path / "restored")
    found = peft_deltas(model)
    assert found.keys() == expected.keys()
    for path, delta in expected.items():
        np.testing.assert_allclose(found[path], delta, rtol=1e-5, atol=1e-5)
    assert keys(tmp_path / "restored") == keys(tmp_path / "source")
    assert model(torch.ones(1, 5)).shape == (1, 2)

    config = (tmp_path / "restored" / "adapter_config.json").read_bytes()
    if form == "original":
        assert config == (tmp_path / "source" / "adapter_config.json").read_bytes()
    else:
        parsed = json.loads(config)
        rank = parsed["r"]
        assert parsed["lora_alpha"] == rank
        assert (parsed["rank_pattern"], parsed["alpha_pattern"]) == ({}, {})
        assert not parsed["use_rslora"]
        assert parsed["inference_mode"]
        assert parsed["target_modules"] == sorted(expected)
        assert (parsed["base_model_name_or_path"], parsed["revision"]) == ("tiny/base", "v1")
        assert parsed["modules_to_save"] == CONFIGS[case].get("modules_to_save")
        assert parsed["bias"] == CONFIGS[case].get("bias", "none")
        tensors = safetensors.torch.load_file(tmp_path / "restored" / "adapter_model.safetensors")
        assert {len(t) for key, t in tensors.items() if "lora_A" in key} == {rank}


def test_transposed_layers_keep_their_meaning(tmp_path: Path) -> None:
    def model() -> Any:
        return torch.nn.Sequential(Conv1D(7, 5))  # type: ignore[no-untyped-call]

    spec = peft.LoraConfig(target_modules=["0"], r=2, lora_alpha=6, fan_in_fan_out=True)
    source = peft.get_peft_model(model(), spec)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(torch.randn_like(parameter))
    source.save_pretrained(str(tmp_path / "source"))
    bundle_of(tmp_path / "source", tmp_path / "out.rmb")
    restored(tmp_path / "out.rmb", "one").save_peft(tmp_path / "dir", portable=True)
    loaded = peft.PeftModel.from_pretrained(model(), str(tmp_path / "dir"))
    expected, found = peft_deltas(source)["0"], peft_deltas(loaded)["0"]
    assert found.shape == (5, 7)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", list(FLOAT_DTYPES))
def test_peft_loads_a_merged_adapter(tmp_path: Path, make_merged: Make, dtype: FloatDtype) -> None:
    zoo = make_merged(dtype=dtype)
    rng = np.random.default_rng(0)
    zoo.encodings.clear()
    for path, (d_out, d_in), rank in (("layers.0.up", (7, 5), 3), ("layers.1.down", (5, 7), 2)):
        zoo.encodings[path] = unmerge_bundle.FactorsEncoding(
            A=rng.standard_normal((rank, d_in)).astype(FLOAT_DTYPES[dtype]),
            B=rng.standard_normal((d_out, rank)).astype(FLOAT_DTYPES[dtype]),
        )
    zoo.write(tmp_path / "out.rmb")
    merged = unmerge_bundle.open(tmp_path / "out.rmb").merged()
    merged.save_peft(tmp_path / "merged")
    found = peft_deltas(load(tmp_path / "merged"))
    assert found.keys() == zoo.encodings.keys()
    for path, delta in found.items():
        np.testing.assert_allclose(delta, merged.delta(path), rtol=1e-5, atol=1e-5)
    tensors = safetensors.torch.load_file(tmp_path / "merged" / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}
    card = (tmp_path / "merged" / "README.md").read_text()
    assert 'base_model: "tiny/base"' in card
    assert "| `math` | 1 | `sha256:" in card
    assert "base_model.model.head.weight" in card
    assert "`rmm` version 1 (unmerge)" in card


def restored(bundle_path: Path, name: str = "math", **options: Any) -> RestoredAdapter:
    return unmerge_bundle.open(bundle_path).restore(name, **options)


def test_the_model_card_says_where_it_came_from(tmp_path: Path) -> None:
    trained(tmp_path / "source", CONFIGS["plain"])
    bundle_of(tmp_path / "source", tmp_path / "out.rmb")
    restored(tmp_path / "out.rmb", "one").save_peft(tmp_path / "dir")
    card = (tmp_path / "dir" / "README.md").read_text()
    for fact in ("out.rmb", "`one`", DIGEST, "`rmm`", "tiny/base", "| delta | 0.125 | 0.125 |"):
        assert fact in card
    assert card.startswith("---\n")
    assert str(tmp_path) not in card


def written(directory: Path) -> dict[str, tuple[Any, Any]]:
    """Return A and B by module path, in the dtype they have in the file."""
    file = BlobReader(directory / "adapter_model.safetensors", where="test")
    keys = {path: f"base_model.model.{path}.lora_" for path in SHAPES}
    return {
        path: (file.array(f"{key}A.weight"), file.array(f"{key}B.weight"))
        for path, key in keys.items()
    }


@pytest.mark.parametrize("held", [None, "float32", "float16"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("portable", [False, True])
def test_what_is_written_is_folded_first_and_rounded_once(
    tmp_path: Path,
    make_zoo: Make,
    held: FloatDtype | None,
    dtype: FloatDtype | None,
    portable: bool,
) -> None:
    zoo = make_zoo(source_dtype="bfloat16", scaling=1.375, source_scaling=1.375, config="{}")
    zoo.write(tmp_path / "out.rmb")
    adapter = restored(tmp_path / "out.rmb", dtype=held)
    saved = adapter.save_peft(tmp_path / "dir", portable=portable, dtype=dtype)
    target = FLOAT_DTYPES[dtype or held or "bfloat16"]
    expected_rounding = 0.0
    for path, (A, B) in written(tmp_path / "dir").items():
        exact_A, exact_B = reconstruct(zoo.encodings[path], "math", dtype="float32")
        folded = exact_B * np.float32(1.375) if portable else exact_B
        assert (A.tobytes(), B.tobytes()) == (
            exact_A.astype(target).tobytes(),
            folded.astype(target).tobytes(),
        )
        # From the files alone, with dense float64 deltas.
        promised_A, promised_B = (
            factor.astype(np.float64)
            for factor in reconstruct(zoo.encodings[path], "math", dtype="bfloat16")
        )
        promised = 1.375 * promised_B @ promised_A
        scaling = 1.0 if portable else 1.375
        delta = scaling * B.astype(np.float64) @ A.astype(np.float64)
        error = float(np.linalg.norm(delta - promised) / np.linalg.norm(promised))
        expected_rounding = max(expected_rounding, error)
    assert saved == SavedAdapter(tmp_path / "dir", saved.rounding)
    assert saved.rounding == pytest.approx(expected_rounding, rel=1e-6, abs=0)
    assert (saved.rounding == 0) == (not portable and target == ml_dtypes.bfloat16)
    card = (tmp_path / "dir" / "README.md").read_text()
    assert "restored in the original's dtype (`bfloat16`)" in card
    assert f"This directory holds the factors in `{target.name}`" in card
    assert ("folded into factor B" in card) == portable
    if saved.rounding:
        assert f"differs from the one with these errors by at most {saved.rounding:.3g}" in card
    else:
        assert "exactly the one with these errors" in card


def test_an_exact_power_of_two_folds_without_a_trace(tmp_path: Path, make_zoo: Make) -> None:
    make_zoo(source_dtype="bfloat16").write(tmp_path / "out.rmb")
    saved = restored(tmp_path / "out.rmb").save_peft(tmp_path / "dir", portable=True)
    assert saved.rounding == 0.0


def test_the_files_are_read_again_only_for_another_form(tmp_path: Path, make_zoo: Make) -> None:
    make_zoo(source_dtype="bfloat16", config="{}").write(tmp_path / "out.rmb")
    copied = pickle.dumps(restored(tmp_path / "out.rmb"))
    adapter = pickle.loads(copied)  # noqa: S301 - our own bytes
    adapter.save_peft(tmp_path / "before", portable=True)
    wide = restored(tmp_path / "out.rmb", dtype="float32")
    shutil.rmtree(tmp_path / "out.rmb")
    adapter.save_peft(tmp_path / "same")
    wide.save_peft(tmp_path / "wide", portable=True, dtype="bfloat16")
    for path, (A, B) in written(tmp_path / "before").items():
        other = written(tmp_path / "wide")[path]
        assert (A.tobytes(), B.tobytes()) == (other[0].tobytes(), other[1].tobytes())
    with pytest.raises(MissingBlobError):
        adapter.save_peft(tmp_path / "portable", portable=True)
    assert not (tmp_path / "portable").exists()


def test_factors_the_source_dtype_cannot_hold_are_infinitely_far(
    tmp_path: Path, make_zoo: Make
) -> None:
    zoo = make_zoo(source_dtype="float16", config="{}")
    zoo.encodings["layers.0.q_proj"].mean_B[0, 0] = 1e6
    zoo.write(tmp_path / "out.rmb")
    with pytest.raises(NonFiniteError):
        restored(tmp_path / "out.rmb")
    saved = restored(tmp_path / "out.rmb", dtype="float32").save_peft(tmp_path / "dir")
    assert saved.rounding == float("inf")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_merged_result_says_what_its_dtype_cost(
    tmp_path: Path, make_merged: Make, dtype: FloatDtype | None
) -> None:
    make_merged().write(tmp_path / "out.rmb")
    merged = unmerge_bundle.open(tmp_path / "out.rmb").merged()
    saved = merged.save_peft(tmp_path / "dir", dtype=dtype)
    rounding = 0.0
    for path, (A, B) in written(tmp_path / "dir").items():
        promised = merged.modules[path]
        assert isinstance(promised, FactorsEncoding)
        exact = promised.B.astype(np.float64) @ promised.A.astype(np.float64)
        error = np.linalg.norm(B.astype(np.float64) @ A.astype(np.float64) - exact)
        rounding = max(rounding, float(error / np.linalg.norm(exact)))
    assert saved.rounding == pytest.approx(rounding, rel=1e-6, abs=0)
    assert (saved.rounding > 0) == (dtype is not None)
    card = (tmp_path / "dir" / "README.md").read_text()
    assert ("exactly the bundle's" in card) == (dtype is None)
    assert (f"by at most {rounding:.3g}" in card) == (dtype is not None)


def test_dtype_changes_factors_and_leaves_verbatim_tensors(
    tmp_path: Path, bundle_path: Path
) -> None:
    adapter = restored(bundle_path)
    for portable in (False, True):
        out = tmp_path / f"dir{portable}"
        adapter.save_peft(out, dtype="bfloat16", portable=portable)
        tensors = safetensors.torch.load_file(out / "adapter_model.safetensors")
        for path, module in adapter.modules.items():
            key = f"base_model.model.{path}.lora_A.weight"
            assert tensors[key].dtype == torch.bfloat16
            bits = tensors[key].view(torch.int16).numpy().tobytes()
            assert bits == module.A.astype(ml_dtypes.bfloat16).tobytes()
        assert tensors["base_model.model.head.weight"].dtype == torch.int64
        assert tensors["scalar"].shape == ()


def test_overflow_after_folding_is_refused(tmp_path: Path, make_zoo: Make) -> None:
    zoo = make_zoo(dtype="float16", scaling=60000.0, source_scaling=60000.0)
    zoo.encodings["layers.0.q_proj"].mean_B[0, 0] = 30000.0
    zoo.write(tmp_path / "out.rmb")
    with pytest.raises(NonFiniteError, match="float16") as caught:
        restored(tmp_path / "out.rmb").save_peft(tmp_path / "dir", portable=True)
    assert caught.value.path == "layers.0.q_proj"
    assert not (tmp_path / "dir").exists()
    restored(tmp_path / "out.rmb").save_peft(tmp_path / "dir", portable=True, dtype="float32")


def test_full_deltas_are_no_adapter(tmp_path: Path, make_merged: Make) -> None:
    make_merged(dense=True).write(tmp_path / "out.rmb")
    merged = unmerge_bundle.open(tmp_path / "out.rmb").merged()
    with pytest.raises(WrongKindError, match=r"1 of 2 modules .*layers\.1\.v_proj.*rank=16"):
        merged.save_peft(tmp_path / "dir")
    assert not (tmp_path / "dir").exists()


def test_existing_directories(tmp_path: Path, bundle_path: Path) -> None:
    adapter = restored(bundle_path)
    adapter.save_peft(tmp_path / "dir")
    before = {file.name: file.read_bytes() for file in (tmp_path / "dir").iterdir()}
    with pytest.raises(OutputExistsError, match="exists"):
        restored(bundle_path, "sql").save_peft(tmp_path / "dir")
    assert {file.name: file.read_bytes() for file in (tmp_path / "dir").iterdir()} == before
    restored(bundle_path, "sql").save_peft(tmp_path / "dir", overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "dir").iterdir()} != before
    with pytest.raises(OutputExistsError, match="neither"):
        adapter.save_peft(bundle_path, overwrite=True)
    assert unmerge_bundle.verify(bundle_path).ok
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dir", "zoo.rmb"]


def test_broken_originals_are_refused(tmp_path: Path, make_zoo: Make) -> None:
    make_zoo(config="{nope").write(tmp_path / "a.rmb")
    with pytest.raises(ManifestError, match="JSON"):
        restored(tmp_path / "a.rmb").save_peft(tmp_path / "dir", portable=True)
    clash = {"base_model.model.layers.0.q_proj.lora_A.weight": np.zeros(2)}
    make_zoo(verbatim=clash).write(tmp_path / "b.rmb")
    with pytest.raises(InvalidInputError, match="key of a restored factor"):
        restored(tmp_path / "b.rmb").save_peft(tmp_path / "dir")
    assert not (tmp_path / "dir").exists()
