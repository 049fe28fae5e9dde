"""diffusers' files are read as it applies them, of every age, and written back exactly."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from adapters import make_adapter, write_peft_directory
from unmerge import AdapterStore
from unmerge.adapter import Adapter, Factors
from unmerge.errors import AdapterError, NonFiniteError, UnsupportedAdapterError
from unmerge.formats import (
    DiffusersFormat,
    KohyaFormat,
    PeftFormat,
    default_formats,
    read_adapter,
    read_peft,
)
from unmerge.formats.diffusers_keys import COMPONENTS, REFUSED_NAMES

FILE = "pytorch_lora_weights.safetensors"
SETTINGS = "lora_adapter_metadata"
ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
SELF_ATTENTION = "text_encoder.text_model.encoder.layers.0.self_attn"


class Block(nn.Module):
    """Layers of the kinds a U-Net has, under names a U-Net has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.proj_in = nn.Conv2d(6, 8, 1)
        self.attn1 = nn.ModuleDict(
            {"to_q": nn.Linear(8, 8), "to_out": nn.ModuleList([nn.Linear(8, 4)])}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj_in(self.conv1(x)).mean((2, 3))
        return self.attn1["to_out"][0](self.attn1["to_q"](x))  # type: ignore[index,no-any-return]


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_blocks[0](x)  # type: ignore[no-any-return]


TARGETS = ["conv1", "proj_in", "to_q", "to_out.0"]
KINDS = {"conv1": "conv2d:3x3", "proj_in": "conv2d:1x1"}


def pair(
    path: str,
    *,
    names: tuple[str, str] = (".lora_A.weight", ".lora_B.weight"),
    d_in: int = 6,
    d_out: int = 5,
    rank: int = 2,
    kernel: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ones = [1] * len(kernel)
    A = torch.randn(rank, d_in, *kernel, generator=generator).to(dtype)
    B = torch.randn(d_out, rank, *ones, generator=generator).to(dtype)
    return {path + names[0]: A, path + names[1]: B}


def pipeline(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Two parts of a pipeline as `_save_lora_weights` (loaders/lora_base.py) packs them."""
    return {
        **pair(f"{ATTENTION}.to_q", dtype=dtype, seed=1),
        **pair("unet.conv_in", kernel=(3, 3), rank=3, dtype=dtype, seed=2),
        **pair("unet.mid_block.attentions.0.proj_in", kernel=(1, 1), dtype=dtype, seed=3),
        **pair(f"{SELF_ATTENTION}.q_proj", rank=4, dtype=dtype, seed=4),
    }


def settings(**parts: dict[str, Any]) -> dict[str, str]:
    """The header as `write_lora_layers` writes it: each part's LoraConfig behind its name."""
    packed = {
        f"{part}.{name}": value for part, found in parts.items() for name, value in found.items()
    }
    return {"format": "pt", SETTINGS: json.dumps(packed, indent=2, sort_keys=True)}


UNET_SETTINGS = {"r": 2, "lora_alpha": 8, "rank_pattern": {"^conv_in": 3}}
TEXT_SETTINGS = {"r": 4, "lora_alpha": 4}


def save(
    path: Path,
    tensors: dict[str, torch.Tensor] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(pipeline() if tensors is None else tensors, path, metadata=metadata)
    return path


def read(path: Path, name: str | None = None) -> Adapter:
    return DiffusersFormat().read(path, name)


def scalings(path: Path) -> dict[str, float]:
    return {module: factors.scaling for module, factors in read(path).modules.items()}


def refused(path: Path, error: type[AdapterError | NonFiniteError] = AdapterError) -> str:
    with pytest.raises(error) as caught:
        read(path, "style")
    assert "\n" not in str(caught.value)
    if isinstance(caught.value, UnsupportedAdapterError):
        assert caught.value.feature in str(caught.value)
    return str(caught.value)


def contents(file: Path) -> tuple[dict[str, tuple[torch.dtype, torch.Size, bytes]], dict[str, str]]:
    tensors = {
        key: (t.dtype, t.shape, t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for key, t in load_file(file).items()
    }
    with safe_open(file, framework="pt") as opened:
        return tensors, opened.metadata() or {}


def write(adapter: Adapter, directory: Path, **options: Any) -> Path:
    directory.mkdir(parents=True)
    DiffusersFormat(**options).write(adapter, directory)
    (file,) = directory.iterdir()
    return file


# Against PEFT, which diffusers loads with --------------------------------------------------------


def adapted(config: Any, seed: int = 0) -> nn.Module:
    """A U-Net with trained-looking factors."""
    torch.manual_seed(seed)
    model = UNet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if hasattr(m, "get_delta_weight")}


def deltas(model: nn.Module) -> dict[str, torch.Tensor]:
    """What PEFT adds to each base weight."""
    layers = adapted_layers(model)
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def assert_same_deltas(adapter: Adapter, expected: dict[str, torch.Tensor]) -> None:
    assert adapter.modules.keys() == {f"unet.{name}" for name in expected}
    for name, delta in expected.items():
        factors = adapter.modules[f"unet.{name}"]
        ours = (factors.scaling * factors.B @ factors.A).reshape(delta.shape)
        torch.testing.assert_close(ours, delta)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 2},
        {"r": 4, "lora_alpha": 3, "use_rslora": True},
        {
            "r": 4,
            "lora_alpha": 2.5,
            "rank_pattern": {"conv1": 2, "^down_blocks.1.attn1.to_q": 3},
            "alpha_pattern": {"attn1.to_q": 7},
        },
    ],
)
def test_settings_in_the_header_mean_what_peft_makes_of_them(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    config = peft.LoraConfig(target_modules=TARGETS, **options)
    model = adapted(config)
    # What save_lora_weights does with unet_lora_layers and _collate_lora_metadata.
    tensors = {
        f"unet.{key}": tensor.contiguous()
        for key, tensor in peft.get_peft_model_state_dict(model, adapter_name="default").items()
    }
    found = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in model.peft_config["default"].to_dict().items()  # type: ignore[index,union-attr]
    }
    file = save(tmp_path / "style" / FILE, tensors, settings(unet=found))
    adapter = read_adapter(tmp_path / "style")
    assert (adapter.name, adapter.format) == ("style", "diffusers")
    assert_same_deltas(adapter, deltas(model))
    assert contents(write(adapter, tmp_path / "out")) == contents(file)


def test_a_converted_adapter_loads_as_diffusers_loads_it(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=TARGETS,
        rank_pattern={"conv1": 2, "down_blocks.1.proj_in": 3},
        alpha_pattern={"to_q": 7, "conv1": 0.3},
    )
    model = adapted(config)
    made = Adapter(
        name="style",
        modules={
            name: Factors(
                layer.lora_A["default"].weight.detach().flatten(1),
                layer.lora_B["default"].weight.detach().flatten(1),
                scaling=layer.scaling["default"],
                kind=KINDS.get(name.rpartition(".")[2], "linear"),
            )
            for name, layer in adapted_layers(model).items()
        },
        format="other",
        base_model="org/base",
        revision="main",
    )
    file = write(made, tmp_path / "out", component="unet")
    back = read_adapter(tmp_path / "out")
    assert_same_deltas(back, deltas(model))
    assert (back.base_model, back.revision) == ("org/base", "main")
    for name, factors in made.modules.items():
        assert back.modules[f"unet.{name}"].scaling == factors.scaling
        assert back.modules[f"unet.{name}"].kind == factors.kind
    # load_lora_adapter (loaders/peft.py): the part's settings become a LoraConfig as they are.
    found = json.loads(contents(file)[1][SETTINGS])
    fields = {name.removeprefix("unet."): value for name, value in found.items()}
    tensors = {key.removeprefix("unet."): tensor for key, tensor in load_file(file).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.inject_adapter_in_model(peft.LoraConfig(**fields), UNet(), state_dict=tensors)
        result = peft.set_peft_model_state_dict(loaded, tensors)
    assert not result.unexpected_keys
    expected = deltas(model)
    for name, delta in deltas(loaded).items():
        torch.testing.assert_close(delta, expected.pop(name), rtol=0, atol=0)
    assert not expected


def test_fields_left_out_have_pefts_defaults(tmp_path: Path) -> None:
    config = peft.LoraConfig()
    tensors = pair("unet.x", rank=config.r)
    file = save(tmp_path / FILE, tensors, settings(unet={"use_rslora": True}))
    assert scalings(file) == {"unet.x": config.lora_alpha / config.r**0.5}


# Names of every age ------------------------------------------------------------------------------

AGES = {
    "today": (f"{ATTENTION}.to_q.lora_A.weight", f"{ATTENTION}.to_q.lora_B.weight"),
    "before": (f"{ATTENTION}.to_q.lora.down.weight", f"{ATTENTION}.to_q.lora.up.weight"),
    "processor": (
        f"{ATTENTION}.processor.to_q.lora.down.weight",
        f"{ATTENTION}.processor.to_q.lora.up.weight",
    ),
    "oldest": (
        f"{ATTENTION}.processor.to_q_lora.down.weight",
        f"{ATTENTION}.processor.to_q_lora.up.weight",
    ),
    "oldest out": (
        f"{ATTENTION}.processor.to_out_lora.down.weight",
        f"{ATTENTION}.processor.to_out_lora.up.weight",
    ),
    "text today": (
        f"{SELF_ATTENTION}.q_proj.lora_A.weight",
        f"{SELF_ATTENTION}.q_proj.lora_B.weight",
    ),
    "text before": (
        f"{SELF_ATTENTION}.q_proj.lora_linear_layer.down.weight",
        f"{SELF_ATTENTION}.q_proj.lora_linear_layer.up.weight",
    ),
    "text oldest": (
        f"{SELF_ATTENTION}.to_q_lora.down.weight",
        f"{SELF_ATTENTION}.to_q_lora.up.weight",
    ),
    "text oldest out": (
        f"{SELF_ATTENTION}.to_out_lora.down.weight",
        f"{SELF_ATTENTION}.to_out_lora.up.weight",
    ),
    "text projection": (
        "text_encoder_2.text_projection.lora.down.weight",
        "text_encoder_2.text_projection.lora.up.weight",
    ),
}


@pytest.mark.parametrize("age", AGES)
def test_the_module_is_the_one_todays_release_finds(tmp_path: Path, age: str) -> None:
    """utils/state_dict_utils.py: UNET_TO_DIFFUSERS, DIFFUSERS_TO_PEFT, DIFFUSERS_OLD_TO_PEFT."""
    down, up = AGES[age]
    tensors = pair("", names=(down, up))
    file = save(tmp_path / "style.safetensors", tensors)
    adapter = read_adapter(file)
    expected = {
        "oldest out": f"{ATTENTION}.to_out.0",
        "text oldest out": f"{SELF_ATTENTION}.out_proj",
        "text projection": "text_encoder_2.text_projection",
    }.get(age, f"{SELF_ATTENTION}.q_proj" if age.startswith("text") else f"{ATTENTION}.to_q")
    assert list(adapter.modules) == [expected]
    factors = adapter.modules[expected]
    assert torch.equal(factors.A, tensors[down])
    assert torch.equal(factors.B, tensors[up])
    assert factors.scaling == 1.0
    assert contents(write(adapter, tmp_path / "out")) == contents(file)


def test_files_of_one_model_alone(tmp_path: Path) -> None:
    # UNet2DConditionModel.save_lora_adapter: neither tensors nor settings have the part in front.
    path = "down_blocks.0.attn1.to_q"
    header = {SETTINGS: json.dumps({"r": 2, "lora_alpha": 3})}
    file = save(tmp_path / "style" / FILE, pair(path), header)
    adapter = read_adapter(tmp_path / "style")
    assert {name: f.scaling for name, f in adapter.modules.items()} == {path: 1.5}
    assert contents(write(adapter, tmp_path / "out")) == contents(file)


def test_both_parts_may_be_of_different_age(tmp_path: Path) -> None:
    down, up = AGES["text before"]
    tensors = {**pair(f"{ATTENTION}.to_q"), **pair("", names=(down, up))}
    assert len(read(save(tmp_path / FILE, tensors)).modules) == 2


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (
            {
                **pair(f"{ATTENTION}.to_q"),
                **pair(f"{ATTENTION}.to_k", names=(".lora.down.weight", ".lora.up.weight")),
            },
            "unet has tensors named as today",
        ),
        ({**pair("unet.x"), **pair("down_blocks.0.x")}, "begins with no part of a pipeline"),
        ({**pair("unet.x"), **pair("vae.x")}, "begins with no part of a pipeline"),
    ],
)
def test_tensors_that_diffusers_would_leave_out(
    tmp_path: Path, tensors: dict[str, torch.Tensor], expected: str
) -> None:
    assert expected in refused(save(tmp_path / FILE, tensors), UnsupportedAdapterError)


def test_one_factor_under_two_names(tmp_path: Path) -> None:
    tensors = {
        **pair("", names=AGES["oldest"]),
        **pair("", names=AGES["before"]),
    }
    assert f"{ATTENTION}.to_q: factor " in (text := refused(save(tmp_path / FILE, tensors)))
    assert "is there twice" in text


# Scalings ----------------------------------------------------------------------------------------


def test_without_settings_and_alphas_the_rank_is_meant(tmp_path: Path) -> None:
    # get_peft_kwargs (utils/peft_utils.py): alpha is the rank of each module, mixed or not.
    assert set(scalings(save(tmp_path / FILE)).values()) == {1.0}
    assert set(scalings(save(tmp_path / FILE, metadata={SETTINGS: ""})).values()) == {1.0}


def test_settings_by_part(tmp_path: Path) -> None:
    file = save(tmp_path / FILE, None, settings(unet=UNET_SETTINGS, text_encoder=TEXT_SETTINGS))
    assert scalings(file) == {
        f"{ATTENTION}.to_q": 4.0,
        "unet.conv_in": 8 / 3,
        "unet.mid_block.attentions.0.proj_in": 4.0,
        f"{SELF_ATTENTION}.q_proj": 1.0,
    }


def test_alphas_by_module(tmp_path: Path) -> None:
    # FluxLoraLoaderMixin.lora_state_dict collects alphas; get_peft_kwargs takes them by module.
    half = torch.tensor(0.1, dtype=torch.bfloat16)
    tensors = {
        **pair("transformer.x"),
        **pair("transformer.y", rank=4),
        **pair("text_encoder.z"),
        "transformer.x.alpha": torch.tensor(1.0),
        "transformer.y.alpha": half,
    }
    file = save(tmp_path / FILE, tensors)
    expected = {"transformer.x": 0.5, "transformer.y": half.item() / 4, "text_encoder.z": 1.0}
    assert scalings(file) == dict(sorted(expected.items()))
    assert contents(write(read(file), tmp_path / "out")) == contents(file)


def test_base_model_and_revision_where_the_parts_agree(tmp_path: Path) -> None:
    named = {**UNET_SETTINGS, "base_model_name_or_path": "org/base", "revision": "v1"}
    file = save(tmp_path / FILE, None, settings(unet=named, text_encoder=TEXT_SETTINGS))
    assert (read(file).base_model, read(file).revision) == ("org/base", "v1")
    other = {**TEXT_SETTINGS, "base_model_name_or_path": "org/text"}
    file = save(tmp_path / FILE, None, settings(unet=named, text_encoder=other))
    assert read(file).base_model is None


@pytest.mark.parametrize(
    ("parts", "error", "expected"),
    [
        ({"unet": UNET_SETTINGS}, UnsupportedAdapterError, "has no field of text_encoder"),
        ({"unet": {**UNET_SETTINGS, "use_dora": True}}, UnsupportedAdapterError, "use_dora"),
        ({"unet": {**UNET_SETTINGS, "lora_bias": True}}, UnsupportedAdapterError, "lora_bias"),
        ({"unet": {**UNET_SETTINGS, "invented": 1}}, UnsupportedAdapterError, "invented"),
        ({"unet": {**UNET_SETTINGS, "peft_type": "LOHA"}}, UnsupportedAdapterError, "peft_type"),
        (
            {"unet": {**UNET_SETTINGS, "modules_to_save": ["conv_out"]}},
            UnsupportedAdapterError,
            "unet.modules_to_save is set",
        ),
        (
            {"unet": {**UNET_SETTINGS, "trainable_token_indices": [1]}},
            UnsupportedAdapterError,
            "unet.trainable_token_indices is set",
        ),
        ({"unet": {**UNET_SETTINGS, "r": 3}}, AdapterError, "factors have rank 2"),
        ({"unet": {**UNET_SETTINGS, "lora_alpha": "8"}}, AdapterError, "lora_alpha is '8'"),
        ({"unet": {**UNET_SETTINGS, "lora_alpha": None}}, AdapterError, "lora_alpha is missing"),
    ],
)
def test_settings_that_are_refused(
    tmp_path: Path,
    parts: dict[str, dict[str, Any]],
    error: type[AdapterError],
    expected: str,
) -> None:
    if expected != "has no field of text_encoder":
        parts = {**parts, "text_encoder": TEXT_SETTINGS}
    assert expected in refused(save(tmp_path / FILE, None, settings(**parts)), error)


@pytest.mark.parametrize("text", ["{", "[]", '{"unet.r": 2, "unet.r": 3}', '{"unet.r": NaN}'])
def test_settings_that_are_no_json_object(tmp_path: Path, text: str) -> None:
    assert SETTINGS in refused(save(tmp_path / FILE, None, {SETTINGS: text}))


def test_settings_and_alphas(tmp_path: Path) -> None:
    tensors = {**pair("unet.x"), "unet.x.alpha": torch.tensor(1.0)}
    file = save(tmp_path / FILE, tensors, settings(unet={"r": 2}))
    assert "has alpha tensors as well" in refused(file, UnsupportedAdapterError)


@pytest.mark.parametrize(
    ("extra", "error", "expected"),
    [
        ({"unet.y.alpha": torch.tensor(1.0)}, AdapterError, "both factors are missing"),
        ({"unet.x.alpha": torch.tensor(torch.nan)}, NonFiniteError, "alpha holds 1 entries"),
        ({"unet.x.alpha": torch.ones(2)}, AdapterError, "expected a single real number"),
        (
            {**pair("unet.y"), "unet.x.alpha": torch.tensor(1.0)},
            UnsupportedAdapterError,
            "unet.y: has no alpha",
        ),
    ],
)
def test_alphas_that_are_refused(
    tmp_path: Path,
    extra: dict[str, torch.Tensor],
    error: type[AdapterError | NonFiniteError],
    expected: str,
) -> None:
    assert expected in refused(save(tmp_path / FILE, {**pair("unet.x"), **extra}), error)


# Refusing ----------------------------------------------------------------------------------------

EXAMPLES = {
    "lora_magnitude_vector": "unet.x.lora_magnitude_vector",
    "dora_scale": "unet.x.dora_scale",
    "lora_embedding_A": "unet.x.lora_embedding_A",
    "lora_embedding_B": "unet.x.lora_embedding_B",
    "bias": "unet.x.lora_B.bias",
    "default": "unet.x.lora_A.default.weight",
    "modules_to_save": "unet.x.modules_to_save.weight",
}


@pytest.mark.parametrize("name", REFUSED_NAMES)
def test_tensors_of_other_methods(tmp_path: Path, name: str) -> None:
    tensors = {**pair("unet.x"), EXAMPLES[name]: torch.ones(2, 2)}
    text = refused(save(tmp_path / FILE, tensors), UnsupportedAdapterError)
    assert f"holds {name}, which is not supported: {REFUSED_NAMES[name]}" in text


@pytest.mark.parametrize(
    "key",
    [
        "unet.x.weight",
        "unet.x.lora_A",
        "double_blocks.0.processor.qkv_lora1.down.weight",  # XLabs' FLUX
        "transformer.norm_q.weight",  # FLUX control
        f"{ATTENTION}.processor.to_x_lora.down.weight",
    ],
)
def test_unknown_tensors(tmp_path: Path, key: str) -> None:
    file = save(tmp_path / FILE, {**pair("unet.x"), key: torch.ones(2, 2)})
    assert f'tensor "{key}" is unknown' in refused(file, UnsupportedAdapterError)


@pytest.mark.parametrize(
    ("tensors", "error", "expected"),
    [
        ({}, AdapterError, "holds no LoRA module"),
        ({"unet.x.lora_A.weight": torch.ones(2, 3)}, AdapterError, "factor B is missing"),
        ({"unet.x.lora.up.weight": torch.ones(2, 3)}, AdapterError, "factor A is missing"),
        (
            {**pair("unet.x"), "unet.x.lora_A.weight": torch.full((2, 6), torch.nan)},
            NonFiniteError,
            "unet.x: factor A",
        ),
        (
            {**pair("unet.x"), "unet.x.lora_A.weight": torch.ones(2, 6).half()},
            AdapterError,
            'factor A of adapter "style" is float16',
        ),
        ({**pair("unet.x"), "unet.x.lora_A.weight": torch.tensor(1.0)}, AdapterError, "shape ()"),
        (
            {**pair("unet.x"), "unet.x.lora_A.weight": torch.ones(0, 6)},
            AdapterError,
            "shape (0, 6)",
        ),
        (pair("unet..x"), AdapterError, "names no module that can be stored"),
        (
            pair("", names=("to_q_lora.down.weight", "to_q_lora.up.weight")),
            AdapterError,
            "names no",
        ),
    ],
)
def test_damaged_modules(
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    error: type[AdapterError | NonFiniteError],
    expected: str,
) -> None:
    assert expected in refused(save(tmp_path / FILE, tensors), error)


# Recognising -------------------------------------------------------------------------------------


def recognised(path: Path) -> list[str]:
    return [found.format for found in default_formats().recognising(path)]


@pytest.mark.parametrize("part", COMPONENTS)
def test_recognises_files_by_the_part_in_front(tmp_path: Path, part: str) -> None:
    assert recognised(save(tmp_path / "style.safetensors", pair(f"{part}.x"))) == ["diffusers"]


def test_recognises_the_standard_name_in_a_directory(tmp_path: Path) -> None:
    file = save(tmp_path / "style" / FILE)
    save_file({"clip_l": torch.ones(2, 2)}, tmp_path / "style" / "emb.safetensors")
    assert recognised(file) == recognised(tmp_path / "style") == ["diffusers"]
    assert read_adapter(file).name == read_adapter(tmp_path / "style").name == "style"
    assert read_adapter(save(tmp_path / "dragon.safetensors")).name == "dragon"


def test_a_directory_without_the_standard_name_needs_to_be_told(tmp_path: Path) -> None:
    save(tmp_path / "style" / "dragon.safetensors")
    assert recognised(tmp_path / "style") == []
    assert read_adapter(tmp_path / "style", format="diffusers").name == "style"
    with pytest.raises(AdapterError, match=r"looked for a directory with pytorch_lora_weights"):
        read(tmp_path)


def test_at_most_one_format_recognises_a_path(tmp_path: Path) -> None:
    """What other formats own stays theirs, also under diffusers' file name."""
    plain = pair("down_blocks.0.attn1.to_q")
    peft_keys = pair("base_model.model.down_blocks.0.to_q")
    kohya = {"lora_unet_x.lora_down.weight": torch.ones(1, 1)}
    assert recognised(save(tmp_path / "a" / FILE, plain).parent) == ["diffusers"]
    assert recognised(tmp_path / "a" / FILE) == ["peft_file"]
    assert recognised(save(tmp_path / "model.safetensors", {"x.weight": torch.ones(2)})) == []
    assert "diffusers" not in recognised(save(tmp_path / "b" / FILE, peft_keys).parent)
    assert "diffusers" not in recognised(tmp_path / "b" / FILE)
    assert recognised(save(tmp_path / "c" / FILE, kohya).parent) == ["kohya"]
    directory = write_peft_directory(make_adapter("sql", seed=0), tmp_path / "sql")
    save(directory / FILE)
    assert recognised(directory) == ["peft"]
    for age, names in AGES.items():
        assert recognised(save(tmp_path / f"{age}.safetensors", pair("", names=names))) == [
            "diffusers"
        ]


def test_recognises_damaged_files_by_name_only(tmp_path: Path) -> None:
    for name in (FILE, "style.safetensors"):
        (tmp_path / name).write_bytes(b"no safetensors")
    assert DiffusersFormat().recognises(tmp_path)
    assert DiffusersFormat().recognises(tmp_path / FILE)
    assert "no readable safetensors" in refused(tmp_path)
    assert not DiffusersFormat().recognises(tmp_path / "style.safetensors")
    for path in ("absent", "a\0b", "a\0b.safetensors", "x" * 5000):
        assert not DiffusersFormat().recognises(tmp_path / path)


# Writing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_file_is_given_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    header = settings(unet=UNET_SETTINGS, text_encoder=TEXT_SETTINGS)
    header = {**header, "note": "ä\n", "modelspec.title": ""}
    file = save(tmp_path / "in" / "my style.safetensors", pipeline(dtype), header)
    written = write(read(file, "style"), tmp_path / "out")
    assert written.name == file.name
    assert contents(written) == contents(file)


def test_the_file_comes_back_from_a_store(tmp_path: Path) -> None:
    header = settings(unet=UNET_SETTINGS, text_encoder=TEXT_SETTINGS)
    file = save(tmp_path / "style.safetensors", pipeline(torch.bfloat16), header)
    store = AdapterStore.create(tmp_path / "zoo")
    store.add(read(file))
    store.commit("one adapter")
    stored = AdapterStore.open(tmp_path / "zoo").read_adapter("style")
    assert contents(write(stored, tmp_path / "out")) == contents(file)


def test_a_configuration_of_another_adapter(tmp_path: Path) -> None:
    header = settings(unet=UNET_SETTINGS, text_encoder=TEXT_SETTINGS)
    adapter = read(save(tmp_path / "style.safetensors", None, header))
    path = "unet.conv_in"
    config = json.loads(adapter.config)
    missing = {**config, "metadata": {}}
    keys = {**config, "keys": {"unet.absent": ["a", "b"]}}
    module = replace(adapter.modules[path], scaling=1.0)
    smaller = replace(
        adapter.modules[path], A=adapter.modules[path].A[:2], B=adapter.modules[path].B[:, :2]
    )
    cases = [
        (replace(adapter, config=json.dumps(missing)), "its configuration says 1.0"),
        (replace(adapter, config=json.dumps(keys)), "speaks of module unet.absent"),
        (replace(adapter, modules={**adapter.modules, path: module}), "has scaling 1.0"),
        (replace(adapter, modules={**adapter.modules, path: smaller}), "factors have rank 2"),
    ]
    for number, (given, expected) in enumerate(cases):
        with pytest.raises(AdapterError) as caught:
            write(given, tmp_path / str(number))
        assert expected in str(caught.value)
        assert not list((tmp_path / str(number)).iterdir())


# Converting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_peft_adapter_and_back(tmp_path: Path, dtype: torch.dtype, rslora: bool) -> None:
    made = make_adapter(
        "sql", seed=0, ranks={"layers.1.mlp.up": 3}, alpha=0.3, dtype=dtype, rslora=rslora
    )
    adapter = read_peft(write_peft_directory(made, tmp_path / "sql"))
    write(adapter, tmp_path / "out", component="text_encoder")
    back = read_adapter(tmp_path / "out")
    renamed = {f"text_encoder.{path}": factors for path, factors in adapter.modules.items()}
    assert back.digest() == replace(adapter, modules=renamed).digest()
    assert (back.base_model, back.format) == ("org/base", "diffusers")
    (tmp_path / "peft").mkdir()
    PeftFormat().write(back, tmp_path / "peft")
    assert read_peft(tmp_path / "peft").digest() == back.digest()


def test_a_file_of_diffusers_becomes_kohyas(tmp_path: Path) -> None:
    header = settings(unet=UNET_SETTINGS, text_encoder={"r": 4, "lora_alpha": 1})
    adapter = read(save(tmp_path / FILE, None, header), "style")
    (tmp_path / "out").mkdir()
    KohyaFormat().write(adapter, tmp_path / "out")
    back = read_adapter(tmp_path / "out" / "style.safetensors")
    assert back.format == "kohya"
    assert len(back.modules) == len(adapter.modules)
    for path, factors in adapter.modules.items():
        name = (
            path.replace(".", "_").replace("text_encoder", "lora_te").replace("unet", "lora_unet")
        )
        assert back.modules[name].scaling == factors.scaling
        assert back.modules[name].kind == factors.kind
        assert torch.equal(back.modules[name].A, factors.A)
        assert torch.equal(back.modules[name].B, factors.B)


def adapter_of(*paths: str, **changes: Any) -> Adapter:
    factors = Factors(torch.ones(4, 18), torch.ones(5, 4), scaling=0.5)
    modules = {path: replace(factors, **changes) for path in paths}
    return Adapter(name="style", modules=modules, format="other")


@pytest.mark.parametrize(
    ("adapter", "component", "feature"),
    [
        (adapter_of("a"), None, "component"),
        (adapter_of("unet"), None, "component"),
        (adapter_of("unet.a", "a"), "unet", "component"),
        (replace(adapter_of("lora_unet_a"), format="kohya"), "unet", "flattened names"),
        (adapter_of("unet.a", kind="embedding"), None, "embedding"),
        (adapter_of("unet.a", scaling=float("inf")), None, "scaling"),
        (replace(adapter_of("unet.a"), verbatim={"head": torch.ones(2)}), None, "head"),
    ],
)
def test_what_would_be_lost(
    tmp_path: Path, adapter: Adapter, component: str | None, feature: str
) -> None:
    with pytest.raises(UnsupportedAdapterError) as caught:
        write(adapter, tmp_path / "out", component=component)
    assert caught.value.feature == feature
    assert 'adapter "style"' in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("scaling", [1 / 49, 0.3, -2.5, 5 / 7, 0.0])
def test_scalings_that_rounding_nearly_loses(tmp_path: Path, scaling: float) -> None:
    factors = Factors(torch.ones(49, 6), torch.ones(5, 49), scaling=scaling)
    adapter = Adapter(name="s", modules={"unet.a": factors}, format="other")
    write(adapter, tmp_path / "out")
    assert read_adapter(tmp_path / "out").modules["unet.a"].scaling == scaling


def test_the_page_shows_what_is_refused() -> None:
    page = (Path(__file__).parents[3] / "docs" / "adapters.md").read_text(encoding="utf-8")
    start, end = "<!-- diffusers tensors: begin -->\n", "\n<!-- diffusers tensors: end -->"
    table = page.split(start)[1].split(end)[0]
    rows = [f"| `{name}` | {because} |" for name, because in REFUSED_NAMES.items()]
    assert table.splitlines()[2:] == rows
    assert ", ".join(f"`{part}`" for part in COMPONENTS) in page
