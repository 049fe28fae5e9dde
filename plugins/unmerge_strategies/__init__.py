"""The built-in strategies, one per file; registered like any outsider's, through `plugin`."""

from unmerge_strategies.average import Average
from unmerge_strategies.mm_svd import MmSvd
from unmerge_strategies.rmm import Rmm
from unmerge_strategies.task_arithmetic import TaskArithmetic

__all__ = ["Average", "MmSvd", "Rmm", "TaskArithmetic"]
