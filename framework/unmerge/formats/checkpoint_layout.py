"""What a checkpoint's tensors are, told from names and shapes: files name no layer classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from unmerge.errors import AdapterError
from unmerge.formats.base import excerpt
from unmerge_bundle.kinds import LINEAR

__all__ = [
    "BUFFERS",
    "CONV1D_LAYERS",
    "CONV1D_MODELS",
    "EMBEDDINGS",
    "HEADS",
    "OUTPUT_EMBEDDINGS",
    "Layer",
    "Pairing",
    "is_buffer",
    "is_head",
    "last_name",
    "layer_of",
    "pair_names",
]

EMBEDDINGS = frozenset(
    {
        *(
            "embed_in",
            "embed_positions",
            "embed_tokens",
            "embed_tokens_per_layer",
            "entity_embeddings",
        ),
        *("position_embedding", "position_embeddings", "positions_embed", "rel_embeddings"),
        *("relative_attention_bias", "shared", "tok_embeddings", "token_embedding"),
        *("token_type_embeddings", "tokens_embed", "word_embedding", "word_embeddings"),
        *("wpe", "wte"),
    }
)
"""Last names of modules that look up rows of their weight: `torch.nn.Embedding`."""

OUTPUT_EMBEDDINGS = frozenset({"embed_out", "lm_head"})
"""Last names of the linear layers that are often tied to the input embedding."""

HEADS: tuple[str, ...] = (
    *("classification_head", "classifier", "cls", "discriminator_predictions", "embed_out"),
    *("final_logits_bias", "generator_lm_head", "generator_predictions", "lm_head", "pooler"),
    *("pre_classifier", "qa_outputs", "score", "sequence_summary", "v_head", "vocab_layer_norm"),
    *("vocab_projector", "vocab_transform"),
)
"""First or second names of modules that a model of one task has and one of another has not."""

BUFFERS = frozenset({"inv_freq", "masked_bias", "position_ids", "token_type_ids"})
"""Last names of tensors that follow from the configuration, and that only some releases saved."""

CONV1D_MODELS = frozenset({"clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
"""Model types with transformers' `Conv1D`: linear layers whose weight is stored `(d_in, d_out)`."""

CONV1D_LAYERS = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})
"""Last names of those layers."""

_SUFFIX = ".weight"
# Beyond this it is no kernel: some mixtures of experts keep (experts, d_out, d_in) in a `weight`.
_LARGEST_KERNEL = 128
# transformers' names of LayerNorm's parameters before 2019, still in much-used base models.
_OLD_NAMES = re.compile(r"(?<=LayerNorm\.)(?:gamma|beta)$")


@dataclass(frozen=True, slots=True)
class Layer:
    """A weight that can take a low-rank update.

    Attributes:
        path: Module path.
        kind: What the module is, see `unmerge_bundle.check_kind`.
        transposed: Whether the weight as stored, as a matrix, is the transpose of the delta.
    """

    path: str
    kind: str
    transposed: bool


def layer_of(
    name: str, shape: tuple[int, ...], bias: tuple[int, ...] | None, model_type: str | None
) -> Layer | None:
    """Return the layer that the tensor `name` is the weight of; `None` if it is of none we know.

    A weight is a `….weight` of two or more dimensions. With two it is an embedding if its last
    name is in `EMBEDDINGS`, else linear; a linear weight is stored transposed in the layers of
    `CONV1D_LAYERS` in models of `CONV1D_MODELS`. With three to five it is a convolution, if its
    kernel is at most 128 wide. A bias tells on which side the outputs are: where it contradicts,
    the layer is none we know.

    Args:
        name: Name of the tensor.
        shape: Its shape.
        bias: Shape of the module's bias, if it has one.
        model_type: `model_type` of the configuration.
    """
    path = name.removesuffix(_SUFFIX)
    if path == name or not 2 <= len(shape) <= 5 or 0 in shape:
        return None
    kernel = shape[2:]
    if kernel:
        layer = Layer(path, f"conv{len(kernel)}d:{'x'.join(map(str, kernel))}", transposed=False)
        known = max(kernel) <= _LARGEST_KERNEL
    elif last_name(name) in EMBEDDINGS:
        layer, known = Layer(path, "embedding", transposed=True), bias is None
    else:
        conv1d = model_type in CONV1D_MODELS and last_name(name) in CONV1D_LAYERS
        layer, known = Layer(path, LINEAR, transposed=conv1d), True
    d_out = shape[1] if layer.transposed else shape[0]
    return layer if known and bias in (None, (d_out,)) else None


def last_name(name: str) -> str:
    """Return the last name of the module that a tensor `….weight` belongs to."""
    return name.removesuffix(_SUFFIX).rpartition(".")[2]


def is_head(name: str, heads: Iterable[str]) -> bool:
    """Return whether a tensor is of a task's head: its first or second name is one of `heads`."""
    return not set(name.split(".")[:2]).isdisjoint(heads)


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor follows from the configuration: `BUFFERS`, or a causal mask."""
    *_, owner, last = ["", *name.split(".")]
    mask = last == "bias" and owner in ("attn", "attention") and shape[:2] == (1, 1)
    return last in BUFFERS or (mask and len(shape) == 4 and shape[2] == shape[3])


@dataclass(frozen=True, slots=True)
class Pairing:
    """Which tensors of a checkpoint and its base are the same parameter.

    Attributes:
        base_of: The base's name, by the checkpoint's.
        only_checkpoint: Names that the base has no counterpart of.
        only_base: Names that the checkpoint has no counterpart of.
    """

    base_of: Mapping[str, str]
    only_checkpoint: tuple[str, ...]
    only_base: tuple[str, ...]


def pair_names(checkpoint: Iterable[str], base: Iterable[str]) -> Pairing:
    """Pair the tensors of a checkpoint with those of its base by name.

    transformers puts a model that is part of a larger one under a prefix, so that `encoder.…` of a
    `BertModel` is `bert.encoder.…` of a `BertForSequenceClassification`. The prefix, on one side
    or none, with which most names agree is taken; `LayerNorm.gamma` and `.beta` are older names.

    Raises:
        AdapterError: No name agrees.
    """
    there, here = tuple(checkpoint), tuple(base)
    best: dict[str, str] = {}
    for ours, theirs in [
        ("", ""),
        *((prefix, "") for prefix in _prefixes(there)),
        *(("", prefix) for prefix in _prefixes(here)),
    ]:
        by_parameter = {_parameter(name, theirs): name for name in here}
        found = {
            name: by_parameter[parameter]
            for name in there
            if (parameter := _parameter(name, ours)) in by_parameter
        }
        # Two names that are one parameter are no pairing: which of them is meant?
        if len(found) > len(best) and len(set(found.values())) == len(found):
            best = found
    if not best:
        raise AdapterError(
            f'no tensor is in both: the checkpoint has "{excerpt(next(iter(there), ""))}", the '
            f'base "{excerpt(next(iter(here), ""))}"; give the base model it was fine-tuned from'
        )
    paired = set(best.values())
    return Pairing(
        base_of=best,
        only_checkpoint=tuple(name for name in there if name not in best),
        only_base=tuple(name for name in here if name not in paired),
    )


def _prefixes(names: Iterable[str]) -> list[str]:
    return sorted({name.split(".")[0] + "." for name in names if "." in name})


def _parameter(name: str, prefix: str) -> str:
    renamed = {"gamma": "weight", "beta": "bias"}
    return _OLD_NAMES.sub(lambda old: renamed[old[0]], name.removeprefix(prefix))
