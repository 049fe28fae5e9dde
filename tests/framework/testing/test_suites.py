"""The kit as a pytest suite: ids, what is left out, announced failures, the missing extra."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unmerge import Merger
from unmerge.errors import ConfigError
from unmerge.testing import MissingExtraError, adapter_collections, parametrize_with_checks
from unmerge_strategies import Average, MmSvd, TaskArithmetic


def params(*mergers: Merger, **options: Any) -> list[Any]:
    @parametrize_with_checks(mergers, **options)
    def test(merger: Merger, check: Any) -> None:
        check(merger)

    [mark] = test.pytestmark  # type: ignore[attr-defined]
    assert mark.args[0] == ("merger", "check")
    return list(mark.args[1])


def test_ids_name_merger_fields_and_check() -> None:
    ids = [p.id for p in params(Average(), MmSvd(rank=3, inner=Average()), Average())]
    assert "average-one_adapter_gives_itself" in ids
    assert "mm_svd(rank=3,inner=average)-encodings_fit" in ids
    assert "average#2-encodings_fit" in ids
    assert len(set(ids)) == len(ids)


def test_checks_that_do_not_apply_are_left_out() -> None:
    names = {p.id.partition("-")[2] for p in params(Average())}
    assert "weights_scale_deltas" not in names
    assert "mixed_ranks_are_merged" in names


def test_a_check_can_be_called_as_it_is_given() -> None:
    for param in params(TaskArithmetic()):
        merger, check = param.values
        assert merger == TaskArithmetic()
        assert repr(check) in param.id
    check(merger)


def test_expected_failures_may_depend_on_the_merger() -> None:
    def announced(merger: Merger) -> dict[str, str]:
        return {"encodings_fit": "known"} if isinstance(merger, MmSvd) else {}

    marked = [p.id for p in params(Average(), MmSvd(), expected_failures=announced) if p.marks]
    assert marked == ["mm_svd-encodings_fit"]


def test_what_is_no_merger_or_no_check_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected instances of mergers"):
        params(Average)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no check is called"):
        params(Average(), expected_failures={"no_such_check": "?"})


SUITE = """
import torch
from unmerge import Capabilities, DeltaEncoding, Merger
from unmerge.testing import parametrize_with_checks


class Zero(Merger, frozen=True):
    method = "suite.zero"

    @property
    def capabilities(self):
        return Capabilities(mixed_ranks=True, ignores_weights=True)

    def merge(self, stack, context):
        return [DeltaEncoding(delta=torch.zeros(m.shape.d_out, m.shape.d_in)) for m in stack]


def make():
    class Local(Zero, frozen=True):
        pass

    return Local()


@parametrize_with_checks(
    [make()],
    expected_failures={
        "nan_never_vanishes": "zero whatever comes",
        "repeating_gives_equal_bytes": "announced, and does not happen",
    },
)
def test_conformance(merger, check):
    check(merger)
"""


def test_a_suite_reports_announced_failures_and_late_skips(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rsxX", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert any(
        "XFAIL" in line and "nan_never_vanishes" in line and "zero whatever" in line
        for line in lines
    )
    assert any("SKIPPED" in line and "cannot import" in line for line in lines)
    assert "[XPASS(strict)] announced, and does not happen" in result.stdout
    assert "1 failed" in lines[-1]


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    for needs in (lambda: parametrize_with_checks([Average()]), adapter_collections):
        with pytest.raises(MissingExtraError, match=r'pip install "unmerge\[testing\]"') as caught:
            needs()
        assert isinstance(caught.value, ImportError)


def test_the_kit_imports_without_pytest_and_hypothesis() -> None:
    program = (
        "import sys\n"
        "sys.modules['pytest'] = sys.modules['hypothesis'] = None\n"
        "from unmerge.testing import check_merger\n"
        "from unmerge_strategies import Average\n"
        "print(sum(result.ok for result in check_merger(Average())))\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 20
    assert result.stderr == ""
