"""kohya's files are read as sd-scripts applies them, written back exactly, or refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional

from adapters import make_adapter, write_peft_directory
from unmerge import AdapterStore
from unmerge.adapter import Adapter, Factors
from unmerge.errors import AdapterError, NonFiniteError, UnsupportedAdapterError
from unmerge.formats import KohyaFormat, default_formats, read_adapter, read_peft
from unmerge.formats.kohya import REFUSED_NAMES

UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
POINT = "lora_unet_down_blocks_0_attentions_0_proj_in"
TEXT = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"

# What sd-scripts puts into the header, shortened: train_network.py, from "ss_session_id" on.
METADATA = {
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_network_alpha": "1",
    "ss_network_args": json.dumps({"conv_dim": "2", "conv_alpha": "1"}),
    "ss_network_dim": "4",
    "ss_network_module": "networks.lora",
    "ss_sd_model_name": "sd_xl_base_1.0.safetensors",
    "ss_training_comment": 'näive "quotes"\nand lines',
    "sshs_legacy_hash": "ad2b4c1e",
}


def layer(
    name: str = UNET,
    *,
    d_in: int = 6,
    d_out: int = 5,
    rank: int = 4,
    kernel: tuple[int, ...] = (),
    alpha: torch.Tensor | float | None = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """One module as `LoRAModule` (networks/lora.py) registers it; `save_weights` casts all."""
    generator = torch.Generator().manual_seed(seed)
    ones = [1] * len(kernel)
    tensors = {
        f"{name}.lora_down.weight": torch.randn(rank, d_in, *kernel, generator=generator),
        f"{name}.lora_up.weight": torch.randn(d_out, rank, *ones, generator=generator),
    }
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    if alpha is not None:
        given = isinstance(alpha, torch.Tensor)
        tensors[f"{name}.alpha"] = alpha if given else torch.tensor(alpha).to(dtype)
    return tensors


def model(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Linear layers, convolutions of both sizes, a text encoder, and one module without alpha."""
    return {
        **layer(UNET, dtype=dtype, seed=1),
        **layer(CONV, kernel=(3, 3), rank=2, alpha=0.5, dtype=dtype, seed=2),
        **layer(POINT, kernel=(1, 1), alpha=None, dtype=dtype, seed=3),
        **layer(TEXT, rank=8, alpha=8.0, dtype=dtype, seed=4),
    }


def save(
    path: Path,
    tensors: dict[str, torch.Tensor] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model() if tensors is None else tensors, path, metadata=metadata)
    return path


def read(path: Path, name: str | None = None) -> Adapter:
    return KohyaFormat().read(path, name)


def refused(
    path: Path, error: type[AdapterError | NonFiniteError] = AdapterError, name: str = "style"
) -> str:
    with pytest.raises(error) as caught:
        read(path, name)
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
    KohyaFormat(**options).write(adapter, directory)
    (file,) = directory.iterdir()
    return file


# Reading ---------------------------------------------------------------------------------------


def test_a_linear_layer_by_hand(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_x.lora_down.weight": torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]]),
        "lora_unet_x.lora_up.weight": torch.tensor([[1.0, 0.0], [2.0, -1.0]]),
        "lora_unet_x.alpha": torch.tensor(3.0),
    }
    adapter = read(save(tmp_path / "style.safetensors", tensors))
    factors = adapter.modules["lora_unet_x"]
    assert (factors.scaling, factors.rank, factors.kind) == (1.5, 2, "linear")
    delta = factors.scaling * factors.B @ factors.A
    assert torch.equal(delta, torch.tensor([[1.5, 3.0, 0.0], [3.0, 4.5, -1.5]]))
    assert (adapter.name, adapter.format, adapter.verbatim) == ("style", "kohya", {})


def merged_by_sd_scripts(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """What is added to the base weight: `merge_to_sd_model` in networks/merge_lora.py, written
    out from its three cases."""
    down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
    rank = down.size(0)
    scale = tensors[f"{name}.alpha"].item() / rank if f"{name}.alpha" in tensors else 1.0
    if down.ndim == 2:
        return up @ down * scale
    if down.shape[2:] == (1, 1):
        return (up[:, :, 0, 0] @ down[:, :, 0, 0])[:, :, None, None] * scale
    return functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3) * scale


@pytest.mark.parametrize(
    ("name", "kind"),
    [(UNET, "linear"), (TEXT, "linear"), (POINT, "conv2d:1x1"), (CONV, "conv2d:3x3")],
)
def test_the_delta_is_what_sd_scripts_merges(tmp_path: Path, name: str, kind: str) -> None:
    tensors = model()
    factors = read(save(tmp_path / "style.safetensors", tensors)).modules[name]
    expected = merged_by_sd_scripts(tensors, name)
    delta = (factors.scaling * factors.B @ factors.A).reshape(expected.shape)
    torch.testing.assert_close(delta, expected)
    assert factors.kind == kind


def test_a_convolution_acts_as_the_two_in_a_row(tmp_path: Path) -> None:
    # LoRAModule.forward: lora_up(lora_down(x)) with the layer's stride and padding in lora_down.
    tensors = layer(CONV, kernel=(3, 2), alpha=2.0)
    factors = read(save(tmp_path / "style.safetensors", tensors)).modules[CONV]
    x = torch.randn(2, 6, 7, 9, generator=torch.Generator().manual_seed(0))
    down = functional.conv2d(x, tensors[f"{CONV}.lora_down.weight"], stride=2, padding=1)
    expected = functional.conv2d(down, tensors[f"{CONV}.lora_up.weight"]) * 0.5
    weight = (factors.scaling * factors.B @ factors.A).reshape(5, 6, 3, 2)
    torch.testing.assert_close(functional.conv2d(x, weight, stride=2, padding=1), expected)


def test_without_alpha_the_rank_is_meant(tmp_path: Path) -> None:
    # create_network_from_weights, "support old LoRA without alpha"; the header does not count.
    tensors = layer(alpha=None, rank=3)
    adapter = read(save(tmp_path / "style.safetensors", tensors, {"ss_network_alpha": "1"}))
    assert adapter.modules[UNET].scaling == 1.0


@pytest.mark.parametrize(
    ("alpha", "scaling"),
    [
        (torch.tensor(1.0), 1.0 / 3),
        (torch.tensor(0.1, dtype=torch.float16), 0.0999755859375 / 3),
        (torch.tensor(0.1, dtype=torch.bfloat16), 0.10009765625 / 3),
        (torch.tensor(0.1, dtype=torch.float64), 0.1 / 3),
        (torch.tensor(16), 16 / 3),
        (torch.tensor(-2, dtype=torch.int8), -2 / 3),
        (torch.tensor([2.0]), 2 / 3),
        (torch.tensor([[2.0]]), 2 / 3),
    ],
)
def test_alphas_of_any_dtype_are_kept(tmp_path: Path, alpha: torch.Tensor, scaling: float) -> None:
    file = save(tmp_path / "style.safetensors", layer(rank=3, alpha=alpha))
    adapter = read(file)
    assert adapter.modules[UNET].scaling == scaling
    assert contents(write(adapter, tmp_path / "out")) == contents(file)


def test_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    tensors = model()
    adapter = read(save(tmp_path / "style.safetensors", tensors))
    A, B = adapter.modules[CONV].A, adapter.modules[CONV].B
    assert torch.equal(A, tensors[f"{CONV}.lora_down.weight"].reshape(2, 54))
    assert torch.equal(B, tensors[f"{CONV}.lora_up.weight"].reshape(5, 2))
    assert list(adapter.modules) == sorted([UNET, CONV, POINT, TEXT])


def test_names_with_dots_are_read_by_the_same_rule(tmp_path: Path) -> None:
    path = "diffusion_model.blocks.0.attn"
    file = save(tmp_path / "style.safetensors", layer(path))
    adapter = read_adapter(file)
    assert (adapter.format, list(adapter.modules)) == ("kohya", [path])
    assert contents(write(adapter, tmp_path / "out")) == contents(file)


@pytest.mark.parametrize(
    ("name", "base_model"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("sd_xl_base_1.0.safetensors", None),
        ("a/b/c", None),
        ("", None),
    ],
)
def test_a_file_name_is_no_base_model(tmp_path: Path, name: str, base_model: str | None) -> None:
    file = save(tmp_path / "style.safetensors", metadata={"ss_sd_model_name": name})
    assert read(file).base_model == base_model


def test_the_name(tmp_path: Path) -> None:
    file = save(tmp_path / "dragon" / "Style v1 (final).safetensors")
    assert read(file.parent).name == "dragon"
    assert read(file, "other").name == "other"
    with pytest.raises(AdapterError, match=r"adapter name 'Style v1 .final.' is not allowed"):
        read(file)


# Recognising -----------------------------------------------------------------------------------


def recognised(path: Path) -> list[str]:
    return [found.format for found in default_formats().recognising(path)]


def test_recognises_a_file_and_the_directory_with_it_alone(tmp_path: Path) -> None:
    file = save(tmp_path / "style" / "style.safetensors")
    (tmp_path / "style" / "preview.png").write_bytes(b"")
    assert recognised(file) == recognised(tmp_path / "style") == ["kohya"]
    assert read_adapter(tmp_path / "style").digest() == read(file).digest()
    save(tmp_path / "style" / "other.safetensors")
    assert recognised(tmp_path / "style") == []
    with pytest.raises(AdapterError, match=r"found a directory with other\.safetensors"):
        read(tmp_path / "style")


@pytest.mark.parametrize(
    "name", ["pytorch_lora_weights.safetensors", "adapter_model.safetensors", "STYLE.SAFETENSORS"]
)
def test_recognises_by_tensors_whatever_the_file_is_called(tmp_path: Path, name: str) -> None:
    assert recognised(save(tmp_path / name)) == ["kohya"]


def test_recognises_methods_it_refuses(tmp_path: Path) -> None:
    loha = {f"{UNET}.hada_w1_a": torch.ones(2, 2), f"{UNET}.alpha": torch.tensor(1.0)}
    assert recognised(save(tmp_path / "loha.safetensors", loha)) == ["kohya"]
    oft = {"oft_unet_x.oft_blocks": torch.ones(1, 2, 2)}
    assert recognised(save(tmp_path / "oft.safetensors", oft)) == ["kohya"]


def test_recognises_nothing_else(tmp_path: Path) -> None:
    peft = write_peft_directory(make_adapter("sql", seed=0), tmp_path / "sql")
    save(peft / "style.safetensors")
    assert recognised(peft) == ["peft"]
    mlx = save(tmp_path / "mlx" / "adapters.safetensors").parent
    assert "kohya" not in recognised(mlx)
    (tmp_path / "bad.safetensors").write_bytes(b"no safetensors")
    for path in ("bad.safetensors", "absent", "a\0b", "a\0b.safetensors", "x" * 5000, "."):
        assert not KohyaFormat().recognises(tmp_path / path)
    plain = {"lora_A.weight": torch.ones(2, 2), "x.lora_A.weight": torch.ones(2, 2)}
    assert not KohyaFormat().recognises(save(tmp_path / "plain.safetensors", plain))


# Refusing --------------------------------------------------------------------------------------

EXAMPLES = {
    "lora_mid": "lora_mid.weight",
    "hada_": "hada_w1_a",
    "lokr_": "lokr_w2_b",
    "oft_": "oft_diag",
    "a1": "a1.weight",
    "a2": "a2.weight",
    "b1": "b1.weight",
    "b2": "b2.weight",
    "bias": "lora_up.bias",
    "bias_": "bias_indices",
}


@pytest.mark.parametrize("name", REFUSED_NAMES)
def test_tensors_of_other_methods(tmp_path: Path, name: str) -> None:
    tensors = {**layer(), f"{UNET}.{EXAMPLES.get(name, name)}": torch.ones(2, 2)}
    text = refused(save(tmp_path / "style.safetensors", tensors), UnsupportedAdapterError)
    assert f"holds {name}, which is not supported: {REFUSED_NAMES[name]}" in text


@pytest.mark.parametrize(
    "key",
    [
        f"{UNET}.lora_down.0.weight",  # lora_flux.py with split_qkv, before it is joined to save
        f"{UNET}.lora_A.weight",
        f"{UNET}.weight",
        "lora_down.weight2",
        "emb_params",
    ],
)
def test_unknown_tensors(tmp_path: Path, key: str) -> None:
    file = save(tmp_path / "style.safetensors", {**layer(), key: torch.ones(2, 2)})
    assert f'tensor "{key}" is unknown' in refused(file, UnsupportedAdapterError)


@pytest.mark.parametrize(
    ("metadata", "feature"),
    [
        ({"ss_network_module": "networks.oft"}, "ss_network_module"),
        ({"ss_network_module": "networks.loha"}, "ss_network_module"),
        ({"ss_network_module": "vendor.networks.lora"}, "ss_network_module"),
        ({"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "LoKr"}'}, "algo"),
        ({"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": 3}'}, "algo"),
        (
            {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"dora_wd": "True"}'},
            "dora_wd",
        ),
        ({"ss_network_args": '{"use_rslora": true}'}, "use_rslora"),
        ({"ss_network_args": '{"rs_lora": "true"}'}, "rs_lora"),
        ({"ss_network_args": '{"use_dora": 1}'}, "use_dora"),
    ],
)
def test_trainings_that_change_what_factors_mean(
    tmp_path: Path, metadata: dict[str, str], feature: str
) -> None:
    file = save(tmp_path / "style.safetensors", metadata=metadata)
    with pytest.raises(UnsupportedAdapterError) as caught:
        read(file)
    assert caught.value.feature == feature
    assert feature in refused(file)


@pytest.mark.parametrize(
    "metadata",
    [
        METADATA,
        {"ss_network_module": "networks.lora_flux", "ss_network_args": '{"split_qkv": "True"}'},
        {"ss_network_module": "networks.lora_fa"},
        {"ss_network_module": "networks.dylora", "ss_network_args": '{"unit": "4"}'},
        {
            "ss_network_module": "lycoris.kohya",
            # LyCORIS multiplies alpha by the root of the rank before it saves it (locon.py).
            "ss_network_args": '{"algo": "LoCon", "rs_lora": "True", "dora_wd": "False"}',
        },
        {"ss_network_module": "", "ss_network_args": ""},
    ],
)
def test_trainings_that_do_not(tmp_path: Path, metadata: dict[str, str]) -> None:
    file = save(tmp_path / "style.safetensors", metadata=metadata)
    assert contents(write(read(file), tmp_path / "out")) == contents(file)


def test_network_arguments_that_are_no_json(tmp_path: Path) -> None:
    file = save(tmp_path / "style.safetensors", metadata={"ss_network_args": "[1"})
    assert "ss_network_args in the header" in refused(file)


DOWN, UP, ALPHA = (f"{UNET}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha"))


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [
        ({UP: None}, AdapterError, "factor A is there and factor B is missing"),
        ({DOWN: None}, AdapterError, "factor B is there and factor A is missing"),
        ({"lora_unet_y.alpha": torch.tensor(1.0)}, AdapterError, "both factors are missing"),
        ({ALPHA: torch.tensor(0.0)}, UnsupportedAdapterError, "alpha is 0, on which"),
        ({ALPHA: torch.tensor(-0.0)}, UnsupportedAdapterError, "alpha is 0, on which"),
        ({ALPHA: torch.tensor(torch.inf)}, NonFiniteError, "alpha holds 1 entries"),
        ({ALPHA: torch.ones(2)}, AdapterError, "expected a single real number"),
        ({ALPHA: torch.ones(0)}, AdapterError, "expected a single real number"),
        ({ALPHA: torch.tensor(True)}, AdapterError, "expected a single real number"),
        ({DOWN: torch.full((4, 6), torch.nan)}, NonFiniteError, "24 entries that are NaN"),
        ({UP: torch.tensor([[1.0, 0, 0, torch.inf]])}, NonFiniteError, r"first at [0, 3]"),
        ({UP: torch.ones(5, 3)}, AdapterError, "do not fit: A is (4, 6), B is (5, 3)"),
        ({UP: torch.ones(5, 4).half()}, AdapterError, "factor B is float16"),
        ({UP: torch.ones(5, 4).double()}, AdapterError, "is float64; expected one of"),
        ({DOWN: torch.ones(4, 6).char()}, AdapterError, "is int8; expected one of"),
        ({DOWN: torch.tensor(1.0)}, AdapterError, "has shape ()"),
        ({DOWN: torch.ones(0, 6)}, AdapterError, "has shape (0, 6)"),
        ({DOWN: torch.ones(4, 6, 1, 1)}, AdapterError, "has shape (4, 6, 1, 1)"),
        ({UP: torch.ones(5, 4, 1, 1)}, AdapterError, "has shape (5, 4, 1, 1)"),
    ],
)
def test_damaged_modules(
    tmp_path: Path,
    change: dict[str, torch.Tensor | None],
    error: type[AdapterError | NonFiniteError],
    expected: str,
) -> None:
    tensors = {key: t for key, t in {**layer(), **change}.items() if t is not None}
    text = refused(save(tmp_path / "style.safetensors", tensors), error)
    assert expected in text
    assert "lora_unet_" in text


@pytest.mark.parametrize(
    ("down", "up", "error", "expected"),
    [
        ((4, 6, 1, 1), (5, 4, 3, 3), UnsupportedAdapterError, "second convolution of size 1"),
        ((4, 6, 0, 3), (5, 4, 1, 1), AdapterError, "has shape (4, 0)"),
        ((4, 6, 3, 3), (5, 3, 1, 1), AdapterError, "do not fit: A is (4, 54), B is (5, 3)"),
        ((4, 1, 10000, 1), (5, 4, 1, 1), AdapterError, "conv2d:10000x1"),
        ((4, 6, 1, 1, 1, 1), (5, 4, 1, 1, 1, 1), AdapterError, "expected two dimensions"),
    ],
)
def test_damaged_convolutions(
    tmp_path: Path,
    down: tuple[int, ...],
    up: tuple[int, ...],
    error: type[AdapterError],
    expected: str,
) -> None:
    tensors = {**layer(CONV), f"{CONV}.lora_down.weight": torch.ones(down)}
    tensors[f"{CONV}.lora_up.weight"] = torch.ones(up)
    assert expected in refused(save(tmp_path / "style.safetensors", tensors), error)


@pytest.mark.parametrize(
    "key",
    [
        "lora_down.weight",
        "alpha",
        "a/b.lora_up.weight",
        "a..b.lora_up.weight",
        "a\nb.lora_up.weight",
        f"{'x' * 1025}.alpha",
    ],
)
def test_names_that_cannot_be_stored(tmp_path: Path, key: str) -> None:
    file = save(tmp_path / "style.safetensors", {key: torch.ones(1, 1)})
    assert "names no module that can be stored" in refused(file)


def test_an_empty_file(tmp_path: Path) -> None:
    assert "holds no LoRA module" in refused(save(tmp_path / "style.safetensors", {}))


def test_a_truncated_file(tmp_path: Path) -> None:
    file = save(tmp_path / "style.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    assert recognised(file) == ["kohya"]
    assert "truncated or damaged" in refused(file)


# Writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_file_is_given_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    file = save(tmp_path / "in" / "Some Name.safetensors", model(dtype), METADATA)
    written = write(read(file.parent), tmp_path / "out")
    assert written.name == file.name
    assert contents(written) == contents(file)


def test_also_from_copies_in_one_memory(tmp_path: Path) -> None:
    file = save(tmp_path / "style.safetensors")
    adapter = read(file)
    modules = {
        path: replace(f, A=torch.cat([f.A, f.A])[: f.rank], B=f.B.T.contiguous().T)
        for path, f in adapter.modules.items()
    }
    assert contents(write(replace(adapter, modules=modules), tmp_path / "out")) == contents(file)


def test_the_configuration_is_canonical(tmp_path: Path) -> None:
    tensors = layer(alpha=torch.tensor(0.1, dtype=torch.bfloat16))
    adapter = read(save(tmp_path / "s.safetensors", tensors, {"b": "2", "a": "ä"}))
    assert adapter.config == (
        f'{{"alphas":{{"{UNET}":{{"dtype":"bfloat16","shape":[],"value":0.10009765625}}}},'
        '"file":"s.safetensors","keys":{},"metadata":{"a":"ä","b":"2"}}'
    )


def test_the_file_comes_back_from_a_store(tmp_path: Path) -> None:
    file = save(tmp_path / "style.safetensors", model(torch.bfloat16), METADATA)
    store = AdapterStore.create(tmp_path / "zoo")
    store.add(read(file))
    store.commit("one adapter")
    stored = AdapterStore.open(tmp_path / "zoo").read_adapter("style")
    assert contents(write(stored, tmp_path / "out")) == contents(file)


def changed(adapter: Adapter, **fields: Any) -> Adapter:
    return replace(adapter, config=json.dumps({**json.loads(adapter.config), **fields}))


def test_a_configuration_of_another_adapter(tmp_path: Path) -> None:
    adapter = read(save(tmp_path / "style.safetensors"))
    module = adapter.modules[UNET]
    entry = {"dtype": "float32", "shape": [], "value": 1.0}
    cases = [
        (replace(adapter, config=""), "the text: Invalid JSON"),
        (replace(adapter, config="[]"), "expected the JSON object"),
        (changed(adapter, file="../style.safetensors"), "file: Value error"),
        (changed(adapter, file="style.bin"), "file: Value error"),
        (changed(adapter, more=1), "more: Extra inputs"),
        (changed(adapter, alphas={"lora_unet_z": entry}), "speaks of module lora_unet_z"),
        (changed(adapter, alphas={}), "has scaling 0.25, its configuration says 1.0"),
        (changed(adapter, alphas={UNET: {**entry, "dtype": "float7"}}), "no float7 of shape"),
        (changed(adapter, alphas={UNET: {**entry, "value": 0.1}}), "no float32 of shape () is 0.1"),
        (changed(adapter, alphas={UNET: {**entry, "shape": [2]}}), "of shape (2,) is 1.0"),
        (
            changed(adapter, alphas={UNET: {"dtype": "int8", "shape": [], "value": 300}}),
            "no int8 of shape () is 300",
        ),
        (
            replace(adapter, modules={**adapter.modules, UNET: replace(module, scaling=0.5)}),
            f'{UNET}: adapter "style" has scaling 0.5, its configuration says 0.25',
        ),
    ]
    for number, (given, expected) in enumerate(cases):
        with pytest.raises(AdapterError) as caught:
            write(given, tmp_path / str(number))
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not list((tmp_path / str(number)).iterdir())


# Converting ------------------------------------------------------------------------------------


def bits(factors: Factors) -> tuple[object, ...]:
    return (factors.A.dtype, factors.A.tolist(), factors.B.tolist(), factors.scaling, factors.kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_peft_adapter_becomes_a_file(tmp_path: Path, dtype: torch.dtype) -> None:
    made = make_adapter("sql", seed=0, ranks={"layers.1.mlp.up": 3}, alpha=1.5, dtype=dtype)
    adapter = read_peft(write_peft_directory(made, tmp_path / "sql"))
    file = write(adapter, tmp_path / "out", prefix="lora_te")
    assert file.name == "sql.safetensors"
    back = read_adapter(file)
    names = {f"lora_te_{path.replace('.', '_')}": path for path in adapter.modules}
    assert list(back.modules) == sorted(names)
    for name, factors in back.modules.items():
        assert bits(factors) == bits(adapter.modules[names[name]])
    alphas = {t.item() for key, t in load_file(file).items() if key.endswith(".alpha")}
    assert alphas == {1.5}
    assert contents(file)[1] == {
        "ss_network_alpha": "1.5",
        "ss_network_dim": "Dynamic",
        "ss_network_module": "networks.lora",
        "ss_sd_model_name": "org/base",
    }


def adapter_of(*paths: str, **changes: Any) -> Adapter:
    factors = Factors(torch.ones(4, 18), torch.ones(5, 4), scaling=0.5)
    modules = {path: replace(factors, **changes) for path in paths}
    return Adapter(name="style", modules=modules, format="other")


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["unet.a.b_c", "text_encoder.d"], ["lora_unet_a_b_c", "lora_te_d"]),
        (
            ["unet.a", "text_encoder.d", "text_encoder_2.d"],
            ["lora_unet_a", "lora_te1_d", "lora_te2_d"],
        ),
        (["transformer.a", "text_encoder.d"], ["lora_transformer_a", "lora_te1_d"]),
        (["text_encoder.d", "text_encoder_3.d"], ["lora_te1_d", "lora_te3_d"]),
        (["model.layers.0", "unet"], ["lora_unet_model_layers_0", "lora_unet_unet"]),
    ],
)
def test_names_when_flattened(tmp_path: Path, paths: list[str], expected: list[str]) -> None:
    back = read(write(adapter_of(*paths), tmp_path / "out"))
    assert list(back.modules) == sorted(expected)


@pytest.mark.parametrize("base_model", ["org/base", "gpt2", "/models/base", None])
@pytest.mark.parametrize("revision", ["v1", None])
def test_the_base_model_and_its_revision_are_kept(
    tmp_path: Path, base_model: str | None, revision: str | None
) -> None:
    source = replace(adapter_of("unet.a"), base_model=base_model, revision=revision)
    file = write(source, tmp_path / "out")
    back = read(file)
    assert (back.base_model, back.revision) == (base_model, revision)
    again = write(back, tmp_path / "again")
    assert contents(again)[1] == contents(file)[1]


@pytest.mark.parametrize("part", ["transformer_2", "transformer_ref", "text_conditioner"])
def test_parts_of_a_pipeline_without_a_name_here(tmp_path: Path, part: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match=f"{part}.a is of {part}") as caught:
        write(adapter_of(f"{part}.a"), tmp_path / "out")
    assert caught.value.feature == part


def test_a_convolution_is_converted_with_its_kernel(tmp_path: Path) -> None:
    file = write(adapter_of("unet.conv", kind="conv2d:3x3"), tmp_path / "out")
    assert load_file(file)["lora_unet_conv.lora_down.weight"].shape == (4, 2, 3, 3)
    assert load_file(file)["lora_unet_conv.lora_up.weight"].shape == (5, 4, 1, 1)
    assert read(file).modules["lora_unet_conv"].kind == "conv2d:3x3"
    wrong = adapter_of("unet.conv", kind="conv2d:5x5")
    with pytest.raises(AdapterError, match=r"expected a multiple of 25 columns for conv2d:5x5"):
        write(wrong, tmp_path / "wrong")


@pytest.mark.parametrize(
    ("adapter", "feature"),
    [
        (adapter_of("a.b", "a_b"), "flattened names"),
        (adapter_of("unet.a", "a"), "flattened names"),
        (adapter_of("a", kind="embedding"), "embedding"),
        (adapter_of("a", scaling=4 / 3**0.5), "scaling"),
        (adapter_of("a", scaling=0.1), "scaling"),
        (adapter_of("a", scaling=0.0), "scaling"),
        (adapter_of("a", scaling=1e300), "scaling"),
        (replace(adapter_of("a"), verbatim={"head.weight": torch.ones(2)}), "head.weight"),
    ],
)
def test_what_would_be_lost(tmp_path: Path, adapter: Adapter, feature: str) -> None:
    with pytest.raises(UnsupportedAdapterError) as caught:
        write(adapter, tmp_path / "out")
    assert caught.value.feature == feature
    assert 'adapter "style"' in str(caught.value)
    assert "cannot be written as kohya" in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("alpha", [1, 3, 7.25, 0.1, 1e-20])
@pytest.mark.parametrize("rank", [1, 3, 7, 8, 48])
def test_any_float32_alpha_comes_back(tmp_path: Path, alpha: float, rank: int) -> None:
    exact = torch.tensor(alpha, dtype=torch.float32).item()
    factors = Factors(torch.ones(rank, 6), torch.ones(5, rank), scaling=exact / rank)
    file = write(Adapter(name="s", modules={"a": factors}, format="other"), tmp_path / "out")
    assert load_file(file)["lora_unet_a.alpha"].item() == exact
    assert read(file).modules["lora_unet_a"].scaling == exact / rank


def test_the_prefix_is_a_name() -> None:
    for prefix in ("", "lora.unet", "1x", "a b"):
        with pytest.raises(ValueError, match="prefix"):
            KohyaFormat(prefix=prefix)


def test_the_page_shows_what_is_refused() -> None:
    page = (Path(__file__).parents[3] / "docs" / "adapters.md").read_text(encoding="utf-8")
    table = page.split("<!-- kohya tensors: begin -->\n")[1].split("\n<!-- kohya tensors: end")[0]
    rows = [f"| `{name}` | {because} |" for name, because in REFUSED_NAMES.items()]
    assert table.splitlines()[2:] == rows
