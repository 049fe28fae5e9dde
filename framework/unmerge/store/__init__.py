"""The adapter store: a layer-indexed, lossless, versioned archive on Icechunk (Zarr v3)."""

from __future__ import annotations

from unmerge.store.adapter_store import AdapterStore
from unmerge.store.records import AdapterInfo, ModuleInfo, Version

__all__ = ["AdapterInfo", "AdapterStore", "ModuleInfo", "Version"]
