"""Small whole models on disk, as transformers saves them, for tests that read checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from unmerge.adapter import Factors

Tensors = Mapping[str, torch.Tensor]


def save_model(
    directory: Path,
    tensors: Tensors,
    *,
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
    stem: str = "model",
) -> Path:
    """Write `tensors` in as many files as `shards` says, with an index where there are several."""
    directory.mkdir(parents=True, exist_ok=True)
    document = {"model_type": "llama", **(config or {})}
    (directory / "config.json").write_text(json.dumps(document))
    stored = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    if shards == 1:
        save_file(stored, directory / f"{stem}.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(stored.items())[shard::shards])
        weight_map.update(dict.fromkeys(part, file))
        save_file(part, directory / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return directory


def gaussian(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Return float32 Gaussian entries."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def delta(factors: Factors) -> torch.Tensor:
    """Return `scaling · B @ A` in float64."""
    return factors.scaling * (factors.B.to(torch.float64) @ factors.A.to(torch.float64))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative Frobenius distance, in float64."""
    difference = found.to(torch.float64) - expected.to(torch.float64)
    return float(difference.norm() / expected.to(torch.float64).norm())
