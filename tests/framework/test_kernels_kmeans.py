"""k-means against the two conditions of every local optimum, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracles
from unmerge.kernels.kmeans import Clusters, kmeans, weighted_means


def cluster(
    points: torch.Tensor,
    count: int,
    *,
    weights: torch.Tensor | None = None,
    key: int = 7,
    max_iterations: int = 100,
) -> Clusters:
    masses = torch.ones(points.shape[0]) if weights is None else weights
    return kmeans(points, masses, count, key=key, max_iterations=max_iterations)


def random_points(count: int, dimension: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 2, 5, 11])
def test_every_point_is_with_its_nearest_mean(seed: int, count: int) -> None:
    points = random_points(40, 6, seed=seed)
    result = cluster(points, count, key=seed)
    labels = result.labels.numpy()
    centroids = oracles.means(points.numpy(), labels, count)
    assert set(labels.tolist()) == set(range(count))
    np.testing.assert_array_equal(labels, oracles.nearest(points.numpy(), centroids))
    expected = oracles.inertia(points.numpy(), centroids) / float(points.square().sum())
    assert result.inertia == pytest.approx(expected, rel=1e-12)


def test_weights_pull_the_mean_by_hand() -> None:
    points = torch.tensor([[0.0], [4.0], [100.0]])
    weights = torch.tensor([3.0, 1.0, 1.0])
    result = cluster(points, 2, weights=weights)
    a, b, c = result.labels.tolist()
    assert a == b != c
    means = weighted_means(points, weights, result.labels, 2)
    assert means[a].tolist() == [1.0]
    assert means[c].tolist() == [100.0]
    # 3 · 1² + 1 · 3² over 3 · 0² + 4² + 100².
    assert result.inertia == pytest.approx(12 / 10016, rel=1e-15)


def test_a_weight_is_a_multiplicity() -> None:
    points = random_points(12, 3)
    weights = torch.tensor([1.0, 2.0, 3.0] * 4)
    result = cluster(points, 3, weights=weights)
    centroids = weighted_means(points, weights.double(), result.labels, 3)
    repeated = points.repeat_interleave(weights.long(), dim=0)
    labels = result.labels.repeat_interleave(weights.long())
    expected = oracles.means(repeated.numpy(), labels.numpy(), 3)
    np.testing.assert_allclose(centroids, expected, atol=1e-14)
    np.testing.assert_array_equal(
        labels.numpy(), oracles.nearest(repeated.numpy(), np.asarray(centroids.numpy()))
    )


@pytest.mark.parametrize("count", [4, 5, 100])
def test_as_many_clusters_as_points_are_the_points(count: int) -> None:
    result = cluster(torch.ones(4, 3), count)
    assert result.labels.tolist() == [0, 1, 2, 3]
    assert (result.iterations, result.inertia) == (0, 0.0)


def test_duplicates_stay_together_and_leave_clusters_empty() -> None:
    points = random_points(3, 5).repeat(4, 1)
    result = cluster(points, 5)
    assert result.labels.tolist() == result.labels[:3].tolist() * 4
    assert len(set(result.labels.tolist())) == 3
    assert result.inertia < 1e-30
    means = weighted_means(points, torch.ones(12, dtype=torch.float64), result.labels, 5)
    assert int((means == 0).all(1).sum()) == 2


def test_duplicates_up_to_rounding_are_duplicates() -> None:
    points = random_points(2, 5).repeat(6, 1)
    points = points * (1 + 1e-15 * random_points(12, 1, seed=3))
    result = cluster(points, 4)
    assert result.labels.tolist() == result.labels[:2].tolist() * 6


def test_points_without_extent_are_one_cluster() -> None:
    result = cluster(torch.zeros(5, 2), 2)
    assert result.labels.tolist() == [0] * 5
    assert result.inertia == 0.0


@pytest.mark.parametrize("key", range(20))
def test_clear_groups_are_found_from_every_start(key: int) -> None:
    # k-means++ draws distant points: with groups this far apart it never misses one.
    centres = torch.tensor([[0.0, 0], [1e6, 0], [0, 1e6], [1e6, 1e6]], dtype=torch.float64)
    points = centres.repeat(5, 1) + random_points(20, 2, seed=1)
    labels = cluster(points, 4, key=key).labels
    assert labels.tolist() == labels[:4].tolist() * 5
    assert len(set(labels.tolist())) == 4


def test_an_emptied_cluster_takes_the_costliest_point() -> None:
    from unmerge.kernels.kmeans import _fill_empty

    # Cluster 2 is empty; point 1 costs 2 · 3 = 6, point 3 costs 5.
    labels = torch.tensor([0, 0, 1, 1])
    distances = torch.tensor([[1.0, 9, 9], [3, 9, 9], [9, 1, 9], [9, 5, 9]])
    weights = torch.tensor([1.0, 2.0, 1.0, 1.0])
    assert _fill_empty(labels, distances, weights, 3, 0.0).tolist() == [0, 2, 1, 1]
    # Two are missing: then point 3, and no cluster is emptied for another.
    assert _fill_empty(labels, distances, weights, 4, 0.0).tolist() == [0, 2, 1, 3]
    assert _fill_empty(labels, distances, weights, 5, 0.0).tolist() == [0, 2, 1, 3]
    assert labels.tolist() == [0, 0, 1, 1]


def test_the_key_decides_the_start_and_nothing_else_does() -> None:
    points = random_points(30, 4)
    torch.manual_seed(1)
    first = cluster(points, 6, key=3)
    torch.manual_seed(2)
    assert torch.equal(cluster(points, 6, key=3).labels, first.labels)
    others = [cluster(points, 6, key=key).labels for key in range(4, 9)]
    assert any(not torch.equal(other, first.labels) for other in others)


def test_rounds_are_counted_and_bounded() -> None:
    points = random_points(60, 2, seed=5)
    free = cluster(points, 8)
    assert 2 <= free.iterations < 100
    cut = cluster(points, 8, max_iterations=1)
    assert cut.iterations == 1
    assert cut.inertia >= free.inertia


def test_it_is_as_good_as_lloyd_from_random_starts() -> None:
    points = random_points(50, 8, seed=9)
    total = float(points.square().sum())
    random = [
        oracles.inertia(points.numpy(), oracles.lloyd(points.numpy(), 6, seed=s)) / total
        for s in range(5)
    ]
    assert cluster(points, 6).inertia < max(random) * 1.05


def test_inputs_are_not_written_to() -> None:
    points, weights = random_points(20, 3), torch.ones(20)
    copies = points.clone(), weights.clone()
    cluster(points, 4, weights=weights)
    assert torch.equal(points, copies[0])
    assert torch.equal(weights, copies[1])
