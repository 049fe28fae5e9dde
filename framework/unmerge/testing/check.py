"""What a check is: a law with its name, and what a merger must declare for it to apply."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from unmerge.errors import CapabilityError
from unmerge.merger import Merger
from unmerge.testing.results import CheckFailedError, CheckSkippedError, Violation

__all__ = [
    "Check",
    "declares",
    "has_lossless",
    "law",
    "lossless_of",
    "needs_no_activations",
]

Requirement = Callable[[Merger], str | None]


@dataclass(frozen=True, slots=True)
class Check:
    """One law of the kit, to be called with a merger.

    Attributes:
        name: Its name, as in results and `expected_failures`.
        law: What it checks, in one line.
        run: Raises `Violation` where the law is broken; returns what is worth knowing of a pass.
        requirements: Each returns why the law does not apply to a merger, or `None`.
    """

    name: str
    law: str
    run: Callable[[Merger], str | None]
    requirements: tuple[Requirement, ...] = ()

    def __str__(self) -> str:
        return self.name

    def not_applicable(self, merger: Merger) -> str | None:
        """Return why the law says nothing about `merger`, or `None` where it does."""
        for requirement in self.requirements:
            reason = requirement(merger)
            if reason is not None:
                return reason
        return None

    def __call__(self, merger: Merger) -> str:
        """Check the law; return what is worth knowing of a pass, or "".

        Raises:
            CheckFailedError: The law is broken, or the strategy raised something.
            CheckSkippedError: The law does not apply to the strategy; says why.
        """
        reason = self.not_applicable(merger)
        if reason is not None:
            raise CheckSkippedError(reason)
        try:
            with _one_thread():
                return self.run(merger) or ""
        except CheckSkippedError:
            raise
        except Violation as violation:
            raise CheckFailedError(
                strategy=merger.method,
                check=self.name,
                case=violation.case,
                expected=violation.expected,
                got=violation.got,
            ) from None
        except Exception as error:
            # A strategy is foreign code: whatever it raises where a result is due is a failure.
            raise CheckFailedError(
                strategy=merger.method,
                check=self.name,
                case="an input of this check",
                expected="a result",
                got=f"{type(error).__name__}: {error}",
            ) from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """Give torch one thread, as a pipeline does: only so are bits promised to be equal."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def law(*requirements: Requirement) -> Callable[[Callable[[Merger], str | None]], Check]:
    """Make a check of a function: its name, and the first line of its docstring as the law."""

    def decorate(run: Callable[[Merger], str | None]) -> Check:
        first_line = (run.__doc__ or "").strip().splitlines()[0]
        return Check(run.__name__, first_line, run, requirements)

    return decorate


def declares(capability: str, expected: object = True) -> Requirement:
    """Require that a capability has a value (for `restores`: any but `None`, if `True`)."""

    def requirement(merger: Merger) -> str | None:
        value = getattr(merger.capabilities, capability)
        held = bool(value) if expected is True else value == expected
        return None if held else f"declares {capability}={value!r}"

    return requirement


def needs_no_activations(merger: Merger) -> str | None:
    """Require that the kit can supply everything a merge needs."""
    if merger.capabilities.needs_activations:
        return "declares needs_activations: the kit has no activations to give"
    return None


def has_lossless(merger: Merger) -> str | None:
    """Require settings under which nothing is lost."""
    return None if merger.lossless() is not None else "lossless() returns None"


def lossless_of(merger: Merger) -> Merger:
    """Return `merger.lossless()` where `has_lossless` said that there is one.

    Raises:
        CapabilityError: There is none: the merger answers differently each time it is asked.
    """
    lossless = merger.lossless()
    if lossless is None:
        raise CapabilityError(f"{merger.method}: lossless() returned a merger once and None now")
    return lossless
