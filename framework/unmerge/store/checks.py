"""What an adapter must satisfy before a store takes it; nothing wrong is found out only later."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Container, Mapping

import torch

from unmerge.adapter import Adapter, Factors
from unmerge.arrays import DTYPES, VERBATIM_DTYPES, dtype_name
from unmerge.errors import (
    AdapterError,
    AdapterExistsError,
    DuplicateAdapterError,
    IncompatibleAdaptersError,
    NonFiniteError,
)
from unmerge.store.records import Layer
from unmerge.store.staging import Annotation, StagedAdapter
from unmerge_bundle.kinds import check_kind
from unmerge_bundle.names import check_key, check_module_path, check_name

Layers = Mapping[str, Layer]

_LONGEST_NOTE = 10_000
_LONGEST_KEY = 100


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


def check_free(name: str, taken: Container[str], *, holder: str) -> None:
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


def check_fits(
    adapter: StagedAdapter,
    *,
    layers: Layers,
    base: tuple[str | None, str | None],
    twins: Collection[str],
    holder: str,
) -> None:
    """Refuse an adapter that does not belong to those already known, or is one of them.

    Args:
        adapter: The adapter.
        layers: What is known of the base model's layers.
        base: Its id and revision, so far as known.
        twins: Names of known adapters with its digest.
        holder: What knows all this, for the message.

    Raises:
        IncompatibleAdaptersError: A layer, the base model or its revision differ.
        DuplicateAdapterError: It is known under another name, and may not be.
    """
    check_layers(adapter.name, adapter.layers, layers, holder=holder)
    check_base(adapter.name, (adapter.base_model, adapter.revision), base, holder=holder)
    if not adapter.duplicate:
        check_fresh(adapter.name, twins, holder=holder)


def check_layers(name: str, layers: Layers, known: Layers, *, holder: str) -> None:
    """Refuse an adapter whose modules are other layers than those already known.

    Args:
        name: The adapter's name.
        layers: Its modules' `(d_out, d_in, kind)`.
        known: Those already known.
        holder: What knows them, for the message.

    Raises:
        IncompatibleAdaptersError: A module's size or kind differs.
    """
    for path, (*size, kind) in layers.items():
        if path not in known:
            continue
        *expected, expected_kind = known[path]
        if size != expected:
            raise IncompatibleAdaptersError(
                f'{path}: adapter "{name}" has (d_out, d_in) {tuple(size)}, {holder} has '
                f"{tuple(expected)}; check that both used the same base model"
            )
        if kind != expected_kind:
            raise IncompatibleAdaptersError(
                f'{path}: adapter "{name}" has it as {kind}, {holder} as {expected_kind}; '
                "check that both used the same base model"
            )


def check_fresh(name: str, twins: Collection[str], *, holder: str) -> None:
    """Refuse an adapter that is already there, bit for bit.

    Args:
        name: The adapter's name.
        twins: Names of those that have its digest.
        holder: What has them, for the message.

    Raises:
        DuplicateAdapterError: There is one.
    """
    for twin in twins:
        raise DuplicateAdapterError(
            f'adapter "{name}" is "{twin}" of {holder}, bit for bit; leave it out, or allow '
            "duplicates (--allow-duplicates on the command line)"
        )


def check_base(
    name: str,
    own: tuple[str | None, str | None],
    known: tuple[str | None, str | None],
    *,
    holder: str,
) -> None:
    """Refuse an adapter of another base model, as far as both are known.

    Args:
        name: The adapter's name.
        own: Its base model and that one's revision.
        known: Those already known.
        holder: What knows them, for the message.

    Raises:
        IncompatibleAdaptersError: Base model or revision differ.
    """
    for what, got, expected in zip(("base model", "base model revision"), own, known, strict=True):
        if got and expected and got != expected:
            raise IncompatibleAdaptersError(
                f'adapter "{name}" has {what} "{got}", {holder} has "{expected}"; '
                "keep adapters of different base models in different stores"
            )


def check_annotation(name: str, note: str, metadata: Mapping[str, str]) -> Annotation:
    """Return a note and metadata that can be stored.

    Raises:
        AdapterError: A key or value is no text, is no valid Unicode, or has too many characters.
    """
    for what, text in (("note", note), *((f'metadata "{k}"', v) for k, v in metadata.items())):
        if not isinstance(text, str):
            raise AdapterError(f'adapter "{name}": {what} is {text!r}, expected text')
        _check_unicode(name, what, text)
        if len(text) > _LONGEST_NOTE:
            raise AdapterError(
                f'adapter "{name}": {what} has {len(text)} characters, expected at most '
                f"{_LONGEST_NOTE}; keep long texts elsewhere and put a link here"
            )
    for key in metadata:
        if not isinstance(key, str) or not key.isprintable() or not 0 < len(key) <= _LONGEST_KEY:
            raise AdapterError(
                f'adapter "{name}": metadata key {key!r} is not allowed; expected 1 to '
                f"{_LONGEST_KEY} printable characters"
            )
    return Annotation(note, dict(sorted(metadata.items())))


def _check_texts(adapter: Adapter) -> None:
    try:
        check_name(adapter.name)
        for path, factors in adapter.modules.items():
            check_module_path(path)
            check_kind(factors.kind)
        for key in adapter.verbatim:
            check_key(key)
    except ValueError as error:
        raise AdapterError(f'adapter "{adapter.name}": {error}') from error
    for field in ("config", "format", "source", "base_model", "revision"):
        _check_unicode(adapter.name, field, getattr(adapter, field) or "")


def _check_unicode(name: str, what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise AdapterError(
            f'adapter "{name}": {what} is no valid Unicode text '
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
    return Factors(A, B, float(factors.scaling), factors.kind)


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
