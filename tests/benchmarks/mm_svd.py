"""MM-SVD in factor space against PEFT's `svd`, which decomposes the dense delta."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tests.benchmarks.row import Row, cpu_seconds
from torch import nn

from unmerge import Factors, FactorsEncoding, FactorStack, MergeContext
from unmerge_strategies import MmSvd

SIZE, COUNT, RANK = 2048, 8, 16


class _OneLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE, bias=False)


def benchmark() -> Row:
    """Merge 8 adapters of rank 16 on one 2048 × 2048 module into one of rank 16."""
    generator = torch.Generator().manual_seed(0)
    names = [f"adapter{n}" for n in range(COUNT)]
    factors = {
        name: Factors(
            A=torch.randn(RANK, SIZE, generator=generator) / SIZE**0.5,
            B=torch.randn(SIZE, RANK, generator=generator) / SIZE**0.5,
            scaling=1.0,
        )
        for name in names
    }

    stack = FactorStack.build([("linear", list(factors.items()))], names)
    context = MergeContext(weights=dict.fromkeys(names, 1.0))
    ours_s, [encoding] = cpu_seconds(lambda: MmSvd(rank=RANK).merge(stack, context))
    assert isinstance(encoding, FactorsEncoding)

    # Scaling 1: PEFT applies the scaling twice on this path, which would change its numbers.
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["linear"], bias="none")
    model = get_peft_model(_OneLinear(), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    # PEFT's layers are typed as plain modules.
    base: Any = model.base_model
    layer: Any = base.model.linear
    with torch.no_grad():
        for name, f in factors.items():
            layer.lora_A[name].weight.copy_(f.A)
            layer.lora_B[name].weight.copy_(f.B)

    def peer() -> None:
        if "merged" in layer.lora_A:
            model.delete_adapter("merged")
        model.add_weighted_adapter(
            names, [1.0] * COUNT, "merged", combination_type="svd", svd_rank=RANK
        )

    peer_s, _ = cpu_seconds(peer)
    theirs = (layer.lora_B["merged"].weight @ layer.lora_A["merged"].weight).detach().double()

    dense = sum(f.B.double() @ f.A.double() for f in factors.values())
    U, S, Vt = np.linalg.svd(torch.as_tensor(dense).numpy(), full_matrices=False)
    best = torch.from_numpy((U[:, :RANK] * S[:RANK]) @ Vt[:RANK])
    # As a bundle stores them: rounded once to the dtype of the inputs.
    product = encoding.B.float().double() @ encoding.A.float().double()
    return Row(
        what=f"mm_svd, one {SIZE} × {SIZE} module, {COUNT} adapters of rank {RANK}",
        peer='PEFT add_weighted_adapter(combination_type="svd")',
        ours_s=ours_s,
        peer_s=peer_s,
        difference=float((product - best).norm() / best.norm()),
        peer_difference=float((theirs - best).norm() / best.norm()),
        target=100.0,
    )
