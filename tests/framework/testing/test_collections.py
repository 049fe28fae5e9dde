"""Collections of adapters: deterministic, exact where they say so, and readable from disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from unmerge import AdapterStore, read_adapter
from unmerge.errors import ConfigError, IncompatibleAdaptersError
from unmerge.testing import (
    AdapterCollection,
    adapter_collections,
    random_collection,
    write_zoo,
)
from unmerge.testing.cases import edge_cases, exact, general, regauged
from unmerge.testing.collections import unimodular
from unmerge.testing.outcome import deltas
from unmerge_bundle import OutputExistsError
from unmerge_strategies import TaskArithmetic


def test_equal_arguments_give_equal_numbers_and_known_ones() -> None:
    one, two = (random_collection(values="integer", seed=1) for _ in range(2))
    for path, having in one.modules.items():
        for name, f in having.items():
            assert torch.equal(f.A, two.modules[path][name].A)
    # Written down once: a collection must not change from one release to the next unnoticed.
    assert one.modules["layers.0.q_proj"]["a"].A[0, :6].tolist() == [-1, 2, 2, -3, 2, -2]
    other = random_collection(values="integer", seed=2).modules["layers.0.q_proj"]["a"]
    assert not torch.equal(one.modules["layers.0.q_proj"]["a"].A, other.A)


def test_flat_values_are_gaussian() -> None:
    f = random_collection(ranks=(50,), d_in=400, d_out=5).modules["layers.0.q_proj"]["a"]
    assert abs(float(f.A.mean())) < 0.03
    assert abs(float(f.A.std()) - 1) < 0.03
    assert float((f.A.abs() < 0.6745).double().mean()) == pytest.approx(0.5, abs=0.02)


def test_a_decaying_spectrum_falls_by_ten() -> None:
    f = random_collection(ranks=(4,), d_in=500, d_out=500, values="decaying").modules[
        "layers.0.q_proj"
    ]["a"]
    sizes = torch.linalg.vector_norm(f.A, dim=1) * torch.linalg.vector_norm(f.B, dim=0)
    for k in range(3):
        assert math.log10(float(sizes[k] / sizes[k + 1])) == pytest.approx(1, abs=0.1)


def test_integer_deltas_are_exact_in_float32_whatever_the_gauge() -> None:
    collection = exact()
    other = regauged(collection)
    for path, having in collection.modules.items():
        for name, f in having.items():
            changed = other.modules[path][name]
            assert not torch.equal(changed.B, f.B)
            assert torch.equal(changed.B @ changed.A, f.B @ f.A)
            assert torch.equal((f.B @ f.A).double() * f.scaling, collection.delta(path, name))


@pytest.mark.parametrize("rank", [1, 2, 5, 9])
def test_a_unimodular_matrix_has_an_integer_inverse(rank: int) -> None:
    G, inverse = unimodular(("m", "a"), rank)
    assert torch.equal(G @ inverse, torch.eye(rank, dtype=torch.float64))
    assert torch.equal(G, G.round())


def test_stacks_hold_modules_of_one_shape_in_the_pipelines_order() -> None:
    collection = general()
    assert [s.path for s in collection.shapes] == [
        "layers.0.q_proj",
        "layers.1.q_proj",
        "layers.0.up_proj",
    ]
    assert [s.modules for s in collection.stacks()] == [
        ("layers.0.q_proj", "layers.1.q_proj"),
        ("layers.0.up_proj",),
    ]
    assert [s.modules for s in collection.stacks(size=1)] == [(s.path,) for s in collection.shapes]
    with pytest.raises(IncompatibleAdaptersError):
        collection.stack()


def test_a_lacking_adapter_has_a_zero_delta_and_keeps_its_weight() -> None:
    [collection] = [c for c in edge_cases() if c.name == "missing modules"]
    assert float(collection.delta("layers.0.q_proj", "a").abs().max()) == 0.0
    assert collection.context().weights == {"a": 2.0, "b": 0.5, "c": 3.0}
    assert "a" not in collection.modules["layers.0.q_proj"]


def test_wrong_counts_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 ranks, 2 scalings and 3 weights"):
        random_collection(scalings=(1.0, 2.0))
    with pytest.raises(ConfigError, match="27 ranks"):
        random_collection(ranks=(1,) * 27)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_zoo_reads_back_as_it_was_written(tmp_path: Path, dtype: str) -> None:
    for number, collection in enumerate((general(), *edge_cases())):
        directories = write_zoo(tmp_path / f"{number}-{dtype}", collection, dtype=dtype)
        assert [d.name for d in directories] == list(collection.adapters)
        for directory in directories:
            adapter = read_adapter(directory)
            assert adapter.base_model == "org/base"
            assert set(adapter.modules) == {
                path for path, having in collection.modules.items() if directory.name in having
            }
            for path, f in adapter.modules.items():
                source = collection.modules[path][directory.name]
                assert f.scaling == source.scaling
                assert f.A.dtype == getattr(torch, dtype)
                assert torch.equal(f.A, source.A.to(f.A.dtype))
                assert torch.equal(f.B, source.B.to(f.B.dtype))


def test_ranks_and_scalings_that_differ_by_module_are_written_as_patterns(tmp_path: Path) -> None:
    low = random_collection(ranks=(2,), paths=("m.q",), scalings=(0.5,))
    high = random_collection(ranks=(5,), paths=("m.q_proj",), scalings=(3.0,))
    [directory] = write_zoo(tmp_path, low.joined(high), base_model=None)
    adapter = read_adapter(directory)
    assert {p: (f.rank, f.scaling) for p, f in adapter.modules.items()} == {
        "m.q": (2, 0.5),
        "m.q_proj": (5, 3.0),
    }
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {r"^m\.q_proj": 5}
    assert config["base_model_name_or_path"] is None


def test_a_zoo_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    collection = random_collection()
    with pytest.raises(ConfigError, match='dtype "int8"'):
        write_zoo(tmp_path, collection, dtype="int8")
    lacking = collection.without("layers.0.q_proj", "b")
    with pytest.raises(ConfigError, match='adapter "b" has no module'):
        write_zoo(tmp_path / "lacking", lacking)
    write_zoo(tmp_path / "once", collection)
    with pytest.raises(OutputExistsError):
        write_zoo(tmp_path / "once", collection)


def test_a_collection_goes_into_a_store(tmp_path: Path) -> None:
    store = AdapterStore.create(tmp_path / "zoo", base_model="org/base")
    for adapter in general().as_adapters(base_model="org/base"):
        store.add(adapter, allow_duplicates=True)
    store.commit("a collection")
    assert sorted(store.names()) == ["a", "b", "c"]


@settings(max_examples=40, deadline=None)
@given(adapter_collections())
def test_drawn_collections_are_mergeable(collection: AdapterCollection) -> None:
    merger = TaskArithmetic()
    for stack in collection.stacks():
        encodings = merger.merge(stack, collection.context())
        for path, encoding in zip(stack.modules, encodings, strict=True):
            [merged] = deltas(encoding).values()
            expected = sum(
                (collection.weights[n] * collection.delta(path, n) for n in collection.adapters),
                start=torch.zeros(merged.shape, dtype=torch.float64),
            )
            assert torch.allclose(merged, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    adapter_collections(
        mixed_ranks=False, missing_modules=False, negative=False, values=("integer",)
    )
)
def test_what_is_ruled_out_is_not_drawn(collection: AdapterCollection) -> None:
    assert not collection.mixed_ranks
    assert min(collection.weights.values()) > 0
    for having in collection.modules.values():
        assert set(having) == set(collection.adapters)
        for f in having.values():
            assert f.scaling > 0
            assert torch.equal(f.A, f.A.round())
