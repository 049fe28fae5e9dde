"""LinearMerger: rules that are weighted sums, exact in factors where they run on deltas."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch

from unmerge.elementwise import ElementwiseMerger
from unmerge.kernels.lowrank import concatenate
from unmerge.matrices import Block, PartWeights
from unmerge.merger import Capabilities, MergeContext, OutputSize
from unmerge.stack import FactorStack, ModuleShape
from unmerge_bundle.encodings import Encoding, FactorsEncoding

__all__ = ["LinearMerger"]


class LinearMerger(ElementwiseMerger, frozen=True, extra="forbid"):
    """`Σ c_i x_i` with coefficients that depend on the weights alone.

    In `delta` space the factors are concatenated, `B = [c_i s_i B_i]`, `A = [A_i]`: exact, of rank
    Σ r_i, no dense delta and no cross terms. In `factors` space, and inside a wrapper, the sum
    runs over entries.
    """

    @abstractmethod
    def coefficients(self, weights: PartWeights) -> list[float]:
        """Return c_i for each of `weights.values`.

        Raises:
            ConfigError: The weights leave them undefined.
        """

    @property
    def capabilities(self) -> Capabilities:
        """Exact in factors for any ranks, but for `factors` space, which needs one rank."""
        multiplied = self.space == "delta"
        return Capabilities(
            factor_exact=multiplied,
            mixed_ranks=multiplied,
            gauge_invariant=multiplied,
            sign_equivariant=True,
        )

    def combine(self, block: Block, state: Any) -> torch.Tensor:  # noqa: ARG002
        """Return the sum, adapter by adapter in the order of their names."""
        coefficients = self.coefficients(block.part_weights)
        total = coefficients[0] * block.values[0]
        for values, coefficient in zip(block.values[1:], coefficients[1:], strict=True):
            # Not add_(alpha=…): it fuses for some entries of a block and not for others.
            total += coefficient * values
        return total

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        """Concatenate the factors of every module, O((d_out + d_in) Σ r_i), or sum them up.

        Raises:
            ConfigError: The weights leave the coefficients undefined.
        """
        if self.space == "factors":
            return super().merge(stack, context)
        encodings: list[Encoding[torch.Tensor]] = []
        for module in stack:
            weights = PartWeights.of(module.path, module.adapters, self.space, context)
            A, B = concatenate(module.factors, self.coefficients(weights))
            encodings.append(FactorsEncoding(A=A, B=B))
        return encodings

    def check(self, shape: ModuleShape, context: MergeContext) -> None:
        """Refuse weights that leave the coefficients undefined, and mixed ranks in factor space."""
        super().check(shape, context)
        for part in ("A", "B") if self.space == "factors" else (self.space,):
            self.coefficients(PartWeights.of(shape.path, shape.adapters, part, context))

    def predict(self, shape: ModuleShape) -> OutputSize:
        """Return the elements of one adapter, of rank Σ r_i in `delta` space."""
        return (
            OutputSize(shared=shape.elements) if self.space == "delta" else super().predict(shape)
        )

    def workspace_bytes(self, shape: ModuleShape) -> int:
        """Return three float64 copies of all factors."""
        return 3 * 8 * shape.elements
