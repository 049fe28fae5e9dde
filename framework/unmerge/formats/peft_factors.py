"""Factors out of the tensors of a PEFT file, as matrices, and back into the shapes PEFT has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from unmerge.adapter import Factors
from unmerge.arrays import VERBATIM_DTYPES, dtype_name
from unmerge.errors import AdapterError, UnsupportedAdapterError
from unmerge.formats.base import excerpt
from unmerge.formats.checks import build_factors, check_finite, shape_text
from unmerge.formats.peft_config import LoraSettings
from unmerge.formats.peft_keys import CONFIG_FILE, FACTOR_NAMES, PREFIX
from unmerge_bundle.kinds import EMBEDDING, LINEAR, check_kernel, check_kind, kernel_of

__all__ = ["read_factors", "read_verbatim", "written_tensors"]


def read_factors(
    found: Mapping[str, Mapping[str, torch.Tensor]],
    settings: LoraSettings,
    name: str,
    weights: Path,
) -> dict[str, Factors]:
    """Return the factors by module path, as matrices, sorted by path.

    Args:
        found: Tensors by module path and name, as `sort_tensors` returns them.
        settings: What the configuration says of ranks and scalings.
        name: The adapter's name, for messages.
        weights: The file, for messages.

    Raises:
        AdapterError: There is none, a factor has no partner, or the wrong shape, rank or dtype.
        UnsupportedAdapterError: The factors are those of a convolution with groups.
        NonFiniteError: A factor holds NaN or an infinity.
    """
    if not found:
        raise AdapterError(
            f"{weights}: holds no LoRA module; expected tensors named "
            f'"{PREFIX}<module>.lora_A.weight" and "….lora_B.weight"; check that the adapter was '
            "saved with trained layers"
        )
    result = {}
    for path, tensors in sorted(found.items()):
        embedding = "lora_embedding_A" in tensors or "lora_embedding_B" in tensors
        names = FACTOR_NAMES[embedding]
        if extra := sorted(tensors.keys() - set(names)):
            raise AdapterError(
                f"{path}: has both {extra[0]} and the factors of an embedding in {weights}; "
                "expected a module to be one or the other; save the adapter again"
            )
        if missing := [label for label, key in zip("AB", names, strict=True) if key not in tensors]:
            there = "B" if missing == ["A"] else "A"
            raise AdapterError(
                f"{path}: factor {there} is there and factor {missing[0]} is missing in {weights}; "
                "expected both; the file is incomplete, save the adapter again"
            )
        A, B = (tensors[key] for key in names)
        result[path] = _factors(A, B, settings, path, name, embedding=embedding)
    return result


def read_verbatim(
    others: Mapping[str, torch.Tensor], name: str, weights: Path
) -> dict[str, torch.Tensor]:
    """Return the tensors that are no factors, sorted by key.

    Args:
        others: The tensors by their key.
        name: The adapter's name, for messages.
        weights: The file, for messages.

    Raises:
        AdapterError: A tensor has a dtype that cannot be stored.
        NonFiniteError: A tensor holds NaN or an infinity.
    """
    for key, tensor in others.items():
        if tensor.dtype not in VERBATIM_DTYPES.values():
            raise AdapterError(
                f"{weights}: {key} is {dtype_name(tensor.dtype)}; expected one of "
                f"{', '.join(VERBATIM_DTYPES)}; convert it and save again"
            )
        check_finite(tensor, f'{key}: tensor of adapter "{name}"')
    return dict(sorted(others.items()))


def written_tensors(path: str, factors: Factors) -> dict[str, torch.Tensor]:
    """Return a module's factors under the keys and in the shapes that PEFT gives them.

    Args:
        path: The module.
        factors: Its factors; those of a convolution become A `(rank, channels, *kernel)` and
            B `(d_out, rank, 1, …)`.

    Raises:
        AdapterError: The kernel does not divide the factor's columns, or there is no such kind.
    """
    try:
        check_kernel(factors.kind, factors.d_in)
    except ValueError as error:
        raise AdapterError(f"{path}: {error}; correct the adapter") from error
    A, B = factors.A, factors.B
    if kernel := kernel_of(factors.kind):
        A = A.reshape(factors.rank, -1, *kernel)
        B = B.reshape(factors.d_out, factors.rank, *(1 for _ in kernel))
    names = FACTOR_NAMES[factors.kind == EMBEDDING]
    return {f"{PREFIX}{path}.{name}": tensor for name, tensor in zip(names, (A, B), strict=True)}


def _factors(
    A: torch.Tensor,
    B: torch.Tensor,
    settings: LoraSettings,
    path: str,
    name: str,
    *,
    embedding: bool,
) -> Factors:
    kind = EMBEDDING
    if not embedding:
        kind = _kind(A, B, path, name)
        # Row-major, as the weight of a convolution is taken for a matrix.
        A, B = (tensor.flatten(1) if tensor.ndim > 2 else tensor for tensor in (A, B))
    factors = build_factors(A, B, settings.scaling_of(path), path=path, adapter=name, kind=kind)
    rank = settings.rank_of(path)
    if factors.rank != rank:
        raise AdapterError(
            f'{path}: factors of adapter "{name}" have rank {factors.rank}, {CONFIG_FILE} says '
            f"{excerpt(str(rank), 20)}; correct r or rank_pattern (its first matching key counts) "
            "to what the adapter was trained with"
        )
    return factors


def _kind(A: torch.Tensor, B: torch.Tensor, path: str, name: str) -> str:
    """Return what layer factors of these shapes belong to, where that is not an embedding."""
    if A.ndim <= 2 and B.ndim <= 2:
        return LINEAR
    kernel = tuple(A.shape[2:])
    shapes = f"A is {shape_text(A)}, B is {shape_text(B)}"
    # Before anything is divided, or written out whatever its length.
    layer = 3 <= A.ndim == B.ndim <= 5 and 0 not in (*A.shape, *B.shape)
    points = layer and B.shape[2:] == (1,) * len(kernel)
    if points and A.shape[0] > B.shape[1] and A.shape[0] % B.shape[1] == 0:
        raise UnsupportedAdapterError(
            f'{path}: factors of adapter "{name}" are those of a convolution with '
            f"{A.shape[0] // B.shape[1]} groups ({shapes}), which is not supported: A reads all "
            "channels and the weight of a group only its own, so there is no delta, and PEFT "
            "cannot merge it either; leave the module out",
            feature="convolution with groups",
        )
    if not points or A.shape[0] != B.shape[1]:
        raise AdapterError(
            f'{path}: factors of adapter "{name}" do not fit: {shapes}; expected (rank, d_in) and '
            "(d_out, rank), or of a convolution in up to three dimensions (rank, channels, "
            "*kernel) and (d_out, rank, 1, …), all above 0; the file is damaged, save the adapter "
            "again"
        )
    try:
        return check_kind(f"conv{len(kernel)}d:{'x'.join(str(size) for size in kernel)}")
    except ValueError as error:
        raise AdapterError(
            f'{path}: factors of adapter "{name}" are of no layer there is: {error}; the file is '
            "damaged, save the adapter again"
        ) from error
