"""What the tensors in a PEFT file are by their names: factors, kept verbatim, or refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from unmerge.errors import AdapterError, UnsupportedAdapterError
from unmerge.formats.base import excerpt
from unmerge.formats.checks import module_path, shape_text
from unmerge.formats.peft_config import LoraSettings
from unmerge_bundle.names import check_key

__all__ = [
    "CONFIG_FILE",
    "EMBEDDING_MODULES",
    "FACTOR_NAMES",
    "PREFIX",
    "REFUSED_TENSORS",
    "sort_tensors",
]

CONFIG_FILE = "adapter_config.json"

PREFIX = "base_model.model."
"""What the name of every tensor of PEFT's starts with."""

REFUSED_TENSORS: Mapping[str, str] = {
    "lora_magnitude_vector": "DoRA's magnitudes rescale the updated weight",
    "lora_B.bias": "a bias inside factor B is no part of a low-rank delta",
    "lora_diag": "KaSA puts a diagonal between B and A",
    "lora_E": "AdaLoRA puts a diagonal between B and A",
    "lora_velora_embed": "this is VeLoRA's training state",
    "lora_monteclora_sampler": "this is MonteCLoRA's distribution around A",
}
"""Parts of tensor names that are refused, and why; `docs/adapters.md` shows the same list."""

EMBEDDING_MODULES = frozenset(
    {
        "embed_tokens",
        "lm_head",
        "wte",
        "word_embeddings",
        "tok_embeddings",
        "embed_in",
        "embed_out",
        "shared",
    }
)
"""Last names of the input and output embeddings, which PEFT saves whole when the vocabulary was
resized, or they were targeted or tied, without saying so in the configuration."""

FACTOR_NAMES: Mapping[bool, tuple[str, str]] = {
    False: ("lora_A.weight", "lora_B.weight"),
    # Parameters of the wrapped embedding itself, so they are saved without ".weight".
    True: ("lora_embedding_A", "lora_embedding_B"),
}
"""What PEFT calls factors A and B of a module, by whether it is an embedding."""

_ALL_FACTOR_NAMES = tuple(name for names in FACTOR_NAMES.values() for name in names)
_TRAINED_ROWS = ".token_adapter.trainable_tokens_delta"
# Names PEFT puts between a module and its parameters when it wraps the module.
_WRAPPERS = frozenset({"base_layer", "modules_to_save", "original_module"})
# Longer than any name that can be stored; what the messages below repeat stays readable.
_LONGEST_KEY = 2048


def sort_tensors(
    tensors: Mapping[str, torch.Tensor], settings: LoraSettings, weights: Path
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Split the tensors of a file into those of low-rank updates and all others.

    Args:
        tensors: The tensors by their key.
        settings: What the configuration says.
        weights: The file, for messages.

    Returns:
        Tensors by module path and PEFT's name for them (`lora_A.weight`, …); the others by key.

    Raises:
        AdapterError: A key cannot be stored, or trained token rows do not fit the configuration.
        UnsupportedAdapterError: A tensor is refused, or the configuration does not explain it.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    others: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if len(key) > _LONGEST_KEY:
            raise AdapterError(
                f'{weights}: tensor "{excerpt(key, 80)}" has a name of {len(key)} characters, '
                f"expected at most {_LONGEST_KEY}; rename the module"
            )
        if not key.startswith(PREFIX):
            raise UnsupportedAdapterError(
                f'{weights}: tensor "{excerpt(key)}" is none of PEFT\'s: its name does not start '
                f'with "{PREFIX}"; save the adapter again with PEFT\'s save_pretrained',
                feature=key,
            )
        # The leading dot lets a path be empty, which is then refused as such.
        rest = f".{key.removeprefix(PREFIX)}"
        for name in _ALL_FACTOR_NAMES:
            if rest.endswith(f".{name}"):
                path = module_path(rest.removesuffix(f".{name}").removeprefix("."), key, weights)
                found.setdefault(path, {})[name] = tensor
                break
        else:
            others[key] = tensor
    for key in others:
        _check_explained(key, found, settings, weights)
        try:
            check_key(key)
        except ValueError as error:
            raise AdapterError(f"{weights}: {error}; rename the module") from error
    _check_token_rows(others, settings, weights)
    return found, others


def _check_explained(
    key: str, modules: Iterable[str], settings: LoraSettings, weights: Path
) -> None:
    """Refuse a tensor that is no factor unless the configuration says why it is there.

    modules_to_save: PEFT saves `<module>.<parameter>`; with bias="all" also
    `<module>.modules_to_save.bias` and `<module>.original_module.bias`. A module is meant when
    its path *ends with* a listed name, dot or not, as PEFT has it, and so for
    trainable_token_indices. Biases of adapted modules are at `<module>.base_layer.bias`
    (`<module>.bias` before PEFT 0.7).
    """
    rest = key.removeprefix(PREFIX)
    where = f'{weights}: tensor "{excerpt(key)}"'
    for fragment, because in REFUSED_TENSORS.items():
        if f".{fragment}." in f".{rest}.":
            raise UnsupportedAdapterError(
                f"{where} holds {fragment}, which is not supported: {because}; "
                "use an adapter trained without it",
                feature=fragment,
            )
    parts = rest.split(".")
    if not {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}.isdisjoint(parts):
        raise UnsupportedAdapterError(
            f"{where} is no factor as PEFT names them, "
            f'"{PREFIX}<module>.lora_A.weight" or "….lora_B.weight" (in embeddings '
            '"….lora_embedding_A" or "…B"); if an adapter name is left in the key, save the '
            "adapter with PEFT's save_pretrained",
            feature=key,
        )
    above = [".".join(parts[:end]) for end in range(1, len(parts))]
    if any(path.endswith(ending) for path in above for ending in settings.saved_modules):
        return
    owner = rest.removesuffix(_TRAINED_ROWS)
    if rest.endswith(_TRAINED_ROWS) and any(map(owner.endswith, settings.token_rows)):
        return
    if parts[-1] == "bias":
        owner = ".".join(parts[:-1])
        if settings.bias == "all":
            return
        if settings.bias == "lora_only" and owner.removesuffix(".base_layer") in modules:
            return
    owners = [part for part in parts[:-1] if part not in _WRAPPERS]
    if parts[-1] in ("weight", "bias") and owners and owners[-1] in EMBEDDING_MODULES:
        return
    raise UnsupportedAdapterError(
        f"{where} is not explained by {CONFIG_FILE}: neither a LoRA factor, nor under "
        f"modules_to_save ({excerpt(', '.join(settings.saved_modules)) or 'empty'}), nor a bias "
        f'with bias="{settings.bias}", nor an embedding or rows of one that '
        "trainable_token_indices names; name its module in modules_to_save if that is what it is, "
        "or remove it",
        feature=key,
    )


def _check_token_rows(
    others: Mapping[str, torch.Tensor], settings: LoraSettings, weights: Path
) -> None:
    """Refuse trained rows of embeddings unless there are as many as there are tokens."""
    rows = {
        key.removeprefix(PREFIX).removesuffix(_TRAINED_ROWS): tensor
        for key, tensor in others.items()
        if key.endswith(_TRAINED_ROWS)
    }
    expected = settings.token_rows
    # Of embeddings that are tied PEFT saves one, so not every ending need be there.
    if bool(rows) != bool(expected) or ("" in expected and len(rows) > 1):
        named = excerpt(", ".join(expected)) or "the input embedding"
        raise AdapterError(
            f"{weights}: holds trained rows of {len(rows)} embeddings, expected those of "
            f"{named if expected else 'none'} by trainable_token_indices; save the adapter again"
        )
    for path, tensor in rows.items():
        counts = {count for ending, count in expected.items() if path.endswith(ending)}
        if tensor.ndim != 2 or tensor.shape[0] not in counts:
            wanted = " or ".join(str(count) for count in sorted(counts))
            raise AdapterError(
                f"{weights}: the trained rows of {excerpt(path)} have shape {shape_text(tensor)}, "
                f"expected ({wanted}, features) by trainable_token_indices; save the adapter again"
            )
