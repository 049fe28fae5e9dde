"""Reversible Model Merging: a mean and a few basis adapters from which every adapter comes back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from unmerge import (
    AffineBasisEncoding,
    Capabilities,
    Encoding,
    Factors,
    FactorStack,
    MergeContext,
    Merger,
    ModuleShape,
    OutputSize,
    ReversibleMerger,
    StackModule,
)
from unmerge.errors import ConfigError, IncompatibleAdaptersError
from unmerge.kernels import AffineBasis, affine_basis, aligned, balanced, factor_positions

_WAYS = ("basis_size", "storage", "error")


class Rmm(ReversibleMerger, frozen=True):
    """A mean and p basis adapters for all, best per row of B and column of A; all come back.

    At every task-vector position the N adapters are points in r dimensions. RMM keeps their mean,
    the top p right singular vectors W of the centred points, and each adapter's coefficients
    C = X W; an adapter comes back as `C_i Wᵀ + μ`. In factor space this is the optimal affine
    subspace (Theorem 1): the squared factor error is the tail of the squared singular values and
    never grows with p; the error of the delta usually falls too, but need not. At
    p = min(N − 1, r) nothing is lost but rounding, and a larger `basis_size` is cut to that.

    Elements kept, relative to the adapters: `(p (r + N) + r) / (r N)`; from 1 on it saves nothing.
    p is given, or follows per module from a `storage` budget or a bound on the `error`.

    Weights play no part: every adapter is restored as it was. As in the paper the result depends
    on the gauge: `(B G, G⁻¹ A)` is the same adapter and has another RMM. `gauge` fixes one first;
    what comes back is then in that gauge, the same delta with other factors, and errors of factors
    are distances between gauges: the delta's error counts.

    Every module's `facts` are `basis_size`, the p it got, and `factor_error`, the relative
    Frobenius error of the factors that were compressed, all adapters together.

    Source: "Towards Reversible Model Merging for Low-rank Weights", section 5 and Algorithm 1 (its
    A is our B and the other way round). Deviations: the mean has its 1/N, as in the text, where
    line 7 of the algorithm prints the sum; `storage`, `error`, `gauge` and `pad` are ours. The
    paper says nothing about `alpha / r`: raw factors are compressed and scalings kept apart,
    unless `fold_scaling` or a gauge puts them in.
    """

    method: ClassVar[str] = "rmm"

    basis_size: int | None = Field(
        default=2, ge=1, description="p, the number of basis adapters kept; one of three ways"
    )
    storage: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="instead of p: the largest fraction of the adapters' elements to keep",
    )
    error: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="instead of p: the largest relative error of a module's factors",
    )
    gauge: Literal["none", "balanced", "aligned"] = Field(
        default="none",
        description="how each adapter is factored first: as it is (paper), by its SVD, or rotated "
        "towards the others from there",
    )
    pad: bool = Field(
        default=False, description="fill unequal ranks up with zeros instead of refusing them"
    )
    fold_scaling: bool = Field(
        default=False,
        description="compress scaling · B instead of B; matters where scalings differ; always so "
        "with a gauge",
    )

    @model_validator(mode="before")
    @classmethod
    def _other_ways_replace_the_default(cls, data: Any) -> Any:
        """Let `storage` or `error` alone stand for "and no basis_size"."""
        if not isinstance(data, Mapping) or "basis_size" in data:
            return data
        given = any(data.get(way) is not None for way in _WAYS[1:])
        return {**data, "basis_size": None} if given else data

    @model_validator(mode="after")
    def _one_way(self) -> Rmm:
        given = [way for way in _WAYS if getattr(self, way) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give one of basis_size, storage and error, not {' and '.join(given) or 'none'}"
            )
        return self

    @property
    def capabilities(self) -> Capabilities:
        """Restores factors, whatever the weights; with a gauge it depends on the deltas alone."""
        return Capabilities(
            restores="factors",
            ignores_weights=True,
            mixed_ranks=self.pad,
            gauge_invariant=self.gauge != "none",
        )

    def lossless(self) -> Merger:
        """Return this strategy with as large a basis as is of use."""
        return self.model_copy(update={"basis_size": 2**31, "storage": None, "error": None})

    def check(self, shape: ModuleShape, context: MergeContext) -> None:  # noqa: ARG002
        """Refuse mixed ranks unless they are padded, and a budget that no basis keeps.

        Raises:
            IncompatibleAdaptersError: The adapters' ranks differ on this module.
            ConfigError: `storage` is below what a basis of one adapter takes.
        """
        if len(set(shape.ranks)) > 1 and not self.pad:
            ranks = ", ".join(str(rank) for rank in sorted(set(shape.ranks)))
            raise IncompatibleAdaptersError(
                f"{shape.path}: ranks {ranks} differ; rmm needs one rank per module: set "
                "pad=true to fill them up with zeros, or bring the adapters to one rank first"
            )
        if self.storage is not None and self._size(shape) is None:
            least = min(1, _useful(shape))
            needed = math.ceil(1e4 * _output(shape, least).total / shape.elements) / 1e4
            raise ConfigError(
                f"{shape.path}: storage {self.storage:g} is too little: {len(shape.ranks)} "
                f"adapters of rank {max(shape.ranks)} take {needed:g} at basis_size {least}; "
                "allow that much, or keep these adapters as they are"
            )

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        """Fit every module's positions. O((d_out + d_in) N r min(N, r)) each.

        Raises:
            IncompatibleAdaptersError, ConfigError: As `check`.
            NonFiniteError: Products of the factors exceed float64.
        """
        modules = list(stack)
        for module in modules:
            self.check(module.shape, context)
        return [self._fit(module) for module in modules]

    def predict(self, shape: ModuleShape) -> OutputSize | None:
        """Return p r + r shared elements and N p coefficients a position, d_out + d_in times.

        `None` with `error`, where p depends on the adapters.
        """
        size = self._size(shape)
        return None if size is None else _output(shape, size)

    def advise(self, shapes: Sequence[ModuleShape]) -> list[str]:
        """Say where `basis_size` is cut, which p would save, and what a gauge does to factors."""
        lines = []
        if self.gauge != "none":
            lines.append(
                f"gauge {self.gauge}: restored adapters have the deltas of the originals, as near "
                "as the basis allows, but other A and B"
            )
        if self.basis_size is None:
            return lines
        cut = [s for s in shapes if _useful(s) < self.basis_size]
        if cut:
            lines.append(
                f"basis_size {self.basis_size} is cut to {max(map(_useful, cut))} or less on "
                f"{len(cut)} modules: min(adapters - 1, rank) already restores them exactly"
            )
        kept = sum(s.elements for s in shapes)

        def needed(basis_size: int) -> int:
            return sum(_output(s, min(basis_size, _useful(s))).total for s in shapes)

        if needed(self.basis_size) >= kept:
            saving = [p for p in range(1, max(map(_useful, shapes), default=0)) if needed(p) < kept]
            lines.append(
                f"basis_size {max(saving)} or less would be smaller than the adapters"
                if saving
                else "no basis_size would be smaller than these adapters; keep them as they are"
            )
        return lines

    def workspace_bytes(self, shape: ModuleShape) -> int:
        """Return float64 points and results, two more copies with a gauge, and a block's work."""
        rank, count = max(shape.ranks), len(shape.ranks)
        positions = shape.d_out + shape.d_in
        size = _useful(shape) if self.error is not None else self._size(shape) or 0
        copies = 4 if self.gauge != "none" else 1
        results = rank + size * (rank + count)
        gram = min(rank, count) ** 2
        block = min(positions + 64, 2048) * (4 * count * rank + 5 * gram + 12 * size * rank)
        return 8 * (positions * (copies * count * rank + results) + block)

    def _size(self, shape: ModuleShape) -> int | None:
        """Return p for a module; `None` where it depends on the tensors, or no p fits."""
        useful = _useful(shape)
        if self.basis_size is not None:
            return min(self.basis_size, useful)
        if self.storage is None:
            return None
        # Never 0 where 1 is of use: a mean alone is no reversible merge.
        sizes = range(min(1, useful), useful + 1)
        budget = self.storage * shape.elements
        return max((p for p in sizes if _output(shape, p).total <= budget), default=None)

    def _fit(self, module: StackModule) -> AffineBasisEncoding[torch.Tensor]:
        folded = self.fold_scaling or self.gauge != "none"
        fit = self._affine_basis(self._points(module), module.shape)
        split = module.factors[0].d_in
        return AffineBasisEncoding(
            names=module.adapters,
            scalings=tuple(1.0 if folded else f.scaling for f in module.factors),
            mean_A=fit.mean[:split].T,
            basis_A=fit.basis[:split].permute(1, 2, 0),  # (p, r, d_in)
            coefficients_A=fit.coefficients[:split].permute(1, 2, 0),  # (N, p, d_in)
            mean_B=fit.mean[split:],
            basis_B=fit.basis[split:].permute(1, 0, 2),  # (p, d_out, r)
            coefficients_B=fit.coefficients[split:].permute(1, 2, 0),  # (N, p, d_out)
            facts={
                "basis_size": float(fit.basis.shape[1]),
                "factor_error": math.sqrt(fit.residual / fit.energy) if fit.energy else 0.0,
            },
        )

    def _points(self, module: StackModule) -> torch.Tensor:
        rank = max(f.rank for f in module.factors)
        factors: Sequence[Factors] = module.factors
        if self.gauge != "none":
            factors = [balanced(f) for f in factors]
        elif self.fold_scaling:
            factors = [Factors(f.A, f.B.to(torch.float64) * f.scaling, 1.0) for f in factors]
        if self.gauge == "aligned":
            factors = aligned(factors, rank)
        return factor_positions(factors, rank)

    def _affine_basis(self, points: torch.Tensor, shape: ModuleShape) -> AffineBasis:
        if self.error is None:
            return affine_basis(points, self._size(shape) or 0)
        largest = _useful(shape)
        full = affine_basis(points, largest)
        # Bases are nested: what direction k adds is what its coefficients hold, for every p ≥ k.
        captured = full.coefficients.square().sum(dim=(0, 1)).tolist()
        allowed = self.error**2 * full.energy
        size = largest
        while size > 1 and math.fsum(captured[size - 1 :]) <= allowed:
            size -= 1
        return full if size == largest else affine_basis(points, size)


def _useful(shape: ModuleShape) -> int:
    """Return min(N − 1, r): the basis that restores everything."""
    return min(len(shape.ranks) - 1, max(shape.ranks))


def _output(shape: ModuleShape, size: int) -> OutputSize:
    """Return what a basis of `size` takes; ranks are those of the padded adapters."""
    positions, rank = shape.d_out + shape.d_in, max(shape.ranks)
    return OutputSize(
        shared=positions * (size * rank + rank), per_adapter=positions * len(shape.ranks) * size
    )
