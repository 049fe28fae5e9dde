"""Runs the checks of the kit on a merger, and knows which failures were announced."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Literal

from unmerge.errors import ConfigError
from unmerge.merger import Merger
from unmerge.testing import contract, laws, reversible
from unmerge.testing.check import Check
from unmerge.testing.results import CheckFailedError, CheckResult, CheckSkippedError

__all__ = ["all_checks", "check_merger", "check_names"]


def all_checks() -> tuple[Check, ...]:
    """Return every check of the kit, in the order in which they run."""
    return (*contract.CHECKS, *laws.CHECKS, *reversible.CHECKS)


def check_merger(
    merger: Merger,
    *,
    expected_failures: Mapping[str, str] | None = None,
    on_fail: Literal["raise", "report"] = "raise",
) -> list[CheckResult]:
    """Check a merger against every law that applies to what it declares.

    Args:
        merger: An instance: capabilities may depend on its fields.
        expected_failures: Reasons by name of check. A check that fails as announced is reported
            as `"expected_failure"`; one that passes nevertheless counts as failed.
        on_fail: `"raise"` at the first failure, or `"report"` all results.

    Returns:
        One result per check, those that were left out with the reason included.

    Raises:
        CheckFailedError: A law is broken and `on_fail` is `"raise"`.
        ConfigError: `merger` is no instance of a merger, or `expected_failures` names no check.
    """
    if not isinstance(merger, Merger):
        raise ConfigError(
            f"check_merger was given {merger!r}, expected an instance of a Merger, such as "
            "Average()"
        )
    announced = check_names(expected_failures)
    results = []
    for check in all_checks():
        result, error = _result(check, merger, announced.get(check.name))
        if error is not None and on_fail == "raise":
            raise error
        results.append(result)
    return results


def check_names(expected_failures: Mapping[str, str] | None) -> dict[str, str]:
    """Return the announced failures, after making sure that such checks exist.

    Raises:
        ConfigError: A name is not that of a check; names that come near are listed.
    """
    known = [check.name for check in all_checks()]
    for name in expected_failures or {}:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f'expected_failures: no check is called "{name}"; {hint}')
    return dict(expected_failures or {})


def _result(
    check: Check, merger: Merger, announced: str | None
) -> tuple[CheckResult, CheckFailedError | None]:
    try:
        note = check(merger)
    except CheckSkippedError as skipped:
        return CheckResult(check.name, "skipped", str(skipped), check.law), None
    except CheckFailedError as error:
        if announced is not None:
            return CheckResult(check.name, "expected_failure", announced, check.law), None
        return CheckResult(check.name, "failed", str(error), check.law), error
    if announced is None:
        return CheckResult(check.name, "passed", note, check.law), None
    passed = CheckFailedError(
        strategy=merger.method,
        check=check.name,
        case="all inputs of this check",
        expected=f"the failure that was announced ({announced})",
        got="a pass; remove it from expected_failures",
    )
    return CheckResult(check.name, "unexpected_pass", str(passed), check.law), passed
