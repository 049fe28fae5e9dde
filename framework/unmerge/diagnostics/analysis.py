"""All diagnostics that need no data, over the adapters of a store, one module at a time."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unmerge.diagnostics.interference import DirectMergeInterference, direct_merge_interference
from unmerge.diagnostics.spaces import (
    PairwiseGeometry,
    SubspaceGeometry,
    compare_deltas,
    cosines_of,
    ratio,
)
from unmerge.errors import ConfigError, ModuleNotInAdapterError, NonFiniteError
from unmerge.execution import one_thread_per_task
from unmerge.store import AdapterStore

__all__ = ["Analysis", "ModuleAnalysis", "analyze"]

_Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class ModuleAnalysis:
    """One module of the adapters that have it.

    Attributes:
        path: Module path.
        d_out: Output features.
        d_in: Input features.
        adapters: Names of the adapters that have the module, sorted.
        ranks: Rank of each of them, as stored.
        geometry: How their deltas lie to each other, in that order.
        direct: The interference term of merging them directly with weights 1, or `None`.
        no_direct: Why `direct` is `None`, else "".
    """

    path: str
    d_out: int
    d_in: int
    adapters: tuple[str, ...]
    ranks: tuple[int, ...]
    geometry: PairwiseGeometry
    direct: DirectMergeInterference | None
    no_direct: str

    def to_data(self) -> dict[str, Any]:
        """Return the module's numbers as plain JSON-compatible data."""
        geometry = self.geometry
        return {
            "module": self.path,
            "d_out": self.d_out,
            "d_in": self.d_in,
            "adapters": list(self.adapters),
            "ranks": list(self.ranks),
            "numerical_ranks": list(geometry.ranks),
            "norms": geometry.norms.tolist(),
            "cosines": geometry.cosines.tolist(),
            "shares": geometry.shares.tolist(),
            "interference": geometry.interference.tolist(),
            "columns": _angles_data(geometry.columns),
            "rows": _angles_data(geometry.rows),
            "direct_merge": None if self.direct is None else _direct_data(self.direct),
            "no_direct_merge": self.no_direct or None,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Analysis:
    """How the adapters of a store lie to each other, over the whole model and per module.

    Over the whole model an adapter is the block-diagonal matrix of its deltas, and one that lacks
    a module is zero there. Where a zero adapter would give 0/0 the value is 0.

    Attributes:
        store: Where the adapters were read from.
        version: The version of the store.
        adapters: The N adapter names, sorted.
        modules: One entry per module, sorted by path.
        norms: `(N,)` float64 Frobenius norms over the whole model.
        cosines: `(N, N)` cosines over the whole model.
        shares: `(N, N)`; entry (i, j) is the share of adapter i's norm that lies where adapter j
            acts, `‖P_j Δ_i Q_j‖ / ‖Δ_i‖`.
        interference: `(N,)`; entry i is what the sum of the others adds where adapter i acts,
            `‖P_i (Σ_{j≠i} Δ_j) Q_i‖ / ‖Δ_i‖`.
    """

    store: str
    version: str
    adapters: tuple[str, ...]
    modules: tuple[ModuleAnalysis, ...]
    norms: torch.Tensor
    cosines: torch.Tensor
    shares: torch.Tensor
    interference: torch.Tensor

    @property
    def direct_relative(self) -> float | None:
        """`‖M‖ / ‖L_MM‖` over all modules that can be merged directly; `None` where none can."""
        measured = [module.direct for module in self.modules if module.direct is not None]
        if not measured:
            return None
        norm = math.hypot(*(direct.norm for direct in measured))
        whole = math.hypot(*(direct.multiplied_norm for direct in measured))
        if norm == 0:
            return 0.0
        return norm / whole if whole else math.inf

    def interference_matrix(self) -> torch.Tensor:
        """Return interference per module and adapter, `(L, N)`; NaN where one lacks a module."""
        rows = {name: n for n, name in enumerate(self.adapters)}
        table = self.norms.new_full((len(self.modules), len(self.adapters)), math.nan)
        for layer, module in enumerate(self.modules):
            table[layer, [rows[name] for name in module.adapters]] = module.geometry.interference
        return table

    def to_data(self) -> dict[str, Any]:
        """Return everything but spectra as plain JSON-compatible data; angles in radians.

        A value that is not finite, which JSON lacks, is `None`.
        """
        relative = self.direct_relative
        return {
            "store": self.store,
            "version": self.version,
            "adapters": list(self.adapters),
            "norms": self.norms.tolist(),
            "cosines": self.cosines.tolist(),
            "shares": self.shares.tolist(),
            "interference": self.interference.tolist(),
            "direct_merge_relative": None if relative is None else _finite(relative),
            "modules": [module.to_data() for module in self.modules],
        }


def analyze(
    store: AdapterStore,
    adapters: Sequence[str] | None = None,
    modules: Sequence[str] | None = None,
    progress: _Progress | None = None,
) -> Analysis:
    """Compare the adapters of a store with each other, module by module.

    Args:
        store: Where they are read from, at its version.
        adapters: Names of the adapters, all unless given.
        modules: Glob patterns of module paths, all modules unless given.
        progress: Called with the phase "analyze", modules done and modules in all.

    Raises:
        ConfigError: The store holds no adapters, or the list of adapters is empty or has one twice.
        AdapterNotInStoreError: An adapter is not there.
        ModuleNotInAdapterError: A pattern matches no module of the adapters.
        NonFiniteError: A module's deltas are not finite; names the module.

    Numerics: float64, one thread, adapters in sorted order: equal bits for equal stores. One
        module's factors are in memory at a time; the result holds 8 N² numbers a module. Cost per
        module: see `compare_deltas` and `direct_merge_interference`.
    """
    names, paths = _select(store, adapters, modules)
    report = progress or _silent
    rows = {name: n for n, name in enumerate(names)}
    count = len(names)
    squares = torch.zeros(count, dtype=torch.float64)
    inner = torch.zeros(count, count, dtype=torch.float64)
    inside, disturbance = inner.clone(), squares.clone()
    analysed = []
    report("analyze", 0, len(paths))
    with one_thread_per_task():
        for path in paths:
            module = _analyze_module(store, path, names)
            analysed.append(module)
            geometry = module.geometry
            index = torch.tensor([rows[name] for name in module.adapters])
            squares[index] += geometry.norms.square()
            disturbance[index] += geometry.disturbance.square()
            inner[index[:, None], index] += geometry.inner
            inside[index[:, None], index] += geometry.inside.square()
            report("analyze", len(analysed), len(paths))
    norms = squares.sqrt()
    return Analysis(
        store=str(store.address),
        version=store.version,
        adapters=names,
        modules=tuple(analysed),
        norms=norms,
        cosines=cosines_of(inner, norms),
        shares=ratio(inside.sqrt(), norms[:, None]).clamp(max=1.0),
        interference=ratio(disturbance.sqrt(), norms),
    )


def _analyze_module(store: AdapterStore, path: str, names: Sequence[str]) -> ModuleAnalysis:
    pairs = store.read_module(path, names)
    factors = [f for _, f in pairs]
    ranks = tuple(f.rank for f in factors)
    direct, reason = None, ""
    try:
        geometry = compare_deltas(factors)
        if len(set(ranks)) > 1:
            different = ", ".join(str(rank) for rank in sorted(set(ranks)))
            reason = f"ranks {different} differ, so the factors cannot be added up"
        else:
            direct = direct_merge_interference(factors)
    except NonFiniteError as error:
        raise NonFiniteError(f"{path}: {error}") from error
    return ModuleAnalysis(
        path=path,
        d_out=factors[0].d_out,
        d_in=factors[0].d_in,
        adapters=tuple(name for name, _ in pairs),
        ranks=ranks,
        geometry=geometry,
        direct=direct,
        no_direct=reason,
    )


def _select(
    store: AdapterStore, adapters: Sequence[str] | None, patterns: Sequence[str] | None
) -> tuple[tuple[str, ...], list[str]]:
    """Return the names and module paths that are meant, sorted."""
    names = tuple(sorted(store.names() if adapters is None else adapters))
    if not names:
        empty = f"{store.address}: the store holds no adapters; add some first"
        raise ConfigError(empty if adapters is None else "the list of adapters is empty")
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f'adapter "{name}" is listed twice')
    union = sorted({path for name in names for path in store.info(name).modules})
    for pattern in patterns or ():
        if not any(fnmatch.fnmatchcase(path, pattern) for path in union):
            raise ModuleNotInAdapterError(
                f'no module of these adapters matches "{pattern}"; the first of {len(union)} is '
                f"{union[0]}"
            )
    chosen = [
        path
        for path in union
        if patterns is None or any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
    ]
    return names, chosen


def _angles_data(geometry: SubspaceGeometry) -> dict[str, Any]:
    return {
        "smallest_angle": geometry.smallest.tolist(),
        "largest_angle": geometry.largest.tolist(),
        "overlap": geometry.overlap.tolist(),
    }


def _direct_data(direct: DirectMergeInterference) -> dict[str, Any]:
    noise = direct.noise()
    return {
        "rank": direct.rank,
        "norm": direct.norm,
        "relative": _finite(direct.relative),
        "multiplied_norm": direct.multiplied_norm,
        "direct_norm": direct.direct_norm,
        "truncation": direct.truncation,
        "alignment": direct.alignment,
        "mean": direct.mean,
        "std": direct.std,
        "stable_rank": direct.stable_rank,
        "top_energy": direct.top_energy,
        "noise": {
            "stable_rank": noise.stable_rank,
            "top_energy": noise.top_energy(direct.rank),
            "share": direct.noise_share,
        },
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _silent(phase: str, done: int, total: int) -> None:
    """Show no progress."""
