"""EMR: one unified delta, and per adapter a mask and a rescaler that bring its own back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from unmerge import (
    Block,
    Capabilities,
    Encoding,
    FactorStack,
    MaskedDeltaEncoding,
    MergeContext,
    Merger,
    ModuleShape,
    OutputSize,
    Passes,
    ReversibleMerger,
    Scope,
    StackModule,
    module_matrices,
)
from unmerge.kernels import TILE_ROWS, elected_signs, pack_bits


class Emr(ReversibleMerger, frozen=True):
    """One delta τ for all; a mask and a rescaler bring each back, roughly: `λ_i · M_i ⊙ τ`.

    Elect: τ has the sign of `Σ_i Δ_i` and, per entry, the largest magnitude among the adapters of
    that sign. Mask: M_i lets an entry through where `Δ_i` has τ's sign. Rescale:
    `λ_i = Σ|Δ_i| / Σ|M_i ⊙ τ|`, over the module or over all of the adapter's modules (`scope`).

    A mask takes d_out · d_in / 8 bytes an adapter, and τ is dense: for adapters of low rank the
    result is usually much larger than the adapters, which `plan` says. Weights play no part.

    Source: "EMR-Merging: Tuning-Free High-Performance Model Merging", arXiv 2405.17461, section
    3.2: one rescaler a task, which is `scope="model"`. `"module"` restores each module's L1 norm
    and needs one reading of the adapters. The authors' code differs from its formulas: it takes a
    sum of 0 for negative, and adds up every tensor's mean magnitude instead of its sum.
    """

    method: ClassVar[str] = "emr"
    restores: ClassVar[Literal["factors", "delta"]] = "delta"

    scope: Scope = Field(
        default="module", description="what one rescaler is for: a module, or the whole adapter"
    )

    @property
    def capabilities(self) -> Capabilities:
        """Restores deltas, of any ranks, in any gauge; needs a survey for one rescaler a model."""
        return Capabilities(
            restores="delta",
            ignores_weights=True,
            mixed_ranks=True,
            gauge_invariant=True,
            needs_survey=self.scope == "model",
        )

    def survey(self, passes: Passes, context: MergeContext) -> dict[str, float] | None:
        """Return one rescaler per adapter, over all modules."""
        if self.scope == "module":
            return None
        sums: dict[str, list[tuple[float, float]]] = {name: [] for name in context.adapters}
        for stack in passes:
            for module in stack:
                for name, *norms in _norms(module, context):
                    sums[name].append((norms[0], norms[1]))
        return {name: _quotient(pairs) for name, pairs in sums.items()}

    def merge(self, stack: FactorStack, context: MergeContext) -> list[Encoding[torch.Tensor]]:
        """Elect, mask and rescale every module in row blocks. O(N d_out d_in) each."""
        return [self._encode(module, context) for module in stack]

    def predict(self, shape: ModuleShape) -> OutputSize:
        """Return one dense delta, and a bit per entry and adapter."""
        packed = len(shape.ranks) * shape.d_out * -(-shape.d_in // 8)
        return OutputSize(shared=shape.d_out * shape.d_in, packed_bytes=packed)

    def advise(self, shapes: Sequence[ModuleShape]) -> list[str]:
        """Say where a mask alone takes more bytes than its adapter's factors in float16."""
        worse = [s for s in shapes if s.d_out * s.d_in / 8 > 2 * s.elements / len(s.ranks)]
        if not worse:
            return []
        advice = (
            f"on {len(worse)} of {len(shapes)} modules a mask of one bit an entry takes more bytes "
            "than the adapter's factors in float16; rmm, truncate and quantize keep factors"
        )
        return [advice]

    def workspace_bytes(self, shape: ModuleShape) -> int:
        """Return a row block in work, the unified delta and the masks."""
        block = TILE_ROWS * len(shape.ranks) * shape.d_in
        packed = len(shape.ranks) * shape.d_out * -(-shape.d_in // 8)
        return 24 * block + 4 * shape.d_out * shape.d_in + packed

    def lossless(self) -> Merger:
        """Return itself: of one adapter everything passes, with a rescaler of 1."""
        return self

    def _encode(
        self, module: StackModule, context: MergeContext
    ) -> MaskedDeltaEncoding[torch.Tensor]:
        shape = module.shape
        first = module.factors[0].A
        unified = first.new_empty(shape.d_out, shape.d_in)
        packed = (len(module.adapters), shape.d_out, -(-shape.d_in // 8))
        masks = first.new_empty(packed, dtype=torch.uint8)
        sums: list[list[tuple[float, float]]] = [[] for _ in module.adapters]
        for block, rows, mask in _elected(module, context):
            these = slice(block.row, block.row + rows.shape[0])
            unified[these] = rows
            masks[:, these] = pack_bits(mask)
            for n, norms in enumerate(_block_norms(block, rows, mask)):
                sums[n].append(norms)
        if self.scope == "model":
            rescalers: Mapping[str, float] = context.state
            scalings = tuple(rescalers[name] for name in module.adapters)
        else:
            scalings = tuple(_quotient(pairs) for pairs in sums)
        return MaskedDeltaEncoding(
            names=module.adapters,
            scalings=scalings,
            unified=unified,
            masks=masks,
        )


def _elected(
    module: StackModule, context: MergeContext
) -> Iterator[tuple[Block, torch.Tensor, torch.Tensor]]:
    """Yield row blocks with the unified rows and the masks `(N, rows, cols)`.

    In a grid of its own, not that of the context: sums over a block must not depend on it.
    """
    [matrices] = module_matrices(module, "delta", context)
    for block in matrices.blocks(TILE_ROWS):
        signs = elected_signs(block.values)
        agreeing = (block.values * signs).clamp_(min=0)
        yield block, signs * agreeing.amax(dim=0), agreeing > 0


def _block_norms(
    block: Block, rows: torch.Tensor, masks: torch.Tensor
) -> Iterator[tuple[float, float]]:
    """Yield `Σ|Δ_i|` and `Σ|M_i ⊙ τ|` over a block, adapter by adapter, in float64."""
    magnitude = rows.abs().to(torch.float64)
    for values, mask in zip(block.values, masks, strict=True):
        whole = values.abs().sum(dtype=torch.float64)
        yield float(whole), float((magnitude * mask).sum())


def _norms(module: StackModule, context: MergeContext) -> Iterator[tuple[str, float, float]]:
    sums: list[list[tuple[float, float]]] = [[] for _ in module.adapters]
    for block, rows, mask in _elected(module, context):
        for n, norms in enumerate(_block_norms(block, rows, mask)):
            sums[n].append(norms)
    for name, pairs in zip(module.adapters, sums, strict=True):
        yield name, math.fsum(whole for whole, _ in pairs), math.fsum(left for _, left in pairs)


def _quotient(pairs: Sequence[tuple[float, float]]) -> float:
    """Return `Σ|Δ_i| / Σ|M_i ⊙ τ|`, 1 where nothing passes the mask."""
    # fsum rounds once, whatever the order in which modules came.
    left = math.fsum(left for _, left in pairs)
    return math.fsum(whole for whole, _ in pairs) / left if left > 0 else 1.0
