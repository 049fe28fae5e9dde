"""What tensors are, told from their names, is what transformers' and diffusers' modules are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

from unmerge.errors import AdapterError
from unmerge.formats.checkpoint_layout import (
    BUFFERS,
    CONV1D_LAYERS,
    CONV1D_MODELS,
    EMBEDDINGS,
    HEADS,
    Layer,
    is_buffer,
    is_head,
    layer_of,
    pair_names,
)

transformers = pytest.importorskip("transformers")

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
BERT = {**TINY, "intermediate_size": 24, "max_position_embeddings": 12}
GPT2 = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 40,
    "n_positions": 12,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
VIT = {**BERT, "image_size": 8, "patch_size": 4}
WHISPER = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "vocab_size": 40,
    "num_mel_bins": 4,
    "max_source_positions": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "BertForSequenceClassification": lambda: build("BertForSequenceClassification", "Bert", BERT),
    "RobertaForMaskedLM": lambda: build("RobertaForMaskedLM", "Roberta", BERT),
    "GPT2LMHeadModel": lambda: build("GPT2LMHeadModel", "GPT2", GPT2),
    "LlamaForCausalLM": lambda: build("LlamaForCausalLM", "Llama", BERT),
    "GPTNeoXForCausalLM": lambda: build("GPTNeoXForCausalLM", "GPTNeoX", BERT),
    "OPTForCausalLM": lambda: build(
        "OPTForCausalLM", "OPT", {**BERT, "ffn_dim": 24, "word_embed_proj_dim": 16}
    ),
    "T5ForConditionalGeneration": lambda: build("T5ForConditionalGeneration", "T5", T5),
    "ViTForImageClassification": lambda: build("ViTForImageClassification", "ViT", VIT),
    "WhisperModel": lambda: build("WhisperModel", "Whisper", WHISPER),
}


def build(name: str, config: str, options: dict[str, object]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, name)(
            getattr(transformers, f"{config}Config")(**options)
        )
    return model


def expected(path: str, module: nn.Module) -> Layer | None:
    """What a module is by its class."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Embedding):
        return Layer(path, "embedding", transposed=True)
    if isinstance(module, nn.Linear | Conv1D):
        return Layer(path, "linear", transposed=isinstance(module, Conv1D))
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        kernel = "x".join(str(size) for size in module.kernel_size)
        return Layer(path, f"conv{len(module.kernel_size)}d:{kernel}", transposed=False)
    return None


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_what_their_classes_say(name: str) -> None:
    model = MODELS[name]()
    state = model.state_dict()
    seen = set()
    for path, module in model.named_modules():
        for parameter, _ in module.named_parameters(recurse=False):
            key = f"{path}.{parameter}"
            bias = state.get(f"{path}.bias")
            shape = None if bias is None else tuple(bias.shape)
            found = layer_of(key, tuple(state[key].shape), shape, model.config.model_type)
            wanted = expected(path, module) if parameter == "weight" else None
            assert found == wanted, key
            seen.add(found)
    assert len(seen) > 5


@pytest.mark.parametrize(
    ("name", "shape", "bias", "model_type"),
    [
        ("a.weight", (4,), None, None),
        ("a.weight", (), None, None),
        ("a.weight", (0, 4), None, None),
        ("a.weight", (2, 2, 2, 2, 2, 2), None, None),
        ("a.kernel", (4, 4), None, None),
        ("weight", (4, 4), None, None),
        ("a.weight", (4, 6), (6,), "llama"),  # transposed, in a model of which we do not know it
        ("h.0.c_attn.weight", (4, 6), (4,), "gpt2"),  # not transposed, where it should be
        ("wte.weight", (4, 6), (6,), None),  # embeddings have no bias
        ("up.weight", (4, 6, 3, 3), (6,), None),  # a transposed convolution
        ("a.weight", (4, 6, 3, 129), None, None),
    ],
)
def test_layers_that_are_not_known(
    name: str, shape: tuple[int, ...], bias: tuple[int, ...] | None, model_type: str | None
) -> None:
    assert layer_of(name, shape, bias, model_type) is None


def test_a_prefix_on_either_side() -> None:
    short = ["encoder.q.weight", "encoder.k.weight"]
    long = ["bert.encoder.q.weight", "bert.encoder.k.weight", "classifier.weight"]
    pairing = pair_names(long, short)
    assert pairing.base_of == {f"bert.{name}": name for name in short}
    assert pairing.only_checkpoint == ("classifier.weight",)
    assert pairing.only_base == ()
    pairing = pair_names(short, long)
    assert pairing.base_of == {name: f"bert.{name}" for name in short}
    assert pairing.only_base == ("classifier.weight",)


def test_equal_names_need_no_prefix() -> None:
    names = ["a.x.weight", "x.weight", "a.a.x.weight"]
    assert pair_names(names, names).base_of == {name: name for name in names}


def test_a_prefix_is_taken_only_where_more_names_agree() -> None:
    pairing = pair_names(["a.x", "b.y"], ["a.x", "b.y", "x"])
    assert pairing.base_of == {"a.x": "a.x", "b.y": "b.y"}


def test_names_from_before_2019() -> None:
    old = ["bert.LayerNorm.gamma", "bert.LayerNorm.beta", "bert.gamma"]
    new = ["bert.LayerNorm.weight", "bert.LayerNorm.bias", "bert.gamma"]
    assert pair_names(new, old).base_of == dict(zip(new, old, strict=True))


def test_two_names_of_one_parameter_are_not_paired() -> None:
    # Without the prefix both would be "x.weight"; with it only one name agrees.
    pairing = pair_names(["a.x.weight", "x.weight"], ["x.weight"])
    assert pairing.base_of == {"x.weight": "x.weight"}


@pytest.mark.parametrize(("ours", "theirs"), [(["a"], ["b"]), ([], ["b"]), (["a"], [])])
def test_nothing_in_common(ours: list[str], theirs: list[str]) -> None:
    with pytest.raises(AdapterError, match="no tensor is in both"):
        pair_names(ours, theirs)


def test_heads_by_first_or_second_name() -> None:
    assert is_head("classifier.dense.weight", HEADS)
    assert is_head("bert.pooler.dense.bias", HEADS)
    assert not is_head("model.layers.0.classifier.weight", HEADS)
    assert not is_head("my_classifier.weight", HEADS)


def test_buffers() -> None:
    assert is_buffer("bert.embeddings.position_ids", (1, 512))
    assert is_buffer("inv_freq", (64,))
    assert is_buffer("h.0.attn.bias", (1, 1, 8, 8))
    assert not is_buffer("h.0.attn.bias", (8,))
    assert not is_buffer("h.0.attn.bias", (1, 1, 8, 9))
    assert not is_buffer("h.0.mlp.bias", (1, 1, 8, 8))
    assert not is_buffer("bias", (1, 1, 8, 8))


@pytest.mark.parametrize("names", [BUFFERS, CONV1D_LAYERS, CONV1D_MODELS, EMBEDDINGS, HEADS])
def test_the_page_lists_the_names(names: Iterable[str]) -> None:
    page = Path(__file__).parents[3] / "docs" / "adapters.md"
    listed = ", ".join(f"`{name}`" for name in sorted(names))
    assert listed in " ".join(page.read_text(encoding="utf-8").split())
