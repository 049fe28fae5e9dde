"""MM-SVD in factor space against PEFT's `svd`, which decomposes the dense delta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tests.benchmarks.adapters import adapters, stacked
from tests.benchmarks.row import Row, cpu_seconds
from torch import nn

from unmerge import Factors, FactorsEncoding
from unmerge.kernels.dense import leading_svd
from unmerge.kernels.truncation import RankChoice
from unmerge_strategies import MmSvd

COUNT, RANK = 8, 16


class _OneLinear(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)


def benchmarks() -> list[Row]:
    """Merge 8 adapters of rank 16 on one module into one of rank 16, at two sizes.

    The reference is the dense float64 sum: at 2048² decomposed in full; at 4096², where that
    takes minutes, through its Gram matrix and a Rayleigh–Ritz step on the sum itself, which the
    tests hold against the full SVD. Neither uses the factors.
    """
    return [
        _benchmark(2048, _full_svd, target=100.0, repeats=3),
        _benchmark(4096, _leading_svd, target=500.0, repeats=1),
    ]


def _benchmark(
    size: int, best: Callable[[torch.Tensor], torch.Tensor], *, target: float, repeats: int
) -> Row:
    factors = adapters(size, COUNT, RANK)
    stack, context = stacked(factors)
    ours_s, [encoding] = cpu_seconds(lambda: MmSvd(rank=RANK).merge(stack, context), repeats=5)
    assert isinstance(encoding, FactorsEncoding)

    peer_s, theirs = cpu_seconds(_peer(size, factors), repeats=repeats)

    dense = torch.zeros(size, size, dtype=torch.float64)
    for f in factors.values():
        dense += f.B.double() @ f.A.double()
    reference = best(dense)
    # As a bundle stores them: rounded once to the dtype of the inputs.
    product = encoding.B.float().double() @ encoding.A.float().double()
    return Row(
        what=f"mm_svd, one {size} × {size} module, {COUNT} adapters of rank {RANK}",
        peer='PEFT add_weighted_adapter(combination_type="svd")',
        ours_s=ours_s,
        peer_s=peer_s,
        difference=float((product - reference).norm() / reference.norm()),
        peer_difference=float((theirs - reference).norm() / reference.norm()),
        target=target,
    )


def _peer(size: int, factors: dict[str, Factors]) -> Callable[[], torch.Tensor]:
    """Return PEFT's merge of the same adapters, which gives the merged delta."""
    names = list(factors)
    # Scaling 1, so that the numbers do not depend on how often a release of PEFT applies it.
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["linear"], bias="none")
    model = get_peft_model(_OneLinear(size), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    # PEFT's layers are typed as plain modules.
    base: Any = model.base_model
    layer: Any = base.model.linear
    with torch.no_grad():
        for name, f in factors.items():
            layer.lora_A[name].weight.copy_(f.A)
            layer.lora_B[name].weight.copy_(f.B)

    def merge() -> torch.Tensor:
        if "merged" in layer.lora_A:
            model.delete_adapter("merged")
        model.add_weighted_adapter(
            names, [1.0] * COUNT, "merged", combination_type="svd", svd_rank=RANK
        )
        merged: torch.Tensor = layer.lora_B["merged"].weight @ layer.lora_A["merged"].weight
        return merged.detach().double()

    return merge


def _full_svd(dense: torch.Tensor) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    best: torch.Tensor = (U[:, :RANK] * S[:RANK]) @ Vh[:RANK]
    return best


def _leading_svd(dense: torch.Tensor) -> torch.Tensor:
    svd = leading_svd(dense, RankChoice(rank=RANK)).svd
    return (svd.U * svd.S) @ svd.Vh
