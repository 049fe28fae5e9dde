"""Boolean masks as bits: eight columns a byte, the first in the least significant bit."""

from __future__ import annotations

import torch


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Return a bool tensor `(…, columns)` as `(…, ceil(columns / 8))` uint8.

    Bit `j % 8`, counted from the least significant, of byte `j // 8` is column j; bits beyond the
    last column are 0.
    """
    missing = -mask.shape[-1] % 8
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, missing))
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=mask.device)
    octets = padded.reshape(*padded.shape[:-1], padded.shape[-1] // 8, 8)
    packed: torch.Tensor = (octets * weights).sum(dim=-1, dtype=torch.uint8)
    return packed


def unpack_bits(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Return the bool tensor `(…, columns)` that `pack_bits` packed."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> bits) & 1).flatten(-2)[..., :columns].to(torch.bool)
