"""Small adapters and base models that every test can build, save and hand to PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from unmerge.adapter import Adapter, Factors

PREFIX = "base_model.model."

MODULES: Mapping[str, tuple[int, int]] = {
    "layers.0.attn.q_proj": (12, 12),
    "layers.0.attn.v_proj": (8, 12),
    "layers.0.mlp.up": (20, 12),
    "layers.1.attn.q_proj": (12, 12),
    "layers.1.attn.v_proj": (8, 12),
    "layers.1.mlp.up": (20, 12),
}
"""Module paths of `TinyModel` with their `(d_out, d_in)`, two of every shape."""


def peft_config(
    *,
    rank: int = 4,
    alpha: float = 8,
    targets: list[str] | None = None,
    base_model: str | None = "org/base",
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what PEFT 0.21 writes to `adapter_config.json`, with `changes` made to it."""
    config: dict[str, Any] = {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "kasa_config": None,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "monteclora_config": None,
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": targets,
        "target_parameters": None,
        "task_type": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
        "velora_config": None,
    }
    return {**config, **(changes or {})}


def make_adapter(
    name: str,
    *,
    seed: int,
    modules: Mapping[str, tuple[int, int]] = MODULES,
    rank: int = 4,
    alpha: float = 8,
    dtype: torch.dtype = torch.float32,
    rslora: bool = False,
    ranks: Mapping[str, int] | None = None,
    verbatim: Mapping[str, torch.Tensor] | None = None,
    base_model: str | None = "org/base",
) -> Adapter:
    """Return an adapter with Gaussian A and B (neither zero), as `read_peft` would return it.

    Args:
        name: The adapter's name.
        seed: Equal seeds give equal tensors.
        modules: `(d_out, d_in)` by module path.
        rank: Rank of every module that `ranks` does not name.
        alpha: Alpha of every module.
        dtype: Dtype of every factor.
        rslora: Whether alpha is divided by the root of the rank.
        ranks: Ranks of single modules, by path.
        verbatim: Further tensors by their full key, such as `base_model.model.head.weight`; their
            modules become `modules_to_save`.
        base_model: Id of the base model.
    """
    generator = torch.Generator().manual_seed(seed)
    ranks = dict(ranks or {})
    factors = {}
    for path, (d_out, d_in) in sorted(modules.items()):
        r = ranks.get(path, rank)
        factors[path] = Factors(
            A=torch.randn(r, d_in, generator=generator).to(dtype),
            B=torch.randn(d_out, r, generator=generator).to(dtype),
            scaling=alpha / r**0.5 if rslora else alpha / r,
        )
    saved = sorted({key.removeprefix(PREFIX).rpartition(".")[0] for key in verbatim or {}})
    config = peft_config(
        rank=rank,
        alpha=alpha,
        targets=sorted(modules),
        base_model=base_model,
        changes={
            "use_rslora": rslora,
            # Anchored, because PEFT lets a pattern match the end of a longer path too.
            "rank_pattern": {"^" + path.replace(".", r"\."): r for path, r in ranks.items()},
            "modules_to_save": saved or None,
        },
    )
    return Adapter(
        name=name,
        modules=factors,
        verbatim=dict(sorted((verbatim or {}).items())),
        config=json.dumps(config, indent=2, sort_keys=True),
        base_model=base_model,
    )


def random_collection(
    n: int,
    *,
    seed: int = 0,
    modules: Mapping[str, tuple[int, int]] = MODULES,
    rank: int = 4,
    alpha: float = 8,
    dtype: torch.dtype = torch.float32,
) -> list[Adapter]:
    """Return `n` adapters of one shape, named adapter-00, adapter-01, …, with different tensors."""
    return [
        make_adapter(
            f"adapter-{i:02d}",
            seed=1000 * seed + i,
            modules=modules,
            rank=rank,
            alpha=alpha,
            dtype=dtype,
        )
        for i in range(n)
    ]


def peft_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors under the keys PEFT gives them."""
    tensors = dict(adapter.verbatim)
    for path, factors in adapter.modules.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = factors.A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = factors.B
    return tensors


def write_peft_directory(adapter: Adapter, directory: Path) -> Path:
    """Write what PEFT's `save_pretrained` would, and return `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_bytes(adapter.config.encode())
    tensors = {key: tensor.contiguous() for key, tensor in peft_tensors(adapter).items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


class TinyModel(nn.Module):
    """A base model of a few thousand weights whose `MODULES` PEFT can adapt.

    Args:
        conv1d: Build the layers from GPT-2's `Conv1D`, which stores its weight transposed.
    """

    def __init__(self, *, conv1d: bool = False, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList([_Block(conv1d) for _ in range(2)])
            self.norm = nn.LayerNorm(12)
            self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(batch, 12)` to `(batch, 3)`."""
        for block in self.layers:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class _Attention(nn.Module):
    def __init__(self, conv1d: bool) -> None:
        super().__init__()
        self.q_proj = _linear(12, 12, conv1d)
        self.v_proj = _linear(12, 8, conv1d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate: torch.Tensor = self.v_proj(x).mean(-1, keepdim=True)
        return gate * self.q_proj(x)  # type: ignore[no-any-return]


class _Mlp(nn.Module):
    def __init__(self, conv1d: bool) -> None:
        super().__init__()
        self.up = _linear(12, 20, conv1d)
        self.down = nn.Linear(20, 12, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, conv1d: bool) -> None:
        super().__init__()
        self.attn = _Attention(conv1d)
        self.mlp = _Mlp(conv1d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attn(x) + self.mlp(x)  # type: ignore[no-any-return]


def _linear(d_in: int, d_out: int, conv1d: bool) -> nn.Module:
    if conv1d:
        from transformers.pytorch_utils import Conv1D  # slow to import, and few tests want it

        layer: nn.Module = Conv1D(d_out, d_in)  # type: ignore[no-untyped-call]
        return layer
    return nn.Linear(d_in, d_out)
