"""Exact selection of the largest magnitudes against sorting, whatever the stream looks like."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmerge.kernels.sparsify import Cut, Entries, largest_magnitudes

Values = Mapping[str, Mapping[str, torch.Tensor]]
"""Tensors by matrix key and name."""

DENSITIES = (0.001, 0.05, 0.2, 1 / 3, 0.5, 0.77, 0.999, 1.0)
DTYPES = (torch.float32, torch.float64)


def stream(
    values: Values, *, chunk: int = 1000, keys: Iterable[str] | None = None
) -> Callable[[], Iterator[Entries]]:
    """Return passes over values, `chunk` entries at a time, matrices in the order of `keys`."""

    def start() -> Iterator[Entries]:
        for key in keys or values:
            length = next(iter(values[key].values())).numel()
            for first in range(0, length, chunk):
                yield (
                    key,
                    first,
                    {n: v.reshape(-1)[first : first + chunk] for n, v in values[key].items()},
                )

    return start


def kept(cut: Cut, values: Values, name: str, *, chunk: int = 1000) -> dict[tuple[str, int], float]:
    """Return what the cut keeps of one name, zeros left out, by key and index."""
    found = {}
    for key, first, having in stream(values, chunk=chunk)():
        if name in having:
            mask = cut.keep(key, first, having[name])
            assert mask.dtype == torch.bool
            trimmed = cut.trim(key, first, having[name])
            assert torch.equal(trimmed, torch.where(mask, having[name], 0.0))
            for place in mask.nonzero()[:, 0].tolist():
                if float(having[name][place]) != 0:
                    found[key, first + place] = float(having[name][place])
    return found


def sorted_out(values: Values, name: str, density: float) -> dict[tuple[str, int], float]:
    """Return the same by sorting: magnitude falling, then key, then index; zeros left out."""
    entries = [
        (-abs(value), key, index, value)
        for key in values
        if name in values[key]
        for index, value in enumerate(values[key][name].reshape(-1).tolist())
    ]
    chosen = sorted(entries)[: int(density * len(entries))]
    return {(key, index): value for _, key, index, value in chosen if value != 0}


def check(values: Values, density: float, *, chunk: int = 7, backwards: bool = True) -> None:
    keys = sorted(values, reverse=backwards)
    cuts = largest_magnitudes(stream(values, chunk=chunk, keys=keys), density)
    names = {name for having in values.values() for name in having}
    assert set(cuts) == names
    for name in names:
        for cut_chunk in (1, chunk, 1000):
            got = kept(cuts[name], values, name, chunk=cut_chunk)
            assert got == sorted_out(values, name, density)


def gaussian(*sizes: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", DENSITIES)
def test_it_keeps_what_sorting_keeps(density: float, dtype: torch.dtype) -> None:
    check(
        {"m": {"a": gaussian(300, dtype=dtype), "b": gaussian(300, dtype=dtype, seed=1)}}, density
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", DENSITIES)
def test_of_equal_magnitudes_the_first_are_kept(density: float, dtype: torch.dtype) -> None:
    """In the order of key and index, though the matrices come in another."""
    generator = torch.Generator().manual_seed(3)
    values = {
        key: {"a": torch.randint(-2, 3, (size,), generator=generator).to(dtype)}
        for key, size in (("m.0", 40), ("m.1", 25), ("m.10", 30), ("m.2", 17))
    }
    check(values, density)
    check(values, density, chunk=1, backwards=False)


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1000])
def test_chunks_do_not_matter(chunk: int) -> None:
    generator = torch.Generator().manual_seed(4)
    values = {
        key: {
            "ties": torch.randint(-3, 4, (90,), generator=generator).float(),
            "none": torch.randn(90, generator=generator),
        }
        for key in ("x", "y")
    }
    whole = largest_magnitudes(stream(values), 0.4)
    assert largest_magnitudes(stream(values, chunk=chunk), 0.4) == whole
    assert largest_magnitudes(stream(values, chunk=chunk, keys=("y", "x")), 0.4) == whole


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_extremes_of_the_format_are_ordered(dtype: torch.dtype) -> None:
    """Denormals, neighbours that differ in the last bit, and the largest finite number."""
    limits = torch.finfo(dtype)
    one = torch.ones((), dtype=dtype)
    values = torch.stack(
        [
            one * 0,
            -one * limits.smallest_normal,
            one * limits.smallest_normal * 0.5,
            -one * limits.smallest_normal * limits.eps,  # the smallest denormal
            one * limits.smallest_normal * limits.eps * 2,
            one,
            -torch.nextafter(one, 2 * one),
            torch.nextafter(one, 0 * one),
            one * limits.max,
            -one * limits.max,
            -one * 0,
        ]
    )
    assert (values != 0).sum() == 9
    for count in range(1, len(values) + 1):
        check({"m": {"a": values}}, (count + 0.5) / len(values) if count < len(values) else 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_zeros_only(density: float, dtype: torch.dtype) -> None:
    check({"m": {"a": torch.zeros(20, dtype=dtype)}}, density)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cut_among_the_zeros_keeps_every_other_entry(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -3.0, 0.0, 1e-30, 0.0], dtype=dtype)
    [cut] = largest_magnitudes(stream({"m": {"a": values}}), 0.6).values()
    assert cut == Cut(threshold=0.0)
    check({"m": {"a": values}}, 0.6)


def test_a_fraction_below_one_entry_keeps_nothing() -> None:
    values = {"m": {"a": torch.tensor([3.0, -4.0, 5.0])}}
    [cut] = largest_magnitudes(stream(values), 0.3).values()
    assert not cut.keep("m", 0, values["m"]["a"]).any()
    assert not cut.keep("m", 0, torch.tensor([torch.finfo(torch.float32).max])).any()


@pytest.mark.parametrize("count", range(1, 9))
def test_exactly_k_of_equal_entries(count: int) -> None:
    """Eight equal magnitudes over three matrices: the first k, by key and then by index."""
    values = {
        "b": {"a": torch.tensor([2.0, -2.0, 2.0])},
        "a": {"a": torch.tensor([-2.0, 2.0])},
        "c": {"a": torch.tensor([2.0, 2.0, -2.0])},
    }
    [cut] = largest_magnitudes(stream(values, chunk=2), count / 8).values()
    order = [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 2), ("c", 0), ("c", 1), ("c", 2)]
    assert sorted(kept(cut, values, "a")) == order[:count]


def test_names_may_lack_matrices() -> None:
    values = {
        "m.0": {"a": gaussian(30, dtype=torch.float32)},
        "m.1": {"b": gaussian(20, dtype=torch.float32, seed=1)},
        "m.2": {n: gaussian(25, dtype=torch.float32, seed=2) for n in "ab"},
    }
    check(values, 0.3)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "cut", [Cut(1.0), Cut(float("inf")), Cut(0.0), Cut(1.0, {"m": 0})], ids=str
)
def test_trimming_does_not_hide_what_is_not_finite(cut: Cut, wrong: float) -> None:
    values = torch.tensor([1.0, wrong, 0.5])
    assert not torch.isfinite(cut.trim("m", 0, values)[1])


def test_a_cut_keeps_the_shape_of_a_block() -> None:
    values = torch.tensor([[1.0, -1.0, 3.0], [1.0, 0.5, 1.0]])
    [cut] = largest_magnitudes(stream({"m": {"a": values.reshape(-1)}}), 0.5).values()
    # 3, then the first two of the ones: row 0, columns 0 and 1.
    assert cut.keep("m", 0, values).tolist() == [[True, True, True], [False, False, False]]
    assert cut.keep("m", 3, values[1:]).tolist() == [[False, False, False]]


@pytest.mark.parametrize(
    ("dtype", "repeated", "matrices", "passes"),
    [
        (torch.float32, False, 2, 2),
        (torch.float64, False, 2, 4),
        (torch.float32, True, 1, 3),
        (torch.float32, True, 3, 4),
        (torch.float64, True, 1, 5),
        (torch.float64, True, 3, 6),
    ],
    ids=str,
)
def test_the_number_of_passes(
    dtype: torch.dtype, repeated: bool, matrices: int, passes: int
) -> None:
    def values(seed: int) -> torch.Tensor:
        return torch.ones(51, dtype=dtype) if repeated else gaussian(51, dtype=dtype, seed=seed)

    started = 0
    start = stream({f"m.{n}": {"a": values(n)} for n in range(matrices)})

    def counted() -> Iterator[Entries]:
        nonlocal started
        started += 1
        return start()

    largest_magnitudes(counted, 0.5)
    assert started == passes


@settings(max_examples=80, deadline=None)
@given(
    values=st.lists(
        st.lists(
            st.one_of(
                st.floats(width=32, allow_nan=False, allow_infinity=False),
                st.integers(-2, 2).map(float),
            ),
            min_size=1,
            max_size=20,
        ),
        min_size=1,
        max_size=4,
    ),
    density=st.floats(0.001, 1.0),
    chunk=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
)
def test_any_finite_values(
    values: list[list[float]], density: float, chunk: int, dtype: torch.dtype
) -> None:
    tensors = {f"m.{n}": {"a": torch.tensor(v, dtype=dtype)} for n, v in enumerate(values)}
    check(tensors, density, chunk=chunk)
