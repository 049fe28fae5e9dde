"""What is written as PEFT reads back the same: PEFT's own as it came, other formats exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from adapters import MODULES, PREFIX, TinyModel, make_adapter, write_peft_directory
from unmerge.adapter import Adapter, Factors
from unmerge.errors import AdapterError, UnsupportedAdapterError
from unmerge.formats import PeftFormat, read_peft

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q = "layers.0.attn.q_proj"


def write(adapter: Adapter, directory: Path) -> Path:
    directory.mkdir()
    PeftFormat().write(adapter, directory)
    return directory


def document(directory: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    return loaded


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def foreign(
    modules: Mapping[str, tuple[int, int]],
    scalings: Mapping[str, float] | float,
    *,
    ranks: Mapping[str, int] | int = 4,
    dtype: torch.dtype = torch.float32,
    kinds: Mapping[str, str] | None = None,
    verbatim: Mapping[str, torch.Tensor] | None = None,
) -> Adapter:
    """Return an adapter as a format other than PEFT would give it."""
    generator = torch.Generator().manual_seed(2)
    factors = {}
    for path, (d_out, d_in) in modules.items():
        rank = ranks if isinstance(ranks, int) else ranks[path]
        factors[path] = Factors(
            A=torch.randn(rank, d_in, generator=generator).to(dtype),
            B=torch.randn(d_out, rank, generator=generator).to(dtype),
            scaling=scalings if isinstance(scalings, float | int) else scalings[path],
            kind=(kinds or {}).get(path, "linear"),
        )
    return Adapter(
        name="sql",
        modules=factors,
        verbatim=verbatim or {},
        config="{}",
        format="vendor.other",
        base_model="org/base",
        revision="abc",
    )


def same_after_reading(adapter: Adapter, directory: Path) -> None:
    got = read_peft(directory, name=adapter.name)
    assert list(got.modules) == sorted(adapter.modules)
    for path, want in adapter.modules.items():
        back = got.modules[path]
        assert (back.scaling.hex(), back.kind) == (float(want.scaling).hex(), want.kind)
        for tensor, original in ((back.A, want.A), (back.B, want.B)):
            assert (tensor.dtype, tensor.shape) == (original.dtype, original.shape)
            assert torch.equal(bits(tensor), bits(original))
    assert (got.base_model, got.revision) == (adapter.base_model, adapter.revision)


def refusal(adapter: Adapter, directory: Path) -> UnsupportedAdapterError:
    with pytest.raises(UnsupportedAdapterError) as caught:
        write(adapter, directory)
    assert "\n" not in str(caught.value)
    assert not list(directory.iterdir())
    return caught.value


# -- PEFT's own --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_and_configuration_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = make_adapter(
        "sql",
        seed=3,
        dtype=dtype,
        ranks={Q: 2},
        verbatim={
            f"{PREFIX}head.weight": torch.tensor([[-0.0, 1e-45, 3.0]]),
            f"{PREFIX}head.steps": torch.tensor(7),
            f"{PREFIX}head.mask": torch.tensor([True, False]),
            f"{PREFIX}head.codes": torch.tensor([], dtype=torch.int8),
        },
    )
    source = write_peft_directory(adapter, tmp_path / "sql")
    config = "\r\n" + adapter.config.replace("org/base", "örg/base") + " "
    (source / CONFIG).write_bytes(config.encode())
    out = write(read_peft(source), tmp_path / "out")

    assert (out / CONFIG).read_bytes() == config.encode()
    want, got = load_file(source / WEIGHTS), load_file(out / WEIGHTS)
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert (got[key].dtype, got[key].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(got[key]), bits(tensor))
    with safe_open(out / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_pickled_weights_become_safetensors(tmp_path: Path) -> None:
    source = write_peft_directory(make_adapter("sql", seed=3), tmp_path / "sql")
    torch.save(load_file(source / WEIGHTS), source / "adapter_model.bin")
    (source / WEIGHTS).unlink()
    adapter = read_peft(source)
    assert read_peft(write(adapter, tmp_path / "out")).digest() == adapter.digest()


def test_what_is_refused_by_now_can_still_be_given_back(tmp_path: Path) -> None:
    """A store may hold an adapter that an earlier release read."""
    adapter = make_adapter("sql", seed=3)
    config = json.dumps(json.loads(adapter.config) | {"use_newest": 1})
    later = Adapter(name="sql", modules=adapter.modules, config=config)
    assert document(write(later, tmp_path / "out"))["use_newest"] == 1


@pytest.mark.parametrize("changes", [{"lora_alpha": 9}, {"r": 5}, {"rank_pattern": {"up": 3}}])
def test_a_configuration_of_another_adapter(changes: dict[str, Any], tmp_path: Path) -> None:
    adapter = make_adapter("sql", seed=3)
    config = json.dumps(json.loads(adapter.config) | changes)
    other = Adapter(name="sql", modules=adapter.modules, config=config)
    with pytest.raises(
        AdapterError, match=r"the factors have 4 and 2\.0; the configuration is not"
    ):
        write(other, tmp_path / "out")


def test_no_configuration_at_all(tmp_path: Path) -> None:
    adapter = Adapter(name="sql", modules=make_adapter("sql", seed=3).modules)
    with pytest.raises(AdapterError, match=r'adapter "sql" \(adapter_config\.json\): not valid'):
        write(adapter, tmp_path / "out")


def test_a_verbatim_tensor_with_the_key_of_a_factor(tmp_path: Path) -> None:
    plain = make_adapter("sql", seed=3)
    adapter = Adapter(
        name="sql",
        modules=plain.modules,
        verbatim={f"{PREFIX}{Q}.lora_A.weight": torch.ones(1)},
        config=plain.config,
    )
    with pytest.raises(AdapterError, match="has the key of a factor"):
        write(adapter, tmp_path / "out")


# -- other formats -----------------------------------------------------------------------------


def test_one_rank_and_one_scaling_need_no_pattern(tmp_path: Path) -> None:
    adapter = foreign(MODULES, 2.5)
    out = write(adapter, tmp_path / "out")
    same_after_reading(adapter, out)
    config = document(out)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 10, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == sorted(MODULES)
    assert config["modules_to_save"] is None


def test_differing_modules_are_named_by_their_path(tmp_path: Path) -> None:
    scalings = dict.fromkeys(MODULES, 2.0) | {Q: 0.5}
    adapter = foreign(MODULES, scalings, ranks=dict.fromkeys(MODULES, 4) | {Q: 8})
    out = write(adapter, tmp_path / "out")
    same_after_reading(adapter, out)
    assert document(out)["rank_pattern"] == {Q: 8}
    assert document(out)["alpha_pattern"] == {Q: 4}


def test_what_peft_makes_of_it(tmp_path: Path) -> None:
    scalings = {path: 0.75 + i for i, path in enumerate(MODULES)}
    ranks = {path: 1 + i % 3 for i, path in enumerate(MODULES)}
    adapter = foreign(MODULES, scalings, ranks=ranks)
    out = write(adapter, tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(TinyModel().double(), out)
    layers = dict(loaded.base_model.model.named_modules())
    for path, factors in adapter.modules.items():
        layer = layers[path]
        assert (layer.r["default"], layer.scaling["default"]) == (factors.rank, factors.scaling)
        delta = factors.scaling * factors.B.double() @ factors.A.double()
        assert torch.allclose(layer.get_delta_weight("default"), delta, rtol=1e-12, atol=0)


def test_paths_that_end_alike_or_are_no_plain_expression(tmp_path: Path) -> None:
    """A plain path would match the end of the longer one, or something else altogether."""
    modules = {"q": (3, 5), "deep.q": (3, 5), "a.b": (3, 5), "a_b": (3, 5), "x+(y": (3, 5)}
    scalings = {path: 1.0 + i for i, path in enumerate(modules)}
    adapter = foreign(modules, scalings, ranks={path: 1 + i for i, path in enumerate(modules)})
    out = write(adapter, tmp_path / "out")
    same_after_reading(adapter, out)
    assert r"^a\.b" in document(out)["alpha_pattern"]

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("q", "a_b", "x+(y"):
                self.add_module(name, nn.Linear(5, 3))
            self.deep = nn.ModuleDict({"q": nn.Linear(5, 3)})
            self.a = nn.ModuleDict({"b": nn.Linear(5, 3)})

    layers = dict(peft.PeftModel.from_pretrained(Odd(), out).base_model.model.named_modules())
    assert {path: layers[path].scaling["default"] for path in modules} == scalings


def test_every_kind_of_layer(tmp_path: Path) -> None:
    modules = {"tokens": (6, 11), "conv": (6, 4 * 3 * 2), "point": (6, 4), "line": (7, 4 * 3)}
    kinds = {"tokens": "embedding", "conv": "conv2d:3x2", "point": "conv2d:1x1", "line": "conv1d:3"}
    adapter = foreign(modules, 1.5, kinds=kinds, dtype=torch.bfloat16)
    out = write(adapter, tmp_path / "out")
    same_after_reading(adapter, out)
    shapes = {k.removeprefix(PREFIX): tuple(t.shape) for k, t in load_file(out / WEIGHTS).items()}
    assert shapes["tokens.lora_embedding_A"] == (4, 11)
    assert shapes["conv.lora_A.weight"] == (4, 4, 3, 2)
    assert shapes["conv.lora_B.weight"] == (6, 4, 1, 1)
    assert shapes["line.lora_A.weight"] == (4, 4, 3)

    model = nn.ModuleDict(
        {
            "tokens": nn.Embedding(11, 6),
            "conv": nn.Conv2d(4, 6, (3, 2)),
            "point": nn.Conv2d(4, 6, 1),
            "line": nn.Conv1d(4, 7, 3),
        }
    )
    loaded = peft.PeftModel.from_pretrained(model, out)
    for path, layer in loaded.base_model.model.items():
        factors = adapter.modules[path]
        delta = 1.5 * factors.B.double() @ factors.A.double()
        got = layer.get_delta_weight("default").double()
        want = delta.T if path == "tokens" else delta.reshape(got.shape)
        assert torch.linalg.norm(got - want) < 1e-5 * torch.linalg.norm(want)


def test_a_kernel_that_does_not_fit(tmp_path: Path) -> None:
    adapter = foreign({"conv": (6, 25)}, 1.0, kinds={"conv": "conv2d:3x3"})
    with pytest.raises(AdapterError, match=r"conv: kind conv2d:3x3 needs a d_in .* got 25"):
        write(adapter, tmp_path / "out")


def test_views_of_one_memory(tmp_path: Path) -> None:
    """Other formats store factors transposed, and may share them."""
    A = torch.randn(5, 4).T
    factors = Factors(A=A, B=A[:, :4].T, scaling=1.0)
    adapter = Adapter(name="sql", modules={"x": factors, "y": factors}, format="vendor.other")
    same_after_reading(adapter, write(adapter, tmp_path / "out"))


def test_attention_and_its_output_are_one_target(tmp_path: Path) -> None:
    modules = {"attn": (24, 8), "attn.base_layer.out_proj": (8, 8)}
    adapter = foreign(modules, 3.0)
    out = write(adapter, tmp_path / "out")
    same_after_reading(adapter, out)
    assert document(out)["target_modules"] == ["attn"]
    uneven = foreign(modules, {"attn": 3.0, "attn.base_layer.out_proj": 1.0})
    assert refusal(uneven, tmp_path / "uneven").feature == "scaling"


# -- scalings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scaling", "rank", "alpha", "rslora"),
    [
        (2.0, 16, 32, False),
        (1.0, 7, 7, False),
        (16 / 12, 12, 16, False),
        (1.3 / 3, 3, 1.3, False),
        (0.0, 4, 0, False),
        (-0.0, 4, -0.0, False),
        (-4 / 3, 3, -4, False),
        (5e-324, 1, 5e-324, False),
        # 16 / sqrt(5) is no number divided by 5, but is what rsLoRA computes.
        (16 / math.sqrt(5), 5, 16, True),
        (16 / math.sqrt(8), 8, 8 * (16 / math.sqrt(8)), False),
        (2.0**60, 1, 2.0**60, False),
    ],
)
def test_scalings_that_peft_can_say(
    scaling: float, rank: int, alpha: float, rslora: bool, tmp_path: Path
) -> None:
    adapter = foreign({"x": (3, 5)}, scaling, ranks=rank)
    out = write(adapter, tmp_path / "out")
    same_after_reading(adapter, out)
    config = document(out)
    assert config["use_rslora"] is rslora
    assert repr(config["lora_alpha"]) == repr(alpha)


def unreachable(rank: int) -> float:
    """Return a number that no float is the `rank`-fold or root-of-`rank`-fold of, rounded."""

    def reached(scaling: float, divisor: float) -> bool:
        alpha = scaling * divisor
        near = (alpha, math.nextafter(alpha, 0), math.nextafter(alpha, math.inf))
        return any(candidate / divisor == scaling for candidate in near)

    scaling = 1.9
    while reached(scaling, rank) or reached(scaling, math.sqrt(rank)):
        scaling = math.nextafter(scaling, 2)
    return scaling


@pytest.mark.parametrize("scaling", [unreachable(3), 1e307, math.inf, math.nan])
def test_scalings_that_peft_cannot_say(scaling: float, tmp_path: Path) -> None:
    refused = refusal(foreign({"x": (3, 5)}, scaling, ranks=3), tmp_path / "out")
    assert refused.feature == "scaling"
    assert str(refused).startswith(
        f'x: adapter "sql" (format vendor.other) has the scaling {scaling!r}'
    )


def test_two_scalings_that_need_different_rules(tmp_path: Path) -> None:
    """One flag says for all modules whether the rank or its root divides."""
    scalings, ranks = {"x": 16 / math.sqrt(5), "y": 16 / 10}, {"x": 5, "y": 10}
    for path, rslora in (("x", True), ("y", False)):
        alone = foreign({path: (3, 5)}, scalings[path], ranks=ranks[path])
        assert document(write(alone, tmp_path / path))["use_rslora"] is rslora
    both = foreign(dict.fromkeys(scalings, (3, 5)), scalings, ranks=ranks)
    assert refusal(both, tmp_path / "out").feature == "scaling"


def test_zeros_of_both_signs(tmp_path: Path) -> None:
    """They are one number to patterns, but two scalings."""
    adapter = foreign({"x": (3, 5), "y": (3, 5)}, {"x": 0.0, "y": -0.0})
    assert refusal(adapter, tmp_path / "out").feature == "scaling"


# -- tensors that are no low-rank update -------------------------------------------------------


def test_whole_modules_become_modules_to_save(tmp_path: Path) -> None:
    verbatim = {
        "head.weight": torch.randn(3, 12),
        "head.bias": torch.randn(3),
        f"{Q}.bias": torch.randn(12),
    }
    adapter = foreign(MODULES, 2.0, verbatim=verbatim)
    out = write(adapter, tmp_path / "out")
    same_after_reading(adapter, out)
    assert document(out)["modules_to_save"] == ["head"]
    assert document(out)["bias"] == "lora_only"
    back = read_peft(out).verbatim
    assert set(back) == {
        f"{PREFIX}head.weight",
        f"{PREFIX}head.bias",
        f"{PREFIX}{Q}.base_layer.bias",
    }
    assert torch.equal(back[f"{PREFIX}{Q}.base_layer.bias"], verbatim[f"{Q}.bias"])

    state = peft.PeftModel.from_pretrained(TinyModel(), out).merge_and_unload().state_dict()
    for key, tensor in verbatim.items():
        assert torch.equal(state[key], tensor), key


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (f"{Q}.weight", "none with adapted layers"),
        (f"{Q}.base_layer.weight", "none with adapted layers"),
        ("layers.0.scale", "none with adapted layers"),
        ("norm.bias", "the weight is not there"),
        ("weight", "none with adapted layers"),
        ("head.lora_A.bias", "the weight is not there"),
    ],
)
def test_tensors_that_peft_has_no_place_for(key: str, words: str, tmp_path: Path) -> None:
    adapter = foreign(MODULES, 2.0, verbatim={key: torch.ones(3)})
    refused = refusal(adapter, tmp_path / "out")
    assert words in str(refused)
    assert refused.feature == key


def test_two_tensors_that_would_be_one(tmp_path: Path) -> None:
    verbatim = {"head.weight": torch.zeros(3), f"{PREFIX}head.weight": torch.ones(3)}
    refused = refusal(foreign(MODULES, 2.0, verbatim=verbatim), tmp_path / "out")
    assert refused.feature == f"{PREFIX}head.weight"


@pytest.mark.parametrize("key", ["head.lora_E.weight", "head.lora_magnitude_vector.weight"])
def test_tensors_that_could_not_be_read_again(key: str, tmp_path: Path) -> None:
    adapter = foreign(MODULES, 2.0, verbatim={key: torch.ones(3)})
    assert refusal(adapter, tmp_path / "out").feature in key


@pytest.mark.parametrize(
    "path", ["lora_unet_mid_block_proj_in", "lora_te1_text_model_fc1", "lycoris_blocks_0_q"]
)
def test_joined_names(path: str, tmp_path: Path) -> None:
    refused = refusal(foreign({path: (3, 5)}, 1.0), tmp_path / "out")
    assert refused.feature == path
    assert "joins the parts of a path by underscores" in str(refused)


names = st.sampled_from(["q", "k", "q_proj", "0", "1", "attn", "layers", "a-b"])
paths = st.lists(names, min_size=1, max_size=4).map(".".join)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        paths,
        st.tuples(
            st.integers(1, 6),
            st.integers(-64, 64) | st.floats(-1e3, 1e3),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_any_alphas_and_ranks(
    tmp_path_factory: pytest.TempPathFactory, drawn: dict[str, tuple[int, float]]
) -> None:
    adapter = foreign(
        dict.fromkeys(drawn, (2, 3)),
        {path: alpha / rank for path, (rank, alpha) in drawn.items()},
        ranks={path: rank for path, (rank, _) in drawn.items()},
    )
    same_after_reading(adapter, write(adapter, tmp_path_factory.mktemp("drawn") / "out"))


def test_an_adapter_without_modules(tmp_path: Path) -> None:
    adapter = foreign({}, 1.0, verbatim={"norm.weight": torch.ones(3)})
    with pytest.raises(UnsupportedAdapterError, match="it has no module") as caught:
        write(adapter, tmp_path / "out")
    assert caught.value.feature == "modules"
    assert not list((tmp_path / "out").iterdir())
