from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import unmerge_bundle
from unmerge_bundle import VerifyReport, verify
from unmerge_bundle.verify import Depth

Make = Callable[..., Any]
DEPTHS: tuple[Depth, ...] = ("structure", "digests", "reconstruction")


def codes(report: VerifyReport) -> list[str]:
    return [problem.code for problem in report.problems]


@pytest.mark.parametrize("depth", DEPTHS)
def test_good_bundles_pass(
    tmp_path: Path, bundle_path: Path, make_merged: Make, depth: Depth
) -> None:
    report = verify(bundle_path, depth)
    assert report.ok
    assert (report.generations, report.blobs) == (1, 4)
    assert report.adapters == (3 if depth == "reconstruction" else 0)
    make_merged(dense=True).write(tmp_path / "merged")
    assert verify(tmp_path / "merged", depth).ok


def test_the_missing_blob_is_named(bundle_path: Path, adapter_blob: Callable[[str], Path]) -> None:
    blob = adapter_blob("math")
    blob.unlink()
    for depth in DEPTHS:
        report = verify(bundle_path, depth)
        assert codes(report) == ["missing-blob"]
        assert report.problems[0].path == str(blob)
        assert not report.problems[0].message.startswith(str(blob))


def test_every_problem_is_listed_once(
    bundle_path: Path, adapter_blob: Callable[[str], Path]
) -> None:
    shared = bundle_path / unmerge_bundle.open(bundle_path).generation.shared[0].file
    data = bytearray(shared.read_bytes())
    data[-1] ^= 1
    shared.write_bytes(data)
    adapter_blob("code").write_bytes(b"short")
    assert codes(verify(bundle_path, "structure")) == ["blob-size"]
    assert codes(verify(bundle_path, "digests")) == ["digest-mismatch", "blob-size"]
    assert codes(verify(bundle_path, "reconstruction")) == ["digest-mismatch", "blob-size"]


def test_bundles_that_cannot_be_opened_are_a_report(tmp_path: Path, bundle_path: Path) -> None:
    assert codes(verify(tmp_path / "nowhere")) == ["not-a-bundle"]
    (document,) = (bundle_path / "blobs").glob("*.json")
    document.write_bytes(document.read_bytes().replace(b"rmm", b"rmn"))
    assert codes(verify(bundle_path, "reconstruction")) == ["digest-mismatch"]
    (bundle_path / "bundle.json").write_bytes(b"{")
    assert codes(verify(bundle_path)) == ["manifest"]


def test_nan_in_a_merged_result_is_found(tmp_path: Path, make_merged: Make) -> None:
    zoo = make_merged()
    zoo.encodings["layers.0.q_proj"].A[0, 0] = 12345.0
    zoo.write(tmp_path / "out")
    (shared,) = unmerge_bundle.open(tmp_path / "out").generation.shared
    file = tmp_path / "out" / shared.file
    number, nan = np.float32(12345.0).tobytes(), np.float32("nan").tobytes()
    file.write_bytes(file.read_bytes().replace(number, nan))
    # The digest catches it first; "reconstruction" would, even with a matching digest.
    assert codes(verify(tmp_path / "out", "structure")) == []
    assert codes(verify(tmp_path / "out", "reconstruction")) == ["digest-mismatch"]


@pytest.mark.parametrize("scalings", [(2.0, 2.0), (1.0, 2.0)])
def test_recorded_errors_are_measured_again(
    tmp_path: Path, make_zoo: Make, scalings: tuple[float, float]
) -> None:
    zoo = make_zoo(scaling=scalings[0], source_scaling=scalings[1])
    zoo.write(tmp_path / "out")
    report = verify(tmp_path / "out", "reconstruction", zoo.originals.__getitem__)
    assert report.ok
    assert report.compared == 3

    A, B = zoo.originals["math"]["layers.0.q_proj"]
    zoo.originals["math"]["layers.0.q_proj"] = (A * 1.05, B)
    report = verify(tmp_path / "out", "reconstruction", zoo.originals.__getitem__)
    assert codes(report) == ["reconstruction-mismatch"] * 1
    assert "adapter 'math'" in report.problems[0].path

    zoo.originals["math"]["layers.0.q_proj"] = (A[:, :-1], B)
    del zoo.originals["sql"]["layers.0.q_proj"]
    report = verify(tmp_path / "out", "reconstruction", zoo.originals.__getitem__)
    assert codes(report) == ["tensor-mismatch"] * 2


def test_recorded_infinity_must_be_found_again(tmp_path: Path, make_zoo: Make) -> None:
    zoo = make_zoo()
    worst = unmerge_bundle.ModuleErrors(factors=float("inf"), delta=float("inf"))
    zoo.errors["layers.0.q_proj"]["math"] = worst
    zoo.write(tmp_path / "out")
    assert unmerge_bundle.open(tmp_path / "out").errors("math")["layers.0.q_proj"] == worst
    report = verify(tmp_path / "out", "reconstruction", zoo.originals.__getitem__)
    assert codes(report) == ["reconstruction-mismatch"]


def digests_of(zoo: Any) -> dict[str, str]:
    return {source.name: source.digest for source in zoo.info.sources}


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("merged", [False, True])
def test_every_source_is_compared_with_its_original(
    tmp_path: Path, make_zoo: Make, make_merged: Make, depth: Depth, merged: bool
) -> None:
    zoo = make_merged() if merged else make_zoo()
    zoo.write(tmp_path / "out")
    digests = {**digests_of(zoo), "unrelated": "sha256:" + "7" * 64}
    assert verify(tmp_path / "out", depth).sources == 0
    report = verify(tmp_path / "out", depth, digests=digests)
    assert report.ok
    assert report.sources == len(zoo.info.sources)

    digests["code"] = "sha256:" + "1" * 64
    del digests["math"]
    report = verify(tmp_path / "out", depth, digests=digests)
    assert codes(report) == ["digest-mismatch", "unknown-source"]
    assert [problem.path for problem in report.problems] == ["source 'code'", "source 'math'"]
    assert "got sha256:1111" in report.problems[0].message
    assert report.sources == len(zoo.info.sources) - 1


def test_only_originals_with_the_right_digest_are_asked_for(tmp_path: Path, make_zoo: Make) -> None:
    zoo = make_zoo()
    zoo.write(tmp_path / "out")
    asked = []

    def originals(name: str) -> Any:
        asked.append(name)
        return zoo.originals[name]

    digests = {**digests_of(zoo), "code": "sha256:" + "1" * 64}
    del digests["math"]
    report = verify(tmp_path / "out", "reconstruction", originals, digests)
    assert codes(report) == ["digest-mismatch", "unknown-source"]
    assert asked == ["sql"]
    assert (report.sources, report.adapters, report.compared) == (2, 3, 1)


def test_modules_outside_the_merge_are_named_and_lost_ones_are_problems(
    tmp_path: Path, make_zoo: Make
) -> None:
    zoo = make_zoo()
    zoo.write(tmp_path / "out")
    factors = zoo.originals["math"]["layers.0.q_proj"]
    for name in ("math", "code"):
        zoo.originals[name]["layers.9.elsewhere"] = factors
    report = verify(tmp_path / "out", "reconstruction", zoo.originals.__getitem__)
    assert report.ok
    assert (report.compared, report.left_out) == (3, ("layers.9.elsewhere",))
    # The bundle says "sql" lacks this module: an original that has it is another one.
    zoo.originals["sql"]["layers.1.v_proj"] = factors
    report = verify(tmp_path / "out", "reconstruction", zoo.originals.__getitem__)
    assert codes(report) == ["tensor-mismatch"]
    assert report.problems[0].path == "adapter 'sql'"
    assert "layers.1.v_proj" in report.problems[0].message
    assert report.compared == 2


def test_originals_without_effect_are_refused(bundle_path: Path) -> None:
    with pytest.raises(ValueError, match="reconstruction"):
        verify(bundle_path, "digests", lambda _: {})
