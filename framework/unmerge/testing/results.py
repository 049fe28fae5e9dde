"""What a check says: its result, the error that names a broken law, and why it was left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unmerge.errors import ConfigError, UnmergeError

__all__ = [
    "CheckFailedError",
    "CheckResult",
    "CheckSkippedError",
    "MissingExtraError",
    "Status",
    "Violation",
]

Status = Literal["passed", "failed", "skipped", "expected_failure", "unexpected_pass"]


class CheckFailedError(UnmergeError, AssertionError):
    """A strategy breaks a law of the conformance kit, or something it declares.

    Attributes:
        strategy: The strategy's method name.
        check: Name of the check.
        case: The input on which it fails.
        expected: What the law says.
        got: What the strategy did.
    """

    def __init__(self, *, strategy: str, check: str, case: str, expected: str, got: str) -> None:
        super().__init__(f"{strategy}: {check}: on {case}: expected {expected}, got {got}")
        self.strategy = strategy
        self.check = check
        self.case = case
        self.expected = expected
        self.got = got

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by the facts: test runners send errors between processes."""
        facts = (self.strategy, self.check, self.case, self.expected, self.got)
        return _rebuilt, facts


def _rebuilt(strategy: str, check: str, case: str, expected: str, got: str) -> CheckFailedError:
    return CheckFailedError(strategy=strategy, check=check, case=case, expected=expected, got=got)


class CheckSkippedError(UnmergeError):
    """A check cannot say anything about this strategy here; the message says why."""


class MissingExtraError(ConfigError, ImportError):
    """A part of the kit needs a package that only an extra of this distribution installs."""


class Violation(Exception):  # noqa: N818 - never seen by users: a check turns it into the error
    """What a law's function raises; the check adds the names of strategy and check."""

    def __init__(self, case: str, expected: str, got: str) -> None:
        super().__init__(case, expected, got)
        self.case = case
        self.expected = expected
        self.got = got


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What one check found about one strategy.

    Attributes:
        name: Name of the check.
        status: `"passed"`; `"failed"`; `"skipped"`: it does not apply; `"expected_failure"`: it
            failed as announced; `"unexpected_pass"`: it was announced to fail and did not, which
            counts as a failure, so that announcements do not outlive their reason.
        reason: Why it failed, was skipped or was expected to fail; of a pass, what is worth
            knowing, or "".
        law: What the check is about, in one line.
    """

    name: str
    status: Status
    reason: str
    law: str

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong: passed, skipped, or failed as announced."""
        return self.status not in ("failed", "unexpected_pass")
