"""Laws of what comes back: restored adapters, and results through a bundle on disk."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import unmerge_bundle
from unmerge.arrays import round_once, to_numpy
from unmerge.merger import Merger
from unmerge.testing import cases
from unmerge.testing.cases import result_of
from unmerge.testing.check import (
    declares,
    has_lossless,
    law,
    lossless_of,
    needs_no_activations,
)
from unmerge.testing.collections import AdapterCollection
from unmerge.testing.outcome import MERGED, Result, Results, deltas, total_norm
from unmerge.testing.results import Violation
from unmerge_bundle import (
    AdapterRecord,
    Bundle,
    BundleWriter,
    GenerationInfo,
    ModuleErrors,
    RecordedModule,
    RestoringEncoding,
)
from unmerge_bundle.encodings import Encoding
from unmerge_bundle.measure import measure

Array = np.ndarray[Any, np.dtype[Any]]

# A reader multiplies float32 factors.
_READ_TOLERANCE = 1e-5
# Room for rounding where one error must not exceed another.
_SLACK = 1e-6


@law(declares("restores"), needs_no_activations)
def restored_adapters_are_finite(merger: Merger) -> None:
    """Every adapter comes back under its name, finite and no farther off than everything is large.

    A restored adapter may be inexact, but one that differs from the original by more than all
    originals together is not a compressed one: it is another one, or scaled twice.
    """
    for collection in (cases.general(), cases.with_missing_modules(), cases.exact()):
        results = result_of(merger, collection)
        for path, having in collection.modules.items():
            size = total_norm(collection.delta(path, name) for name in having)
            restored = deltas(results[path])
            for name in having:
                case = f"{collection.name}, module {path}, adapter {name}"
                if name not in restored:
                    raise Violation(case, "a restored delta", f"those of {sorted(restored)}")
                error = _distance(restored[name], collection.delta(path, name))
                if not error <= size:
                    raise Violation(
                        case,
                        f"an error of at most {size:.3g}, the norms of all originals together",
                        f"{error:.3g}",
                    )


@law(declares("restores"), has_lossless, needs_no_activations)
def lossless_settings_restore_no_worse(merger: Merger) -> None:
    """`lossless()` restores several adapters at least as well as the given settings do."""
    lossless = lossless_of(merger)
    for collection in (cases.general(), cases.with_missing_modules()):
        given, best = (_error(result_of(m, collection), collection) for m in (merger, lossless))
        if not best <= given * (1 + _SLACK) + _SLACK:
            raise Violation(
                collection.name, f"a relative error of at most {given:.3g}", f"{best:.3g}"
            )


def _error(results: Results, collection: AdapterCollection) -> float:
    """Return the Frobenius error of all restored deltas, relative to all originals."""
    error = norm = 0.0
    for path, having in collection.modules.items():
        restored = deltas(results[path])
        for name in having:
            original = collection.delta(path, name)
            error = math.hypot(error, _distance(restored[name], original))
            norm = math.hypot(norm, total_norm([original]))
    return error / norm


def _distance(restored: torch.Tensor, original: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(restored - original))


@law(needs_no_activations)
def a_bundle_gives_everything_back(merger: Merger) -> None:
    """Written to a bundle in float32 and read again, every tensor has its bits.

    So has every fact its value. What the bundle's reader restores agrees with the encoding's
    formula, and the error recorded for each adapter is the one it comes back with.
    """
    collection = cases.with_missing_modules()
    results = {
        path: encoding.map(_rounded) for path, encoding in result_of(merger, collection).items()
    }
    with tempfile.TemporaryDirectory(prefix="unmerge-check-") as folder:
        path = Path(folder) / "check.rmb"
        recorded = _write(path, merger, collection, results)
        bundle = unmerge_bundle.open(path)
        _check_tensors(bundle, collection, results)
        _check_deltas(bundle, collection, results, recorded)


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.dtype.is_floating_point:
        return tensor
    return round_once(tensor, torch.float32, "the result")


def _write(
    path: Path, merger: Merger, collection: AdapterCollection, results: Results
) -> Mapping[tuple[str, str], ModuleErrors]:
    """Write the results as a bundle; return the recorded errors by module and adapter."""
    adapters = {adapter.name: adapter for adapter in collection.as_adapters()}
    restores = merger.capabilities.restores is not None
    absent = {
        name: tuple(p for p in collection.modules if p not in adapter.modules)
        for name, adapter in adapters.items()
    }
    info = GenerationInfo.model_validate(
        {
            "strategy": {
                "method": merger.method,
                "version": merger.version,
                "distribution": type(merger).__module__,
            },
            "recipe": {"merger": merger.recipe()},
            "store_dtype": "float32",
            "sources": [
                {"name": name, "digest": adapter.digest(), "weight": collection.weights[name]}
                for name, adapter in adapters.items()
            ],
            "absent": {name: paths for name, paths in absent.items() if paths},
        }
    )
    recorded: dict[tuple[str, str], ModuleErrors] = {}
    with BundleWriter(path, info=info) as writer:
        for name, adapter in adapters.items() if restores else ():
            modules = tuple(
                RecordedModule(path=p, rank=f.rank, source_scaling=f.scaling, dtype="float32")
                for p, f in adapter.modules.items()
            )
            record = AdapterRecord(
                name=name, format="peft", config="", digest=adapter.digest(), modules=modules
            )
            writer.add_adapter(record, {})
        for module, encoding in sorted(results.items()):
            stored: Encoding[Array] = encoding.map(to_numpy)
            errors = {}
            if isinstance(stored, RestoringEncoding):
                for name in stored.adapters:
                    f = adapters[name].modules[module]
                    errors[name] = recorded[module, name] = measure(
                        stored,
                        name,
                        (to_numpy(f.A), to_numpy(f.B)),
                        source_scaling=f.scaling,
                        dtype="float32",
                        path=module,
                    )
            writer.add_module(module, stored, errors=errors or None)
        writer.finish(created=datetime(2000, 1, 1, tzinfo=UTC))
    return recorded


def _check_tensors(bundle: Bundle, collection: AdapterCollection, results: Results) -> None:
    for path, encoding in results.items():
        entry = bundle.modules[path]
        case = f"{collection.name}, module {path} read from a bundle"
        if dict(entry.facts) != {key: float(value) for key, value in encoding.facts.items()}:
            raise Violation(case, f"the facts {dict(encoding.facts)}", repr(dict(entry.facts)))
        if entry.blob is not None:
            shared = bundle.shared_blob(entry.blob)
            for key, tensor in encoding.shared_tensors().items():
                _check_array(case, key, tensor, shared.array(f"modules/{path}/{key}"))
        for name in encoding.adapters:
            own, _ = bundle.open_adapter(name)
            for key, tensor in encoding.adapter_tensors(name).items():
                _check_array(case, f"{name}/{key}", tensor, own.array(f"modules/{path}/{key}"))


def _check_array(case: str, key: str, written: torch.Tensor, read: Array) -> None:
    array = to_numpy(written)
    if (read.dtype, read.shape) != (array.dtype, array.shape) or read.tobytes() != array.tobytes():
        raise Violation(case, f"tensor {key} with the bits that were written", "others")


def _check_deltas(
    bundle: Bundle,
    collection: AdapterCollection,
    results: Results,
    recorded: Mapping[tuple[str, str], ModuleErrors],
) -> None:
    for path, encoding in results.items():
        for name, delta in deltas(encoding).items():
            source = bundle.merged() if name == MERGED else bundle.restore(name)
            read = torch.from_numpy(np.array(source.delta(path), dtype=np.float64))
            case = f"{collection.name}, module {path}, adapter {name or 'merged'} read again"
            scale = max(total_norm([delta]), _size(encoding))
            if not _distance(read, delta) <= _READ_TOLERANCE * scale:
                raise Violation(
                    case, "the delta of the encoding's formula", f"{_distance(read, delta):.3g} off"
                )
            if name == MERGED:
                continue
            original = collection.delta(path, name)
            promised = recorded[path, name].delta * total_norm([original])
            if not abs(_distance(read, original) - promised) <= _READ_TOLERANCE * scale:
                raise Violation(
                    case,
                    f"the recorded error of the delta, {promised:.3g}",
                    f"{_distance(read, original):.3g}",
                )


def _size(encoding: Result) -> float:
    """Return the largest norm of a delta that the encoding holds."""
    return max(total_norm([delta]) for delta in deltas(encoding).values())


CHECKS = (
    restored_adapters_are_finite,
    lossless_settings_restore_no_worse,
    a_bundle_gives_everything_back,
)
