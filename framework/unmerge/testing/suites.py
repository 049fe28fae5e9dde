"""The kit as a pytest suite: one test per merger and law. pytest is imported here only, lazily."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from unmerge.errors import ConfigError
from unmerge.merger import Merger
from unmerge.testing.check import Check
from unmerge.testing.checks import all_checks, check_names
from unmerge.testing.results import CheckFailedError, CheckSkippedError, MissingExtraError

if TYPE_CHECKING:
    import pytest

__all__ = ["parametrize_with_checks"]

TestT = TypeVar("TestT", bound=Callable[..., Any])


def parametrize_with_checks(
    mergers: Sequence[Merger],
    *,
    expected_failures: Mapping[str, str] | Callable[[Merger], Mapping[str, str]] | None = None,
) -> Callable[[TestT], TestT]:
    """Return a decorator that runs a test with `merger` and `check` for every law that applies.

    The test calls `check(merger)`. Laws of capabilities that a merger does not declare are left
    out of the suite; `check_merger` lists them with the reason. A check that finds out only while
    it runs that it can say nothing skips the test. An announced failure is a strict `xfail`.

    Args:
        mergers: Instances, of one class or several.
        expected_failures: Reasons by name of check, for all mergers, or a function that returns
            them for one.

    Raises:
        MissingExtraError: pytest is not installed.
        ConfigError: Something in `mergers` is no merger, or a name is that of no check.
    """
    try:
        import pytest
    except ImportError as error:
        raise MissingExtraError(
            'parametrize_with_checks needs pytest; pip install "unmerge[testing]"'
        ) from error

    params = list(_params(pytest.param, pytest.mark.xfail, mergers, expected_failures))
    return pytest.mark.parametrize(("merger", "check"), params)


class _Runner:
    """A check as a test calls it: what cannot be checked here skips the test."""

    def __init__(self, check: Check) -> None:
        self._check = check

    def __repr__(self) -> str:
        return self._check.name

    def __call__(self, merger: Merger) -> None:
        """Check the law.

        Raises:
            CheckFailedError: It is broken.
        """
        import pytest

        try:
            self._check(merger)
        except CheckSkippedError as skipped:
            pytest.skip(str(skipped))


def _params(
    param: Callable[..., Any],
    xfail: Callable[..., pytest.MarkDecorator],
    mergers: Sequence[Merger],
    expected_failures: Mapping[str, str] | Callable[[Merger], Mapping[str, str]] | None,
) -> Iterator[Any]:
    for merger, name in zip(mergers, _names(mergers), strict=True):
        announced = check_names(
            expected_failures(merger) if callable(expected_failures) else expected_failures
        )
        for check in all_checks():
            if check.not_applicable(merger) is not None:
                continue
            marks = []
            if check.name in announced:
                marks.append(
                    xfail(reason=announced[check.name], raises=CheckFailedError, strict=True)
                )
            yield param(merger, _Runner(check), id=f"{name}-{check.name}", marks=marks)


def _names(mergers: Sequence[Merger]) -> list[str]:
    """Return a short, distinct name per merger: its method, and the fields that were given."""
    names: list[str] = []
    for merger in mergers:
        if not isinstance(merger, Merger):
            raise ConfigError(
                f"parametrize_with_checks was given {merger!r}, expected instances of mergers, "
                "such as Average()"
            )
        name = _name(merger)
        same = sum(other == name or other.startswith(f"{name}#") for other in names)
        names.append(f"{name}#{same + 1}" if same else name)
    return names


def _name(merger: Merger) -> str:
    given = []
    for field in type(merger).model_fields:
        if field in merger.model_fields_set:
            value = getattr(merger, field)
            given.append(f"{field}={_name(value) if isinstance(value, Merger) else value}")
    return f"{merger.method}({','.join(given)})" if given else merger.method
