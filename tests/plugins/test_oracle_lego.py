"""LoRA-LEGO: the conditions that every answer of k-means meets, and the reweighting after it."""

from __future__ import annotations

import numpy as np
import pytest

import oracles
from oracles.compare import assert_close, build, dense_delta
from stacks import ALL_CASES, Case, collection, merge
from unmerge_bundle.encodings import FactorsEncoding

PLAIN = {"reweight_units": "none", "reweight_output": False}


def centroids(case: Case, path: str, **fields: object) -> oracles.Matrix:
    """Return the merged adapter's own units, unscaled: the centroids."""
    encoding = merge(build("lora_lego", **PLAIN, **fields), case)[path]
    assert isinstance(encoding, FactorsEncoding)
    return np.concatenate([encoding.B.double().numpy().T, encoding.A.double().numpy()], axis=1)


def counted(case: Case, path: str) -> tuple[oracles.Matrix, list[float]]:
    """Return the units of all adapters that weigh something, and each unit's weight."""
    parts = [part for part in case.parts(path) if part[3] != 0]
    weights = [abs(part[3]) for part in parts for _ in range(part[0].shape[0])]
    return oracles.units(parts), weights


@pytest.mark.parametrize("clusters", [1, 2, 4])
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_the_centroids_are_a_fixed_point_of_lloyds_iteration(case: Case, clusters: int) -> None:
    """Every centroid is the weighted mean of the units that are nearest to it."""
    for path in case.modules:
        units, weights = counted(case, path)
        got = centroids(case, path, rank=clusters)
        if len(np.unique(units, axis=0)) < len(units):
            continue  # of equal units some clusters may stay empty
        assert got.shape == (min(clusters, len(units)), units.shape[1])
        labels = oracles.nearest(units, got)
        wanted = oracles.means(units, labels, len(got), weights)
        assert set(labels) == set(range(len(got)))
        assert_close(got, wanted, 1e-9)


def test_no_random_start_is_much_better() -> None:
    for seed in (1, 2):
        case = collection((6, 6, 6), seed=seed)
        units = oracles.units(case.parts("layer.0"))
        got = oracles.inertia(units, centroids(case, "layer.0", rank=4))
        best = min(oracles.inertia(units, oracles.lloyd(units, 4, seed=s)) for s in range(20))
        assert got <= 1.15 * best


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_a_cluster_for_every_unit_is_the_sum(case: Case) -> None:
    """Concatenation is summation: with all units kept, merging adds the deltas up."""
    case = Case(case.name, case.modules)
    rank = max(sum(f.rank for f in having.values()) for having in case.modules.values())
    for path, encoding in merge(build("lora_lego", rank=rank, **PLAIN), case).items():
        units = oracles.units(case.parts(path))
        if len(np.unique(units, axis=0)) < len(units):
            continue
        assert_close(dense_delta(encoding), oracles.task_arithmetic(case.parts(path)), 1e-10)


@pytest.mark.parametrize("clusters", [2, 3, 5])
def test_the_dual_reweighting(clusters: int) -> None:
    for case in (collection((4, 4, 4)), collection((2, 5, 5))):
        parts = case.parts("layer.0")
        units = oracles.units(parts)
        plain = centroids(case, "layer.0", rank=clusters)
        labels = oracles.nearest(units, plain)
        rank = float(np.mean([part[0].shape[0] for part in parts]))
        wanted = oracles.reweighted(units, labels, plain, 14, rank)
        got = dense_delta(merge(build("lora_lego", rank=clusters), case)["layer.0"])
        assert_close(got, wanted, 1e-9)
