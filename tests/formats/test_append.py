import dataclasses
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import unmerge_bundle
from formats.conftest import digest_of
from formats.kinds import D_IN, D_OUT, KINDS, NAMES, SCALINGS, fill, originals
from unmerge_bundle import (
    AdapterInBundleError,
    AdapterRecord,
    BundleBusyError,
    InvalidInputError,
    MissingBlobError,
    NonFiniteError,
    NotABundleError,
    RecordedModule,
    RefitError,
    RestoredModule,
    append_adapter,
    measure,
    verify,
)
from unmerge_bundle.lock import locked

Make = Callable[..., Any]
CREATED = datetime(2026, 2, 1, tzinfo=UTC)


def new_record(name: str = "new", kinds: tuple[str, ...] = KINDS, **changes: Any) -> AdapterRecord:
    modules = tuple(
        RecordedModule(path=kind, rank=2, source_scaling=1.5, dtype="float32") for kind in kinds
    )
    fields: dict[str, Any] = {
        "name": name,
        "format": "peft",
        "config": "{}",
        "base_model": "tiny/base",
        "digest": digest_of(name),
        "modules": modules,
    }
    return AdapterRecord.model_validate({**fields, **changes})


def new_factors(kinds: tuple[str, ...] = KINDS, rank: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(7)
    return {
        kind: (
            rng.standard_normal((rank, D_IN)).astype(np.float32),
            rng.standard_normal((D_OUT, rank)).astype(np.float32),
        )
        for kind in kinds
    }


def append(path: Path, name: str = "new", **changes: Any) -> unmerge_bundle.Appended:
    return append_adapter(path, new_record(name), new_factors(), {}, created=CREATED, **changes)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.fixture
def bundle_path(tmp_path: Path, make_zoo: Make) -> Path:
    zoo = fill(make_zoo(), lacking={"sql": "masked"})
    zoo.info = zoo.info.model_copy(
        update={"base_model": unmerge_bundle.BaseModelId(id="tiny/base", revision=None)}
    )
    zoo.write(tmp_path / "out.rmb")
    return tmp_path / "out.rmb"


def test_a_new_generation_and_every_earlier_file_untouched(bundle_path: Path) -> None:
    before = files(bundle_path)
    old = unmerge_bundle.open(bundle_path)
    restored = {name: old.restore(name) for name in NAMES}
    verbatim = {"head": np.arange(3, dtype=np.int64)}
    appended = append_adapter(
        bundle_path, new_record(), new_factors(), verbatim, message="one more", created=CREATED
    )
    after = files(bundle_path)
    assert appended.generation == 2
    assert list(bundle_path.parent.iterdir()) == [bundle_path]
    assert {k: after[k] for k in before if k != "bundle.json"} == {
        k: v for k, v in before.items() if k != "bundle.json"
    }
    assert len(after) == len(before) + 2

    bundle = unmerge_bundle.open(bundle_path)
    document = bundle.generation
    assert [g.message for g in bundle.generations] == ["first", "one more"]
    assert bundle.generations[1].created == "2026-02-01T00:00:00Z"
    assert (document.number, document.parent) == (2, bundle.generations[0].document.digest)
    assert bundle.adapters == ("code", "math", "new", "sql")
    assert [a.generation for a in document.adapters] == [1, 1, 2, 1]
    assert [s.name for s in document.sources] == list(bundle.adapters)
    assert document.shared == old.generation.shared
    assert document.modules == old.generation.modules
    assert document.recipe == old.generation.recipe
    assert document.absent == {"sql": ("masked",)}
    for name in NAMES:
        found = bundle.restore(name)
        for path, module in found.modules.items():
            earlier = restored[name].modules[path]
            if isinstance(module, RestoredModule) and isinstance(earlier, RestoredModule):
                assert module.A.tobytes() == earlier.A.tobytes()
                assert module.B.tobytes() == earlier.B.tobytes()
    added = bundle.restore("new")
    assert added.verbatim["head"].tolist() == [0, 1, 2]
    assert {path: m.errors for path, m in added.modules.items()} == appended.errors
    assert list(appended.errors) == sorted(KINDS)
    # Readers that had it open go on with what they opened.
    assert old.adapters == NAMES
    assert old.restore("math").modules.keys() == restored["math"].modules.keys()


def test_the_errors_are_those_a_verifier_measures(bundle_path: Path, make_zoo: Make) -> None:
    zoo = fill(make_zoo(), lacking={"sql": "masked"})
    append(bundle_path)
    sources = {**zoo.originals, "new": new_factors()}
    digests = {name: digest_of(name) for name in sources}
    report = verify(bundle_path, "reconstruction", sources.__getitem__, digests)
    assert report.problems == ()
    assert (report.generations, report.adapters, report.compared, report.sources) == (2, 4, 4, 4)
    errors = unmerge_bundle.open(bundle_path).errors("new")
    assert errors["own"] == unmerge_bundle.ModuleErrors(factors=0.0, delta=0.0)
    assert 0 < errors["quantised8"].delta < 0.02 < errors["quantised4"].delta < 0.3
    assert 0 < errors["core"].delta < 1
    assert errors["masked"].factors is None


def test_an_adapter_of_the_merge_comes_back_as_well_again(tmp_path: Path, make_zoo: Make) -> None:
    zoo = fill(make_zoo())
    zoo.write(tmp_path / "out.rmb")
    bundle = unmerge_bundle.open(tmp_path / "out.rmb")
    restored = bundle.restore("math")
    factors = {
        path: (m.A, m.B) for path, m in restored.modules.items() if isinstance(m, RestoredModule)
    }
    record = zoo.records["math"]
    modules = tuple(
        RecordedModule(path=path, rank=len(A), source_scaling=SCALINGS["math"], dtype="float32")
        for path, (A, _) in factors.items()
    )
    again = record.model_copy(update={"name": "again", "modules": modules})
    appended = append_adapter(tmp_path / "out.rmb", again, factors, {})
    for path, errors in appended.errors.items():
        assert errors.delta < (0.1 if path == "quantised4" else 0.01), path
        if path in ("affine", "core", "diagonal", "tall"):
            assert errors.delta < 1e-5
    assert unmerge_bundle.open(tmp_path / "out.rmb").generation.absent == {"again": ("masked",)}


def test_folded_bundles_stay_folded(tmp_path: Path, make_zoo: Make) -> None:
    zoo = fill(make_zoo(), kinds=("affine",))
    encoding = dataclasses.replace(zoo.encodings["affine"], scalings=(1.0, 1.0, 1.0))
    zoo.encodings["affine"] = encoding
    for name, factors in originals(0).items():
        zoo.errors["affine"][name] = measure(
            encoding, name, factors, source_scaling=SCALINGS[name], dtype="float32"
        )
    zoo.write(tmp_path / "out.rmb")
    append_adapter(
        tmp_path / "out.rmb", new_record(kinds=("affine",)), new_factors(("affine",)), {}
    )
    module = unmerge_bundle.open(tmp_path / "out.rmb").restore("new").modules["affine"]
    assert isinstance(module, RestoredModule)
    assert (module.scaling, module.source_scaling) == (1.0, 1.5)
    A, B = new_factors(("affine",))["affine"]
    folded = unmerge_bundle.fit_adapter(
        unmerge_bundle.open(tmp_path / "out.rmb").generation.modules[0],  # type: ignore[arg-type]
        encoding.shared_tensors(),
        (A, 1.5 * B),
        source_scaling=1.0,
        scaling=1.0,
        store_dtype="float32",
    )
    appended = dataclasses.replace(
        encoding,
        names=("new",),
        scalings=(1.0,),
        coefficients_A=folded.tensors["coefficients_A"][None],
        coefficients_B=folded.tensors["coefficients_B"][None],
    )
    expected = unmerge_bundle.reconstruct(appended, "new", dtype="float32")
    np.testing.assert_allclose(module.B, expected[1], rtol=1e-5, atol=1e-6)


def test_equal_appends_give_equal_bytes(tmp_path: Path, make_zoo: Make) -> None:
    found = []
    for name in ("a.rmb", "b.rmb"):
        fill(make_zoo()).write(tmp_path / name)
        append(tmp_path / name)
        append(tmp_path / name, "other")
        found.append(files(tmp_path / name))
    assert found[0] == found[1]
    assert unmerge_bundle.open(tmp_path / "a.rmb").generation.number == 3
    assert verify(tmp_path / "a.rmb", "reconstruction").ok


def refused(path: Path, error: type[Exception], match: str, call: Callable[[], object]) -> None:
    before = files(path.parent)
    with pytest.raises(error, match=match) as caught:
        call()
    assert type(caught.value) is error
    assert files(path.parent) == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_what_cannot_be_appended_is_refused_by_name(bundle_path: Path) -> None:
    def call(
        record: AdapterRecord | None = None, factors: Any = None, **options: Any
    ) -> Callable[[], object]:
        return lambda: append_adapter(
            bundle_path, record or new_record(), factors or new_factors(), {}, **options
        )

    wide = new_record(modules=[{**m.model_dump(), "rank": 4} for m in new_record().modules])
    refused(bundle_path, RefitError, "rank 4, the basis 3", call(wide, new_factors(rank=4)))
    more = (*KINDS, "elsewhere")
    refused(
        bundle_path,
        RefitError,
        "'elsewhere' and 0 more",
        call(new_record(kinds=more), new_factors(more)),
    )
    narrow = {path: (A[:, :-1], B) for path, (A, B) in new_factors().items()}
    refused(bundle_path, RefitError, "another base model", call(None, narrow))
    refused(bundle_path, AdapterInBundleError, "'math' already", call(new_record("math")))
    other = new_record(base_model="other/base")
    refused(bundle_path, InvalidInputError, "'other/base', the bundle for 'tiny/base'", call(other))
    refused(bundle_path, InvalidInputError, "differ in", call(None, new_factors(KINDS[:3])))
    refused(
        bundle_path, InvalidInputError, r"expected A \(2, d_in\)", call(None, new_factors(rank=1))
    )
    nan = new_factors()
    nan["masked"][1][0, 0] = np.nan
    refused(bundle_path, NonFiniteError, "masked, adapter 'new', factor B", call(None, nan))
    refused(bundle_path, InvalidInputError, "4097 characters", call(message="x" * 4097))
    refused(bundle_path, InvalidInputError, "time zone", call(created=datetime(2026, 1, 1)))  # noqa: DTZ001
    refused(bundle_path, InvalidInputError, "weight", call(weight=float("nan")))


def test_merged_bundles_and_no_bundles(tmp_path: Path, make_merged: Make) -> None:
    path = tmp_path / "merged.rmb"
    make_merged().write(path)
    refused(path, RefitError, "merge again with 'new'", lambda: append(path))
    for place in (tmp_path / "nothing", tmp_path / "merged.rmb" / "blobs", tmp_path / "a\0b"):
        refused(path, NotABundleError, r"bundle\.json", lambda place=place: append(place))


def test_a_missing_shared_blob_stops_it(bundle_path: Path) -> None:
    (shared,) = unmerge_bundle.open(bundle_path).generation.shared
    (bundle_path / shared.file).unlink()
    refused(bundle_path, MissingBlobError, "not there", lambda: append(bundle_path))


@pytest.mark.parametrize("step", ["replace", "rmtree"])
def test_a_crash_leaves_the_bundle_as_it_was(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = (bundle_path / "bundle.json").read_bytes()

    class PowerCutError(BaseException):
        pass

    real = Path.replace

    def cut(self: Path, target: Path) -> Path:
        if self.name == "bundle.json":
            raise PowerCutError
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", cut)
        if step == "rmtree":  # killed outright: nothing is tidied up either
            patch.setattr("unmerge_bundle.append.shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(PowerCutError):
            append(bundle_path)
    assert (bundle_path / "bundle.json").read_bytes() == before
    assert unmerge_bundle.open(bundle_path).adapters == NAMES
    assert verify(bundle_path, "reconstruction").ok
    # What is left behind is in nobody's way.
    assert append(bundle_path).generation == 2
    assert verify(bundle_path, "reconstruction").ok


def test_a_writer_elsewhere_is_noticed(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unmerge_bundle import append as module

    manifest = json.loads((bundle_path / "bundle.json").read_bytes())
    real = module.write_documents

    def meanwhile(*args: Any, **options: Any) -> Any:
        (bundle_path / "bundle.json").write_text(json.dumps(manifest))
        return real(*args, **options)

    monkeypatch.setattr(module, "write_documents", meanwhile)
    with pytest.raises(BundleBusyError, match="meanwhile"):
        append(bundle_path)
    assert json.loads((bundle_path / "bundle.json").read_bytes()) == manifest


def test_threads_queue(bundle_path: Path) -> None:
    failures: list[BaseException] = []

    def run(name: str) -> None:
        try:
            append(bundle_path, name)
        except BaseException as error:  # noqa: BLE001 - reported by the test
            failures.append(error)

    names = [f"t{index}" for index in range(6)]
    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    bundle = unmerge_bundle.open(bundle_path)
    assert bundle.adapters == tuple(sorted((*NAMES, *names)))
    assert bundle.generation.number == 7
    assert verify(bundle_path, "reconstruction").ok


HOLD = """
import sys
from pathlib import Path
from unmerge_bundle.lock import locked
with locked(Path(sys.argv[1]), timeout=1):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_goes_with_the_process_that_holds_it(bundle_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(bundle_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BundleBusyError):
            append(bundle_path, timeout=0)
        other.kill()
        other.wait()
        assert append(bundle_path, timeout=5).generation == 2
    assert list(bundle_path.parent.iterdir()) == [bundle_path]


def test_who_waits_too_long_is_told(bundle_path: Path) -> None:
    with locked(bundle_path, timeout=1):
        with pytest.raises(BundleBusyError, match=r"\.out\.rmb\.lock") as caught:
            append(bundle_path, timeout=0)
        assert caught.value.code == "busy"
    assert append(bundle_path, timeout=0).generation == 2


def test_a_removed_lock_file_is_no_lock(tmp_path: Path) -> None:
    root = tmp_path / "x"
    with locked(root, timeout=1):
        (tmp_path / ".x.lock").unlink()  # as a holder does on releasing it
        with locked(root, timeout=1):
            assert (tmp_path / ".x.lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_on_a_file_that_is_gone_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unmerge_bundle import lock

    real, tries = lock._try_lock, []

    def late(descriptor: int) -> bool:
        if not tries:  # the holder removes its file between our opening and locking it
            (tmp_path / ".x.lock").unlink()
        tries.append(descriptor)
        return real(descriptor)

    monkeypatch.setattr(lock, "_try_lock", late)
    with locked(tmp_path / "x", timeout=5):
        assert (tmp_path / ".x.lock").exists()
    assert len(tries) == 2


def test_verify_reads_every_blob_once(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(4):
        append(bundle_path, f"n{index}")
    from unmerge_bundle.reader import Bundle

    opened: list[str] = []
    real = Bundle.open_blob

    def counting(self: Bundle, descriptor: Any) -> Any:
        opened.append(descriptor.digest)
        return real(self, descriptor)

    monkeypatch.setattr(Bundle, "open_blob", counting)
    report = verify(bundle_path, "digests")
    assert (report.ok, report.generations, report.blobs) == (True, 5, 8)
    assert len(opened) == len(set(opened)) == 8


def test_damage_in_any_generation_is_found(bundle_path: Path) -> None:
    append(bundle_path)
    bundle = unmerge_bundle.open(bundle_path)
    (entry,) = [a for a in bundle.generation.adapters if a.name == "new"]
    file = bundle_path / entry.blob.file
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert hashlib.sha256(data).hexdigest() != entry.blob.digest[7:]
    report = verify(bundle_path, "digests")
    assert [problem.code for problem in report.problems] == ["digest-mismatch"]
