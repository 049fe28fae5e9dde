"""What comes out of a store is what went in, bit for bit, whatever the order and the mixture."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from unmerge.adapter import Adapter, Factors
from unmerge.errors import AdapterNotInStoreError, ModuleNotInAdapterError
from unmerge.store import AdapterStore

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _special(dtype: torch.dtype) -> torch.Tensor:
    """Zeros of both signs, the smallest and largest denormal, the extremes: (2, 5)."""
    info = torch.finfo(dtype)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    denormals = torch.tensor([1, 2], dtype=integer).view(dtype)
    largest_denormal = torch.tensor([info.smallest_normal], dtype=dtype).view(integer) - 1
    others = torch.tensor([0.0, -0.0, info.max, info.min, info.smallest_normal, 1.0, -1.0])
    return torch.cat([others.to(dtype), denormals, largest_denormal.view(dtype)]).reshape(2, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_come_back_bit_for_bit(
    store: AdapterStore, kit: SimpleNamespace, dtype: torch.dtype
) -> None:
    A = _special(dtype)
    adapter = Adapter("a", {"m": Factors(A, A.T, 1 / 3)}, verbatim={"v": A}, config='{"r": 2}\n')
    store.add(adapter)
    store.commit("")

    again = AdapterStore.open(store.address)
    assert kit.content(again.read_adapter("a")) == kit.content(adapter)
    [(name, factors)] = store.read_module("m")
    assert (name, kit.bits(factors.A), kit.bits(factors.B)) == ("a", kit.bits(A), kit.bits(A.T))
    assert factors.scaling == 1 / 3


def test_all_zero_tensors_and_negative_zeros_stay_apart(
    store: AdapterStore, kit: SimpleNamespace
) -> None:
    zeros = Adapter("a", {"m": Factors(torch.zeros(2, 3), torch.zeros(4, 2), 1.0)})
    negative = Adapter("b", {"m": Factors(-torch.zeros(2, 3), -torch.zeros(4, 2), -0.0)})
    store.add(zeros)
    store.commit("")
    store.add(negative)
    store.commit("")
    assert kit.content(store.read_adapter("a")) == kit.content(zeros)
    assert kit.content(store.read_adapter("b")) == kit.content(negative)


def test_verbatim_tensors_of_any_shape_and_dtype(store: AdapterStore, kit: SimpleNamespace) -> None:
    verbatim = {
        "scalar": torch.tensor(7),
        "scalar/bool": torch.tensor(True),
        "empty": torch.empty(0, 5),
        "empty.last": torch.empty(3, 0, dtype=torch.int64),
        "embeddings.position_ids": torch.arange(9).reshape(1, 9),
        "mask": torch.tensor([True, False, True]),
        "wide": torch.full((2, 2), torch.pi, dtype=torch.float64),
        "small": torch.tensor([[-128, 127]], dtype=torch.int8),
        "bytes": torch.tensor([0, 255], dtype=torch.uint8),
        "half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
        ".": torch.ones(1),
        "zarr.json": torch.ones(2),
    }
    adapter = kit.make("a", verbatim=verbatim)
    store.add(adapter)
    store.commit("")
    assert kit.content(store.read_adapter("a")) == kit.content(adapter)
    read = store.read_verbatim("a")
    assert list(read) == sorted(verbatim)
    assert {k: kit.bits(t) for k, t in read.items()} == {
        k: kit.bits(t) for k, t in verbatim.items()
    }
    assert store.info("a").verbatim["empty.last"] == ("int64", (3, 0))


@pytest.mark.parametrize(
    "path",
    ["c", "a.c", "c.0", "__init__", "zarr.json", "x.zarr.json", "%2E", "é", "a b", "m" * 300],
)
def test_any_legal_module_path_works(store: AdapterStore, kit: SimpleNamespace, path: str) -> None:
    adapter = kit.make("zarr.json", paths=(path, "other"))
    store.add(adapter)
    store.commit("")
    again = AdapterStore.open(store.address)
    assert kit.content(again.read_adapter("zarr.json")) == kit.content(adapter)
    assert set(again.modules()) == {path, "other"}


def test_mixed_ranks_dtypes_and_targets(filled: AdapterStore, kit: SimpleNamespace) -> None:
    assert filled.names() == ("chat", "math", "sql")
    assert filled.modules() == {"layers.0.q_proj": (5, 4), "layers.0.v_proj": (5, 4)}
    read = dict(filled.read_module("layers.0.q_proj"))
    assert list(read) == ["chat", "math", "sql"]
    assert [f.rank for f in read.values()] == [3, 2, 2]
    assert read["chat"].A.dtype == torch.bfloat16
    assert read["sql"].A.dtype == torch.float32
    assert [name for name, _ in filled.read_module("layers.0.v_proj")] == ["math", "sql"]
    assert [n for n, _ in filled.read_module("layers.0.q_proj", ["sql", "chat"])] == ["chat", "sql"]
    original = kit.make("sql").modules["layers.0.q_proj"]
    assert kit.bits(read["sql"].B) == kit.bits(original.B)


def test_factors_of_two_dtypes(store: AdapterStore, kit: SimpleNamespace) -> None:
    module = Factors(torch.randn(2, 3).half(), torch.randn(4, 2).bfloat16(), 1.0)
    adapter = Adapter("a", {"m": module})
    store.add(adapter)
    store.commit("")
    assert kit.content(store.read_adapter("a")) == kit.content(adapter)
    assert store.info("a").modules["m"].dtype == "float32"
    assert store.info("a").nbytes == 2 * (2 * 3 + 4 * 2)


def test_info_says_what_is_stored(filled: AdapterStore, kit: SimpleNamespace) -> None:
    info = filled.info("math")
    assert info.digest == filled.read_adapter("math").digest()
    assert info.added.endswith("+00:00")
    module = info.modules["layers.0.q_proj"]
    assert (module.rank, module.d_out, module.d_in) == (2, 5, 4)
    assert (module.dtype, module.scaling) == ("float32", 0.1)
    assert info.verbatim == {"score.weight": ("float32", (2, 3))}
    assert info.elements == 2 * 2 * (5 + 4) + 6
    assert (info.nbytes, info.verbatim_nbytes) == (4 * info.elements, 24)
    assert [i.name for i in filled.list()] == list(filled.names())
    assert filled.info("chat").nbytes == 2 * 3 * (5 + 4)


def test_config_text_is_kept_byte_for_byte(store: AdapterStore, kit: SimpleNamespace) -> None:
    text = '\ufeff{\r\n\t"lora_alpha": 1e-7,\x00 "é": "\U0001f999"}\n\n'
    store.add(kit.make("a", config=text))
    store.commit("")
    again = AdapterStore.open(store.address)
    assert again.read_adapter("a").config == again.read_config("a") == text


def test_non_contiguous_and_gradient_tensors(store: AdapterStore, kit: SimpleNamespace) -> None:
    A = torch.randn(6, 4)[::2].requires_grad_()
    B = torch.randn(3, 5).T
    store.add(Adapter("a", {"m": Factors(A, B, 1.0)}))
    store.commit("")
    [(_, factors)] = store.read_module("m")
    assert torch.equal(factors.A, A)
    assert torch.equal(factors.B, B)
    assert factors.A.is_contiguous()
    assert not factors.A.requires_grad


def test_changing_a_tensor_after_add_changes_nothing(
    store: AdapterStore, kit: SimpleNamespace
) -> None:
    adapter = kit.make("a")
    expected = kit.content(adapter)
    store.add(adapter)
    adapter.modules["layers.0.q_proj"].A.fill_(torch.nan)
    store.commit("")
    assert kit.content(store.read_adapter("a")) == expected


def test_order_of_adding_does_not_matter(tmp_path: Path, kit: SimpleNamespace) -> None:
    names = [f"a{i}" for i in range(20)]
    one, many = AdapterStore.create(tmp_path / "one"), AdapterStore.create(tmp_path / "many")
    for name in names:
        one.add(kit.make(name))
    one.commit("all at once")
    for part in (names[13:], names[:2], names[2:13]):
        for name in reversed(part):
            many.add(kit.make(name))
        many.commit("in parts")
    for path in one.modules():
        left, right = one.read_module(path), many.read_module(path)
        assert [n for n, _ in left] == [n for n, _ in right] == sorted(names)
        for (name, a), (_, b) in zip(left, right, strict=True):
            original = kit.make(name).modules[path]
            assert kit.bits(a.A) == kit.bits(b.A) == kit.bits(original.A)
            assert kit.bits(a.B) == kit.bits(b.B) == kit.bits(original.B)
    scattered = many.read_module("layers.0.q_proj", ["a19", "a3", "a7"])
    assert [n for n, _ in scattered] == ["a19", "a3", "a7"]
    for name, factors in scattered:
        assert kit.bits(factors.A) == kit.bits(kit.make(name).modules["layers.0.q_proj"].A)


def test_unknown_names_and_paths(filled: AdapterStore) -> None:
    with pytest.raises(AdapterNotInStoreError, match='"poem"; it has chat, math, sql'):
        filled.read_adapter("poem")
    with pytest.raises(AdapterNotInStoreError, match="poem"):
        filled.read_module("layers.0.q_proj", ["sql", "poem"])
    with pytest.raises(ModuleNotInAdapterError, match=r"layers\.9"):
        filled.read_module("layers.9.q_proj")
    with pytest.raises(ModuleNotInAdapterError, match=r"layers\.0\.v_proj"):
        filled.read_module("layers.0.v_proj", ["chat"])


def test_threads_read_at_once(filled: AdapterStore, kit: SimpleNamespace) -> None:
    store = AdapterStore.open(filled.address)  # fresh: nothing cached yet
    expected = {name: kit.content(filled.read_adapter(name)) for name in filled.names()}
    with ThreadPoolExecutor(4) as pool:
        adapters = list(pool.map(store.read_adapter, list(expected) * 4))
        modules = list(pool.map(store.read_module, ["layers.0.q_proj"] * 4))
    assert all(kit.content(a) == expected[a.name] for a in adapters)
    assert all([n for n, _ in m] == ["chat", "math", "sql"] for m in modules)


@st.composite
def _adapters(draw: st.DrawFn) -> list[Adapter]:
    shapes = draw(
        st.dictionaries(
            st.sampled_from(["q", "k.0", "layers.1.c", "é"]),
            st.tuples(st.integers(1, 4), st.integers(1, 4)),
            min_size=1,
        )
    )
    names = draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True))
    return [_adapter(draw, name, shapes) for name in names]


def _adapter(draw: st.DrawFn, name: str, shapes: dict[str, tuple[int, int]]) -> Adapter:
    paths = draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, unique=True))
    modules = {}
    for path in paths:
        d_out, d_in = shapes[path]
        rank = draw(st.integers(1, 3))
        dtype = draw(st.sampled_from(DTYPES))
        scaling = draw(st.floats(allow_nan=False, allow_infinity=False))
        A, B = draw(_tensor((rank, d_in), dtype)), draw(_tensor((d_out, rank), dtype))
        modules[path] = Factors(A, B, scaling)
    config = draw(st.text(max_size=20))
    return Adapter(name, modules, config=config)


def _tensor(shape: tuple[int, int], dtype: torch.dtype) -> st.SearchStrategy[torch.Tensor]:
    """Any finite bit pattern."""
    integer = np.int32 if dtype == torch.float32 else np.int16

    def finite(bits: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> torch.Tensor:
        tensor = torch.from_numpy(bits).view(dtype)
        return torch.where(torch.isfinite(tensor), tensor, torch.zeros((), dtype=dtype))

    return hnp.arrays(integer, shape).map(finite)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(adapters=_adapters(), split=st.integers(0, 4))
def test_any_set_of_adapters_comes_back(
    kit: SimpleNamespace, adapters: list[Adapter], split: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = AdapterStore.create(Path(folder) / "zoo")
        for part in (adapters[:split], adapters[split:]):
            for adapter in part:
                store.add(adapter, allow_duplicates=True)
            if part:
                store.commit("part")
        again = AdapterStore.open(store.address)
        for adapter in adapters:
            assert kit.content(again.read_adapter(adapter.name)) == kit.content(adapter)
        for path in again.modules():
            for name, factors in again.read_module(path):
                [original] = [a.modules[path] for a in adapters if a.name == name]
                assert kit.bits(factors.A) == kit.bits(original.A)
                assert kit.bits(factors.B) == kit.bits(original.B)
