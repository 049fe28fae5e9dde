"""Embeddings, convolutions and trained tokens: PEFT saves them, and its merged weight decides."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adapters import PREFIX, make_adapter, peft_tensors, write_peft_directory
from unmerge.adapter import Factors
from unmerge.errors import AdapterError, UnmergeError, UnsupportedAdapterError
from unmerge.formats import PeftFormat, read_peft
from unmerge_bundle.kinds import kernel_of

pytestmark = [
    # PEFT's own, about groups, resized or tied embeddings, and a function of transformers.
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


class Mixed(nn.Module):
    """One layer of every kind, with no two sizes equal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(11, 6, padding_idx=0)
        self.block = nn.ModuleDict(
            {
                "one": nn.Conv1d(4, 7, 3, stride=2),
                "two": nn.Conv2d(4, 6, (3, 2), padding=1),
                "point": nn.Conv2d(4, 6, 1),
                "three": nn.Conv3d(3, 5, (2, 1, 3)),
                "out": nn.Linear(6, 9),
            }
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


KINDS = {
    "tokens": "embedding",
    "block.one": "conv1d:3",
    "block.two": "conv2d:3x2",
    "block.point": "conv2d:1x1",
    "block.three": "conv3d:2x1x3",
    "block.out": "linear",
}
TARGETS = ["tokens", "one", "two", "point", "three", "out"]


def adapt(model: nn.Module, **config: Any) -> Any:
    """Return `model` with a LoRA whose every trained tensor is random."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(adapted.named_parameters()):
        if parameter.requires_grad or "lora_" in name:
            # In place, because factors of tied layers share their memory.
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return adapted


def merged_change(model: nn.Module, adapted: Any) -> dict[str, torch.Tensor]:
    """Return what merging adds to the weights of `model`, in float64, where anything is added."""
    before = {key: weight.double() for key, weight in model.state_dict().items()}
    after = adapted.double().merge_and_unload().state_dict()
    changes = {key: weight - before[key] for key, weight in after.items()}
    return {key: change for key, change in changes.items() if change.abs().max() > 0}


def as_weight(factors: Factors) -> torch.Tensor:
    """Return the delta in the layout of the base weight, as the definition of `kind` says."""
    delta = factors.scaling * factors.B.double() @ factors.A.double()
    if factors.kind == "embedding":
        return delta.T
    kernel = kernel_of(factors.kind)
    return delta.reshape(factors.d_out, -1, *kernel) if kernel else delta


def check_against_peft(model: Any, directory: Path, tmp_path: Path) -> None:
    """The directory, and what is written from it, do to a model what our factors say."""
    adapter = read_peft(directory)
    again = tmp_path / "again"
    again.mkdir()
    PeftFormat().write(adapter, again)
    for place in (directory, again):
        changes = merged_change(model(), peft.PeftModel.from_pretrained(model().double(), place))
        assert changes.keys() == {f"{path}.weight" for path in adapter.modules}
        for path, factors in adapter.modules.items():
            want, got = changes[f"{path}.weight"], as_weight(factors)
            assert got.shape == want.shape
            assert torch.linalg.norm(got - want) < 1e-12 * torch.linalg.norm(want), path


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 7},
        {"r": 3, "lora_alpha": 5, "use_rslora": True},
        {
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"tokens": 2, "block.two": 5},
            "alpha_pattern": {"tokens": 3, "three": 1.5},
        },
        {"r": 2, "init_lora_weights": "gaussian"},
    ],
    ids=["plain", "rslora", "patterns", "gaussian"],
)
def test_every_kind_of_layer(settings: dict[str, Any], tmp_path: Path) -> None:
    adapted = adapt(Mixed(), target_modules=TARGETS, **settings)
    adapted.save_pretrained(tmp_path / "task")
    modules = read_peft(tmp_path / "task").modules
    assert {path: factors.kind for path, factors in modules.items()} == KINDS
    check_against_peft(Mixed, tmp_path / "task", tmp_path)


def test_factors_are_matrices_over_the_bits_in_the_file(tmp_path: Path) -> None:
    adapt(Mixed(), target_modules=TARGETS, r=3).save_pretrained(tmp_path / "task")
    stored = load_file(tmp_path / "task" / "adapter_model.safetensors")
    modules = read_peft(tmp_path / "task").modules
    two, tokens = modules["block.two"], modules["tokens"]
    assert (two.A.shape, two.B.shape) == ((3, 4 * 3 * 2), (6, 3))
    assert (tokens.A.shape, tokens.B.shape) == ((3, 11), (6, 3))
    # Row-major: channel, then the kernel's rows, then its columns.
    A = stored[f"{PREFIX}block.two.lora_A.weight"]
    assert torch.equal(two.A[1, 2 * 6 + 2 * 2 + 1], A[1, 2, 2, 1])
    assert torch.equal(tokens.A, stored[f"{PREFIX}tokens.lora_embedding_A"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    adapt(Mixed(), target_modules=TARGETS, r=3).to(dtype).save_pretrained(tmp_path / "task")
    check_same_files(tmp_path / "task", tmp_path)


def check_same_files(directory: Path, tmp_path: Path) -> None:
    """Reading and writing gives back every tensor, bit for bit, and the configuration."""
    out = tmp_path / "out"
    out.mkdir()
    PeftFormat().write(read_peft(directory), out)
    assert sorted(file.name for file in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = "adapter_config.json"
    assert (out / config).read_bytes() == (directory / config).read_bytes()
    want, got = (load_file(d / "adapter_model.safetensors") for d in (directory, out))
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert (got[key].dtype, got[key].shape) == (tensor.dtype, tensor.shape), key
        assert torch.equal(got[key].view(torch.uint8), tensor.view(torch.uint8)), key


# -- transformers, whose embeddings may be tied ------------------------------------------------


def llama(*, tied: bool) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def test_targeted_embedding_of_a_language_model(tmp_path: Path) -> None:
    adapted = adapt(llama(tied=False), target_modules=["q_proj", "embed_tokens"], r=2)
    adapted.save_pretrained(tmp_path / "task")
    adapter = read_peft(tmp_path / "task")
    assert adapter.modules["model.embed_tokens"].kind == "embedding"
    assert set(adapter.verbatim) == {f"{PREFIX}model.embed_tokens.base_layer.weight"}
    check_against_peft(lambda: llama(tied=False), tmp_path / "task", tmp_path)


def test_tied_embeddings_are_two_modules_with_one_delta(tmp_path: Path) -> None:
    adapted = adapt(
        llama(tied=True),
        target_modules=["q_proj", "embed_tokens"],
        ensure_weight_tying=True,
        r=2,
        lora_alpha=3,
    )
    adapted.save_pretrained(tmp_path / "task")
    modules = read_peft(tmp_path / "task").modules
    assert modules["lm_head"].kind == "linear"
    delta = as_weight(modules["model.embed_tokens"])
    assert delta.abs().max() > 0
    assert torch.allclose(as_weight(modules["lm_head"]), delta, rtol=1e-12, atol=0)
    check_same_files(tmp_path / "task", tmp_path)
    reloaded = peft.PeftModel.from_pretrained(llama(tied=True).double(), tmp_path / "out")
    layer = reloaded.base_model.model.model.embed_tokens
    assert torch.allclose(layer.get_delta_weight("default"), delta, rtol=1e-12, atol=0)


# -- trained tokens ----------------------------------------------------------------------------

ROWS = "token_adapter.trainable_tokens_delta"
TOKENS: dict[str, tuple[bool, Any, set[str]]] = {
    "a list": (False, [1, 3], {"model.embed_tokens"}),
    "a list, tied": (True, [1, 3], {"model.embed_tokens"}),
    "by name": (
        False,
        {"embed_tokens": [1, 3, 4], "lm_head": [2]},
        {"model.embed_tokens", "lm_head"},
    ),
    "by name, tied alike": (
        True,
        {"embed_tokens": [1, 3], "lm_head": [1, 3]},
        {"model.embed_tokens"},
    ),
}


@pytest.mark.parametrize("case", TOKENS)
def test_trained_tokens_are_kept_verbatim(case: str, tmp_path: Path) -> None:
    tied, indices, saved = TOKENS[case]
    adapted = adapt(
        llama(tied=tied), target_modules=["q_proj"], trainable_token_indices=indices, r=2
    )
    adapted.save_pretrained(tmp_path / "task")
    adapter = read_peft(tmp_path / "task")
    assert set(adapter.modules) == {"model.layers.0.self_attn.q_proj"}
    assert set(adapter.verbatim) == {f"{PREFIX}{path}.{ROWS}" for path in saved}
    check_same_files(tmp_path / "task", tmp_path)

    # They are the rows themselves, no difference: merging puts them into the embedding.
    merged = peft.PeftModel.from_pretrained(llama(tied=tied), tmp_path / "out").merge_and_unload()
    wanted = indices if isinstance(indices, list) else indices["embed_tokens"]
    rows = adapter.verbatim[f"{PREFIX}model.embed_tokens.{ROWS}"]
    assert torch.equal(merged.model.embed_tokens.weight[wanted], rows)


def with_tokens(directory: Path, indices: Any, rows: dict[str, torch.Tensor]) -> Path:
    """Write a plain adapter whose configuration names `indices`, with `rows` by embedding."""
    adapter = make_adapter("task", seed=0)
    write_peft_directory(adapter, directory)
    config = json.loads(adapter.config) | {"trainable_token_indices": indices}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    tensors = peft_tensors(adapter) | {f"{PREFIX}{path}.{ROWS}": t for path, t in rows.items()}
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def complaint(directory: Path, kind: type[UnmergeError] = AdapterError) -> str:
    with pytest.raises(kind) as caught:
        read_peft(directory)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


TWO = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("indices", "rows", "words"),
    [
        ([1, 2, 3], {"wte": TWO}, "rows of wte have shape (2, 4), expected (3, features)"),
        ({"wte": [1]}, {"wte": TWO}, "expected (1, features)"),
        ([1, 2], {"wte": torch.ones(2)}, "rows of wte have shape (2), expected (2, features)"),
        ([1, 2], {}, "holds trained rows of 0 embeddings, expected those of the input embedding"),
        ({"wte": [1]}, {}, "expected those of wte by trainable_token_indices"),
        ([1, 2], {"wte": TWO, "lm_head": TWO + 1}, "holds trained rows of 2 embeddings"),
        (3, {}, "trainable_token_indices is 3; expected null, a list of token numbers"),
        ([True], {}, "trainable_token_indices is [True]"),
        ({"wte": 3}, {"wte": TWO}, "trainable_token_indices is {'wte': 3}"),
        ({"": [1, 2]}, {"wte": TWO}, "trainable_token_indices is {'': [1, 2]}"),
    ],
)
def test_trained_tokens_that_do_not_fit(
    indices: Any, rows: dict[str, torch.Tensor], words: str, tmp_path: Path
) -> None:
    assert words in complaint(with_tokens(tmp_path / "task", indices, rows))


def test_trained_tokens_of_an_embedding_that_is_not_named(tmp_path: Path) -> None:
    directory = with_tokens(tmp_path / "task", {"wte": [1, 2]}, {"lm_head": TWO})
    assert "is not explained" in complaint(directory, UnsupportedAdapterError)
    directory = with_tokens(tmp_path / "none", None, {"wte": TWO})
    assert "is not explained" in complaint(directory, UnsupportedAdapterError)


def test_trained_tokens_hidden_under_modules_to_save(tmp_path: Path) -> None:
    directory = with_tokens(tmp_path / "task", None, {"wte": TWO})
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"modules_to_save": ["wte"]}))
    assert "holds trained rows of 1 embeddings, expected those of none" in complaint(directory)


# -- what cannot be ----------------------------------------------------------------------------


def test_convolution_with_groups(tmp_path: Path) -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, groups=2)})
    adapted = adapt(model, target_modules=["conv"], r=4)
    adapted.save_pretrained(tmp_path / "task")
    with pytest.raises(UnsupportedAdapterError, match=r"conv: .*a convolution with 2 groups") as e:
        read_peft(tmp_path / "task")
    assert e.value.feature == "convolution with groups"
    with pytest.raises(NotImplementedError, match="groups > 1"):
        adapted.merge_and_unload()


def write_pair(directory: Path, names: tuple[str, str], *tensors: torch.Tensor) -> Path:
    adapter = make_adapter("task", seed=0, modules={"x": (3, 5)}, rank=2)
    write_peft_directory(adapter, directory)
    pair = {f"{PREFIX}x.{name}": t for name, t in zip(names, tensors, strict=True)}
    save_file(pair, directory / "adapter_model.safetensors")
    return directory


LORA = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")


@pytest.mark.parametrize(
    ("names", "a", "b", "words"),
    [
        (LORA, (2, 5, 3), (3, 2), "do not fit: A is (2, 5, 3), B is (3, 2)"),
        (LORA, (2, 5), (3, 2, 1), "do not fit"),
        (LORA, (2, 5, 3, 3), (3, 2, 1, 3), "do not fit"),
        (LORA, (2, 5, 3, 3), (3, 3, 1, 1), "do not fit"),
        (LORA, (3, 5, 3, 3), (3, 2, 1, 1), "do not fit"),
        (LORA, (2, 5, 0, 3), (3, 2, 1, 1), "do not fit"),
        (LORA, (2, 1, 1, 1, 1, 1), (3, 2, 1, 1, 1, 1), "convolution in up to three dimensions"),
        (LORA, (2, 1, 10000), (3, 2, 1), "kind 'conv1d:10000'"),
        (EMBEDDING, (2, 5, 1), (3, 2, 1), "expected two dimensions above 0"),
        (EMBEDDING, (2, 5), (2, 3), "do not fit"),
        (EMBEDDING, (1, 5), (3, 1), "have rank 1, adapter_config.json says 2"),
    ],
)
def test_shapes_that_are_no_layer(
    names: tuple[str, str], a: tuple[int, ...], b: tuple[int, ...], words: str, tmp_path: Path
) -> None:
    message = complaint(write_pair(tmp_path / "task", names, torch.ones(a), torch.ones(b)))
    assert message.startswith("x: ")
    assert words in message


def test_half_an_embedding(tmp_path: Path) -> None:
    directory = write_pair(tmp_path / "task", EMBEDDING, torch.ones(2, 5), torch.ones(3, 2))
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(f"{PREFIX}x.lora_embedding_A")
    save_file(tensors, file)
    assert "x: factor B is there and factor A is missing" in complaint(directory)


def test_an_embedding_that_is_another_layer_too(tmp_path: Path) -> None:
    directory = write_pair(tmp_path / "task", EMBEDDING, torch.ones(2, 5), torch.ones(3, 2))
    file = directory / "adapter_model.safetensors"
    save_file(load_file(file) | {f"{PREFIX}x.lora_A.weight": torch.ones(2, 5)}, file)
    assert "x: has both lora_A.weight and the factors of an embedding" in complaint(directory)


@pytest.mark.parametrize("name", ["lora_embedding_A.default", "lora_embedding_B.weight"])
def test_embedding_factors_under_other_names(name: str, tmp_path: Path) -> None:
    directory = write_pair(
        tmp_path / "task", (name, EMBEDDING[1]), torch.ones(2, 5), torch.ones(3, 2)
    )
    message = complaint(directory, UnsupportedAdapterError)
    assert f'x.{name}" is no factor as PEFT names them' in message


def test_nothing_rounds_the_scaling_of_an_embedding(tmp_path: Path) -> None:
    adapt(Mixed(), target_modules=["tokens"], r=3, lora_alpha=7).save_pretrained(tmp_path / "a")
    assert read_peft(tmp_path / "a").modules["tokens"].scaling == 7 / 3
    adapt(Mixed(), target_modules=["tokens"], r=3, lora_alpha=7, use_rslora=True).save_pretrained(
        tmp_path / "b"
    )
    assert read_peft(tmp_path / "b").modules["tokens"].scaling == 7 / math.sqrt(3)
