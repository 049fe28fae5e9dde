"""The built-in strategies, one per file; registered like any outsider's, through `plugin`."""

from unmerge_strategies.average import Average
from unmerge_strategies.core_space import CoreSpace
from unmerge_strategies.dare import Dare
from unmerge_strategies.emr import Emr
from unmerge_strategies.knots import Knots
from unmerge_strategies.magnitude_prune import MagnitudePrune
from unmerge_strategies.mm_svd import MmSvd
from unmerge_strategies.rmm import Rmm
from unmerge_strategies.task_arithmetic import TaskArithmetic
from unmerge_strategies.ties import Ties

__all__ = [
    "Average",
    "CoreSpace",
    "Dare",
    "Emr",
    "Knots",
    "MagnitudePrune",
    "MmSvd",
    "Rmm",
    "TaskArithmetic",
    "Ties",
]
