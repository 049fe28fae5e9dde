"""Every registered strategy keeps every law that it claims, by the kit that outsiders use."""

from __future__ import annotations

from typing import Any

import pytest

from unmerge import Merger, default_registry
from unmerge.testing import all_checks, parametrize_with_checks

VARIANTS: tuple[dict[str, Any], ...] = (
    {"method": "average", "absent": "renormalise"},
    {"method": "average", "space": "factors"},
    {"method": "task_arithmetic", "scale": 0.3},
    {"method": "task_arithmetic", "space": "factors"},
    {"method": "task_arithmetic", "absent": "renormalise"},
    {"method": "magnitude_prune", "scope": "model"},
    {"method": "magnitude_prune", "space": "factors", "density": 0.5},
    {"method": "ties", "scope": "model"},
    {"method": "ties", "space": "factors"},
    {"method": "ties", "vote": "count", "zero_vote": "positive"},
    {"method": "ties", "zero_vote": "majority", "scope": "model", "reduce": "sum"},
    {"method": "ties", "weigh_votes": True, "density": 1.0},
    {"method": "ties", "reduce": "max", "density": 0.5},
    {"method": "dare", "rescale": "norm", "inner": {"method": "ties"}},
    {"method": "dare", "rescale": "none", "inner": {"method": "ties", "scope": "model"}},
    {"method": "dare", "space": "factors", "density": 0.5},
    {"method": "dare", "density": 1.0},
    {"method": "knots", "axis": "input"},
    {"method": "knots", "inner": {"method": "ties", "scope": "model"}},
    {"method": "knots", "inner": {"method": "dare", "density": 0.5}},
    {"method": "knots", "inner": {"method": "task_arithmetic"}},
    {"method": "core_space", "inner": {"method": "task_arithmetic"}},
    {"method": "core_space", "inner": {"method": "ties", "scope": "model"}},
    {"method": "core_space", "balance": False},
    {"method": "mm_svd", "rank": 2, "inner": {"method": "average"}, "split": "balanced"},
    {"method": "mm_svd", "energy": 0.9, "split": "B"},
    {"method": "mm_svd", "error": 0.1},
    {"method": "mm_svd", "inner": {"method": "ties"}},
    {"method": "mm_svd", "inner": {"method": "dare", "inner": {"method": "ties"}}},
    {"method": "mm_svd", "inner": {"method": "knots"}},
    {"method": "lore", "finish": "mean", "mu": 0.5, "mu_unit": "relative"},
    {"method": "lore", "finish": "ties", "mu": 0.5, "mu_unit": "relative"},
    {"method": "lore", "rank_ratio": 0.2, "warmup": 2, "max_iterations": 20},
    {"method": "rmm", "basis_size": 1, "fold_scaling": True},
    {"method": "rmm", "gauge": "balanced"},
    {"method": "rmm", "gauge": "aligned"},
    {"method": "rmm", "pad": True},
    {"method": "rmm", "error": 0.3},
    {"method": "emr", "scope": "model"},
    {"method": "jd", "rank": 2},
    {"method": "jd", "diagonal": True, "max_iterations": 20},
    {"method": "lora_lego", "rank": 2},
    {"method": "truncate", "rank": 2},
    {"method": "truncate", "energy": 0.9},
    {"method": "truncate", "error": 0.2},
    {"method": "quantize", "bits": 4, "group_size": 4},
    {"method": "tsv", "rank": 2, "scale": 0.5},
    {"method": "iso_c", "scale": 0.5},
)
"""Fields that change what is computed or declared; every strategy's defaults come besides."""

REGISTRY = default_registry()
# With its defaults, lore iterates a thousand times, on every input of every check.
SHORTENED = {"lore": {"max_iterations": 20}}
DEFAULTS = [REGISTRY.build({"method": method, **SHORTENED.get(method, {})}) for method in REGISTRY]
MERGERS: list[Merger] = [*DEFAULTS, *(REGISTRY.build(recipe) for recipe in VARIANTS)]


@parametrize_with_checks(MERGERS)
def test_conformance(merger: Merger, check: Any) -> None:
    check(merger)


@pytest.mark.parametrize("merger", DEFAULTS, ids=lambda merger: merger.method)
def test_nothing_is_left_out_but_what_is_not_declared(merger: Merger) -> None:
    reasons = {check.name: check.not_applicable(merger) for check in all_checks()}
    for reason in reasons.values():
        assert reason is None or reason.startswith(("declares ", "lossless() returns None"))
    assert reasons["registry_builds_it"] is None
