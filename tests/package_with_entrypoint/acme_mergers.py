"""A strategy from outside: everything a plugin needs is in the public names of `unmerge`."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from unmerge import Block, Capabilities, ElementwiseMerger, Merger, hookimpl


class Midrange(ElementwiseMerger, frozen=True):
    """The middle between the smallest and the largest adapter, entry by entry."""

    method: ClassVar[str] = "acme.midrange"

    scale: float = Field(default=1.0, allow_inf_nan=False, description="applied to the result")

    @property
    def capabilities(self) -> Capabilities:
        """Takes adapters of different ranks, in delta space."""
        return Capabilities(mixed_ranks=self.space == "delta")

    def combine(self, block: Block, state: None) -> torch.Tensor:
        """Return `scale · (min + max) / 2` over the adapters."""
        low, high = block.values.aminmax(dim=0)
        return self.scale * (low + high) / 2


@hookimpl
def unmerge_mergers() -> list[type[Merger]]:
    """Return the package's strategies."""
    return [Midrange]
