"""The entry point of the built-in strategies: the hook implementations, nothing else."""

from __future__ import annotations

from unmerge import Merger, hookimpl
from unmerge_strategies.average import Average
from unmerge_strategies.mm_svd import MmSvd
from unmerge_strategies.rmm import Rmm
from unmerge_strategies.task_arithmetic import TaskArithmetic


@hookimpl
def unmerge_mergers() -> list[type[Merger]]:
    """Return the built-in strategies."""
    return [Average, MmSvd, Rmm, TaskArithmetic]
