"""Restoring one adapter from a bundle against reading the bytes it needs and nothing else."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from tests.benchmarks.row import Row, cpu_seconds

import unmerge_bundle
from unmerge import (
    Adapter,
    AdapterStore,
    AffineBasisEncoding,
    Factors,
    FactorStack,
    MergeContext,
    MergePipeline,
)
from unmerge_strategies import Rmm

SIZE, COUNT, RANK, BASIS, MODULES = 512, 16, 16, 3, 12


def _adapters() -> list[Adapter]:
    generator = torch.Generator().manual_seed(0)
    return [
        Adapter(
            name=f"adapter-{n:02d}",
            modules={
                f"layer.{layer:02d}": Factors(
                    A=torch.randn(RANK, SIZE, generator=generator),
                    B=torch.randn(SIZE, RANK, generator=generator),
                    scaling=2.0,
                )
                for layer in range(MODULES)
            },
        )
        for n in range(COUNT)
    ]


def _expected_A(adapters: list[Adapter], path: str, name: str) -> torch.Tensor:
    names = [adapter.name for adapter in adapters]
    stack = FactorStack.build([(path, [(a.name, a.modules[path]) for a in adapters])], names)
    context = MergeContext(weights=dict.fromkeys(names, 1.0))
    [encoding] = Rmm(basis_size=BASIS).merge(stack, context)
    assert isinstance(encoding, AffineBasisEncoding)
    coefficients = encoding.coefficients_A[names.index(name)]
    A: torch.Tensor = encoding.mean_A + torch.einsum("pj,prj->rj", coefficients, encoding.basis_A)
    return A


def benchmarks() -> list[Row]:
    """Open a bundle of 16 adapters on 12 modules and restore one of them, pages cached."""
    adapters = _adapters()
    name, path = adapters[5].name, "layer.07"
    with tempfile.TemporaryDirectory() as folder:
        store = AdapterStore.create(Path(folder) / "zoo")
        for adapter in adapters:
            store.add(adapter)
        store.commit("benchmark")
        out = Path(folder) / "out.rmb"
        MergePipeline(store, Rmm(basis_size=BASIS), device="cpu", workers=1).run(out)

        ours_s, restored = cpu_seconds(lambda: unmerge_bundle.open(out).restore(name), repeats=5)
        generation = unmerge_bundle.open(out).generation
        [own] = [entry.blob for entry in generation.adapters if entry.name == name]
        files = [out / descriptor.file for descriptor in (*generation.shared, own)]
        peer_s, contents = cpu_seconds(lambda: [f.read_bytes() for f in files], repeats=5)
        got = np.asarray(restored.modules[path].A, dtype=np.float64)
    expected = _expected_A(adapters, path, name).numpy()
    megabytes = sum(map(len, contents)) / 1e6
    row = Row(
        what=f"restore one of {COUNT} adapters, {MODULES} modules of {SIZE} × {SIZE}, p = {BASIS}",
        peer=f"reading the same {megabytes:.1f} MB, unchecked",
        ours_s=ours_s,
        peer_s=peer_s,
        difference=float(np.linalg.norm(got - expected) / np.linalg.norm(expected)),
    )
    return [row]
