"""The adapter store: a layer-indexed, lossless, versioned archive on Icechunk (Zarr v3)."""

from __future__ import annotations

from unmerge.store.adapter_store import AdapterStore
from unmerge.store.compact import GcReport
from unmerge.store.diff import AdapterChange, ModuleChange, StoreDiff
from unmerge.store.records import AdapterInfo, LinkedFile, ModuleInfo, Version
from unmerge.store.tables import DeadSpace
from unmerge.store.verify import StoreProblem, StoreReport

__all__ = [
    "AdapterChange",
    "AdapterInfo",
    "AdapterStore",
    "DeadSpace",
    "GcReport",
    "LinkedFile",
    "ModuleChange",
    "ModuleInfo",
    "StoreDiff",
    "StoreProblem",
    "StoreReport",
    "Version",
]
