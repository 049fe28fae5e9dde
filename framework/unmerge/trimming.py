"""TrimmingMerger: elementwise rules that first keep each adapter's largest entries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field

from unmerge.elementwise import ElementwiseMerger
from unmerge.kernels.sparsify import COUNTERS, Cut, Entries, largest_magnitudes
from unmerge.matrices import Block, Blocks
from unmerge.merger import Capabilities, MergeContext
from unmerge.stack import ModuleShape

__all__ = ["Scope", "TrimmingMerger"]

Scope = Literal["module", "model"]


class TrimmingMerger(ElementwiseMerger, frozen=True, extra="forbid"):
    """Keeps, of each adapter's entries, exactly the `⌊density · count⌋` of largest magnitude.

    Of equal magnitudes at the cut the first are kept, in the order of module path and row-major
    index. `scope="module"` cuts every matrix on its own and needs one reading of the adapters;
    `scope="model"` cuts all matrices of all modules together, exactly, in a survey of two passes
    (up to four where magnitudes repeat at the cut). Memory does not grow with either.
    """

    density: float = Field(default=0.2, gt=0, le=1, description="fraction of entries kept")
    scope: Scope = Field(
        default="module",
        description="what one cut is made over: each matrix, or all matrices of all modules",
    )

    @property
    def capabilities(self) -> Capabilities:
        """Needs a survey for one cut over all modules."""
        return replace(super().capabilities, needs_survey=self.scope == "model")

    def matrix_bytes(self, adapters: int, rows: int, cols: int) -> int:
        """Return those of the blocks, and the counters that find the cuts."""
        counters = 0 if self.density == 1 else (adapters + 2) * 8 * COUNTERS
        return super().matrix_bytes(adapters, rows, cols) + counters

    def advise(self, shapes: Sequence[ModuleShape]) -> list[str]:
        """Say where the density keeps not a single entry."""
        if self.scope == "model" or self.space != "delta":
            return []
        empty = [s for s in shapes if int(self.density * s.d_out * s.d_in) == 0]
        if not empty:
            return []
        first = empty[0].path
        line = f"density {self.density:g} keeps no entry of {len(empty)} modules, such as {first}"
        return [f"{line}: their result is zero"]

    def measure(self, blocks: Blocks, context: MergeContext) -> Any:  # noqa: ARG002
        """Return the cut of every adapter, by name."""
        return self.cuts(blocks)

    def cuts(self, blocks: Blocks) -> dict[str, Cut]:
        """Return the cut of every adapter, by name."""

        def start_pass() -> Iterator[Entries]:
            for block in blocks:
                yield _key(block), block.start, dict(zip(block.adapters, block.values, strict=True))

        return largest_magnitudes(start_pass, self.density)

    def trimmed(self, block: Block, cuts: Mapping[str, Cut]) -> torch.Tensor:
        """Return the block's values with what is not kept set to 0, `(N, rows, cols)`."""
        if self.density == 1:
            return block.values
        kept = torch.empty_like(block.values)
        for n, name in enumerate(block.adapters):
            kept[n] = cuts[name].trim(_key(block), block.start, block.values[n])
        return kept


def _key(block: Block) -> str:
    # NUL sorts before every character of a path: by module first, then by matrix.
    return f"{block.module}\0{block.part}"
