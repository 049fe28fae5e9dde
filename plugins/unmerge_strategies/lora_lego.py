"""LoRA-LEGO: all adapters' rank-one units, clustered; the centroids are the merged adapter."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field

from unmerge import (
    Capabilities,
    Encoding,
    Factors,
    FactorsEncoding,
    FactorStack,
    MergeContext,
    Merger,
    ModuleShape,
    OutputSize,
    StackModule,
)
from unmerge.errors import ConfigError, NonFiniteError
from unmerge.kernels.counter import stream_key
from unmerge.kernels.kmeans import kmeans, weighted_means
from unmerge.kernels.lowrank import orthonormal_core

# A centroid shorter than this, relative to its members, is their cancellation and has no direction.
_CANCELLED = 1e-12


class LoraLego(Merger, frozen=True):
    """k-means over the rank-one units of all adapters; k centroids make an adapter of rank k.

    A minimal semantic unit is a row of A with its column of B, as one vector of d_in + d_out
    entries; an adapter of rank r is a heap of r units whose order means nothing. The units of all
    adapters go into one pool, k-means groups the similar ones, and each centroid is a unit of the
    merged adapter. Averaging shortens vectors and another number of units changes the size of the
    sum; the paper's two reweightings undo both: every centroid gets the mean length of its
    members, and the result is multiplied with `√(r / k)`.

    The adapter's scaling enters the units. With `balance` both halves of a unit have the same
    length, so that the clusters do not depend on how a size is spread over A and B; a pair
    `(−a, −b)` is still another unit than `(a, b)`, and mixing units by `(B G, G⁻¹ A)` gives other
    clusters. Weights are relative, as for an average: a unit counts in its centroid with its
    adapter's |weight|, a negative weight flips the half that belongs to B, a zero one leaves the
    adapter out. An adapter that lacks a module has no units there. One adapter at rank r comes
    back as itself.

    Source: "Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes Through
    Rank-Wise Clustering" (arXiv 2409.16167, ICLR 2025), section 3. Deviations: `balance`, the
    scaling, weights, mixed ranks (r is then the mean rank) and the k-means++ start with keyed
    draws are ours; the length is the Euclidean norm, where a public re-implementation takes the
    largest entry (`reweight_units="peak"`) and clusters halves that are normalised each.
    """

    method: ClassVar[str] = "lora_lego"

    rank: int | None = Field(
        default=None,
        ge=1,
        description="k, clusters and rank; the largest rank among the adapters unless given",
    )
    balance: bool = Field(
        default=True, description="give both halves of a unit the same length before clustering"
    )
    reweight_units: Literal["norm", "peak", "none"] = Field(
        default="norm",
        description="give a centroid the mean norm, or mean largest entry, of its members",
    )
    reweight_output: bool = Field(
        default=True, description="multiply the result with √(r / k), r the adapters' rank"
    )
    max_iterations: int = Field(default=100, ge=1, description="most rounds of k-means")

    @property
    def capabilities(self) -> Capabilities:
        """Takes any ranks; the start of k-means is drawn; weights are relative."""
        return Capabilities(mixed_ranks=True, stochastic=True)

    def check(self, shape: ModuleShape, context: MergeContext) -> None:
        """Refuse a module whose adapters all have weight 0.

        Raises:
            ConfigError: They have.
        """
        if not any(context.weights_of(shape.adapters)):
            raise ConfigError(
                f"{shape.path}: all of {', '.join(shape.adapters)} have weight 0, so there is "
                "nothing to cluster; give one of them another weight"
            )

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        """Cluster the units of every module. O((d_out + d_in) R² + R² k) a round, R = Σ r_i.

        Raises:
            ConfigError: All adapters of a module have weight 0.
            NonFiniteError: A unit holds NaN or infinity.
        """
        for module in stack:
            self.check(module.shape, context)
        return [self._assemble(module, context) for module in stack]

    def predict(self, shape: ModuleShape) -> OutputSize:
        """Return the elements of an adapter of rank k, or of all units where they are fewer.

        The most there can be: adapters of weight 0 may leave fewer than k units.
        """
        rank = min(self._count(shape), sum(shape.ranks))
        return OutputSize(shared=rank * (shape.d_out + shape.d_in), at_most=True)

    def workspace_bytes(self, shape: ModuleShape) -> int:
        """Return float64 units, their reflectors and core, and the merged adapter."""
        total = sum(shape.ranks)
        return 8 * (4 * shape.elements + 4 * total * min(total, shape.d_out + shape.d_in))

    def lossless(self) -> LoraLego:
        """Return the strategy at the adapters' own rank: each unit is a cluster of its own."""
        return self.model_copy(update={"rank": None})

    def _count(self, shape: ModuleShape) -> int:
        return self.rank if self.rank is not None else max(shape.ranks)

    def _assemble(
        self, module: StackModule, context: MergeContext
    ) -> FactorsEncoding[torch.Tensor]:
        shape, weights = module.shape, context.weights_of(module.adapters)
        parts = [(f, w) for f, w in zip(module.factors, weights, strict=True) if w != 0]
        units = torch.cat([self._units(f, w) for f, w in parts])  # (R, d_in + d_out)
        if not bool(torch.isfinite(units).all()):
            raise NonFiniteError(f"{module.path}: a unit holds NaN or infinity; check the adapters")
        masses = torch.cat([units.new_full((f.rank,), abs(w)) for f, w in parts])
        # In an order of their own: that of an adapter's ranks must not decide where k-means starts.
        order = torch.linalg.vector_norm(units, dim=1).argsort(descending=True, stable=True)
        units, masses = units[order], masses[order]
        count = min(self._count(shape), units.shape[0])
        clusters = kmeans(
            # Coordinates in an orthonormal basis of the units: the same distances, R numbers each.
            orthonormal_core(units.T).core.T,
            masses,
            count,
            key=stream_key(context.seed, self.method, module.path),
            max_iterations=self.max_iterations,
        )
        centroids = weighted_means(units, masses, clusters.labels, count)
        centroids = self._reweighted(centroids, units, masses, clusters.labels)
        A, B = centroids[:, : shape.d_in], centroids[:, shape.d_in :].T
        if self.reweight_output:
            rank = sum(f.rank for f, _ in parts) / len(parts)
            used = int(clusters.labels.bincount().count_nonzero())
            B = B * math.sqrt(rank / used)
        return FactorsEncoding(
            A=A.contiguous(),
            B=B.contiguous(),
            facts={"inertia": clusters.inertia, "iterations": clusters.iterations},
        )

    def _units(self, factors: Factors, weight: float) -> torch.Tensor:
        """Return `(r, d_in + d_out)` float64: a row is √|s| a beside ±√|s| b."""
        root = math.sqrt(abs(factors.scaling))
        sign = math.copysign(1.0, factors.scaling) * math.copysign(1.0, weight)
        A = factors.A.to(torch.float64) * root
        B = factors.B.T.to(torch.float64) * (sign * root)
        if self.balance:
            lengths_A = torch.linalg.vector_norm(A, dim=1, keepdim=True)
            lengths_B = torch.linalg.vector_norm(B, dim=1, keepdim=True)
            # A unit with a zero half adds nothing to the delta: it becomes the zero vector.
            null = (lengths_A == 0) | (lengths_B == 0)
            ratio = torch.where(null, 1.0, lengths_B) / torch.where(null, 1.0, lengths_A)
            A = torch.where(null, 0.0, A * ratio.sqrt())
            B = torch.where(null, 0.0, B / ratio.sqrt())
        return torch.cat([A, B], dim=1)

    def _reweighted(
        self,
        centroids: torch.Tensor,
        units: torch.Tensor,
        masses: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """Return the centroids with the (weighted) mean length of their members."""
        if self.reweight_units == "none":
            return centroids
        order = 2 if self.reweight_units == "norm" else math.inf
        of_units = torch.linalg.vector_norm(units, order, dim=1, keepdim=True)
        target = weighted_means(of_units, masses, labels, centroids.shape[0])
        length = torch.linalg.vector_norm(centroids, order, dim=1, keepdim=True)
        directed = length > _CANCELLED * target
        factor = torch.where(directed, target, 1.0) / torch.where(directed, length, 1.0)
        return centroids * factor
