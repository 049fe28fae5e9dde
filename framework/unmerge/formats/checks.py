"""What every format asks of names, factors and tensors, in one place and in the same words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from unmerge.adapter import Factors
from unmerge.arrays import DTYPES, dtype_name, to_numpy
from unmerge.errors import AdapterError, NonFiniteError
from unmerge.formats.base import excerpt
from unmerge_bundle.blob import Held, write_safetensors
from unmerge_bundle.kinds import LINEAR
from unmerge_bundle.names import check_module_path, check_name

__all__ = [
    "adapter_name",
    "build_factors",
    "check_finite",
    "check_partners",
    "module_path",
    "own_name",
    "save_tensors",
    "shape_text",
]


def own_name(path: Path) -> str:
    """Return what `path` itself is called; a link keeps its own name."""
    return Path(os.path.abspath(path)).name  # noqa: PTH100 - resolve() would follow the link


def adapter_name(name: str, where: Path) -> str:
    """Return `name` if an adapter may be called that.

    Raises:
        AdapterError: It may not; see `unmerge_bundle.check_name`.
    """
    try:
        return check_name(name)
    except ValueError as error:
        raise AdapterError(f"{where}: {error}") from error


def module_path(path: str, key: str, weights: Path) -> str:
    """Return `path` if it may be a module path.

    Args:
        path: What the tensor's name says its module is.
        key: The tensor's name.
        weights: The file, for messages.

    Raises:
        AdapterError: It may not; see `unmerge_bundle.check_module_path`.
    """
    try:
        return check_module_path(path)
    except ValueError as error:
        raise AdapterError(
            f'{weights}: tensor "{excerpt(key)}" names no module that can be stored: '
            f"{excerpt(str(error), 300)}; rename the module"
        ) from error


def check_partners(
    factors_A: Mapping[str, torch.Tensor],
    factors_B: Mapping[str, torch.Tensor],
    weights: Path,
    *,
    names: str,
) -> None:
    """Refuse modules of which one factor is missing, and files without any module.

    Args:
        factors_A: Factors A by module path.
        factors_B: Factors B by module path.
        weights: The file, for messages.
        names: What the factors' tensors are called in this format.

    Raises:
        AdapterError: A factor has no partner, or there is none at all.
    """
    for path in sorted(factors_A.keys() ^ factors_B.keys()):
        there, missing = ("A", "B") if path in factors_A else ("B", "A")
        raise AdapterError(
            f"{path}: factor {there} is there and factor {missing} is missing in {weights}; "
            "expected both; the file is incomplete, save the adapter again"
        )
    if not factors_A:
        raise AdapterError(
            f"{weights}: holds no LoRA module; expected tensors named {names}; check that the "
            "adapter was saved with trained layers"
        )


def build_factors(
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    *,
    path: str,
    adapter: str,
    kind: str = LINEAR,
) -> Factors:
    """Return a module's factors after checking all that does not depend on the format.

    Args:
        A: Expected to be `(rank, d_in)`, of a dtype in `DTYPES`.
        B: Expected to be `(d_out, rank)`, of the same dtype.
        scaling: What multiplies `B @ A`.
        path: The module's path.
        adapter: The adapter's name, for messages.
        kind: The layer the module is.

    Raises:
        AdapterError: Dimensions, shapes or dtypes are not as expected.
        NonFiniteError: A factor holds NaN or an infinity.
    """
    for label, tensor in (("A", A), ("B", B)):
        if tensor.ndim != 2 or 0 in tensor.shape:
            raise AdapterError(
                f'{path}: factor {label} of adapter "{adapter}" has shape {shape_text(tensor)}; '
                "expected two dimensions above 0; it may be a shard that was saved without being "
                "gathered"
            )
        if tensor.dtype not in DTYPES.values():
            raise AdapterError(
                f'{path}: factor {label} of adapter "{adapter}" is {dtype_name(tensor.dtype)}; '
                f"expected one of {', '.join(DTYPES)}; convert it and save again"
            )
    if A.shape[0] != B.shape[1]:
        raise AdapterError(
            f'{path}: factors of adapter "{adapter}" do not fit: A is {shape_text(A)}, B is '
            f"{shape_text(B)}; expected (rank, d_in) and (d_out, rank); the file is damaged, save "
            "the adapter again"
        )
    if A.dtype != B.dtype:
        raise AdapterError(
            f'{path}: factor A of adapter "{adapter}" is {dtype_name(A.dtype)}, factor B is '
            f"{dtype_name(B.dtype)}; expected one dtype; convert both to the wider one"
        )
    for label, tensor in (("A", A), ("B", B)):
        check_finite(tensor, f'{path}: factor {label} of adapter "{adapter}"')
    return Factors(A=A, B=B, scaling=scaling, kind=kind)


def check_finite(tensor: torch.Tensor, what: str) -> None:
    """Refuse a floating-point tensor that holds NaN or an infinity.

    Args:
        tensor: Of any dtype; whole numbers are always finite.
        what: Which tensor of which adapter it is, for the message.

    Raises:
        NonFiniteError: Says how many there are and where the first one is.
    """
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


def save_tensors(
    tensors: Mapping[str, torch.Tensor], file: Path, metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file with these tensors, shapes, dtypes and bits, and this metadata.

    Raises:
        OSError: The disk refuses.
    """
    held = {key: Held.of(to_numpy(tensor), name=key) for key, tensor in tensors.items()}
    write_safetensors(file, held, metadata or None)


def shape_text(tensor: torch.Tensor) -> str:
    """Return a tensor's shape as messages show it, "(8, 16)"."""
    return excerpt(f"({', '.join(str(size) for size in tensor.shape)})")
