"""MLX adapters are read as mlx-lm applies them, written back bit for bit, and refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapters import make_adapter, write_peft_directory
from unmerge.adapter import Adapter, Factors
from unmerge.errors import AdapterError, NonFiniteError, UnsupportedAdapterError
from unmerge.formats import MlxFormat, PeftFormat, read_adapter
from unmerge.formats.mlx import EMBEDDINGS

Q_PROJ = "model.layers.0.self_attn.q_proj"
EMBEDDING = "model.embed_tokens"


def training_arguments(**parameters: Any) -> dict[str, Any]:
    """What mlx-lm saves as adapter_config.json: the arguments of the training, all of them."""
    return {
        "adapter_path": "adapters",
        "fine_tune_type": "lora",
        "iters": 1000,
        "lora_parameters": {"rank": 2, "dropout": 0.0, "scale": 20.0, **parameters},
        "model": "org/base",
        "num_layers": 16,
        "optimizer": "adam",
        "train": True,
    }


def matrices(
    path: str = Q_PROJ,
    *,
    d_in: int = 5,
    d_out: int = 3,
    rank: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Factors in MLX's layout: lora_a is (d_in, rank), lora_b is (rank, d_out)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{path}.lora_a": torch.randn(d_in, rank, generator=generator).to(dtype),
        f"{path}.lora_b": torch.randn(rank, d_out, generator=generator).to(dtype),
    }


def save(
    directory: Path,
    tensors: dict[str, torch.Tensor] | None = None,
    config: dict[str, Any] | None = None,
    *,
    file: str = "adapters.safetensors",
    metadata: dict[str, str] | None = None,
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(matrices() if tensors is None else tensors, directory / file, metadata=metadata)
    text = json.dumps(training_arguments() if config is None else config, indent=4)
    (directory / "adapter_config.json").write_text(text, encoding="utf-8")
    return directory


def refused(directory: Path, error: type[Exception] = AdapterError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        MlxFormat(**options).read(directory, None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_delta_is_what_a_linear_layer_gains(tmp_path: Path) -> None:
    # 2 · [1 2]ᵀ [3 0 -1]: what inputs (1, 0) and (0, 1) gain is a row each.
    tensors = {
        f"{Q_PROJ}.lora_a": torch.tensor([[1.0], [2.0]]),
        f"{Q_PROJ}.lora_b": torch.tensor([[3.0, 0.0, -1.0]]),
    }
    config = training_arguments(rank=1, scale=2.0)
    factors = read_adapter(save(tmp_path / "sql", tensors, config)).modules[Q_PROJ]
    delta = factors.scaling * factors.B @ factors.A
    assert delta.tolist() == [[6.0, 12.0], [0.0, 0.0], [-2.0, -4.0]]  # (d_out, d_in)


def test_an_input_through_mlx_and_through_our_delta(tmp_path: Path) -> None:
    tensors = matrices()
    adapter = read_adapter(save(tmp_path / "sql", tensors))
    x = np.arange(5, dtype=np.float64)
    a, b = (tensors[f"{Q_PROJ}.{half}"].double().numpy() for half in ("lora_a", "lora_b"))
    factors = adapter.modules[Q_PROJ]
    ours = factors.scaling * factors.B.double().numpy() @ factors.A.double().numpy() @ x
    np.testing.assert_allclose(ours, 20.0 * ((x @ a) @ b), rtol=1e-13)


def test_an_embedding_gains_the_delta_transposed(tmp_path: Path) -> None:
    tensors = matrices(EMBEDDING, d_in=7, d_out=3)
    adapter = read_adapter(save(tmp_path / "sql", tensors))
    factors = adapter.modules[EMBEDDING]
    assert factors.kind == "embedding"
    assert (factors.A.shape, factors.B.shape) == ((2, 7), (3, 2))
    # mlx-lm: embedding.weight + (scale · lora_a) @ lora_b, one row per token.
    gained = 20.0 * tensors[f"{EMBEDDING}.lora_a"] @ tensors[f"{EMBEDDING}.lora_b"]
    torch.testing.assert_close((factors.scaling * factors.B @ factors.A).T, gained)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("model.embed_tokens", "embedding"),
        ("transformer.wte", "embedding"),
        ("model.embedders.3", "embedding"),
        ("lm_head", "linear"),
        ("model.layers.0.embed_tokens_proj", "linear"),
    ],
)
def test_embeddings_are_known_by_name(tmp_path: Path, path: str, kind: str) -> None:
    adapter = read_adapter(save(tmp_path / "sql", matrices(path)))
    assert adapter.modules[path].kind == kind


def test_what_an_adapter_says_of_itself(tmp_path: Path) -> None:
    directory = save(tmp_path / "sql")
    adapter = read_adapter(directory)
    assert (adapter.name, adapter.format, adapter.base_model) == ("sql", "mlx", "org/base")
    assert (adapter.revision, adapter.source) == (None, str(directory))
    assert adapter.modules[Q_PROJ].scaling == 20.0
    assert read_adapter(directory, name="other").name == "other"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        **matrices(dtype=dtype),
        **matrices(EMBEDDING, d_in=7, dtype=dtype, seed=1),
    }
    tensors[f"{Q_PROJ}.lora_a"][0, 0] = -0.0
    given = save(tmp_path / "sql", tensors, metadata={"format": "mlx", "by": "me"})
    (tmp_path / "out").mkdir()
    MlxFormat().write(read_adapter(given), tmp_path / "out")
    name = "adapter_config.json"
    assert (tmp_path / "out" / name).read_bytes() == (given / name).read_bytes()
    weights = tmp_path / "out" / "adapters.safetensors"
    written = load_file(weights)
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert written[key].dtype == dtype
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(written[key].view(bits), tensor.view(bits)), key
    with safe_open(weights, "pt") as file:
        assert file.metadata() == {"format": "mlx", "by": "me"}


def test_a_checkpoint_of_the_training(tmp_path: Path) -> None:
    directory = save(tmp_path / "sql", file="0000100_adapters.safetensors")
    later = save(tmp_path / "sql", matrices(seed=1))
    assert read_adapter(directory).digest() == read_adapter(later).digest()
    checkpoint = read_adapter(directory / "0000100_adapters.safetensors")
    assert checkpoint.name == "0000100_adapters"
    assert torch.equal(checkpoint.modules[Q_PROJ].A, matrices()[f"{Q_PROJ}.lora_a"].T)
    assert read_adapter(directory / "adapters.safetensors").name == "sql"


def test_recognition(tmp_path: Path) -> None:
    mlx = save(tmp_path / "mlx")
    peft = write_peft_directory(make_adapter("sql", seed=0), tmp_path / "peft")
    both = save(write_peft_directory(make_adapter("sql", seed=0), tmp_path / "both"))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapters.npz").touch()
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    save(tmp_path / "plain", {"layers.0.weight": torch.ones(1)}, file="model.safetensors")
    for path, ours in {
        mlx: True,
        mlx / "adapters.safetensors": True,
        tmp_path / "old": True,
        peft: False,
        both: False,
        tmp_path / "x.safetensors": False,
        tmp_path / "plain": False,
        tmp_path / "plain" / "model.safetensors": False,
        tmp_path / "nowhere": False,
        Path("x" * 5000): False,
        Path("nul\0.safetensors"): False,
    }.items():
        assert MlxFormat().recognises(path) is ours, path
        assert not (ours and PeftFormat().recognises(path)), path
    assert PeftFormat().recognises(peft)
    assert PeftFormat().recognises(both)


def test_the_scale_of_configurations_that_have_an_alpha(tmp_path: Path) -> None:
    # Trained before June 2024: scale · alpha / rank; loaded since: scale.
    directory = save(tmp_path / "sql", config=training_arguments(alpha=16, scale=10.0))
    text = refused(directory)
    assert "scale 10.0 and alpha 16 at rank 2" in text
    assert "June 2024" in text
    adapter = MlxFormat(scale=80.0).read(directory, None)
    assert adapter.modules[Q_PROJ].scaling == 80.0
    assert json.loads(adapter.config)["scale"] == 80.0
    # An alpha equal to the rank leaves only one reading.
    same = save(tmp_path / "same", config=training_arguments(alpha=2.0, scale=10.0))
    assert read_adapter(same).modules[Q_PROJ].scaling == 10.0


@pytest.mark.parametrize("scale", [None, "20", True, float("1e301"), [20.0]])
def test_a_scale_that_is_none(tmp_path: Path, scale: Any) -> None:
    directory = save(tmp_path / "sql", config=training_arguments(scale=scale))
    assert "expected a finite number" in refused(directory)


@pytest.mark.parametrize("rank", [None, 0, -1, 2.0, True, "2"])
def test_a_rank_that_is_none(tmp_path: Path, rank: Any) -> None:
    directory = save(tmp_path / "sql", config=training_arguments(rank=rank))
    assert "expected a whole number above 0" in refused(directory)


def test_a_rank_that_is_not_the_tensors(tmp_path: Path) -> None:
    directory = save(tmp_path / "sql", config=training_arguments(rank=3))
    assert "have rank 2, adapter_config.json says 3" in refused(directory)


@pytest.mark.parametrize("parameters", [None, 3, "rank"])
def test_no_parameters(tmp_path: Path, parameters: Any) -> None:
    config = {**training_arguments(), "lora_parameters": parameters}
    text = refused(save(tmp_path / "sql", config=config))
    assert "expected an object with rank and scale" in text


def test_a_configuration_of_peft(tmp_path: Path) -> None:
    directory = save(tmp_path / "sql", config={"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    assert "lora_parameters is None" in refused(directory)


@pytest.mark.parametrize(
    "change", [{"fine_tune_type": "dora"}, {"fine_tune_type": "full"}, {"fine_tune_type": "x"}]
)
def test_other_kinds_of_training(tmp_path: Path, change: dict[str, Any]) -> None:
    directory = save(tmp_path / "sql", config={**training_arguments(), **change})
    with pytest.raises(UnsupportedAdapterError, match="fine_tune_type is") as caught:
        read_adapter(directory)
    assert caught.value.feature == "fine_tune_type"


def test_dora_as_it_was_named_before(tmp_path: Path) -> None:
    config = {**training_arguments(), "use_dora": True}
    del config["fine_tune_type"]
    text = refused(save(tmp_path / "sql", config=config), UnsupportedAdapterError)
    assert "fine_tune_type is 'dora'" in text
    plain = {**config, "use_dora": False}
    assert read_adapter(save(tmp_path / "sql", config=plain)).modules[Q_PROJ].scaling == 20.0


def test_an_unknown_parameter(tmp_path: Path) -> None:
    directory = save(tmp_path / "sql", config=training_arguments(use_rslora=True))
    with pytest.raises(UnsupportedAdapterError, match="unknown entry 'use_rslora'") as caught:
        read_adapter(directory)
    assert caught.value.feature == "use_rslora"
    assert read_adapter(save(tmp_path / "sql", config=training_arguments(use_rslora=False)))


@pytest.mark.parametrize(
    ("key", "shape", "feature"),
    [
        (f"{Q_PROJ}.m", (3,), "m"),
        ("model.layers.0.mlp.up_proj.lora_a", (4, 2, 5), "LoRASwitchLinear"),
        ("model.layers.0.qkv_proj.lora_a.0", (5, 2), "FusedLoRALinear"),
        ("model.layers.0.qkv_proj.lora_b.11", (2, 5), "FusedLoRALinear"),
        ("model.norm.weight", (5,), "model.norm.weight"),
        ("language_model.q_proj.A", (5, 2), "language_model.q_proj.A"),
    ],
)
def test_tensors_that_are_refused(
    tmp_path: Path, key: str, shape: tuple[int, ...], feature: str
) -> None:
    directory = save(tmp_path / "sql", {**matrices(), key: torch.ones(shape)})
    with pytest.raises(UnsupportedAdapterError) as caught:
        read_adapter(directory)
    assert caught.value.feature == feature
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({f"{Q_PROJ}.lora_a": torch.ones(5)}, "factor A .* has shape (5)"),
        ({f"{Q_PROJ}.lora_a": torch.ones(5, 3)}, "do not fit: A is (3, 5), B is (3, 2)"),
        ({f"{Q_PROJ}.lora_a": torch.ones(5, 2).half()}, "factor A .* is float16"),
        ({f"{Q_PROJ}.lora_b": torch.ones(2, 3).double()}, "factor B .* is float64"),
        ({"x.lora_a": torch.ones(5, 2)}, "x: factor A is there and factor B is missing"),
        ({".lora_a": torch.ones(5, 2)}, 'tensor ".lora_a" names no module'),
        ({"a/b.lora_a": torch.ones(5, 2)}, "it holds '/'"),
    ],
)
def test_malformed_tensors(tmp_path: Path, changed: dict[str, torch.Tensor], words: str) -> None:
    text = refused(save(tmp_path / "sql", {**matrices(), **changed}))
    for part in words.split(" .* "):
        assert part in text


def test_numbers_that_are_none(tmp_path: Path) -> None:
    tensors = matrices()
    tensors[f"{Q_PROJ}.lora_b"][1, 2] = float("inf")
    text = refused(save(tmp_path / "sql", tensors), NonFiniteError)
    assert f'{Q_PROJ}: factor B of adapter "sql" holds 1 entries' in text
    assert "the first at [2, 1]" in text  # of B, which is (d_out, rank)


def test_no_module(tmp_path: Path) -> None:
    assert "holds no LoRA module" in refused(save(tmp_path / "sql", {}))


def test_missing_files(tmp_path: Path) -> None:
    directory = save(tmp_path / "sql")
    (directory / "adapter_config.json").unlink()
    assert "is missing; without it the scale is unknown" in refused(directory)
    adapter = MlxFormat(scale=20.0).read(directory, None)
    (tmp_path / "out").mkdir()
    MlxFormat().write(adapter, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["adapters.safetensors"]
    (directory / "adapters.safetensors").unlink()
    assert "no MLX adapter; looked for a directory" in refused(directory)
    (directory / "adapters.npz").touch()
    assert "before April 2024" in refused(directory, UnsupportedAdapterError)


def test_a_truncated_file(tmp_path: Path) -> None:
    directory = save(tmp_path / "sql")
    weights = directory / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "truncated or damaged" in refused(directory)


@pytest.mark.parametrize("scale", [None, 20.0])
def test_a_configuration_that_is_not_the_adapters(tmp_path: Path, scale: float | None) -> None:
    source = save(tmp_path / "sql")
    if scale is not None:
        (source / "adapter_config.json").unlink()
    adapter = MlxFormat(scale=scale).read(source, None)
    out = tmp_path / "out"
    out.mkdir()
    scaled = {path: replace(f, scaling=5.0) for path, f in adapter.modules.items()}
    with pytest.raises(AdapterError, match=r"has scaling 5\.0, its configuration says 20\.0"):
        MlxFormat().write(replace(adapter, modules=scaled), out)
    for config in ("{}", '{"adapter_config":null,"metadata":{},"scale":null}'):
        with pytest.raises(AdapterError, match="not what reading the adapter gave"):
            MlxFormat().write(replace(adapter, config=config), out)
    assert not list(out.iterdir())


def test_a_path_longer_than_any(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no MLX adapter"):
        MlxFormat().read(tmp_path / f"{'x' * 300}.safetensors", "sql")


def test_from_peft_and_back(tmp_path: Path) -> None:
    modules = {Q_PROJ: (8, 12), "model.layers.7.mlp.up_proj": (20, 12), "lm_head": (6, 12)}
    source = make_adapter("sql", seed=0, modules=modules, rank=3, alpha=7, dtype=torch.bfloat16)
    source = replace(source, revision="v1")
    MlxFormat().write(source, tmp_path)
    back = read_adapter(tmp_path, name="sql")
    assert back.format == "mlx"
    assert back.digest() == source.digest()
    assert (back.base_model, back.revision) == ("org/base", "v1")
    weights = load_file(tmp_path / "adapters.safetensors")
    assert weights[f"{Q_PROJ}.lora_a"].shape == (12, 3)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    # What mlx-lm needs to load it: all layers looked at, these modules adapted.
    assert (config["num_layers"], config["fine_tune_type"]) == (-1, "lora")
    assert config["lora_parameters"] == {
        "dropout": 0.0,
        "keys": sorted(modules),
        "rank": 3,
        "scale": 7 / 3,
    }


def linear(path: str, *, rank: int = 2, scaling: float = 1.0, kind: str = "linear") -> Adapter:
    first = Factors(torch.ones(2, 4), torch.ones(4, 2), 1.0)
    other = Factors(torch.ones(rank, 4), torch.ones(4, rank), scaling, kind)
    return Adapter(name="sql", modules={"a.proj": first, path: other})


@pytest.mark.parametrize(
    ("adapter", "feature", "words"),
    [
        (linear("b.proj", rank=3), "rank", "a.proj has rank 2, b.proj has rank 3"),
        (linear("b.proj", scaling=0.5), "scaling", "a.proj has scaling 1.0, b.proj has 0.5"),
        (linear("b.proj", kind="conv2d:1x1"), "kind", "b.proj: its kind is conv2d:1x1"),
        (linear("b.proj", kind="embedding"), "kind", "takes a module of that name for linear"),
        (linear("wte"), "kind", "takes a module of that name for embedding"),
        (
            replace(linear("b.proj"), verbatim={"base_model.model.head.weight": torch.ones(1)}),
            "verbatim",
            "base_model.model.head.weight: it has tensors that are no factors",
        ),
        (linear("lora_unet_b"), "lora_unet_b", "the name is flattened, MLX needs its dots"),
        (replace(linear("lycoris_b"), format="kohya"), "lycoris_b", "the name is flattened"),
        (Adapter(name="sql", modules={}), "modules", "it has no module"),
    ],
)
def test_what_mlx_cannot_hold(tmp_path: Path, adapter: Adapter, feature: str, words: str) -> None:
    with pytest.raises(UnsupportedAdapterError) as caught:
        MlxFormat().write(adapter, tmp_path)
    assert caught.value.feature == feature
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_embedding_is_converted_too(tmp_path: Path) -> None:
    MlxFormat().write(linear("wte", kind="embedding"), tmp_path)
    back = read_adapter(tmp_path, name="sql")
    assert back.digest() == linear("wte", kind="embedding").digest()


def test_the_page_lists_the_names_of_embeddings() -> None:
    page = Path(__file__).parents[3] / "docs" / "adapters.md"
    listed = ", ".join(f"`{name}`" for name in sorted(EMBEDDINGS))
    assert listed in " ".join(page.read_text(encoding="utf-8").split())


def test_options() -> None:
    with pytest.raises(ValueError, match="finite"):
        MlxFormat(scale=float("nan"))
