"""A small restorable bundle and a small merged one, with everything that goes into them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from unmerge_bundle import (
    AdapterRecord,
    AffineBasisEncoding,
    BundleSize,
    BundleWriter,
    DeltaEncoding,
    Encoding,
    FactorsEncoding,
    GenerationInfo,
    ModuleErrors,
    RecordedModule,
    Source,
    Strategy,
    reconstruct,
    relative_errors,
)
from unmerge_bundle.arrays import FLOAT_DTYPES, FloatDtype

Array = npt.NDArray[Any]

CREATED = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)
SHAPES = {"layers.0.q_proj": (6, 4), "layers.1.v_proj": (3, 5)}
RANK = 2


def digest_of(name: str) -> str:
    return f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"


@dataclass
class Zoo:
    """What a bundle is written from."""

    info: GenerationInfo
    encodings: dict[str, Encoding[Array]]
    records: dict[str, AdapterRecord] = field(default_factory=dict)
    verbatim: dict[str, dict[str, Array]] = field(default_factory=dict)
    originals: dict[str, dict[str, tuple[Array, Array]]] = field(default_factory=dict)
    errors: dict[str, dict[str, ModuleErrors]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)  # "linear" where nothing is said

    def write(self, path: Path, *, overwrite: bool = False, **limits: int) -> BundleSize:
        with BundleWriter(path, info=self.info, overwrite=overwrite, **limits) as writer:
            for name, record in self.records.items():
                writer.add_adapter(record, self.verbatim.get(name, {}))
            for module, encoding in self.encodings.items():
                writer.add_module(
                    module,
                    encoding,
                    kind=self.kinds.get(module, "linear"),
                    errors=self.errors.get(module),
                )
            return writer.finish(message="first", created=CREATED)


def make_info(names: tuple[str, ...], dtype: FloatDtype, **changes: Any) -> GenerationInfo:
    fields: dict[str, Any] = {
        "strategy": Strategy(method="rmm", version=1, distribution="unmerge"),
        "recipe": {"merger": {"method": "rmm", "basis_size": 2}},
        "store_dtype": dtype,
        "libraries": {"torch": "2.13.0"},
        "sources": tuple(Source(name=n, digest=digest_of(n), weight=1.0) for n in names),
    }
    return GenerationInfo.model_validate({**fields, **changes})


def build_zoo(
    *,
    names: tuple[str, ...] = ("code", "math", "sql"),
    dtype: FloatDtype = "float32",
    source_dtype: FloatDtype | None = None,
    scaling: float = 2.0,
    source_scaling: float = 2.0,
    lacking: Mapping[str, str] | None = None,
    config: str = "",
    verbatim: Mapping[str, Array] | None = None,
    seed: int = 0,
) -> Zoo:
    rng = np.random.default_rng(seed)
    lacking = {"sql": "layers.1.v_proj"} if lacking is None else lacking
    source_dtype = source_dtype or dtype
    zoo = Zoo(
        info=make_info(names, dtype, absent={n: (p,) for n, p in lacking.items()}), encodings={}
    )

    def draw(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32).astype(FLOAT_DTYPES[dtype])

    for path, (d_out, d_in) in SHAPES.items():
        present = tuple(n for n in names if lacking.get(n) != path)
        encoding = AffineBasisEncoding[Array](
            names=present,
            scalings=(scaling,) * len(present),
            mean_A=draw(RANK, d_in),
            basis_A=draw(2, RANK, d_in),
            coefficients_A=draw(len(present), 2, d_in),
            mean_B=draw(d_out, RANK),
            basis_B=draw(2, d_out, RANK),
            coefficients_B=draw(len(present), 2, d_out),
        )
        zoo.encodings[path] = encoding
        zoo.errors[path] = {}
        for name in present:
            restored = reconstruct(encoding, name, dtype=source_dtype)
            A, B = (
                (f + 0.01 * rng.standard_normal(f.shape)).astype(f.dtype)
                for f in (f.astype(np.float32) for f in restored)
            )
            zoo.originals.setdefault(name, {})[path] = (A, B)
            zoo.errors[path][name] = relative_errors(
                (A, B), restored, source_scaling=source_scaling, scaling=scaling
            )
    for name in names:
        zoo.records[name] = AdapterRecord(
            name=name,
            format="peft",
            config=config,
            base_model="tiny/base",
            revision="main",
            digest=digest_of(name),
            modules=tuple(
                RecordedModule(
                    path=path, rank=RANK, source_scaling=source_scaling, dtype=source_dtype
                )
                for path in SHAPES
                if lacking.get(name) != path
            ),
        )
    zoo.verbatim["math"] = dict(
        {
            "base_model.model.head.weight": np.arange(6, dtype=np.int64).reshape(2, 3),
            "base_model.model.head.bias": np.array([1.5, -0.0], dtype=ml_dtypes.bfloat16),
            "scalar": np.array(True),
        }
        if verbatim is None
        else verbatim
    )
    return zoo


def build_merged(*, dtype: FloatDtype = "float32", dense: bool = False, seed: int = 0) -> Zoo:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32).astype(FLOAT_DTYPES[dtype])

    encodings: dict[str, Encoding[Array]] = {}
    for index, (path, (d_out, d_in)) in enumerate(SHAPES.items()):
        if dense and index == 1:
            encodings[path] = DeltaEncoding(delta=draw(d_out, d_in))
        else:
            rank = 2 + index
            encodings[path] = FactorsEncoding(A=draw(rank, d_in), B=draw(d_out, rank))
    info = make_info(
        ("code", "math"),
        dtype,
        base_model={"id": "tiny/base", "revision": "main"},
        unmerged={"math": ("base_model.model.head.weight",)},
    )
    return Zoo(info=info, encodings=encodings)


@pytest.fixture
def make_zoo() -> Callable[..., Zoo]:
    return build_zoo


@pytest.fixture
def make_merged() -> Callable[..., Zoo]:
    return build_merged


@pytest.fixture
def bundle_path(tmp_path: Path) -> Path:
    """A restorable bundle of three adapters, one of them with tensors kept verbatim."""
    path = tmp_path / "zoo.rmb"
    build_zoo().write(path)
    return path


@pytest.fixture
def adapter_blob(bundle_path: Path) -> Callable[[str], Path]:
    """Path of an adapter's blob."""
    import unmerge_bundle

    def find(name: str) -> Path:
        bundle = unmerge_bundle.open(bundle_path)
        (entry,) = [a for a in bundle.generation.adapters if a.name == name]
        return bundle_path / entry.blob.file

    return find


@pytest.fixture
def reseal(bundle_path: Path) -> Callable[[Callable[[dict[str, Any]], None]], None]:
    """Change the generation document of `bundle_path` and make every digest fit again."""
    import json

    from unmerge_bundle.jsontext import canonical_bytes
    from unmerge_bundle.model import sha256

    def change(edit: Callable[[dict[str, Any]], None]) -> None:
        manifest = json.loads((bundle_path / "bundle.json").read_bytes())
        descriptor = manifest["generations"][-1]["document"]
        old = bundle_path / "blobs" / f"{descriptor['digest'][7:]}.json"
        document = json.loads(old.read_bytes())
        edit(document)
        data = canonical_bytes(document)
        old.unlink()
        descriptor.update(digest=sha256(data), size=len(data))
        (bundle_path / "blobs" / f"{descriptor['digest'][7:]}.json").write_bytes(data)
        del manifest["digest"]
        sealed = {**manifest, "digest": sha256(canonical_bytes(manifest))}
        (bundle_path / "bundle.json").write_bytes(canonical_bytes(sealed))

    return change
