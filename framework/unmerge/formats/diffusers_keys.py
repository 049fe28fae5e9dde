"""What diffusers has called the tensors of LoRA files over the years, and the modules they mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch

from unmerge.errors import AdapterError, UnsupportedAdapterError
from unmerge.formats.base import excerpt
from unmerge.formats.checks import check_partners, module_path
from unmerge.formats.files import Header
from unmerge.formats.single_file import Alpha

__all__ = [
    "ALPHA",
    "COMPONENTS",
    "REFUSED_NAMES",
    "Component",
    "Sorted",
    "component_of",
    "is_diffusers",
    "is_of_pipeline",
    "keys_of",
    "sort_tensors",
]

ALPHA = ".alpha"

Component = Literal[
    "unet",
    "transformer",
    "transformer_2",
    "transformer_ref",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "connectors",
    "text_conditioner",
]
COMPONENTS: tuple[str, ...] = get_args(Component)
"""Parts of a pipeline that LoRA is trained in; the first part of a tensor's name."""

REFUSED_NAMES: Mapping[str, str] = {
    "lora_magnitude_vector": "DoRA rescales the updated weight",
    "dora_scale": "DoRA rescales the updated weight",
    "lora_embedding_A": "diffusers saves no embeddings as factors",
    "lora_embedding_B": "diffusers saves no embeddings as factors",
    "bias": "a bias is no part of a low-rank delta",
    "default": "an adapter's name is left in the tensor's name",
    "modules_to_save": "a weight that was trained whole is no low-rank update",
}
"""What parts of tensor names are refused, and why; `docs/adapters.md` shows the same list."""

# Endings of the names of A and B: as PEFT has them, which is what diffusers saves today; before
# that; in text encoders before that; and of the first attention processors.
_PEFT = (".lora_A.weight", ".lora_B.weight")
_OLDER = (
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
)
_PROCESSORS = ("_lora.down.weight", "_lora.up.weight")

# What the layers of the first attention processors are called in the model.
_PROJECTIONS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
_TEXT_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


# What GPT-2 and its kin call their layers, behind the name of a pipeline's part.
_LANGUAGE_MODEL = re.compile(r"transformer\.(h\.[0-9]+|wte|wpe|word_embeddings)(\.|$)")


class Place(NamedTuple):
    """What a tensor's name says.

    Attributes:
        path: The module.
        factor: 0 for A, 1 for B.
        current: Whether the name is of today's kind, as PEFT gives it.
    """

    path: str
    factor: int
    current: bool


class Sorted(NamedTuple):
    """The tensors of a file by what they are.

    Attributes:
        A: Factors A by module path.
        B: Factors B by module path.
        alphas: Alphas by module path.
        keys: Names of the tensors of A and B by module path, where they are not of today's kind.
    """

    A: dict[str, torch.Tensor]
    B: dict[str, torch.Tensor]
    alphas: dict[str, Alpha]
    keys: dict[str, tuple[str, str]]


def component_of(path: str) -> str:
    """Return the part of the pipeline that a module path or a tensor's name begins with, or ""."""
    first, dot, _ = path.partition(".")
    return first if dot and first in COMPONENTS else ""


def is_of_pipeline(path: str) -> bool:
    """Return whether a module path begins with a part of a pipeline, and is no language model's."""
    return component_of(path) != "" and not _LANGUAGE_MODEL.match(path)


def keys_of(path: str) -> tuple[str, str]:
    """Return what the tensors of A and B of a module are called today."""
    return path + _PEFT[0], path + _PEFT[1]


def is_diffusers(header: Header) -> bool:
    """Return whether a tensor has a name as only diffusers gives it."""
    places = (_place(name) for name in header.tensors)
    return any(place and (not place.current or is_of_pipeline(place.path)) for place in places)


def sort_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> Sorted:
    """Sort the tensors of a file into factors and alphas.

    Raises:
        AdapterError: A factor has no partner or is there twice, an alpha has no factors or is no
            number, or a module's path is not allowed.
        UnsupportedAdapterError: Any other tensor; a name of an older kind beside one of today's;
            a name without a part of the pipeline beside one with; alphas for some modules only.
        NonFiniteError: An alpha is NaN or infinite.
    """
    found = Sorted({}, {}, {}, {})
    factors = (found.A, found.B)
    names: tuple[dict[str, str], dict[str, str]] = ({}, {})
    kinds: dict[str, dict[bool, str]] = {}
    for key, tensor in tensors.items():
        place = _place(key)
        if place is None and key.endswith(ALPHA):
            path = module_path(key.removesuffix(ALPHA), key, file)
            found.alphas[path] = Alpha.of(tensor, f"{file}: {path}: alpha")
            continue
        if place is None:
            raise _refusal(key, file)
        path = module_path(place.path, key, file)
        if path in factors[place.factor]:
            raise AdapterError(
                f"{path}: factor {'AB'[place.factor]} is there twice in {file}, as "
                f'"{excerpt(names[place.factor][path])}" and as "{excerpt(key)}"; expected it '
                "once; remove one of them"
            )
        factors[place.factor][path] = tensor
        names[place.factor][path] = key
        kinds.setdefault(component_of(path), {})[place.current] = key
    check_partners(found.A, found.B, file, names=f'"<part>.<module>{_PEFT[0]}" and "…{_PEFT[1]}"')
    _check_parts(kinds, file)
    _check_alphas(found.alphas, found.A, file)
    for path in found.A:
        keys = (names[0][path], names[1][path])
        if keys != keys_of(path):
            found.keys[path] = keys
    return found


def _place(key: str) -> Place | None:
    for endings in (_PEFT, *_OLDER):
        for factor, ending in enumerate(endings):
            if key.endswith(ending):
                path = key.removesuffix(ending)
                if endings is _PEFT:
                    return Place(path, factor, current=True)
                return Place(path.replace(".processor.", "."), factor, current=False)
    for factor, ending in enumerate(_PROCESSORS):
        if key.endswith(ending):
            owner, _, last = key.removesuffix(ending).rpartition(".")
            in_text_encoder = component_of(key).startswith("text_encoder")
            layer = (_TEXT_PROJECTIONS if in_text_encoder else _PROJECTIONS).get(last)
            if layer is not None:
                owner = f"{owner}.".replace(".processor.", ".")
                return Place(owner + layer, factor, current=False)
    return None


def _check_parts(kinds: Mapping[str, Mapping[bool, str]], file: Path) -> None:
    """Refuse names that diffusers would leave out: of two kinds, or of no part beside others."""
    if "" in kinds and len(kinds) > 1:
        key = next(iter(kinds[""].values()))
        raise UnsupportedAdapterError(
            f'{file}: tensor "{excerpt(key)}" begins with no part of a pipeline '
            f"({', '.join(COMPONENTS)}) and others do, so that diffusers would leave it out; "
            "expected all or none; remove it, or put its part in front",
            feature=key,
        )
    for component, found in kinds.items():
        if len(found) > 1:
            raise UnsupportedAdapterError(
                f"{file}: {component or 'the model'} has tensors named as today, "
                f'"{excerpt(found[True])}", and as in older releases, "{excerpt(found[False])}"; '
                "diffusers then leaves some out; expected one kind of name; save the adapter again",
                feature=found[False],
            )


def _check_alphas(alphas: Mapping[str, Alpha], modules: Iterable[str], file: Path) -> None:
    paths = set(modules)
    for path in sorted(alphas.keys() - paths):
        raise AdapterError(
            f"{path}: alpha is there and both factors are missing in {file}; expected "
            f'"{excerpt(path)}{_PEFT[0]}" and "…{_PEFT[1]}"; the file is incomplete, get it again'
        )
    with_alphas = {component_of(path) for path in alphas}
    for path in sorted(paths - alphas.keys()):
        if component_of(path) in with_alphas:
            raise UnsupportedAdapterError(
                f"{path}: has no alpha in {file} and others have one, on which programs differ: "
                "diffusers takes the most frequent alpha, others the rank; expected one for every "
                "module; add the missing ones",
                feature="alpha",
            )


def _refusal(key: str, file: Path) -> UnsupportedAdapterError:
    where = f'{file}: tensor "{excerpt(key)}"'
    parts = key.split(".")
    for name, because in REFUSED_NAMES.items():
        if name in parts:
            return UnsupportedAdapterError(
                f"{where} holds {name}, which is not supported: {because}; use an adapter saved "
                "without it",
                feature=name,
            )
    return UnsupportedAdapterError(
        f"{where} is unknown; expected factors only, <part>.<module>{_PEFT[0]} and …{_PEFT[1]}, "
        "or as older releases name them; remove it if it has no effect",
        feature=key,
    )
