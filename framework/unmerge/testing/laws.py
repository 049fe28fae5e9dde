"""The laws of merging: what must not change a result, and what must change it how.

Bit for bit: handing-over order, stacks, row blocks, chunks of a survey, repetition, another
process, weights that are ignored, seeds of rules that are not random. To `TOLERANCE`, a Frobenius
distance relative to what went in: identity, gauge, scalings, names, linearity, factor exactness,
signs. Those run on adapters of small integers wherever a rule might compare numbers: their deltas
are exact in float32 however they are factored, so that a rule which trims or votes sees the very
same numbers, and a broken law is off by the size of an entry, not by rounding.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from unmerge.adapter import Factors
from unmerge.merger import Merger
from unmerge.stack import FactorStack
from unmerge.testing import cases
from unmerge.testing.cases import merge_collection, regauged, result_of, scale_of
from unmerge.testing.check import (
    declares,
    has_lossless,
    law,
    lossless_of,
    needs_no_activations,
)
from unmerge.testing.collections import AdapterCollection, random_collection
from unmerge.testing.outcome import (
    Results,
    all_tensors,
    bits,
    check_close,
    check_same_bits,
    deltas,
)
from unmerge.testing.processes import digest_elsewhere, digest_here
from unmerge.testing.results import CheckSkippedError, Violation
from unmerge_bundle.encodings import DeltaEncoding, FactorsEncoding

TOLERANCE = 1e-5
"""Largest relative Frobenius distance where rounding may enter: methods, section 10, in float32."""

_LATE_NAMES = "tuvwxyz"

SCALINGS = {
    "alpha / r": 16 / 4,
    "rsLoRA": 16 / 4**0.5,
    "a fraction": 1 / 3,
    "a negative scaling": -0.5,
    "a tiny scaling": 2.0**-30,
    "a huge scaling": 2.0**30,
}
"""Scalings that one adapter of rank 4 may have; a hidden cut-off shows at the ends."""


@law(has_lossless, needs_no_activations)
def one_adapter_gives_itself(merger: Merger) -> None:
    """Under lossless settings one adapter at weight 1 gives its own delta, however scaled."""
    lossless = lossless_of(merger)
    for kind, scaling in SCALINGS.items():
        collection = cases.one_adapter(scaling, f"one adapter, scaled by {kind}")
        check_close(
            collection.name,
            _as_deltas(collection),
            _as_merged(result_of(lossless, collection)),
            "the adapter's own delta",
            tolerance=TOLERANCE,
        )


def _as_deltas(collection: AdapterCollection) -> Results:
    [name] = collection.adapters
    return {path: DeltaEncoding(delta=collection.delta(path, name)) for path in collection.modules}


def _as_merged(results: Results) -> Results:
    """Return each encoding's one delta, merged or restored, as an encoding of its own."""
    return {
        path: DeltaEncoding(delta=next(iter(deltas(encoding).values())))
        for path, encoding in results.items()
    }


@law(declares("gauge_invariant"), needs_no_activations)
def scaling_enters_once(merger: Merger) -> None:
    """`(B, A, 2s)`, `(2B, A, s)` and `(B, 2A, s)` are one adapter."""
    collection = cases.exact()
    # Powers of two, different ones: that all adapters grow alike must not hide a mistake. One is
    # negative: a rule may lose the sign of a scaling.
    powers = {"a": 1.0, "b": 2.0, "c": -0.25}

    def change(what: str) -> AdapterCollection:
        return collection.map(
            lambda _path, name, f: Factors(
                A=f.A * (powers[name] if what == "A" else 1.0),
                B=f.B * (powers[name] if what == "B" else 1.0),
                scaling=f.scaling * (powers[name] if what == "s" else 1.0),
            ),
            f"{collection.name}, rescaled through {what}",
        )

    expected = result_of(merger, change("s"))
    for what in ("A", "B"):
        changed = change(what)
        check_close(
            changed.name,
            expected,
            result_of(merger, changed),
            "the result of the same deltas with other scalings",
            tolerance=TOLERANCE,
            scale=scale_of(changed),
        )


@law(declares("gauge_invariant"), needs_no_activations)
def factoring_is_irrelevant(merger: Merger) -> None:
    """`(B G, G⁻¹ A)` is the same adapter as `(B, A)`, where `gauge_invariant` is declared."""
    collections = [
        cases.exact(),
        random_collection("exact deltas", values="integer", seed=20),
        # More rank than most defaults keep, so that what a rule leaves out is looked at too.
        random_collection(
            "exact deltas of rank 24", ranks=(24,) * 3, d_out=40, d_in=30, values="integer", seed=22
        ),
    ]
    if merger.capabilities.mixed_ranks:
        collections.append(
            random_collection(
                "exact deltas, mixed ranks", ranks=(2, 4, 1), values="integer", seed=21
            )
        )
    for collection in collections:
        other = regauged(collection)
        check_close(
            other.name,
            result_of(merger, collection),
            result_of(merger, other),
            "the result of the same deltas, factored otherwise",
            tolerance=TOLERANCE,
            scale=scale_of(collection),
        )


@law(declares("factor_exact"), needs_no_activations)
def factors_equal_the_dense_result(merger: Merger) -> None:
    """Factors come back, and their product is that of merging the multiplied deltas."""
    collection = cases.exact()

    def dense(path: str, name: str, f: Factors) -> Factors:
        return Factors(
            A=torch.eye(f.d_in), B=collection.delta(path, name).to(torch.float32), scaling=1.0
        )

    results = result_of(merger, collection)
    for path, encoding in results.items():
        if not isinstance(encoding, FactorsEncoding):
            raise Violation(f"{collection.name}, module {path}", "factors", f'"{encoding.kind}"')
    check_close(
        f"{collection.name}, given as dense matrices",
        results,
        result_of(merger, collection.map(dense)),
        "the product of the merged factors",
        tolerance=TOLERANCE,
        scale=scale_of(collection),
    )


@law(declares("weight_scales_delta"), needs_no_activations)
def weights_scale_deltas(merger: Merger) -> None:
    """Doubling a weight doubles that adapter's part and nothing else, down to the weight 0."""
    for collection in (cases.general(), cases.with_missing_modules(), cases.many()):
        weighted = collection.weighted({"a": 1.0, "b": -3.0})
        last = collection.adapters[-1]
        others = dict.fromkeys(collection.adapters[:-1], 0.0)
        doubled = result_of(merger, weighted.weighted({last: 2 * weighted.weights[last]}))
        alone = result_of(merger, weighted.weighted(others))
        check_close(
            f"{collection.name}, the weight of {last} doubled",
            _sum(result_of(merger, weighted), alone),
            _sum(doubled),
            f"the result before, and {last}'s part once more",
            tolerance=TOLERANCE,
            scale=scale_of(weighted),
        )


def _sum(*results: Results) -> Results:
    return {
        path: DeltaEncoding(
            delta=sum(
                (next(iter(deltas(result[path]).values())) for result in results),
                start=torch.zeros(encoding.shape, dtype=torch.float64),
            )
        )
        for path, encoding in results[0].items()
    }


@law(declares("ignores_weights"), needs_no_activations)
def ignored_weights_have_no_effect(merger: Merger) -> None:
    """Weights change nothing, where `ignores_weights` is declared."""
    collection = cases.general()
    weights = {"weights": {"a": 2.0, "b": 0.25, "c": 3.0}}
    try:
        weighted = merge_collection(merger, collection, changes=weights)
    except Exception as error:
        raise Violation(
            f"{collection.name}, weighted", "a result", f"{type(error).__name__}: {error}"
        ) from error
    check_same_bits(
        f"{collection.name}, weighted",
        result_of(merger, collection),
        weighted,
        "the result of equal weights",
    )


@law(declares("ignores_weights", expected=False), needs_no_activations)
def weights_have_an_effect(merger: Merger) -> None:
    """Other weights give another result, unless `ignores_weights` is declared."""
    collection = cases.general()
    others = collection.weighted({"a": 2.0, "b": 0.25, "c": 3.0})
    weighted, expected = (result_of(merger, c) for c in (others, collection))
    if all(bits(weighted[path]) == bits(encoding) for path, encoding in expected.items()):
        raise Violation(
            f"{collection.name}, weighted otherwise",
            "another result, or ignores_weights declared",
            "the same bits",
        )


@law(needs_no_activations)
def order_of_adapters_is_irrelevant(merger: Merger) -> None:
    """Adapters handed over in reverse change no bit; named in another order, only rounding."""
    for collection in (cases.general(), cases.with_missing_modules()):
        check_same_bits(
            f"{collection.name}, handed over in reverse",
            result_of(merger, collection),
            result_of(merger, collection, reverse=True),
            "the result of the usual order",
        )
    if merger.capabilities.stochastic:
        return  # Random numbers are keyed by the adapters' names, so other names draw others.
    for collection in (cases.exact(), cases.general(), cases.many()):
        names = dict(zip(collection.adapters, reversed(_LATE_NAMES), strict=False))
        renamed = result_of(merger, collection.renamed(names))
        original = result_of(merger, collection)
        for path, encoding in original.items():
            got, expected = deltas(renamed[path]), deltas(encoding)
            check_close(
                f"{collection.name}, {', '.join(names)} named {', '.join(names.values())}",
                {path: DeltaEncoding(delta=torch.cat(list(expected.values())))},
                {path: DeltaEncoding(delta=torch.cat([got[names.get(n, n)] for n in expected]))},
                "the result under the usual names",
                tolerance=TOLERANCE,
                scale=scale_of(collection),
            )


@law(needs_no_activations)
def a_stack_equals_its_modules(merger: Merger) -> None:
    """Modules merged together equal modules merged one by one, bit for bit."""
    paths = ("m.2", "m.1", "m.0")
    collection = random_collection("a stack of modules", ranks=(4,) * 3, paths=paths, seed=30)
    # Another rank in one module, an adapter fewer in another: the stack pads both.
    smaller = random_collection(ranks=(2,) * 3, paths=("m.1",), seed=31)
    collection = collection.joined(smaller).without("m.2", "b")
    stack = collection.stack()
    context = cases.context_of(merger, collection)
    context = cases.surveyed(merger, [stack], context)
    together = merger.merge(stack, context)
    if not isinstance(together, list) or len(together) != len(stack):
        raise Violation(collection.name, f"a list of {len(stack)} encodings", repr(together)[:200])
    for index, path in enumerate(stack.modules):
        for how, alone in (
            ("as a view of the stack", stack.narrow(index)),
            ("built alone", collection.stack(paths=[path])),
        ):
            check_same_bits(
                f"{collection.name}, one {how}",
                {path: together[index]},
                {path: merger.merge(alone, context)[0]},
                "the module's part of the whole stack",
            )


@law(needs_no_activations)
def block_height_is_irrelevant(merger: Merger) -> None:
    """Row blocks of any height give equal results, bit for bit."""
    collection = cases.tall()
    expected = result_of(merger, collection, block_rows=1000)
    for height in (1, 7, 64):
        check_same_bits(
            f"{collection.name} in blocks of {height}",
            expected,
            result_of(merger, collection, block_rows=height),
            "the result of one block",
        )


@law(declares("needs_survey"), needs_no_activations)
def chunking_of_a_survey_is_irrelevant(merger: Merger) -> None:
    """A survey finds the same facts however many modules come at a time, bit for bit."""
    for collection in (cases.general(), cases.with_missing_modules(), cases.exact()):
        expected = result_of(merger, collection)
        for size in (1, 2):
            stacks: list[FactorStack] = collection.stacks(size=size)
            check_same_bits(
                f"{collection.name}, surveyed {size} modules at a time",
                expected,
                result_of(merger, collection, survey_stacks=stacks),
                "the result of surveying all of a shape together",
            )


@law(needs_no_activations)
def repeating_gives_equal_bytes(merger: Merger) -> None:
    """The same merge with the same seed, done again, gives the same bits and facts."""
    collection = cases.general()
    check_same_bits(
        f"{collection.name}, merged twice",
        result_of(merger, collection, seed=1),
        result_of(merger, collection, seed=1),
        "the result of the first time",
    )


@law(needs_no_activations)
def another_process_gives_equal_bytes(merger: Merger) -> None:
    """A Python process with another hash seed gives the same bits and facts."""
    elsewhere = digest_elsewhere(merger)
    if elsewhere.skipped is not None:
        raise CheckSkippedError(elsewhere.skipped)
    if elsewhere.digest != digest_here(merger):
        raise Violation(
            cases.general().name,
            "the bits that this process gives",
            elsewhere.error or "other bits",
        )


@law(declares("stochastic"), needs_no_activations)
def another_seed_gives_another_result(merger: Merger) -> None:
    """The seed changes the result, where `stochastic` is declared."""
    collection = cases.tall()
    first = result_of(merger, collection, seed=0)
    if all(
        bits(first[path]) == bits(encoding)
        for seed in (1, 2, 3)
        for path, encoding in result_of(merger, collection, seed=seed).items()
    ):
        raise Violation(collection.name, "another result for another seed", "the same bits")


@law(declares("stochastic", expected=False), needs_no_activations)
def the_seed_is_irrelevant(merger: Merger) -> None:
    """The seed changes nothing, where `stochastic` is not declared."""
    collection = cases.general()
    expected = result_of(merger, collection, seed=0)
    for seed in (1, 2):
        check_same_bits(
            f"{collection.name}, seed {seed}",
            expected,
            result_of(merger, collection, seed=seed),
            "the result of seed 0",
        )


@law(declares("sign_equivariant"), needs_no_activations)
def flipped_entries_flip_the_result(merger: Merger) -> None:
    """Entries whose sign is flipped in all adapters flip in the result, and no others do."""
    drawn = random_collection(
        "dense adapters of integers", ranks=(6,) * 3, values="integer", d_in=6, seed=40
    )
    # A = 1, so that B is the delta and any of its entries can be flipped.
    dense = drawn.map(lambda _path, _name, f: replace(f, A=torch.eye(f.d_in)))
    # An even number of adapters too: a middle one of four is not the middle of the signs flipped.
    for collection in (dense, _opposed(dense), dense.without(next(iter(dense.modules)), "c")):
        [shape] = collection.shapes
        signs = torch.where(torch.arange(shape.d_out * shape.d_in) % 5 == 1, -1.0, 1.0)
        signs = signs.reshape(shape.d_out, shape.d_in)
        flipped = collection.map(
            partial(_flipped, signs), f"{collection.name}, the signs of some entries flipped"
        )
        got = deltas(result_of(merger, flipped)[shape.path])
        for name, delta in deltas(result_of(merger, collection)[shape.path]).items():
            check_close(
                flipped.name,
                {shape.path: DeltaEncoding(delta=signs.double() * delta)},
                {shape.path: DeltaEncoding(delta=got[name])},
                "the result with those signs flipped",
                tolerance=TOLERANCE,
                scale=scale_of(collection),
            )


def _flipped(signs: torch.Tensor, _path: str, _name: str, f: Factors) -> Factors:
    return replace(f, B=signs * f.B)


def _opposed(collection: AdapterCollection) -> AdapterCollection:
    """Return the collection with c the opposite of a and b zero: every vote is exactly zero."""
    modules = {}
    for path, having in collection.modules.items():
        a = having["a"]
        zero = replace(a, B=torch.zeros_like(a.B))
        modules[path] = {"a": a, "b": zero, "c": replace(a, B=-a.B)}
    return replace(collection, name=f"{collection.name}, c = −a", modules=modules)


@law(needs_no_activations)
def nan_never_vanishes(merger: Merger) -> None:
    """An adapter of NaN gives an error or a result that is not finite, never a finite one."""
    collection = cases.general().map(
        lambda _path, name, f: (
            replace(f, B=torch.full_like(f.B, float("nan"))) if name == "b" else f
        ),
        "three adapters, one of them NaN",
    )
    try:
        results = merge_collection(merger, collection)
    except Exception:  # noqa: BLE001
        # Any error will do: a store never holds NaN, and the pipeline reports what is raised.
        return
    for path, encoding in results.items():
        if all(bool(torch.isfinite(t).all()) for t in all_tensors(encoding).values()) and all(
            bool(torch.isfinite(d).all()) for d in deltas(encoding).values()
        ):
            raise Violation(
                f"{collection.name}, module {path}",
                "an error, or a result that is not finite",
                "finite numbers",
            )


CHECKS = (
    one_adapter_gives_itself,
    scaling_enters_once,
    factoring_is_irrelevant,
    factors_equal_the_dense_result,
    weights_scale_deltas,
    ignored_weights_have_no_effect,
    weights_have_an_effect,
    order_of_adapters_is_irrelevant,
    a_stack_equals_its_modules,
    block_height_is_irrelevant,
    chunking_of_a_survey_is_irrelevant,
    repeating_gives_equal_bytes,
    another_process_gives_equal_bytes,
    another_seed_gives_another_result,
    the_seed_is_irrelevant,
    flipped_entries_flip_the_result,
    nan_never_vanishes,
)
