"""What changed between two versions of a store: adapters, their modules, and by how much."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from unmerge.adapter import Factors
from unmerge.arrays import dtype_name
from unmerge.kernels.lowrank import orthonormal_core
from unmerge.store.layout import to_stored
from unmerge.store.records import ModuleInfo, ModuleRecord, StoredAdapter
from unmerge.store.view import StoreView
from unmerge_bundle.arrays import Array
from unmerge_bundle.measure import relative_errors

Change = Literal["added", "removed", "changed"]
Progress = Callable[[int, int], None]

_Pair = tuple[StoredAdapter, StoredAdapter]

# What makes an adapter another one, as `AdapterInfo` and `AdapterStore.read_config` name it. The
# time of adding does not: an adapter removed and added again is the same.
_FIELDS = ("digest", "config", "format", "source", "base_model", "revision", "note", "metadata")

# Of one module, across adapters, at a time.
_BATCH_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class ModuleChange:
    """One module of a changed adapter that is there once only, or differs.

    Norms are Frobenius norms of the delta, `None` beyond the range of float64.

    Attributes:
        change: "added", "removed" or "changed".
        before: What the module was, `None` if it was not there.
        after: What it is, `None` if it is not there.
        norm_before: Norm of its delta before, `None` if it was not there.
        norm_after: Norm of its delta after, `None` if it is not there.
        difference: Norm of the difference of the two deltas, relative to that before. 0 where only
            the form of the factors differs, `None` where the delta before is zero or not there, or
            the layers' sizes differ.
    """

    change: Change
    before: ModuleInfo | None
    after: ModuleInfo | None
    norm_before: float | None
    norm_after: float | None
    difference: float | None


@dataclass(frozen=True, slots=True)
class AdapterChange:
    """An adapter that both versions have and that differs.

    Attributes:
        name: Its name.
        fields: What of it differs: "digest" (tensors or scalings), "config", "format", "source",
            "base_model", "revision", "note", "metadata".
        modules: Modules that differ, by path, sorted; empty where they were not compared.
        verbatim: How verbatim tensors that differ do so, by key, sorted; likewise.
    """

    name: str
    fields: tuple[str, ...]
    modules: Mapping[str, ModuleChange]
    verbatim: Mapping[str, Change]


@dataclass(frozen=True, slots=True)
class StoreDiff:
    """What `AdapterStore.diff` found.

    Attributes:
        before: Id of the one version.
        after: Id of the other.
        added: Names of adapters that only the other has, sorted.
        removed: Names of adapters that only the one has, sorted.
        changed: Adapters that both have and that differ, sorted by name.
        unchanged: Number of adapters that are the same in both.
    """

    before: str
    after: str
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[AdapterChange, ...]
    unchanged: int


def diff(
    before: StoreView, after: StoreView, *, modules: bool, progress: Progress | None
) -> StoreDiff:
    """Compare two versions; see `AdapterStore.diff`."""
    old, new = before.index.adapters, after.index.adapters
    common = sorted(old.keys() & new.keys())
    pairs: dict[str, _Pair] = {}
    fields: dict[str, tuple[str, ...]] = {}
    for name in common:
        if old[name].sha256 == new[name].sha256:  # one text, with the adapter's digest in it
            continue
        first, second = before.record(name), after.record(name)
        differing = tuple(f for f in _FIELDS if getattr(first, f) != getattr(second, f))
        # None where only rows have moved.
        if differing:
            pairs[name], fields[name] = (first, second), differing
    touched = {name: pairs[name] for name in pairs if modules and "digest" in fields[name]}
    found: dict[str, dict[str, ModuleChange]] = {name: {} for name in pairs}
    for name, path, change in _modules(before, after, touched, progress):
        found[name][path] = change
    return StoreDiff(
        before=before.version,
        after=after.version,
        added=tuple(sorted(new.keys() - old.keys())),
        removed=tuple(sorted(old.keys() - new.keys())),
        changed=tuple(
            AdapterChange(
                name=name,
                fields=fields[name],
                modules=found[name],
                verbatim=_verbatim(before, after, touched[name]) if name in touched else {},
            )
            for name in pairs
        ),
        unchanged=len(common) - len(pairs),
    )


def _modules(
    before: StoreView,
    after: StoreView,
    touched: Mapping[str, _Pair],
    progress: Progress | None,
) -> Iterator[tuple[str, str, ModuleChange]]:
    """Give adapter name, module path and change of every module that differs.

    Module by module across adapters, as the tensors lie on the disk.
    """
    paths = sorted({path for pair in touched.values() for r in pair for path in r.modules.path})
    for done, path in enumerate(paths, start=1):
        # Rows and checksums of one number are no proof: all that is there is read.
        stored = {
            name: (first.modules.get(path), second.modules.get(path))
            for name, (first, second) in touched.items()
            if path in first.modules or path in second.modules
        }
        for names in _batches(stored):
            old, new = (
                _read(view, path, [name for name in names if stored[name][side] is not None])
                for side, view in enumerate((before, after))
            )
            for name in names:
                change = _change(old.get(name), new.get(name))
                if change is not None:
                    yield name, path, change
        if progress is not None:
            progress(done, len(paths))


def _batches(
    stored: Mapping[str, tuple[ModuleRecord | None, ModuleRecord | None]],
) -> Iterator[list[str]]:
    """Split adapters so that both versions of a module, of a batch's adapters, fit into memory."""
    batch: list[str] = []
    nbytes = 0
    for name, pair in stored.items():
        # Of float32, the widest dtype there is.
        size = sum(4 * module.rank * (module.d_in + module.d_out) for module in pair if module)
        if batch and nbytes + size > _BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append(name)
        nbytes += size
    if batch:
        yield batch


def _read(view: StoreView, path: str, names: Sequence[str]) -> dict[str, Factors]:
    return dict(view.read_module(path, names)) if names else {}


def _change(before: Factors | None, after: Factors | None) -> ModuleChange | None:
    """Return how a module differs, `None` if it does not."""
    if before is not None and after is not None and _content(before) == _content(after):
        return None
    return ModuleChange(
        change="added" if before is None else "removed" if after is None else "changed",
        before=_info(before),
        after=_info(after),
        norm_before=_norm(before),
        norm_after=_norm(after),
        difference=_difference(before, after),
    )


def _content(factors: Factors) -> tuple[object, ...]:
    return _tensor(factors.A), _tensor(factors.B), factors.scaling.hex(), factors.kind


def _info(factors: Factors | None) -> ModuleInfo | None:
    if factors is None:
        return None
    return ModuleInfo(
        rank=factors.rank,
        d_out=factors.d_out,
        d_in=factors.d_in,
        dtype=dtype_name(torch.promote_types(factors.A.dtype, factors.B.dtype)),
        scaling=factors.scaling,
        kind=factors.kind,
    )


def _norm(factors: Factors | None) -> float | None:
    """Return `‖s B A‖` in float64, without ever forming the delta."""
    if factors is None:
        return None
    left, right = (orthonormal_core(m).core for m in (factors.B.double(), factors.A.double().T))
    return _finite(abs(factors.scaling) * float(torch.linalg.matrix_norm(left @ right.T)))


def _difference(before: Factors | None, after: Factors | None) -> float | None:
    if before is None or after is None:
        return None
    if (before.d_out, before.d_in) != (after.d_out, after.d_in):
        return None
    # What both are divided by leaves a ratio as it is, and no scaling takes it out of range.
    largest = max(abs(before.scaling), abs(after.scaling)) or 1.0
    errors = relative_errors(
        _float64(before),
        _float64(after),
        source_scaling=before.scaling / largest,
        scaling=after.scaling / largest,
    )
    return _finite(errors.delta)


def _float64(factors: Factors) -> tuple[Array, Array]:
    return factors.A.double().numpy(), factors.B.double().numpy()


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _verbatim(before: StoreView, after: StoreView, pair: _Pair) -> dict[str, Change]:
    """Return how the verbatim tensors of an adapter differ, by key, sorted."""
    first, second = pair
    if (first.verbatim, first.verbatim_digest) == (second.verbatim, second.verbatim_digest):
        return {}
    old, new = before.read_verbatim(first.name), after.read_verbatim(second.name)
    changes: dict[str, Change] = {}
    for key in sorted(old.keys() | new.keys()):
        if key not in old:
            changes[key] = "added"
        elif key not in new:
            changes[key] = "removed"
        elif _tensor(old[key]) != _tensor(new[key]):
            changes[key] = "changed"
    return changes


def _tensor(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return what makes a tensor, as plain values: equal exactly where it is, bit for bit."""
    return tensor.dtype, tuple(tensor.shape), to_stored(tensor).tobytes()
