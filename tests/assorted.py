"""Adapters of every kind and dtype that a store takes, and what makes them equal bit for bit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch

from unmerge.adapter import Adapter, Factors
from unmerge.arrays import VERBATIM_DTYPES
from unmerge.store import AdapterStore
from unmerge_bundle.kinds import kernel_of

KINDS: Mapping[str, str] = {
    "conv": "conv2d:3x3",
    "layers.0.q_proj": "linear",
    "tokens": "embedding",
}
"""Kind of every module that an assorted adapter may have, by path."""

_D_OUT, _D_IN = 7, 5


def assorted(
    name: str,
    *,
    seed: int,
    rank: int = 2,
    dtype: torch.dtype = torch.float32,
    modules: tuple[str, ...] = tuple(KINDS),
    head: bool = False,
) -> Adapter:
    """Return an adapter whose numbers are any bits that are finite, negative zeros included.

    Args:
        name: Its name.
        seed: Equal seeds give equal tensors.
        rank: Rank of every module.
        dtype: Dtype of every factor.
        modules: Paths of its modules, of `KINDS`.
        head: Whether it has a verbatim tensor of every dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for path in sorted(modules):
        d_in = _D_IN * math.prod(kernel_of(KINDS[path]))
        factors[path] = Factors(
            _bits((rank, d_in), dtype, generator),
            _bits((_D_OUT, rank), dtype, generator),
            scaling=(1 + seed) / (3 * rank),
            kind=KINDS[path],
        )
    verbatim = {}
    if head:
        verbatim = {n: _bits((2, 3), dtype, generator) for n, dtype in VERBATIM_DTYPES.items()}
    return Adapter(
        name,
        factors,
        verbatim=verbatim,
        config=f'{{\n  "seed": {seed} }}',
        format="peft",
        source=f"somewhere/{name}",
    )


def content(adapter: Adapter) -> dict[str, object]:
    """Return everything of an adapter as plain values: equal exactly when it is the same."""
    values: dict[str, object] = {
        field.name: getattr(adapter, field.name)
        for field in dataclasses.fields(adapter)
        if field.name not in ("modules", "verbatim")
    }
    for path, factors in adapter.modules.items():
        values[f"module {path}"] = _factors(factors)
    for key, tensor in adapter.verbatim.items():
        values[f"verbatim {key}"] = _content(tensor)
    return values


def contents(store: AdapterStore) -> dict[str, dict[str, object]]:
    """Return the content of every adapter of a store by name, read in both ways there are."""
    found = {name: content(store.read_adapter(name)) for name in store.names()}
    for path in store.modules():
        for name, factors in store.read_module(path):
            assert found[name][f"module {path}"] == _factors(factors)
    return found


def _factors(factors: Factors) -> tuple[object, ...]:
    return _content(factors.A), _content(factors.B), factors.scaling.hex(), factors.kind


def _content(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), flat.numpy().tobytes()


def _bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).to(torch.bool)
    size = math.prod(shape) * dtype.itemsize
    tensor = torch.randint(256, (size,), generator=generator, dtype=torch.uint8).view(dtype)
    if dtype.is_floating_point:
        tensor = torch.where(torch.isfinite(tensor), tensor, -0.0).to(dtype)
    return tensor.reshape(shape)
