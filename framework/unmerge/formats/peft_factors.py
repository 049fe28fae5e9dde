"""Factors out of the tensors of a PEFT file, as matrices, and back into the shapes PEFT has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from unmerge.adapter import Factors
from unmerge.arrays import DTYPES, VERBATIM_DTYPES, dtype_name
from unmerge.errors import AdapterError, NonFiniteError, UnsupportedAdapterError
from unmerge.formats.base import excerpt
from unmerge.formats.peft_config import LoraSettings
from unmerge.formats.peft_keys import CONFIG_FILE, FACTOR_NAMES, PREFIX, shown_shape
from unmerge_bundle.kinds import LINEAR, check_kind, kernel_of

__all__ = ["read_factors", "read_verbatim", "written_tensors"]

_EMBEDDING = "embedding"


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
        _check_dtype(tensor, VERBATIM_DTYPES, f"{weights}: {key}")
        _check_finite(tensor, f'{key}: tensor of adapter "{name}"')
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
        kernel = kernel_of(check_kind(factors.kind))
    except ValueError as error:
        raise AdapterError(f"{path}: {error}; correct the adapter") from error
    A, B = factors.A, factors.B
    if kernel:
        if factors.d_in % math.prod(kernel):
            raise AdapterError(
                f"{path}: factor A has {factors.d_in} columns, no whole number of channels for "
                f"{factors.kind}; correct the adapter"
            )
        A = A.reshape(factors.rank, -1, *kernel)
        B = B.reshape(factors.d_out, factors.rank, *(1 for _ in kernel))
    names = FACTOR_NAMES[factors.kind == _EMBEDDING]
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
    for label, tensor in (("A", A), ("B", B)):
        if tensor.ndim < 2 or tensor.ndim > (2 if embedding else 5) or 0 in tensor.shape:
            more = "" if embedding else ", up to five in a convolution"
            raise AdapterError(
                f'{path}: factor {label} of adapter "{name}" has shape {shown_shape(tensor)}; '
                f"expected two dimensions{more}, each above 0; it may be a shard that was saved "
                "without being gathered"
            )
        _check_dtype(tensor, DTYPES, f'{path}: factor {label} of adapter "{name}"')
    kernel = tuple(A.shape[2:])
    if B.shape[2:] != (1,) * len(kernel) or A.shape[0] != B.shape[1]:
        _refuse_groups(A, B, path, name)
        raise AdapterError(
            f'{path}: factors of adapter "{name}" do not fit: A is {shown_shape(A)}, '
            f"B is {shown_shape(B)}; expected (rank, d_in) and (d_out, rank), in a "
            "convolution (rank, channels, *kernel) and (d_out, rank, 1, …); the file is damaged, "
            "save the adapter again"
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
    kind = _EMBEDDING if embedding else _kind(kernel, path)
    return Factors(A=A.flatten(1), B=B.flatten(1), scaling=settings.scaling_of(path), kind=kind)


def _refuse_groups(A: torch.Tensor, B: torch.Tensor, path: str, name: str) -> None:
    """Refuse the factors PEFT makes for a convolution with groups: B has rank / groups columns."""
    if A.ndim > 2 and B.shape[2:] == (1,) * (A.ndim - 2) and A.shape[0] % B.shape[1] == 0:
        raise UnsupportedAdapterError(
            f'{path}: factors of adapter "{name}" are those of a convolution with '
            f"{A.shape[0] // B.shape[1]} groups (A is {shown_shape(A)}, B is {shown_shape(B)}), "
            "which is not supported: A reads all channels and the weight of a group only its own, "
            "so there is no delta, and PEFT cannot merge it either; leave the module out",
            feature="convolution with groups",
        )


def _kind(kernel: tuple[int, ...], path: str) -> str:
    if not kernel:
        return LINEAR
    try:
        return check_kind(f"conv{len(kernel)}d:{'x'.join(str(size) for size in kernel)}")
    except ValueError as error:
        raise AdapterError(f"{path}: {error}; the file is damaged, save the adapter again") from (
            error
        )


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
