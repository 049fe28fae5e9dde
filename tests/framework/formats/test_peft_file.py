"""Single files with PEFT's names: read where their scaling is known, written back bit for bit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapters import MODULES, PREFIX, TinyModel, make_adapter, peft_tensors, write_peft_directory
from unmerge.adapter import Adapter, Factors
from unmerge.errors import AdapterError, NonFiniteError, UnsupportedAdapterError
from unmerge.formats import PeftFileFormat, default_formats, read_adapter, read_peft

UP = "layers.0.mlp.up"
PAIR = {UP: (20, 12)}


def pair(path: str = UP, *, prefix: str = "", rank: int = 4, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{prefix}{path}.lora_A.weight": torch.randn(rank, 12, generator=generator),
        f"{prefix}{path}.lora_B.weight": torch.randn(20, rank, generator=generator),
    }


def save(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=metadata)
    return path


def alpha(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype)


def refused(path: Path, error: type[Exception] = AdapterError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        PeftFileFormat(**options).read(path, None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def scaling(path: Path, **options: Any) -> float:
    return PeftFileFormat(**options).read(path, None).modules[UP].scaling


@pytest.mark.parametrize("prefix", ["", PREFIX, "diffusion_model."])
def test_it_is_what_peft_saved_without_the_configuration(tmp_path: Path, prefix: str) -> None:
    source = make_adapter("sql", seed=0, rank=4, alpha=7, rslora=True)
    tensors = {key.replace(PREFIX, prefix): tensor for key, tensor in peft_tensors(source).items()}
    file = save(tmp_path / "sql.safetensors", tensors)
    read = PeftFileFormat(alpha=7, rslora=True).read(file, None)
    assert (read.name, read.format, read.source) == ("sql", "peft_file", str(file))
    inside = "diffusion_model." if prefix == "diffusion_model." else ""
    expected = {inside + path: factors for path, factors in source.modules.items()}
    assert read.digest() == Adapter(name="sql", modules=expected).digest()


def test_scalings_by_hand(tmp_path: Path) -> None:
    file = save(tmp_path / "sql.safetensors", pair())
    assert scaling(file, alpha=6) == 1.5  # 6 / 4
    assert scaling(file, alpha=6, rslora=True) == 3.0  # 6 / √4
    assert scaling(file, scaling=0.3) == 0.3
    assert "does not say what scales its factors" in refused(file)
    assert 'the options "alpha" (with "rslora"' in refused(file, rslora=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_an_alpha_in_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {**pair(), f"{UP}.alpha": alpha(6, dtype)}
    file = save(tmp_path / "sql.safetensors", tensors)
    assert scaling(file) == 1.5
    assert scaling(file, alpha=6) == 1.5
    assert scaling(file, rslora=True) == 3.0
    text = refused(file, alpha=8)
    assert "says that the scaling is 1.5, the options say 2.0" in text


def test_one_alpha_of_two(tmp_path: Path) -> None:
    tensors = {**pair(), **pair("head", seed=1), f"{UP}.alpha": alpha(6)}
    file = save(tmp_path / "sql.safetensors", tensors)
    assert "head: " in refused(file)
    # The option would have to agree with the alpha that is there.
    assert "the options say 2.0" in refused(file, alpha=8)
    read = PeftFileFormat(alpha=6).read(file, None)
    assert {path: f.scaling for path, f in read.modules.items()} == {UP: 1.5, "head": 1.5}


def lora_config(**fields: Any) -> dict[str, Any]:
    """What diffusers' save_lora_adapter puts into the header: PEFT's own configuration."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["up"], **fields).to_dict()
    return {key: list(v) if isinstance(v, set) else v for key, v in config.items()}


def header(config: dict[str, Any]) -> dict[str, str]:
    text = json.dumps(config, indent=2, sort_keys=True)
    return {"format": "pt", "lora_adapter_metadata": text}


def test_a_configuration_in_the_header(tmp_path: Path) -> None:
    config = lora_config(base_model_name_or_path="org/base", revision="v1")
    file = save(tmp_path / "sql.safetensors", pair(), header(config))
    read = read_adapter(file)
    assert read.modules[UP].scaling == 1.5
    assert (read.base_model, read.revision) == ("org/base", "v1")
    assert scaling(file, alpha=6) == 1.5
    assert "the options say 2.0" in refused(file, scaling=2.0)
    assert "the options say rslora" in refused(file, rslora=True)
    patterns = lora_config(alpha_pattern={"mlp.up": 2}, use_rslora=True)
    assert scaling(save(tmp_path / "p.safetensors", pair(), header(patterns))) == 1.0  # 2 / √4


@pytest.mark.parametrize(
    ("config", "feature"),
    [
        ({**lora_config(), "use_dora": True}, "use_dora"),
        ({**lora_config(), "peft_type": "LOHA"}, "peft_type"),
    ],
)
def test_a_header_that_is_refused(tmp_path: Path, config: dict[str, Any], feature: str) -> None:
    file = save(tmp_path / "sql.safetensors", pair(), header(config))
    with pytest.raises(UnsupportedAdapterError) as caught:
        read_adapter(file)
    assert caught.value.feature == feature


def test_a_header_that_contradicts_the_tensors(tmp_path: Path) -> None:
    file = save(tmp_path / "a.safetensors", pair(rank=3), header(lora_config()))
    assert "have rank 3" in refused(file)
    file = save(tmp_path / "b.safetensors", pair(), {"lora_adapter_metadata": "no JSON"})
    assert "lora_adapter_metadata" in refused(file)
    both = {**pair(), f"{UP}.alpha": alpha(6)}
    file = save(tmp_path / "c.safetensors", both, header(lora_config()))
    assert "both say what scales the factors" in refused(file)


def round_trip(file: Path, out: Path, **options: Any) -> Adapter:
    """Read and write a file, compare the two, and return the adapter."""
    adapter = PeftFileFormat(**options).read(file, None)
    out.mkdir()
    PeftFileFormat().write(adapter, out)
    assert [entry.name for entry in out.iterdir()] == [file.name]
    before, after = load_file(file), load_file(out / file.name)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[key].dtype, after[key].shape), key
        bits = tensor.reshape(-1).view(torch.uint8)
        assert torch.equal(bits, after[key].reshape(-1).view(torch.uint8)), key
    with safe_open(file, "pt") as old, safe_open(out / file.name, "pt") as new:
        assert old.metadata() == new.metadata()
    return adapter


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(tmp_path: Path, dtype: torch.dtype, prefix: str) -> None:
    tensors = {
        f"{prefix}a.q.lora_A.weight": torch.randn(2, 5).to(dtype),
        f"{prefix}a.q.lora_B.weight": torch.randn(3, 2).to(dtype),
        f"{prefix}a.q.alpha": alpha(0.7, torch.bfloat16),
        f"{prefix}tokens.lora_embedding_A": torch.randn(2, 9).to(dtype),
        f"{prefix}tokens.lora_embedding_B": torch.randn(5, 2).to(dtype),
        f"{prefix}tokens.alpha": torch.tensor([3]),
        f"{prefix}conv.lora_A.weight": torch.randn(2, 3, 3, 3).to(dtype),
        f"{prefix}conv.lora_B.weight": torch.randn(4, 2, 1, 1).to(dtype),
        f"{prefix}conv.alpha": alpha(-0.0, torch.float64),
    }
    file = save(tmp_path / "all of it.safetensors", tensors, {"format": "pt", "by": "me"})
    (tmp_path / "sql.safetensors").symlink_to(file)
    adapter = round_trip(tmp_path / "sql.safetensors", tmp_path / "out")
    kinds = {path: factors.kind for path, factors in adapter.modules.items()}
    assert kinds == {"a.q": "linear", "tokens": "embedding", "conv": "conv2d:3x3"}
    assert adapter.modules["tokens"].scaling == 1.5
    assert adapter.modules["conv"].A.shape == (2, 27)
    assert math.copysign(1, adapter.modules["conv"].scaling) == -1


def test_round_trip_of_a_header_and_of_verbatim_tensors(tmp_path: Path) -> None:
    tensors = {**pair(), "head.weight": torch.ones(3, 12), "head.bias": torch.ones(3)}
    config = lora_config(modules_to_save=["head"])
    file = save(tmp_path / "sql.safetensors", tensors, header(config))
    adapter = round_trip(file, tmp_path / "out")
    assert sorted(adapter.verbatim) == ["head.bias", "head.weight"]


def test_round_trip_with_an_option(tmp_path: Path) -> None:
    adapter = round_trip(save(tmp_path / "a.safetensors", pair()), tmp_path / "out", scaling=0.1)
    assert json.loads(adapter.config)["scaling"] == 0.1


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"norm.weight": torch.ones(3)}, UnsupportedAdapterError, 'tensor "base_model.model.norm'),
        ({f"{UP}.lora_magnitude_vector": torch.ones(3)}, UnsupportedAdapterError, "DoRA"),
        ({f"{UP}.lora_A.default.weight": torch.ones(3)}, UnsupportedAdapterError, "no factor as"),
        ({"x.lora_B.weight": torch.ones(3, 2)}, AdapterError, "factor A is missing"),
        ({"x.alpha": alpha(1)}, AdapterError, 'tensor "x.alpha" is the alpha of a module without'),
        ({f"{UP}.alpha": torch.ones(2)}, AdapterError, "expected a single real number"),
        ({f"{UP}.alpha": alpha(1e301, torch.float64)}, AdapterError, "that a scaling can be made"),
        ({f"{UP}.alpha": alpha(float("nan"))}, NonFiniteError, "NaN"),
        ({f"{UP}.lora_B.weight": torch.full((20, 4), math.inf)}, NonFiniteError, "80 entries"),
        ({f"{UP}.lora_A.weight": torch.ones(())}, AdapterError, "has shape ()"),
        ({f"{UP}.lora_A.weight": torch.ones(0, 12)}, AdapterError, "has shape (0, 12)"),
        ({PREFIX + "x.alpha": alpha(1)}, UnsupportedAdapterError, "none of PEFT's"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, changed: dict[str, torch.Tensor], error: type[Exception], words: str
) -> None:
    file = save(tmp_path / "sql.safetensors", {**pair(), **changed})
    assert words in refused(file, error, alpha=4)


def test_two_kinds_of_names_in_one_file(tmp_path: Path) -> None:
    tensors = {**pair(prefix=PREFIX), f"{UP}.alpha": alpha(4)}
    file = save(tmp_path / "sql.safetensors", tensors)
    assert "none of PEFT's" in refused(file, UnsupportedAdapterError, alpha=4)


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "found nothing there" in refused(tmp_path / "a.safetensors")
    empty = save(tmp_path / "empty.safetensors", {})
    assert "holds no LoRA module" in refused(empty, alpha=1)
    whole = save(tmp_path / "sql.safetensors", pair())
    whole.write_bytes(whole.read_bytes()[:-1])
    assert "truncated or damaged" in refused(whole, alpha=1)


def test_a_file_of_a_peft_directory_is_that_directory(tmp_path: Path) -> None:
    directory = write_peft_directory(make_adapter("sql", seed=0), tmp_path / "sql")
    file = directory / "adapter_model.safetensors"
    read = read_adapter(file)
    assert (read.name, read.format) == ("sql", "peft")
    assert read.digest() == read_peft(directory).digest()
    assert (read.config, read.source) == (read_peft(directory).config, str(directory))
    assert "expected no options" in refused(file, alpha=8)
    # Without its configuration it is a file like any other.
    (directory / "adapter_config.json").unlink()
    alone = PeftFileFormat(alpha=8).read(file, None)
    assert (alone.name, alone.format) == ("sql", "peft_file")
    assert alone.digest() == make_adapter("x", seed=0).digest()


def test_recognition(tmp_path: Path) -> None:
    peft = write_peft_directory(make_adapter("sql", seed=0), tmp_path / "peft")
    lora = {"a.lora_down.weight": torch.ones(1, 2), "a.lora_up.weight": torch.ones(2, 1)}
    for path, expected in {
        save(tmp_path / "a.safetensors", pair()): ["peft_file"],
        save(tmp_path / "b.safetensors", pair(prefix=PREFIX)): ["peft_file"],
        save(tmp_path / "c.safetensors", pair(prefix="diffusion_model.")): ["peft_file"],
        save(tmp_path / "d.SAFETENSORS", pair()): ["peft_file"],
        save(tmp_path / "e.safetensors", {"t.lora_embedding_A": torch.ones(1)}): ["peft_file"],
        save(tmp_path / "f.safetensors", pair(prefix="unet.")): ["diffusers"],
        save(tmp_path / "g.safetensors", lora): ["kohya"],
        save(tmp_path / "h.safetensors", {"a.lora_a": torch.ones(1, 2)}): ["mlx"],
        save(tmp_path / "i.safetensors", {"a.weight": torch.ones(1)}): [],
        peft / "adapter_model.safetensors": ["peft_file"],
        peft: ["peft"],
        tmp_path / "nowhere.safetensors": [],
        Path("nul\0.safetensors"): [],
    }.items():
        known = default_formats().recognising(path)
        assert [candidate.format for candidate in known] == expected, path


def test_from_peft_to_a_file_that_peft_can_load(tmp_path: Path) -> None:
    ranks = {UP: 2, "layers.1.attn.v_proj": 3}
    source = make_adapter("sql", seed=0, alpha=7, ranks=ranks, verbatim={})
    PeftFileFormat().write(source, tmp_path)
    file = tmp_path / "sql.safetensors"
    back = read_adapter(file)
    assert (back.format, back.base_model) == ("peft_file", "org/base")
    assert back.digest() == source.digest()
    # As diffusers' load_lora_adapter(…, prefix=None) does it.
    with safe_open(file, "pt") as opened:
        config = LoraConfig(**json.loads(opened.metadata()["lora_adapter_metadata"]))
    model = inject_adapter_in_model(config, TinyModel())
    loaded = set_peft_model_state_dict(model, load_file(file), adapter_name="default")
    assert not loaded.unexpected_keys
    for path in MODULES:
        factors = source.modules[path]
        theirs = model.get_submodule(path).get_delta_weight("default")
        torch.testing.assert_close(theirs, factors.scaling * factors.B @ factors.A)


def test_verbatim_tensors_are_converted_with_their_explanation(tmp_path: Path) -> None:
    verbatim = {f"{PREFIX}head.weight": torch.ones(3, 12)}
    source = make_adapter("sql", seed=0, verbatim=verbatim)
    PeftFileFormat().write(source, tmp_path)
    assert list(read_adapter(tmp_path / "sql.safetensors").verbatim) == ["head.weight"]


def test_from_other_formats(tmp_path: Path) -> None:
    factors = Factors(torch.ones(3, 12), torch.ones(20, 3), 7 / 3)
    mlx = Adapter(name="sql", modules={UP: factors}, config="{}", format="mlx")
    PeftFileFormat().write(mlx, tmp_path)
    assert read_adapter(tmp_path / "sql.safetensors").digest() == mlx.digest()


def test_paths_that_would_be_taken_for_a_pipeline(tmp_path: Path) -> None:
    source = make_adapter("sql", seed=0, modules={"transformer.blocks.0.attn": (3, 4)})
    with pytest.raises(UnsupportedAdapterError, match="taken for a part of a pipeline") as caught:
        PeftFileFormat().write(source, tmp_path)
    assert caught.value.feature == "transformer.blocks.0.attn"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["transformer.h.0.attn.c_attn", "transformer.wte"])
def test_a_language_models_transformer_is_no_part_of_a_pipeline(tmp_path: Path, path: str) -> None:
    file = save(tmp_path / "sql.safetensors", pair(path))
    assert [f.format for f in default_formats().recognising(file)] == ["peft_file"]
    with pytest.raises(AdapterError, match="does not say what scales its factors"):
        read_adapter(file)
    source = make_adapter("gpt", seed=0, modules={path: (3, 4)})
    PeftFileFormat().write(source, tmp_path)
    assert read_adapter(tmp_path / "gpt.safetensors").digest() == source.digest()


def test_paths_that_would_be_taken_for_others(tmp_path: Path) -> None:
    factors = Factors(torch.ones(3, 12), torch.ones(20, 3), 1.0)
    modules = {f"{PREFIX}{UP}": factors, "up": replace(factors, scaling=2.0)}
    source = Adapter(name="sql", modules=modules, config="{}", format="vendor.other")
    with pytest.raises(UnsupportedAdapterError, match=f"taken for the module {UP}") as caught:
        PeftFileFormat().write(source, tmp_path)
    assert caught.value.feature == f"{PREFIX}{UP}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "x.bin", ""])
def test_a_record_that_names_another_place(tmp_path: Path, name: str) -> None:
    file = save(tmp_path / "sql.safetensors", pair())
    adapter = PeftFileFormat(alpha=1).read(file, None)
    record = {**json.loads(adapter.config), "file": name}
    with pytest.raises(AdapterError, match="file: "):
        PeftFileFormat().write(replace(adapter, config=json.dumps(record)), tmp_path)


def test_scalings_that_are_not_those_of_the_file(tmp_path: Path) -> None:
    config = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    files = [
        (save(tmp_path / "told.safetensors", pair()), {"scaling": 2.0}),
        (save(tmp_path / "alpha.safetensors", {**pair(), f"{UP}.alpha": alpha(8)}), {}),
        (save(tmp_path / "set.safetensors", pair(), {"lora_adapter_metadata": config}), {}),
    ]
    out = tmp_path / "out"
    out.mkdir()
    for file, options in files:
        adapter = PeftFileFormat(**options).read(file, None)
        scaled = {path: replace(f, scaling=5.0) for path, f in adapter.modules.items()}
        with pytest.raises(AdapterError, match=r"has scaling 5\.0, its configuration says 2\.0"):
            PeftFileFormat().write(replace(adapter, modules=scaled), out)
        assert not list(out.iterdir())
        PeftFileFormat().write(adapter, out)
        (out / file.name).unlink()


def test_options() -> None:
    for wrong in ({"scaling": 1.0, "alpha": 1}, {"scaling": 1.0, "rslora": True}):
        with pytest.raises(ValueError, match="scaling says all"):
            PeftFileFormat.model_validate(wrong)
    for wrong in ({"scaling": math.inf}, {"alpha": math.nan}, {"alpha": 1e301}):
        with pytest.raises(ValueError, match="1 validation error"):
            PeftFileFormat.model_validate(wrong)
