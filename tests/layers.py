"""A base model with a layer of every kind that PEFT can adapt, for tests of how weights change."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


class Layers(nn.Module):
    """One layer of every kind; what is compared are weights, so nothing runs through them."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.tokens = nn.Embedding(11, 6)
            self.rows = nn.Embedding(7, 4)
            self.line = nn.Conv1d(6, 5, 3)
            self.square = nn.Conv2d(4, 5, 3)
            self.oblong = nn.Conv2d(3, 4, (2, 3), stride=2, padding=1)
            self.point = nn.Conv2d(5, 7, 1)
            self.volume = nn.Conv3d(2, 3, (1, 2, 3))
            self.out = nn.Linear(7, 3)


KINDS: Mapping[str, str] = {
    "line": "conv1d:3",
    "oblong": "conv2d:2x3",
    "out": "linear",
    "point": "conv2d:1x1",
    "square": "conv2d:3x3",
    "tokens": "embedding",
    "volume": "conv3d:1x2x3",
}
"""Module paths of `Layers` with their kinds; `rows` is for tokens that are trained as they are."""
