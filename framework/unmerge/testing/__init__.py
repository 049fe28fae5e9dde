"""The conformance kit: the laws of merging, checked on any merger by what it declares.

    >>> from unmerge.testing import check_merger
    >>> from unmerge_strategies import Average
    >>> results = check_merger(Average())
    >>> {result.status for result in results} == {"passed", "skipped"}
    True
    >>> [result.reason for result in results if result.name == "the_seed_is_irrelevant"]
    ['']
    >>> [result.reason for result in results if result.name == "weights_scale_deltas"]
    ['declares weight_scales_delta=False']

In a test suite, one test per law:

    from unmerge.testing import parametrize_with_checks

    @parametrize_with_checks([MyRule(), MyRule(density=0.5)])
    def test_conformance(merger, check):
        check(merger)

Capabilities choose the checks, and every declared one is checked. A failure that is known and
has a reason is announced, `expected_failures={"factoring_is_irrelevant": "compares raw factors"}`,
and counts as a failure itself once it no longer happens. Collections of adapters, Hypothesis
strategies that draw them (`adapter_collections`) and a zoo of PEFT directories (`write_zoo`) are
here for tests of your own. pytest and Hypothesis are imported only by what needs them.

What is checked to the bit and what to a tolerance: see `unmerge.testing.laws`.
"""

from unmerge.testing.check import Check
from unmerge.testing.checks import all_checks, check_merger
from unmerge.testing.collections import AdapterCollection, Values, random_collection
from unmerge.testing.generators import adapter_collections
from unmerge.testing.outcome import deltas
from unmerge.testing.results import (
    CheckFailedError,
    CheckResult,
    CheckSkippedError,
    MissingExtraError,
    Status,
)
from unmerge.testing.suites import parametrize_with_checks
from unmerge.testing.zoo import write_zoo

__all__ = [
    "AdapterCollection",
    "Check",
    "CheckFailedError",
    "CheckResult",
    "CheckSkippedError",
    "MissingExtraError",
    "Status",
    "Values",
    "adapter_collections",
    "all_checks",
    "check_merger",
    "deltas",
    "parametrize_with_checks",
    "random_collection",
    "write_zoo",
]
