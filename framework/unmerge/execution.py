"""What one task of a run computes: a stack merged, checked, rounded once, its errors measured.

A pure function of the stack, the merger and the plan, whatever thread or device it runs on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from unmerge.arrays import DTYPES, round_once, to_numpy
from unmerge.errors import CapabilityError, PluginError, UnmergeError
from unmerge.merger import MergeContext, Merger
from unmerge.plan import Plan
from unmerge.stack import FactorStack, StackModule
from unmerge_bundle import ModuleErrors, measure, relative_errors
from unmerge_bundle.arrays import FloatDtype
from unmerge_bundle.encodings import Encoding, FactorsEncoding, RestoringEncoding

__all__ = ["MergedModule", "is_packed", "merge_stack", "one_thread_per_task", "reported_as"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class MergedModule:
    """One module as the bundle stores it.

    Attributes:
        path: Module path.
        kind: The layer it is.
        encoding: Its encoding, in the stored dtype.
        errors: What a reader gets for each adapter that comes back, against the original.
        rounding: Relative change of a merged delta by rounding to the stored dtype; 0 for a
            reversible encoding, whose `errors` include it.
    """

    path: str
    kind: str
    encoding: Encoding[Array]
    errors: Mapping[str, ModuleErrors]
    rounding: float


def merge_stack(
    merger: Merger, stack: FactorStack, context: MergeContext, plan: Plan, *, distribution: str
) -> list[MergedModule]:
    """Merge a stack and return its modules as they are stored.

    Raises:
        PluginError: The merger raised something that is no error of this library.
        CapabilityError: It returned what does not fit the stack, or wrote to its input.
        NonFiniteError: Its result is not finite, or not in the range of the stored dtype.
    """
    who = f"{merger.method} (from {distribution})"
    before = stack.A._version, stack.B._version
    with reported_as(f"{who}, {', '.join(stack.modules)}"):
        encodings = merger.merge(stack, context)
    if (stack.A._version, stack.B._version) != before:
        raise CapabilityError(f"{who} wrote to its input; a merger must not")
    if not isinstance(encodings, list) or len(encodings) != len(stack):
        found = f"{len(encodings)} encodings" if isinstance(encodings, list) else repr(encodings)
        raise CapabilityError(
            f"{who} returned {found} for {len(stack)} modules, expected a list with one each"
        )
    return [
        _finish(module, encoding, plan, who)
        for module, encoding in zip(stack, encodings, strict=True)
    ]


@contextmanager
def reported_as(who: str) -> Iterator[None]:
    """Report as `PluginError` of `who` whatever a strategy raises that is no error of this library.

    A strategy may be foreign code, and what it raises should name it.
    """
    try:
        yield
    except UnmergeError:
        raise
    except Exception as error:
        raise PluginError(f"{who}: failed with {type(error).__name__}: {error}") from error


@contextmanager
def one_thread_per_task() -> Iterator[None]:
    """Give every BLAS and LAPACK one thread: parallelism is over modules, bits do not vary.

    Both torch's and numpy's: recorded errors are measured with numpy, with the reader's code.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(before)


def _finish(module: StackModule, encoding: object, plan: Plan, who: str) -> MergedModule:
    checked = _check(module, encoding, plan, who)
    stored = checked.map(lambda tensor: _stored(tensor, plan, f"{module.path}: {who}"))
    kind = module.shape.kind
    if not isinstance(stored, RestoringEncoding):
        rounding = _rounding(checked, stored)
        return MergedModule(module.path, kind, stored, {}, rounding)
    errors = {
        # On the stored tensors and rounded to the source's dtype: the error a user gets.
        name: measure(
            stored,
            name,
            (to_numpy(original.A), to_numpy(original.B)),
            source_scaling=original.scaling,
            dtype=cast(FloatDtype, plan.source(name).modules[module.path].dtype),
            path=module.path,
        )
        for name, original in module
    }
    return MergedModule(module.path, kind, stored, errors, 0.0)


def _stored(tensor: torch.Tensor, plan: Plan, who: str) -> Array:
    # Masks and codes are bits already; everything else is rounded, once.
    if tensor.dtype == torch.uint8:
        return to_numpy(tensor)
    return to_numpy(round_once(tensor, DTYPES[plan.store_dtype], who))


def _check(module: StackModule, encoding: object, plan: Plan, who: str) -> Encoding[torch.Tensor]:
    if not isinstance(encoding, Encoding):
        raise CapabilityError(f"{module.path}: {who} returned {encoding!r}, expected an encoding")
    tensors = [*encoding.shared_tensors().items()]
    for name in encoding.adapters:
        tensors += encoding.adapter_tensors(name).items()
    for name, tensor in tensors:
        packed = _is_packed_tensor(name)
        fits = isinstance(tensor, torch.Tensor) and (
            tensor.dtype == torch.uint8 if packed else tensor.dtype.is_floating_point
        )
        if not fits:
            kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise CapabilityError(
                f"{module.path}: {who} returned {name} as {kind}, expected a "
                f"{'uint8' if packed else 'real floating'} tensor"
            )
    for name, value in encoding.facts.items():
        if not (isinstance(value, int | float) and math.isfinite(value)):
            raise CapabilityError(
                f"{module.path}: {who} reports {name} as {value!r}, expected a finite number"
            )
    shape = module.shape
    if encoding.shape != (shape.d_out, shape.d_in):
        raise CapabilityError(
            f"{module.path}: {who} returned an encoding of shape {encoding.shape}, the module's "
            f"(d_out, d_in) is {(shape.d_out, shape.d_in)}"
        )
    expected = module.adapters if plan.reversible else ()
    if encoding.adapters != expected:
        raise CapabilityError(
            f"{module.path}: {who} returned an encoding that restores {list(encoding.adapters)}, "
            f"expected {list(expected)}; see capabilities.restores"
        )
    return encoding


def is_packed(encoding: Encoding[Any]) -> bool:
    """Return whether an encoding holds codes or masks, which are stored as they are."""
    return any(
        _is_packed_tensor(t) for n in encoding.adapters[:1] for t in encoding.adapter_tensors(n)
    )


def _is_packed_tensor(name: str) -> bool:
    return name == "mask" or name.endswith(".codes")


def _rounding(exact: Encoding[torch.Tensor], stored: Encoding[Array]) -> float:
    if isinstance(exact, FactorsEncoding) and isinstance(stored, FactorsEncoding):
        original = to_numpy(exact.A), to_numpy(exact.B)
        return relative_errors(original, (stored.A, stored.B)).delta
    pairs = [
        (to_numpy(tensor).astype(np.float64), stored.shared_tensors()[name].astype(np.float64))
        for name, tensor in exact.shared_tensors().items()
    ]
    norm = math.hypot(*(float(np.linalg.norm(a)) for a, _ in pairs))
    change = math.hypot(*(float(np.linalg.norm(b - a)) for a, b in pairs))
    return change / norm if norm > 0 else 0.0
