"""Many adapters at once: all good ones or none, every bad one with its reason, one at a time."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_files import source
from adapters import make_adapter, write_peft_directory
from unmerge import Adapter, AdapterStore
from unmerge.errors import (
    AdapterError,
    AdapterExistsError,
    ConfigError,
    DuplicateAdapterError,
    ImportRefusedError,
    IncompatibleAdaptersError,
    NonFiniteError,
    StoreError,
    UnknownFormatError,
    UnsupportedAdapterError,
)
from unmerge.formats import PeftFileFormat
from unmerge.importing import import_adapters

NAMES = ("chat", "math", "sql")


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore.create(tmp_path / "zoo")


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [
        write_peft_directory(make_adapter(name, seed=seed), tmp_path / "adapters" / name)
        for seed, name in enumerate(NAMES)
    ]


def state(store: AdapterStore) -> tuple[str, tuple[str, ...]]:
    """The version and the adapters that somebody else sees."""
    fresh = AdapterStore.open(store.address)
    return fresh.version, fresh.names()


def with_nan(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[3] = float("nan")
    save_file(tensors, file)


def with_dora(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace('"use_dora": false', '"use_dora": true'))


def other_base(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace("org/base", "org/other"))


def cut_off(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def other_shape(folder: Path) -> None:
    write_peft_directory(make_adapter("x", seed=9, modules={"layers.0.mlp.up": (7, 12)}), folder)


DAMAGE: dict[Callable[[Path], None], tuple[type[Exception], str]] = {
    with_nan: (NonFiniteError, "NaN or infinite"),
    with_dora: (UnsupportedAdapterError, "use_dora"),
    other_base: (IncompatibleAdaptersError, '"org/other"'),
    cut_off: (AdapterError, "truncated or damaged"),
    other_shape: (IncompatibleAdaptersError, r"\(7, 12\)"),
}


def test_all_become_one_version(store: AdapterStore, paths: list[Path]) -> None:
    before = store.version
    report = import_adapters(store, paths, note="first", metadata={"team": "a"})
    assert report.names("added") == NAMES
    assert report.version == store.version == state(store)[0]
    assert [source.source for source in report.sources] == [str(path) for path in paths]
    [newest, parent] = store.history()[:2]
    assert (newest.message, parent.id) == ("add chat, math, sql", before)
    assert (store.info("sql").note, store.info("sql").metadata) == ("first", {"team": "a"})
    assert store.read_adapter("sql").digest() == make_adapter("sql", seed=2).digest()


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
def test_one_bad_adapter_alone_raises_its_own_error(
    store: AdapterStore, paths: list[Path], damage: Callable[[Path], None]
) -> None:
    import_adapters(store, paths[:1])
    before = state(store)
    damage(paths[1])
    error, words = DAMAGE[damage]
    with pytest.raises(error, match=words) as caught:
        import_adapters(store, [paths[1]])
    assert not isinstance(caught.value, ImportRefusedError)
    assert state(store) == before
    assert store.staged == ()


def test_every_bad_adapter_is_reported_and_nothing_is_written(
    store: AdapterStore, tmp_path: Path
) -> None:
    adapters = [
        write_peft_directory(make_adapter(f"a{n}", seed=n), tmp_path / f"a{n}") for n in range(8)
    ]
    for path, damage in zip(adapters[1:], DAMAGE, strict=False):
        damage(path)
    before = state(store)
    with pytest.raises(ImportRefusedError) as caught:
        import_adapters(store, adapters)
    refused = dict(caught.value.refused)
    assert list(refused) == [str(path) for path in adapters[1:6]]
    for path, (_, words) in zip(adapters[1:], DAMAGE.values(), strict=False):
        reason = refused[str(path)]
        assert re.search(words, reason), reason
        assert "\n" not in reason
    assert str(caught.value).startswith("5 of 8 adapters cannot be added, so that none was: ")
    assert all(str(path) in str(caught.value) for path in adapters[1:6])
    assert state(store) == before
    assert store.staged == ()


def test_the_message_names_twenty(store: AdapterStore, tmp_path: Path) -> None:
    sources = [str(tmp_path / f"nothing-{n:02d}") for n in range(23)]
    with pytest.raises(ImportRefusedError, match=r"nothing-19.*; and 3 more$") as caught:
        import_adapters(store, sources)
    assert "nothing-20" not in str(caught.value)
    assert len(caught.value.refused) == 23


def test_with_skip_bad_the_good_ones_are_committed(store: AdapterStore, paths: list[Path]) -> None:
    with_nan(paths[1])
    report = import_adapters(store, [*paths, paths[0].parent / "nobody"], skip_bad=True)
    assert [source.status for source in report.sources] == ["added", "refused", "added", "refused"]
    assert [source.source for source in report.refused] == [
        str(paths[1]),
        str(paths[0].parent / "nobody"),
    ]
    assert state(store) == (report.version, ("chat", "sql"))


def test_nothing_good_is_no_version(store: AdapterStore, paths: list[Path]) -> None:
    for path in paths:
        with_nan(path)
    before = store.version
    report = import_adapters(store, paths, skip_bad=True)
    assert report.version == before == store.version
    assert len(report.refused) == 3


def test_duplicates_by_name_and_by_content(store: AdapterStore, paths: list[Path]) -> None:
    import_adapters(store, paths)
    before = state(store)
    with pytest.raises(AdapterExistsError, match='"sql"'):
        import_adapters(store, paths[2:])
    with pytest.raises(DuplicateAdapterError, match='"again" is "sql"'):
        import_adapters(store, paths[2:], name="again")
    assert state(store) == before
    import_adapters(store, paths[2:], name="again", allow_duplicates=True)
    assert store.info("again").digest == store.info("sql").digest


def test_duplicates_among_the_sources(store: AdapterStore, paths: list[Path]) -> None:
    copy = write_peft_directory(make_adapter("copy", seed=0), paths[0].parent / "copy")
    report = import_adapters(store, [paths[0], copy, paths[0]], skip_bad=True)
    assert [source.status for source in report.sources] == ["added", "refused", "refused"]
    assert '"copy" is "chat" of the staged set' in report.sources[1].reason
    assert 'already has an adapter "chat"' in report.sources[2].reason


def test_replacing_takes_what_changed_and_leaves_the_rest(
    store: AdapterStore, paths: list[Path]
) -> None:
    first = import_adapters(store, paths, note="hand-made", metadata={"team": "a"}).version
    assert import_adapters(store, paths, replace=True).version == first
    write_peft_directory(make_adapter("sql", seed=77), paths[2])
    report = import_adapters(store, paths, replace=True)
    assert [source.status for source in report.sources] == ["unchanged", "unchanged", "replaced"]
    assert store.read_adapter("sql").digest() == make_adapter("sql", seed=77).digest()
    assert (store.info("sql").note, store.info("sql").metadata) == ("hand-made", {"team": "a"})
    assert store.checkout(first).info("sql").digest == make_adapter("sql", seed=2).digest()


def test_a_new_configuration_or_note_is_a_change(store: AdapterStore, paths: list[Path]) -> None:
    import_adapters(store, paths[:1])
    config = paths[0] / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    assert import_adapters(store, paths[:1], replace=True).names("replaced") == ("chat",)
    assert store.read_config("chat") == config.read_text()
    report = import_adapters(store, paths[:1], replace=True, note="better")
    assert report.names("replaced") == ("chat",)
    assert store.info("chat").note == "better"
    report = import_adapters(store, paths[:1], replace=True, metadata={"k": "v"})
    assert report.names("replaced") == ("chat",)
    assert (store.info("chat").note, store.info("chat").metadata) == ("better", {"k": "v"})


def test_replacing_adds_what_is_not_there(store: AdapterStore, paths: list[Path]) -> None:
    assert import_adapters(store, paths, replace=True).names("added") == NAMES


def test_formats_are_recognised_one_by_one_or_forced(store: AdapterStore, tmp_path: Path) -> None:
    sources = [
        source(tmp_path / form, form, seed, torch.float16)
        for seed, form in enumerate(("kohya", "mlx", "peft", "peft_file", "diffusers"))
    ]
    report = import_adapters(store, sources)
    formats = {name: store.info(name).format for name in report.names("added")}
    assert formats == {
        "kohya": "kohya",
        "mlx": "mlx",
        "peft": "peft",
        "style": "peft_file",
        "diffusers": "diffusers",
    }
    with pytest.raises(AdapterError, match="no PEFT adapter"):
        import_adapters(store, sources[:1], format="peft")
    with pytest.raises(AdapterError, match="the options say 3"):
        import_adapters(store, sources[3:4], format=PeftFileFormat(scaling=3), name="x")


def test_usage_is_refused_before_anything_is_read(store: AdapterStore, paths: list[Path]) -> None:
    missing = [Path("nowhere")] * 2
    with pytest.raises(UnknownFormatError, match="did you mean peft"):
        import_adapters(store, missing, format="peftt")
    with pytest.raises(ConfigError, match='"x" is for one adapter, but 2 are given'):
        import_adapters(store, missing, name="x")
    with pytest.raises(ConfigError, match="nothing to import"):
        import_adapters(store, [])
    store.add(make_adapter("waiting", seed=9))
    with pytest.raises(StoreError, match="waiting wait to be committed"):
        import_adapters(store, paths)
    assert store.staged == ("waiting",)


def test_a_store_open_at_a_version_takes_nothing(store: AdapterStore, paths: list[Path]) -> None:
    with pytest.raises(StoreError, match="read-only"):
        import_adapters(store.checkout(store.version), paths)


def test_what_another_writer_committed_meanwhile(store: AdapterStore, paths: list[Path]) -> None:
    def meanwhile(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("read", total):
            other = AdapterStore.open(store.address)
            other.add(make_adapter("sql", seed=50))
            other.commit("theirs")

    with pytest.raises(AdapterExistsError, match="sql"):
        import_adapters(store, paths, progress=meanwhile)
    assert state(store)[1] == ("sql",)
    assert store.staged == ()


def test_an_interruption_leaves_the_store_as_it_was(store: AdapterStore, paths: list[Path]) -> None:
    steps: list[tuple[str, int, int]] = []
    import_adapters(store, paths, progress=lambda *step: steps.append(step))
    assert {phase for phase, _, _ in steps} == {"read", "write"}
    assert ("read", 3, 3) in steps
    for name in NAMES:
        store.remove(name)
    store.commit("again")
    before = state(store)

    def interrupt(at: int) -> Callable[[str, int, int], None]:
        calls = iter(range(at + 1))

        def progress(phase: str, done: int, total: int) -> None:
            if next(calls) == at:
                raise KeyboardInterrupt

        return progress

    for at in range(len(steps)):
        with pytest.raises(KeyboardInterrupt):
            import_adapters(store, paths, progress=interrupt(at))
        assert state(store) == before
        assert store.staged == ()
    import_adapters(store, paths)
    assert state(store)[1] == NAMES


def test_one_adapter_is_in_memory_at_a_time(
    store: AdapterStore, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    add = AdapterStore.add

    def counting(self: AdapterStore, adapter: Adapter, **options: object) -> None:
        nonlocal most
        alive.append(weakref.ref(next(iter(adapter.modules.values())).A))
        gc.collect()
        most = max(most, sum(tensor() is not None for tensor in alive))
        add(self, adapter, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(AdapterStore, "add", counting)
    import_adapters(store, paths)
    assert (len(alive), most) == (3, 1)


def test_the_order_of_the_sources_changes_no_tensor(tmp_path: Path, paths: list[Path]) -> None:
    stores = [AdapterStore.create(tmp_path / f"zoo{n}") for n in range(2)]
    import_adapters(stores[0], paths)
    import_adapters(stores[1], paths[::-1])
    for name in NAMES:
        assert stores[0].info(name).digest == stores[1].info(name).digest
        assert stores[1].read_adapter(name).digest() == stores[1].info(name).digest


def test_names_in_the_history_are_few(store: AdapterStore, tmp_path: Path) -> None:
    modules = {"layers.0.mlp.up": (20, 12)}
    sources = [
        write_peft_directory(make_adapter(f"a{n}", seed=n, modules=modules), tmp_path / f"a{n}")
        for n in range(8)
    ]
    import_adapters(store, sources)
    assert store.history()[0].message == "add a0, a1, a2, a3, a4 and 3 more"
    import_adapters(store, sources[:1], name="b", allow_duplicates=True, message="by hand")
    assert store.history()[0].message == "by hand"
