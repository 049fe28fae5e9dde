"""DARE: drop entries of each adapter at random, rescale the rest, then merge by another rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator

from unmerge import (
    Block,
    Blocks,
    Capabilities,
    ElementwiseMerger,
    InnerRule,
    MergeContext,
    Merger,
    ModuleShape,
)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What brings each adapter's norm back, by module and matrix; and the inner rule's facts."""

    rescale: Mapping[tuple[str, str], tuple[float, ...]]
    inner: Any


class Dare(ElementwiseMerger, frozen=True):
    """Drop entries at random, rescale the rest, merge by a rule f: `f({c_i · m_i ⊙ Δ_i})`.

    Whether an entry is kept is a function of seed, adapter name, module path and the entry's
    place alone: the same for any chunking, device, order of adapters or number of processes. At
    density 1 this is the inner rule itself; with `rescale="density"` and a linear inner rule its
    mean over seeds is the inner rule's result.

    `rescale`: survivors are divided by the density (the paper), brought to the L1 norm that the
    adapter's whole matrix had (mergekit's `rescale`), or left alone.

    `space` is the one that the inner rule runs in, so `inner` takes none. Weights are the inner
    rule's.

    Source: "Language Models are Super Mario", arXiv 2311.03099, section 3.2; its p is the drop
    rate, `1 − density`. PEFT and mergekit draw from the global generator, unseeded.
    """

    method: ClassVar[str] = "dare"
    # While a mask is drawn: the number, the index and the state of the generator, 64 bits each.
    bytes_per_value: ClassVar[int] = 48

    density: float = Field(default=0.1, gt=0, le=1, description="probability to keep an entry")
    rescale: Literal["density", "norm", "none"] = Field(
        default="density",
        description="survivors divided by the density, brought to the L1 norm, or left alone",
    )
    inner: InnerRule = Field(
        default={"method": "task_arithmetic"},
        validate_default=True,
        description="the rule that merges what is left; elementwise",
    )

    @field_validator("inner")
    @classmethod
    def _is_not_dropped_twice(cls, inner: ElementwiseMerger) -> ElementwiseMerger:
        if isinstance(inner, Dare):
            raise ValueError("dare inside dare would draw one mask twice; multiply the densities")
        return inner

    @property
    def capabilities(self) -> Capabilities:
        """As the inner rule's, but random and never exact in factors."""
        return replace(
            self._inner().capabilities,
            stochastic=self.density < 1,
            factor_exact=False,
            restores=None,
        )

    def check(self, shape: ModuleShape, context: MergeContext) -> None:
        """Refuse what the inner rule refuses."""
        self._inner().check(shape, context)

    def matrix_bytes(self, adapters: int, rows: int, cols: int) -> int:
        """Return what drawing masks needs or the inner rule, whichever is more."""
        masks = super().matrix_bytes(adapters, rows, cols)
        return max(masks, self.inner.matrix_bytes(adapters, rows, cols))

    def measure(self, blocks: Blocks, context: MergeContext) -> _Facts:
        """Return what rescales each adapter, and what the inner rule measures on what is left."""
        norms = self._norms(blocks) if self.rescale == "norm" and self.density < 1 else {}
        facts = _Facts(rescale=norms, inner=None)
        survivors = Blocks(lambda: (self._survivors(block, facts) for block in blocks))
        return replace(facts, inner=self._inner().measure(survivors, context))

    def combine(self, block: Block, state: _Facts) -> torch.Tensor:
        """Return the inner rule's rows on what is left."""
        return self._inner().combine(self._survivors(block, state), state.inner)

    def lossless(self) -> Merger | None:
        """Return it with everything kept and a lossless inner rule."""
        inner = self.inner.lossless()
        return None if inner is None else self.model_copy(update={"density": 1.0, "inner": inner})

    def _inner(self) -> ElementwiseMerger:
        return self.inner.model_copy(update={"space": self.space})

    def _kept(self, block: Block) -> torch.Tensor:
        return block.uniform("dare") < self.density

    def _survivors(self, block: Block, facts: _Facts) -> Block:
        if self.density == 1:
            return block
        values = block.values * self._kept(block)
        if self.rescale == "density":
            values /= self.density
        elif self.rescale == "norm":
            factors = facts.rescale[block.module, block.part]
            values *= torch.tensor(factors, dtype=values.dtype, device=values.device)[:, None, None]
        return block.replace(values)

    def _norms(self, blocks: Blocks) -> dict[tuple[str, str], tuple[float, ...]]:
        """Return, per matrix and adapter, `Σ|x| / Σ|m ⊙ x|`; 1 where nothing is left."""
        rows: dict[tuple[str, str], list[tuple[list[list[float]], list[list[float]]]]] = {}
        for block in blocks:
            magnitudes = block.values.abs().to(torch.float64)
            whole = magnitudes.sum(dim=-1)
            left = (magnitudes * self._kept(block)).sum(dim=-1)
            rows.setdefault((block.module, block.part), []).append((whole.tolist(), left.tolist()))
        return {
            matrix: tuple(
                # fsum rounds once: the sum does not depend on how the rows were grouped.
                _quotient(
                    math.fsum(x for whole, _ in parts for x in whole[n]),
                    math.fsum(x for _, left in parts for x in left[n]),
                )
                for n in range(len(parts[0][0]))
            )
            for matrix, parts in rows.items()
        }


def _quotient(whole: float, left: float) -> float:
    return whole / left if left > 0 else 1.0
