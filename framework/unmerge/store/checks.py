"""What an adapter must satisfy before a store takes it; nothing wrong is found out only later."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping

import torch

from unmerge.adapter import Adapter, Factors
from unmerge.arrays import DTYPES, VERBATIM_DTYPES, dtype_name
from unmerge.errors import (
    AdapterError,
    AdapterExistsError,
    IncompatibleAdaptersError,
    NonFiniteError,
)
from unmerge_bundle.names import check_key, check_module_path, check_name

Shapes = Mapping[str, tuple[int, int]]


def own_copy(adapter: Adapter) -> Adapter:
    """Return the adapter with contiguous CPU copies of its tensors, once they are checked.

    The copy is what is checked and later written, so that changing a tensor (or the file a tensor
    is mapped from) after it was staged cannot change what is committed.

    Raises:
        AdapterError: The name is not allowed, a shape or dtype is wrong, or there is no module.
        NonFiniteError: A tensor or a scaling holds NaN or infinity.
    """
    _check_texts(adapter)
    if not adapter.modules:
        raise AdapterError(
            f'adapter "{adapter.name}" has no modules, expected at least one; '
            "check that the source is a LoRA adapter"
        )
    modules = {path: _own_factors(adapter, path) for path in sorted(adapter.modules)}
    verbatim = {key: _own_verbatim(adapter, key) for key in sorted(adapter.verbatim)}
    return dataclasses.replace(adapter, modules=modules, verbatim=verbatim)


def check_free(name: str, taken: Collection[str], *, holder: str) -> None:
    """Refuse a name that is taken.

    Args:
        name: The adapter's name.
        taken: Names that are taken.
        holder: What takes them, for the message.

    Raises:
        AdapterExistsError: It is among them.
    """
    if name in taken:
        raise AdapterExistsError(
            f'{holder} already has an adapter "{name}"; '
            "add it under another name (--name on the command line)"
        )


def check_shapes(adapter: Adapter, known: Shapes, *, holder: str) -> None:
    """Refuse an adapter whose modules have other sizes than those already known.

    Raises:
        IncompatibleAdaptersError: A module's `(d_out, d_in)` differs.
    """
    for path, factors in adapter.modules.items():
        got = (factors.d_out, factors.d_in)
        expected = known.get(path, got)
        if got != expected:
            raise IncompatibleAdaptersError(
                f'{path}: adapter "{adapter.name}" has (d_out, d_in) {got}, {holder} has '
                f"{expected}; check that both used the same base model"
            )


def check_base(
    adapter: Adapter, base_model: str | None, revision: str | None, *, holder: str
) -> None:
    """Refuse an adapter of another base model, as far as both are known.

    Raises:
        IncompatibleAdaptersError: Base model or revision differ.
    """
    for what, got, expected in (
        ("base model", adapter.base_model, base_model),
        ("base model revision", adapter.revision, revision),
    ):
        if got and expected and got != expected:
            raise IncompatibleAdaptersError(
                f'adapter "{adapter.name}" has {what} "{got}", {holder} has "{expected}"; '
                "keep adapters of different base models in different stores"
            )


def _check_texts(adapter: Adapter) -> None:
    try:
        check_name(adapter.name)
        for path in adapter.modules:
            check_module_path(path)
        for key in adapter.verbatim:
            check_key(key)
    except ValueError as error:
        raise AdapterError(f'adapter "{adapter.name}": {error}') from error
    for field in ("config", "format", "source", "base_model", "revision"):
        try:
            (getattr(adapter, field) or "").encode()
        except UnicodeEncodeError as error:
            raise AdapterError(
                f'adapter "{adapter.name}": {field} is no valid Unicode text '
                f"({error.reason} at character {error.start}); correct the source"
            ) from error


def _own_factors(adapter: Adapter, path: str) -> Factors:
    factors = adapter.modules[path]
    where = f'{path}: adapter "{adapter.name}"'
    if not math.isfinite(factors.scaling):
        raise NonFiniteError(f"{where} has scaling {factors.scaling}, expected a finite number")
    own = {
        name: _own_tensor(tensor, DTYPES, where=f"{where}: factor {name}")
        for name, tensor in (("A", factors.A), ("B", factors.B))
    }
    A, B = own["A"], own["B"]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or 0 in (*A.shape, *B.shape):
        raise AdapterError(
            f"{where} has A of shape {tuple(A.shape)} and B of shape {tuple(B.shape)}, "
            "expected (r, d_in) and (d_out, r) with one r, none of them 0"
        )
    return Factors(A, B, float(factors.scaling))


def _own_verbatim(adapter: Adapter, key: str) -> torch.Tensor:
    where = f'adapter "{adapter.name}": verbatim tensor "{key}"'
    return _own_tensor(adapter.verbatim[key], VERBATIM_DTYPES, where=where)


def _own_tensor(
    tensor: torch.Tensor, allowed: Mapping[str, torch.dtype], *, where: str
) -> torch.Tensor:
    if tensor.dtype not in allowed.values() or tensor.layout != torch.strided or tensor.is_meta:
        kind = "meta" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
        raise AdapterError(
            f"{where} is a {kind} tensor of dtype {dtype_name(tensor.dtype)}, "
            f"expected a strided one of {', '.join(allowed)}"
        )
    own = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if own.is_floating_point() and not torch.isfinite(own).all():
        count = int((~torch.isfinite(own)).sum())
        raise NonFiniteError(
            f"{where} has {count} of {own.numel()} entries that are NaN or infinite; "
            "train or export the adapter again"
        )
    return own
