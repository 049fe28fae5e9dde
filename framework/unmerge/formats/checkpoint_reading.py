"""Goes through two models, tensor by tensor: what fine-tuning changed, and how that is kept."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from unmerge.adapter import Factors
from unmerge.arrays import DTYPES, VERBATIM_DTYPES, dtype_name
from unmerge.errors import AdapterError, NonFiniteError, UnsupportedAdapterError
from unmerge.formats.base import describe, excerpt
from unmerge.formats.checkpoint_delta import (
    difference,
    frobenius_norm,
    low_rank,
    rounding_norm,
    same,
)
from unmerge.formats.checkpoint_layout import (
    EMBEDDINGS,
    OUTPUT_EMBEDDINGS,
    Layer,
    Pairing,
    is_buffer,
    is_head,
    last_name,
    layer_of,
    pair_names,
)
from unmerge.formats.checks import check_finite, module_path, shape_text
from unmerge.formats.files import parse_json_object, read_bytes
from unmerge.formats.shards import WEIGHTS, Shards, weights_files
from unmerge.kernels.truncation import RankChoice
from unmerge_bundle.names import check_key

__all__ = ["CONFIG_FILE", "Model", "Reading"]

CONFIG_FILE = "config.json"
# Endings of architectures whose output embedding is tied where it is not saved.
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")


class Model:
    """One of the two models: its configuration and its tensors.

    Args:
        directory: As transformers' or diffusers' `save_pretrained` writes it.
        what: Which of the two it is, for messages.

    Raises:
        AdapterError: A file is missing or damaged.
        UnsupportedAdapterError: The model is quantised.
    """

    def __init__(self, directory: Path, what: str) -> None:
        if not weights_files(directory):
            raise AdapterError(
                f"{directory}: no {what} model; looked for {WEIGHTS[0]} or its index; found "
                f"{describe(directory)}; pass a local directory that the model was saved to"
            )
        self.directory = directory
        where = directory / CONFIG_FILE
        data = read_bytes(where)
        self._document = parse_json_object(data, str(where))
        self.text = data.decode("utf-8")
        for name in ("quantization_config", "quantization"):
            if self._document.get(name):
                raise UnsupportedAdapterError(
                    f"{where}: {name} is set: the weights are quantised, so that their difference "
                    "is no change that training made; pass the model in float32, float16 or "
                    "bfloat16",
                    feature=name,
                )
        self.tensors = Shards(directory)

    def field(self, name: str) -> str | None:
        """Return a field of the configuration if it is text."""
        value = self._document.get(name)
        return value if isinstance(value, str) and value else None

    @property
    def is_language_model(self) -> bool:
        """Whether the configuration names an architecture that maps back to the vocabulary."""
        named = self._document.get("architectures")
        given = named if isinstance(named, list) else []
        return any(str(architecture).endswith(_LANGUAGE_MODELS) for architecture in given)

    def check_type(self, base: Model) -> None:
        """Refuse a base of another type."""
        for name in ("model_type", "_class_name"):
            ours, theirs = (excerpt(str(model.field(name)), 80) for model in (self, base))
            if ours != theirs:
                raise AdapterError(
                    f"{self.directory}: {name} is {ours}, that of the base {base.directory} is "
                    f"{theirs}; pass the base model it was fine-tuned from"
                )

    def settings_unlike(self, base: Model) -> dict[str, list[Any]]:
        """Return what both configurations have and say differently: `[the base's, ours]`."""
        both = self._document.keys() & base._document.keys()
        pairs = {name: [base._document[name], self._document[name]] for name in both}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


@dataclass(kw_only=True)
class Reading:
    """The adapter as it grows, tensor by tensor.

    Attributes:
        name: The adapter's name.
        tuned: The fine-tuned model.
        base: The model it was fine-tuned from.
        keep: How much of every change is kept.
        dtype: Dtype of the factors.
        patterns: Which module paths become low-rank.
        heads: First or second names of modules that one of the models may lack.
        modules: Factors by module path.
        verbatim: Tensors that are kept whole, by their name in the fine-tuned model.
        report: What `Adapter.config` says of them, and of the tensors that are in neither.
    """

    name: str
    tuned: Model
    base: Model
    keep: RankChoice
    dtype: torch.dtype
    patterns: tuple[str, ...]
    heads: tuple[str, ...]
    modules: dict[str, Factors] = field(default_factory=dict)
    verbatim: dict[str, torch.Tensor] = field(default_factory=dict)
    report: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {"modules": {}, "whole": {}, "left_out": {}, "base_only": {}}
    )

    def run(self) -> None:
        """Go through all tensors of both models.

        Raises:
            AdapterError: The models do not belong together, or do not differ.
            ConfigError: The dtype is too narrow for what is to be kept.
            UnsupportedAdapterError: A tensor is quantised, or in one model only and no head's.
            NonFiniteError: A tensor that changed holds NaN or an infinity, or its change exceeds
                the range of float32.
        """
        tuned, base = self.tuned.tensors, self.base.tensors
        try:
            pairing = pair_names(tuned.names, base.names)
        except AdapterError as error:
            raise AdapterError(f"{tuned.directory}: {error}") from error
        base_of = pairing.base_of
        tied = _tied(tuned, base_of.keys())
        tied_in_base = _tied(base, frozenset(base_of.values()))
        for name, base_name in sorted(base_of.items()):
            owner = tied.get(name, "")
            if owner in base_of and tied_in_base.get(base_name) == base_of[owner]:
                self.report["left_out"][name] = f"tied to {owner}"
            else:
                self._pair(name, base_name)
        self._only_tuned(pairing, tied)
        self._only_base(pairing, tied_in_base)
        if not self.modules and not self.verbatim:
            raise AdapterError(
                f"{tuned.directory}: no tensor differs from the base {base.directory}; check that "
                "the two are not one model"
            )

    def _pair(self, name: str, base_name: str) -> None:
        """Take in what changed in a tensor that both models have."""
        where, base_where = self.tuned.tensors.where(name), self.base.tensors.where(base_name)
        tuned, base = self.tuned.tensors.tensor(name), self.base.tensors.tensor(base_name)
        _check_dtype(tuned, name, where)
        _check_dtype(base, base_name, base_where)
        if tuned.shape != base.shape:
            self._resized(name, tuned, base)
            return
        layer = self._layer(name, tuple(tuned.shape))
        if layer is None or not self._is_wanted(layer):
            if not same(tuned, base):
                self._keep_whole(
                    name, tuned, "no layer's weight" if layer is None else "not in modules"
                )
            return
        delta = difference(tuned, base)
        norm = frobenius_norm(delta)
        if norm == 0:
            return
        if not math.isfinite(norm):
            check_finite(base, base_where)
            check_finite(tuned, where)
            raise NonFiniteError(
                f"{where}: its change from the base exceeds the range of float32, the widest dtype "
                "of factors; check that both models are whole and belong together"
            )
        path = module_path(layer.path, name, self.tuned.directory)
        matrix = delta.reshape(len(delta), -1)
        found = low_rank(
            matrix.T if layer.transposed else matrix,
            norm,
            self.keep,
            self.dtype,
            f'{path}: factors of adapter "{self.name}"',
        )
        self.modules[path] = Factors(A=found.A, B=found.B, scaling=1.0, kind=layer.kind)
        self.report["modules"][path] = {
            "rank": len(found.A),
            "error": found.error,
            "rounding": rounding_norm(tuned) / norm,
        }

    def _layer(self, name: str, shape: tuple[int, ...]) -> Layer | None:
        bias = f"{name.removesuffix('.weight')}.bias"
        there = self.tuned.tensors
        bias_shape = there.shape(bias) if bias in there else None
        return layer_of(name, shape, bias_shape, self.tuned.field("model_type"))

    def _is_wanted(self, layer: Layer) -> bool:
        return any(fnmatchcase(layer.path, pattern) for pattern in self.patterns)

    def _resized(self, name: str, tuned: torch.Tensor, base: torch.Tensor) -> None:
        embedding = last_name(name) in EMBEDDINGS | OUTPUT_EMBEDDINGS
        if not embedding and not is_head(name, self.heads):
            raise AdapterError(
                f"{self.tuned.tensors.where(name)} has shape {shape_text(tuned)}, in the base "
                f"{shape_text(base)}; only embeddings and heads may differ in size; pass the base "
                "model it was fine-tuned from"
            )
        self._keep_whole(name, tuned, f"was {shape_text(base)}")

    def _only_tuned(self, pairing: Pairing, tied: Mapping[str, str]) -> None:
        """Take in the tensors that only the fine-tuned model has."""
        tensors = self.tuned.tensors
        for name in pairing.only_checkpoint:
            if is_buffer(name, tensors.shape(name)):
                self.report["left_out"][name] = "follows from the configuration"
            elif name in tied:
                self.report["left_out"][name] = f"tied to {tied[name]}"
            elif is_head(name, self.heads):
                tensor = tensors.tensor(name)
                _check_dtype(tensor, name, tensors.where(name))
                self._keep_whole(name, tensor, "new head")
            else:
                raise _alone(tensors, name, self.base.directory)

    def _only_base(self, pairing: Pairing, tied: Mapping[str, str]) -> None:
        """Account for the tensors that only the base has: what is no head must not be lost."""
        tensors = self.base.tensors
        for name in pairing.only_base:
            if is_buffer(name, tensors.shape(name)):
                self.report["base_only"][name] = "follows from the configuration"
            elif name in tied:
                self.report["base_only"][name] = f"tied to {tied[name]}"
            elif last_name(name) in OUTPUT_EMBEDDINGS and self.tuned.is_language_model:
                raise UnsupportedAdapterError(
                    f"{tensors.where(name)} is not in {self.tuned.directory}, which ties its "
                    "output embedding to its input embedding as the base does not; untie it and "
                    "save it again with tie_word_embeddings=false",
                    feature="tie_word_embeddings",
                )
            elif is_head(name, self.heads):
                self.report["base_only"][name] = "head of another task"
            else:
                raise _alone(tensors, name, self.tuned.directory)

    def _keep_whole(self, name: str, tensor: torch.Tensor, because: str) -> None:
        where = self.tuned.tensors.where(name)
        check_finite(tensor, where)
        try:
            self.verbatim[check_key(name)] = tensor
        except ValueError as error:
            raise AdapterError(f"{where}: {excerpt(str(error), 300)}; rename it") from error
        self.report["whole"][name] = because


def _check_dtype(tensor: torch.Tensor, name: str, where: str) -> None:
    floating = tensor.dtype in (torch.float64, *DTYPES.values())
    # Counters and masks are whole numbers in their own right, weights never.
    whole = not name.endswith("weight") and tensor.dtype in VERBATIM_DTYPES.values()
    if not floating and not (whole and (tensor.ndim < 2 or is_buffer(name, tuple(tensor.shape)))):
        raise UnsupportedAdapterError(
            f"{where} is {dtype_name(tensor.dtype)}, as quantised weights are; their difference is "
            "no change that training made; pass the model in float32, float16 or bfloat16",
            feature="quantization",
        )


def _tied(tensors: Shards, paired: Collection[str]) -> dict[str, str]:
    """Return the embedding of which a tensor of a model is a copy, by the copy's name.

    A model with tied embeddings may have been saved with one tensor under several names.
    """
    shapes = {name: tensors.shape(name) for name in tensors.names if name.endswith(".weight")}
    embeddings = [name for name in shapes if last_name(name) in EMBEDDINGS]
    # Of several copies the one that the other model has too stands for all.
    embeddings.sort(key=lambda name: (name not in paired, name))
    found: dict[str, str] = {}
    for owner in embeddings:
        for name, shape in shapes.items():
            if name == owner or name in found or owner in found or shape != shapes[owner]:
                continue
            first, second = tensors.tensor(owner), tensors.tensor(name)
            if first.dtype == second.dtype and torch.equal(first, second):
                found[name] = owner
    return found


def _alone(tensors: Shards, name: str, other: Path) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        f"{tensors.where(name)} is not in {other}, and its first two names are none of the heads "
        "that one model may lack; pass the base model it was fine-tuned from, or name it in heads",
        feature=name,
    )
