"""The built-in strategies, one per file; registered like any outsider's, through `plugin`."""

from unmerge_strategies.average import Average
from unmerge_strategies.core_space import CoreSpace
from unmerge_strategies.dare import Dare
from unmerge_strategies.emr import Emr
from unmerge_strategies.iso_c import IsoC
from unmerge_strategies.jd import Jd
from unmerge_strategies.knots import Knots
from unmerge_strategies.lora_lego import LoraLego
from unmerge_strategies.lore import Lore
from unmerge_strategies.magnitude_prune import MagnitudePrune
from unmerge_strategies.mm_svd import MmSvd
from unmerge_strategies.quantize import Quantize
from unmerge_strategies.rmm import Rmm
from unmerge_strategies.task_arithmetic import TaskArithmetic
from unmerge_strategies.ties import Ties
from unmerge_strategies.truncate import Truncate
from unmerge_strategies.tsv import Tsv

__all__ = [
    "Average",
    "CoreSpace",
    "Dare",
    "Emr",
    "IsoC",
    "Jd",
    "Knots",
    "LoraLego",
    "Lore",
    "MagnitudePrune",
    "MmSvd",
    "Quantize",
    "Rmm",
    "TaskArithmetic",
    "Ties",
    "Truncate",
    "Tsv",
]
