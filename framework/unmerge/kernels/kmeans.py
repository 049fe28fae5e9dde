"""Weighted k-means of a few hundred points, deterministic: no call order, no device, no ties left.

Lloyd's iteration from a k-means++ start whose draws come from the counter, so that the same points
under the same key give the same clusters anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unmerge.kernels.counter import counter_uniform

# Squared distances below this fraction of the largest squared norm count as none: duplicates.
_SAME = 1e-24


@dataclass(frozen=True, slots=True)
class Clusters:
    """A partition of points.

    Attributes:
        labels: `(n,)` int64, the cluster of every point, 0 … k − 1. A cluster is empty only where
            there are fewer distinct points than clusters.
        iterations: Rounds of assignment and averaging; 0 where nothing had to be chosen.
        inertia: Weighted sum of squared distances to the centroids, relative to that of the
            squared norms: 0 where every point is its centroid.
    """

    labels: torch.Tensor
    iterations: int
    inertia: float


def kmeans(
    points: torch.Tensor, weights: torch.Tensor, count: int, *, key: int, max_iterations: int
) -> Clusters:
    """Return a partition of `points` into `count` clusters that no single reassignment improves.

    Args:
        points: `(n, d)`.
        weights: `(n,)`, > 0: how much each point counts in its centroid and in the inertia.
        count: Clusters k, ≥ 1; where k ≥ n every point is a cluster of its own, in order.
        key: Of the stream that the start is drawn from.
        max_iterations: Most rounds, ≥ 1; Lloyd's iteration ends by itself, as a rule far earlier.

    Numerics: float64; distances are sums of squared differences, without the cancellation of
        `‖x‖² − 2xc + ‖c‖²`. The start draws each next centroid with probability proportional to
        weight times squared distance to the nearest one drawn (k-means++). A point as near to
        several centroids goes to the first. An emptied cluster takes the point that costs most
        where it is, the first of several. O(n k d) a round.
    Source: Lloyd, "Least squares quantization in PCM" (1982); Arthur and Vassilvitskii,
        "k-means++" (2007), both with weights.
    """
    total = points.shape[0]
    if count >= total:
        return Clusters(torch.arange(total, device=points.device), iterations=0, inertia=0.0)
    wide, masses = points.to(torch.float64), weights.to(torch.float64)
    norm = float((masses * wide.square().sum(1)).sum())
    smallest = _SAME * float(wide.square().sum(1).max())
    centroids = wide[_start(wide, masses, count, key, smallest)]
    labels = torch.full((total,), -1, device=points.device)
    iterations = 0
    while iterations < max_iterations:
        iterations += 1
        distances = _squared_distances(wide, centroids)
        assigned = _fill_empty(_nearest(distances, smallest), distances, masses, count, smallest)
        if torch.equal(assigned, labels):
            break
        labels = assigned
        centroids = weighted_means(wide, masses, labels, count)
    lost = float((masses * (wide - centroids[labels]).square().sum(1)).sum())
    return Clusters(labels, iterations=iterations, inertia=lost / norm if norm > 0 else 0.0)


def weighted_means(
    points: torch.Tensor, weights: torch.Tensor, labels: torch.Tensor, count: int
) -> torch.Tensor:
    """Return the weighted mean of every cluster's points, `(count, d)`; zero for an empty one."""
    means = points.new_zeros(count, points.shape[1])
    for cluster in range(count):
        members = labels == cluster
        if bool(members.any()):
            masses = weights[members]
            means[cluster] = (masses / masses.sum()) @ points[members]
    return means


def _start(
    points: torch.Tensor, weights: torch.Tensor, count: int, key: int, smallest: float
) -> torch.Tensor:
    """Return the indices of `count` distinct points, drawn by k-means++."""
    draws = counter_uniform(key, torch.arange(count, device=points.device))
    chosen: list[int] = []
    nearest = torch.ones_like(weights)
    for draw in draws:
        mass = weights * nearest
        if chosen:
            mass = torch.where(nearest > smallest, mass, 0.0)
            # Points drawn already, and duplicates of them, are drawn again only where none is left.
            mass[chosen] = 0.0
            if not bool(mass.any()):
                mass = torch.ones_like(weights)
                mass[chosen] = 0.0
        heights = mass.cumsum(0)
        # The last index of positive mass bounds the search: rounding may put a draw above it.
        last = int(mass.nonzero()[-1])
        index = min(int(torch.searchsorted(heights, draw * heights[-1], right=True)), last)
        chosen.append(index)
        to_new = (points - points[index]).square().sum(1)
        nearest = to_new if len(chosen) == 1 else torch.minimum(nearest, to_new)
    return torch.tensor(chosen, device=points.device)


def _squared_distances(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return `(n, k)`."""
    return torch.stack([(points - c).square().sum(1) for c in centroids], dim=1)


def _nearest(distances: torch.Tensor, smallest: float) -> torch.Tensor:
    """Return the first centroid as near as the nearest: rounding decides between none."""
    least = distances.min(dim=1, keepdim=True).values
    return (distances <= least + smallest).to(torch.uint8).argmax(dim=1)


def _fill_empty(
    labels: torch.Tensor,
    distances: torch.Tensor,
    weights: torch.Tensor,
    count: int,
    smallest: float,
) -> torch.Tensor:
    """Return labels in which every emptied cluster has taken the costliest point of another."""
    labels = labels.clone()
    sizes = labels.bincount(minlength=count)
    own = distances.gather(1, labels[:, None])[:, 0]
    for cluster in range(count):
        if sizes[cluster] > 0:
            continue
        movable = (sizes[labels] > 1) & (own > smallest)
        if not bool(movable.any()):
            break
        point = int(torch.where(movable, weights * own, -1.0).argmax())
        sizes[labels[point]] -= 1
        sizes[cluster] = 1
        labels[point], own[point] = cluster, 0.0
    return labels
