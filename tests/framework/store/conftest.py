"""Adapters for the store's tests, and the one way they are compared: bit for bit."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import s3
from unmerge.adapter import Adapter, Factors
from unmerge.store import AdapterStore

PATHS = ("layers.0.q_proj", "layers.0.v_proj")


def _make(
    name: str,
    *,
    paths: tuple[str, ...] = PATHS,
    rank: int = 2,
    dtype: torch.dtype = torch.float32,
    d_out: int = 5,
    d_in: int = 4,
    scaling: float = 0.1,
    verbatim: Mapping[str, torch.Tensor] | None = None,
    base_model: str | None = None,
    revision: str | None = None,
    config: str = "",
) -> Adapter:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    modules = {
        path: Factors(
            torch.randn(rank, d_in, generator=generator).to(dtype),
            torch.randn(d_out, rank, generator=generator).to(dtype),
            scaling,
        )
        for path in paths
    }
    return Adapter(
        name,
        modules,
        verbatim=verbatim or {},
        base_model=base_model,
        revision=revision,
        config=config,
    )


def _bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), flat.numpy().tobytes()


def _content(adapter: Adapter) -> dict[str, object]:
    """Everything of an adapter as plain values: equal exactly when it is the same bit for bit."""
    return {
        **{
            path: (_bits(f.A), _bits(f.B), f.scaling.hex())
            for path, f in sorted(adapter.modules.items())
        },
        **{f"verbatim/{key}": _bits(t) for key, t in sorted(adapter.verbatim.items())},
        "rest": (
            adapter.name,
            adapter.config,
            adapter.format,
            adapter.base_model,
            adapter.revision,
            adapter.source,
        ),
    }


def _state(path: Path) -> tuple[str, tuple[str, ...]]:
    """What a refused write must leave as it was."""
    store = AdapterStore.open(path)
    return store.version, store.names()


def _chunk_files(path: Path) -> list[Path]:
    return sorted((path / "chunks").iterdir())


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """The helpers above; session scope, because Hypothesis refuses narrower ones."""
    return SimpleNamespace(
        make=_make, bits=_bits, content=_content, state=_state, chunk_files=_chunk_files
    )


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore.create(tmp_path / "zoo")


@pytest.fixture
def filled(store: AdapterStore) -> AdapterStore:
    """Three adapters: two alike, and one with another rank, dtype and one module less."""
    store.add(_make("sql"))
    store.add(_make("math", verbatim={"score.weight": torch.arange(6.0).reshape(2, 3)}))
    store.add(_make("chat", rank=3, dtype=torch.bfloat16, paths=PATHS[:1]))
    store.commit("first import")
    return store


@pytest.fixture(scope="session")
def s3_server() -> Iterator[s3.Server]:
    """A real S3 server, started once."""
    with s3.serve() as server:
        yield server


@pytest.fixture
def s3_address(s3_server: s3.Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An unused address on that server, which the environment leads to."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server.address()
