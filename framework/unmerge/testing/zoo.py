"""A fake zoo on disk: adapter collections as the PEFT directories that readers read."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from unmerge.adapter import Adapter
from unmerge.arrays import DTYPES, to_numpy
from unmerge.errors import ConfigError
from unmerge.testing.collections import AdapterCollection
from unmerge_bundle.peft import write_directory

__all__ = ["write_zoo"]


def write_zoo(
    directory: str | os.PathLike[str],
    collection: AdapterCollection,
    *,
    dtype: str = "float32",
    base_model: str | None = "org/base",
) -> list[Path]:
    """Write every adapter as a PEFT directory named after it, and return them, sorted.

    `read_adapter` gives the collection's factors back, rounded once to `dtype`, with their
    scalings: ranks and alphas that differ between modules go into `rank_pattern` and
    `alpha_pattern`. Weights are not written: they belong to a merge.

    Args:
        directory: Where the directories are made; existing ones are refused.
        collection: The adapters; each needs at least one module.
        dtype: "float32", "float16" or "bfloat16".
        base_model: What the configurations name as the base model.

    Raises:
        ConfigError: `dtype` is none of those, an adapter has no module, or no alpha gives a
            scaling exactly.
        OutputExistsError: A directory exists already.
    """
    if dtype not in DTYPES:
        raise ConfigError(f'dtype "{dtype}" cannot be stored; use one of {", ".join(DTYPES)}')
    written = []
    for adapter in collection.as_adapters(base_model=base_model):
        if not adapter.modules:
            raise ConfigError(f'adapter "{adapter.name}" has no module to write')
        target = Path(directory) / adapter.name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_directory(
            target,
            config=json.dumps(_config(adapter), indent=2, sort_keys=True).encode(),
            factors={
                path: (to_numpy(f.A.to(DTYPES[dtype])), to_numpy(f.B.to(DTYPES[dtype])))
                for path, f in adapter.modules.items()
            },
            kinds={path: f.kind for path, f in adapter.modules.items()},
            verbatim={},
            beside={},
            card=f"# {adapter.name}\n\nRandom numbers, for tests: {collection.name}.\n",
            overwrite=False,
        )
        written.append(target)
    return written


def _config(adapter: Adapter) -> dict[str, Any]:
    ranks = {path: f.rank for path, f in adapter.modules.items()}
    alphas = {path: _alpha(f.scaling, f.rank, path) for path, f in adapter.modules.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base_model,
        "revision": adapter.revision,
        "task_type": None,
        "bias": "none",
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": sorted(adapter.modules),
        "rank_pattern": {_whole(path): r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {_whole(path): a for path, a in alphas.items() if a != alpha},
    }


def _whole(path: str) -> str:
    # Anchored, because PEFT lets a pattern match the end of a longer path too.
    return "^" + re.escape(path)


def _alpha(scaling: float, rank: int, path: str) -> float:
    """Return an alpha with `alpha / rank == scaling`, to the bit."""
    product = scaling * rank
    for alpha in (product, math.nextafter(product, math.inf), math.nextafter(product, -math.inf)):
        if alpha / rank == scaling:
            return alpha
    raise ConfigError(f"{path}: no alpha divided by the rank {rank} gives the scaling {scaling}")
