"""The entry point of the built-in strategies: the hook implementations, nothing else."""

from __future__ import annotations

import unmerge_strategies
from unmerge import Merger, hookimpl


@hookimpl
def unmerge_mergers() -> list[type[Merger]]:
    """Return the built-in strategies."""
    return [getattr(unmerge_strategies, name) for name in unmerge_strategies.__all__]
