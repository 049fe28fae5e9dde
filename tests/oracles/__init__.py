"""Dense float64 references, written from the papers, that the strategies are compared with.

Nothing here is shared with the code under test: every delta is multiplied out, every decomposition
is `numpy.linalg.svd` of the full matrix, every loop is a loop. Slow on purpose. One file per method
or family; `tests/plugins/test_oracles_by_hand.py` checks each of them on numbers worked out by
hand.
"""

from __future__ import annotations

from oracles.common import (
    Matrix,
    Part,
    Rule,
    canonical_signs,
    dense,
    factor_matrices,
    factor_weights,
    in_deltas,
    in_factors,
    numerical_rank,
    renormalised,
    truncated,
)
from oracles.counter import splitmix64
from oracles.lego import inertia, lloyd, means, nearest, units
from oracles.linear import average, direct_merge, mean_rule, sum_rule, task_arithmetic
from oracles.reversible import (
    Emr,
    Joint,
    Quantised,
    emr,
    joint_full,
    quantise,
    with_best_cores,
)
from oracles.rmm import (
    Position,
    RmmRestored,
    balanced_factors,
    rmm_position,
    rmm_restore,
    rmm_storage_ratio,
)
from oracles.sparse import (
    Mask,
    Tensors,
    Weights,
    contested,
    dare,
    magnitude_prune,
    ties,
    ties_rule,
    trim,
    trim_vector,
)
from oracles.spectral import (
    LowRankEstimate,
    TruncatedSvd,
    iso_c,
    lore,
    low_rank_estimate,
    mm_svd,
    rank_for_energy,
    rank_for_error,
    svt,
    truncate,
    truncated_svd,
    tsv,
)
from oracles.subspaces import Aligned, core_blocks, core_space, knots, knots_blocks

__all__ = [
    "Aligned",
    "Emr",
    "Joint",
    "LowRankEstimate",
    "Mask",
    "Matrix",
    "Part",
    "Position",
    "Quantised",
    "RmmRestored",
    "Rule",
    "Tensors",
    "TruncatedSvd",
    "Weights",
    "average",
    "balanced_factors",
    "canonical_signs",
    "contested",
    "core_blocks",
    "core_space",
    "dare",
    "dense",
    "direct_merge",
    "emr",
    "factor_matrices",
    "factor_weights",
    "in_deltas",
    "in_factors",
    "inertia",
    "iso_c",
    "joint_full",
    "knots",
    "knots_blocks",
    "lloyd",
    "lore",
    "low_rank_estimate",
    "magnitude_prune",
    "mean_rule",
    "means",
    "mm_svd",
    "nearest",
    "numerical_rank",
    "quantise",
    "rank_for_energy",
    "rank_for_error",
    "renormalised",
    "rmm_position",
    "rmm_restore",
    "rmm_storage_ratio",
    "splitmix64",
    "sum_rule",
    "svt",
    "task_arithmetic",
    "ties",
    "ties_rule",
    "trim",
    "trim_vector",
    "truncate",
    "truncated",
    "truncated_svd",
    "tsv",
    "units",
    "with_best_cores",
]
