"""Reads LoRA adapters as PEFT saves them: exactly the delta PEFT would apply, or an error."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

import torch

from unmerge.adapter import Adapter, Factors
from unmerge.arrays import DTYPES, VERBATIM_DTYPES, dtype_name
from unmerge.errors import AdapterError, NonFiniteError, UnsupportedAdapterError
from unmerge.formats.base import AdapterFormat, describe, excerpt
from unmerge.formats.files import load_pickled, load_safetensors, parse_json_object, read_bytes
from unmerge.formats.peft_config import LoraSettings, parse_config
from unmerge_bundle.names import check_key, check_module_path, check_name

__all__ = ["EMBEDDING_MODULES", "REFUSED_TENSORS", "PeftFormat", "read_peft"]

CONFIG_FILE = "adapter_config.json"
SAFETENSORS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

REFUSED_TENSORS: Mapping[str, str] = {
    "lora_magnitude_vector": "DoRA's magnitudes rescale the updated weight",
    "lora_B.bias": "a bias inside factor B is no part of a low-rank delta",
    "lora_embedding_A": "the factors of an embedding have another layout",
    "lora_embedding_B": "the factors of an embedding have another layout",
    "lora_diag": "KaSA puts a diagonal between B and A",
    "lora_E": "AdaLoRA puts a diagonal between B and A",
    "lora_velora_embed": "this is VeLoRA's training state",
    "lora_monteclora_sampler": "this is MonteCLoRA's distribution around A",
    "trainable_tokens_delta": "trained rows of an embedding are no low-rank delta",
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

_PREFIX = "base_model.model."
# Names PEFT puts between a module and its parameters when it wraps the module.
_WRAPPERS = frozenset({"base_layer", "modules_to_save", "original_module"})
# Longer than any name that can be stored; what the messages below repeat stays readable.
_LONGEST_KEY = 2048
_FACTOR_A = ".lora_A.weight"
_FACTOR_B = ".lora_B.weight"


class PeftFormat(AdapterFormat):
    """The directories that PEFT's `save_pretrained` writes; see `read_peft`."""

    format: ClassVar[str] = "peft"
    looks_for: ClassVar[str] = f"a directory with {CONFIG_FILE} and {SAFETENSORS_FILE}"

    def recognises(self, path: Path) -> bool:
        """Return whether `path` is a directory with a PEFT configuration or PEFT weights."""
        files = (CONFIG_FILE, SAFETENSORS_FILE, PICKLE_FILE)
        try:
            return any((path / file).is_file() for file in files)
        except OSError:
            return False

    def read(self, path: Path, name: str | None) -> Adapter:
        """Return `read_peft(path, name=name)`, with its errors."""
        return read_peft(path, name=name)


def read_peft(directory: str | os.PathLike[str], *, name: str | None = None) -> Adapter:
    """Read a LoRA adapter from the directory that PEFT saved it to.

    Per module, `A` is `(rank, d_in)`, `B` is `(d_out, rank)` and the delta PEFT applies is
    `scaling · B @ A` of shape `(d_out, d_in)`. That also holds with `fan_in_fan_out` (GPT-2's
    `Conv1D`): there the *base weight* is stored as `(d_in, d_out)`, and PEFT transposes the
    finished product when it adds it; A still maps inputs and B outputs, so nothing is transposed
    here. Ranks and alphas follow PEFT's pattern rule, per module.

    Weights are read from `adapter_model.safetensors`, mapped into memory, or, only where there
    is none, from `adapter_model.bin` through torch's restricted unpickler.

    Args:
        directory: The directory with `adapter_config.json` and the weights.
        name: The adapter's name; by default that of the directory.

    Returns:
        The adapter, factors in their stored dtype (float32, float16 or bfloat16; A and B of one
        module in the same one, because PEFT saves no other and the delta's dtype would be
        anyone's guess). Weights of modules_to_save, biases and whole embeddings are in
        `Adapter.verbatim`.

    Raises:
        AdapterError: Files are missing or malformed, a factor has no partner, the wrong shape,
            rank or dtype, or the name is not allowed.
        UnsupportedAdapterError: A feature that `docs/adapters.md` lists as refused, or a tensor
            that the configuration does not explain; its attribute `feature` names it.
        NonFiniteError: A tensor holds NaN or an infinity.
    """
    place = Path(directory)
    _check_place(place)
    name = _adapter_name(place, name)
    where = str(place / CONFIG_FILE)
    data = read_bytes(place / CONFIG_FILE)
    settings = parse_config(parse_json_object(data, where), where)
    weights = place / SAFETENSORS_FILE
    if weights.is_file():
        tensors = load_safetensors(weights)
    else:
        weights = place / PICKLE_FILE
        tensors = load_pickled(weights)
    factors_A, factors_B, verbatim = _sort_tensors(tensors, settings, weights)
    _check_partners(factors_A, factors_B, weights)
    modules = {
        path: _factors(factors_A[path], factors_B[path], settings, path, name)
        for path in sorted(factors_A)
    }
    for key, tensor in verbatim.items():
        _check_dtype(tensor, VERBATIM_DTYPES, f"{weights}: {key}")
        _check_finite(tensor, f'{key}: tensor of adapter "{name}"')
    return Adapter(
        name=name,
        modules=modules,
        verbatim=dict(sorted(verbatim.items())),
        config=data.decode("utf-8"),
        format=PeftFormat.format,
        base_model=settings.base_model,
        revision=settings.revision,
        source=os.fspath(directory),
    )


def _check_place(place: Path) -> None:
    if not PeftFormat().recognises(place):
        raise AdapterError(
            f"{place}: no PEFT adapter; looked for {PeftFormat.looks_for}; "
            f"found {describe(place)}; pass the directory that the adapter was saved to"
        )
    if not (place / CONFIG_FILE).is_file():
        raise AdapterError(
            f"{place}: {CONFIG_FILE} is missing, found {describe(place)}; without it rank and "
            "scaling are unknown; get it from where the weights came from"
        )
    if not any((place / file).is_file() for file in (SAFETENSORS_FILE, PICKLE_FILE)):
        raise AdapterError(
            f"{place}: the weights are missing; expected {SAFETENSORS_FILE} (or {PICKLE_FILE}), "
            f"found {describe(place)}; get them from where the configuration came from"
        )


def _adapter_name(place: Path, name: str | None) -> str:
    # Not resolve(): a link is called what its owner called it.
    chosen = Path(os.path.abspath(place)).name if name is None else name  # noqa: PTH100
    try:
        return check_name(chosen)
    except ValueError as error:
        raise AdapterError(f"{place}: {error}") from error


def _sort_tensors(
    tensors: Mapping[str, torch.Tensor], settings: LoraSettings, weights: Path
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Split tensors into factors A and B by module path, and verbatim tensors by key."""
    factors_A: dict[str, torch.Tensor] = {}
    factors_B: dict[str, torch.Tensor] = {}
    others: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if len(key) > _LONGEST_KEY:
            raise AdapterError(
                f'{weights}: tensor "{excerpt(key, 80)}" has a name of {len(key)} characters, '
                f"expected at most {_LONGEST_KEY}; rename the module"
            )
        if not key.startswith(_PREFIX):
            raise UnsupportedAdapterError(
                f'{weights}: tensor "{excerpt(key)}" is none of PEFT\'s: its name does not start '
                f'with "{_PREFIX}"; save the adapter again with PEFT\'s save_pretrained',
                feature=key,
            )
        rest = key.removeprefix(_PREFIX)
        # The leading dot lets a path be empty, which is then refused as such.
        if f".{rest}".endswith(_FACTOR_A):
            factors_A[_module_path(rest, _FACTOR_A, weights)] = tensor
        elif f".{rest}".endswith(_FACTOR_B):
            factors_B[_module_path(rest, _FACTOR_B, weights)] = tensor
        else:
            others[key] = tensor
    modules = factors_A.keys() | factors_B.keys()
    for key in others:
        _check_explained(key, modules, settings, weights)
        try:
            check_key(key)
        except ValueError as error:
            raise AdapterError(f"{weights}: {error}; rename the module") from error
    return factors_A, factors_B, others


def _module_path(rest: str, suffix: str, weights: Path) -> str:
    path = f".{rest}".removesuffix(suffix).removeprefix(".")
    try:
        return check_module_path(path)
    except ValueError as error:
        raise AdapterError(
            f'{weights}: tensor "{excerpt(_PREFIX + rest)}" names no module that can be '
            f"stored: {error}; rename the module, or wrap a base model that is a single layer"
        ) from error


def _check_explained(
    key: str, modules: Iterable[str], settings: LoraSettings, weights: Path
) -> None:
    """Refuse a tensor that is no factor unless the configuration says why it is there.

    modules_to_save: PEFT saves `<module>.<parameter>`; with bias="all" also
    `<module>.modules_to_save.bias` and `<module>.original_module.bias`. A module is meant when
    its path *ends with* a listed name, dot or not, as PEFT has it. Biases of adapted modules are
    at `<module>.base_layer.bias` (`<module>.bias` before PEFT 0.7).
    """
    rest = key.removeprefix(_PREFIX)
    where = f'{weights}: tensor "{excerpt(key)}"'
    for fragment, because in REFUSED_TENSORS.items():
        if f".{fragment}." in f".{rest}.":
            raise UnsupportedAdapterError(
                f"{where} holds {fragment}, which is not supported: {because}; "
                "use an adapter trained without it",
                feature=fragment,
            )
    parts = rest.split(".")
    if "lora_A" in parts or "lora_B" in parts:
        raise UnsupportedAdapterError(
            f"{where} is no factor as PEFT names them, "
            f'"{_PREFIX}<module>{_FACTOR_A}" or "…{_FACTOR_B}"; if an adapter name is left in the '
            "key, save the adapter with PEFT's save_pretrained",
            feature=key,
        )
    above = [".".join(parts[:end]) for end in range(1, len(parts))]
    if any(path.endswith(ending) for path in above for ending in settings.saved_modules):
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
        f'with bias="{settings.bias}", nor an embedding; name its module in modules_to_save if '
        "that is what it is, or remove it",
        feature=key,
    )


def _check_partners(
    factors_A: Mapping[str, torch.Tensor], factors_B: Mapping[str, torch.Tensor], weights: Path
) -> None:
    for path in sorted(factors_A.keys() ^ factors_B.keys()):
        there, missing = ("A", "B") if path in factors_A else ("B", "A")
        raise AdapterError(
            f"{path}: factor {there} is there and factor {missing} is missing in {weights}; "
            "expected both; the file is incomplete, save the adapter again"
        )
    if not factors_A:
        raise AdapterError(
            f"{weights}: holds no LoRA module; expected tensors named "
            f'"{_PREFIX}<module>{_FACTOR_A}" and "…{_FACTOR_B}"; check that the adapter was saved '
            "with trained layers"
        )


def _factors(
    A: torch.Tensor, B: torch.Tensor, settings: LoraSettings, path: str, name: str
) -> Factors:
    for label, tensor in (("A", A), ("B", B)):
        if tensor.ndim > 2:
            raise UnsupportedAdapterError(
                f'{path}: factor {label} of adapter "{name}" has shape {_shape(tensor)}; expected '
                "two dimensions; factors of a convolution are not supported",
                feature="convolution",
            )
        if tensor.ndim < 2 or 0 in tensor.shape:
            raise AdapterError(
                f'{path}: factor {label} of adapter "{name}" has shape {_shape(tensor)}; expected '
                "two dimensions above 0; it may be a shard that was saved without being gathered"
            )
        _check_dtype(tensor, DTYPES, f'{path}: factor {label} of adapter "{name}"')
    if A.shape[0] != B.shape[1]:
        raise AdapterError(
            f'{path}: factors of adapter "{name}" do not fit: A is {_shape(A)}, B is {_shape(B)}; '
            "expected (rank, d_in) and (d_out, rank); the file is damaged, save the adapter again"
        )
    rank = settings.rank_of(path)
    if A.shape[0] != rank:
        raise AdapterError(
            f'{path}: factors of adapter "{name}" have rank {A.shape[0]}, {CONFIG_FILE} says '
            f"{excerpt(str(rank), 20)}; correct r or rank_pattern (its first matching key counts) "
            "to what the adapter was trained with"
        )
    if A.dtype != B.dtype:
        raise AdapterError(
            f'{path}: factor A of adapter "{name}" is {dtype_name(A.dtype)}, factor B is '
            f"{dtype_name(B.dtype)}; expected one dtype; convert both to the wider one"
        )
    for label, tensor in (("A", A), ("B", B)):
        _check_finite(tensor, f'{path}: factor {label} of adapter "{name}"')
    return Factors(A=A, B=B, scaling=settings.scaling_of(path))


def _check_dtype(tensor: torch.Tensor, allowed: Mapping[str, torch.dtype], what: str) -> None:
    if tensor.dtype not in allowed.values():
        raise AdapterError(
            f"{what} is {dtype_name(tensor.dtype)}; expected one of {', '.join(allowed)}; "
            "convert it and save again"
        )


def _check_finite(tensor: torch.Tensor, what: str) -> None:
    if not tensor.is_floating_point():
        return
    finite = torch.isfinite(tensor)
    if not finite.all():
        bad = (~finite).nonzero()
        first = ", ".join(str(int(index)) for index in bad[0])
        raise NonFiniteError(
            f"{what} holds {len(bad)} entries that are NaN or infinite, the first at [{first}]; "
            "expected finite numbers only; the training diverged or the file is damaged"
        )


def _shape(tensor: torch.Tensor) -> str:
    return excerpt(f"({', '.join(str(size) for size in tensor.shape)})")
