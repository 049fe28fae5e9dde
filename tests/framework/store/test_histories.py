"""Whatever is done to a store, in whatever order: every version there must be is there, exactly."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from assorted import assorted, content
from unmerge.errors import AdapterExistsError, UnknownVersionError
from unmerge.store import AdapterStore

NAMES = ("a", "b", "c")
BODIES = [
    assorted("", seed=seed, dtype=dtype, rank=rank, modules=modules, head=head)
    for seed, (dtype, rank, modules, head) in enumerate(
        [
            (torch.float32, 2, ("layers.0.q_proj", "tokens"), True),
            (torch.float32, 2, ("conv", "layers.0.q_proj"), False),
            (torch.bfloat16, 3, ("tokens",), True),
            (torch.float16, 1, ("conv",), False),
        ]
    )
]
NOTES = ("", "good", "bad")

State = dict[str, tuple[dict[str, object], str]]
"""Content and note of every adapter of a version, by name."""


class Histories(RuleBasedStateMachine):
    """A store beside a plain dictionary of what each of its versions must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = AdapterStore.create(self.folder / "zoo")
        self.versions: dict[str, State] = {self.store.version: {}}
        self.tags: dict[str, str] = {}
        self.staged: dict[str, tuple[dict[str, object], str] | None] = {}
        self.checked = True

    @property
    def tip(self) -> State:
        return self.versions[self.store.version]

    @rule(
        name=st.sampled_from(NAMES),
        body=st.integers(0, len(BODIES) - 1),
        note=st.sampled_from(NOTES),
    )
    def add(self, name: str, body: int, note: str) -> None:
        adapter = dataclasses.replace(BODIES[body], name=name)
        if name in self.staged:
            with pytest.raises(AdapterExistsError):
                self.store.add(adapter, replace=True)
            return
        if name in self.tip:
            with pytest.raises(AdapterExistsError):
                self.store.add(adapter, allow_duplicates=True)
        self.store.add(adapter, note=note, replace=True, allow_duplicates=True)
        self.staged[name] = (content(adapter), note)

    @precondition(lambda self: self.tip.keys() - self.staged.keys())
    @rule(data=st.data())
    def remove(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.tip.keys() - self.staged.keys())))
        self.store.remove(name)
        self.staged[name] = None

    @precondition(lambda self: self.tip.keys() - self.staged.keys())
    @rule(data=st.data(), note=st.sampled_from(NOTES))
    def annotate(self, data: Any, note: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.tip.keys() - self.staged.keys())))
        self.store.annotate(name, note=note)
        self.staged[name] = (self.tip[name][0], note)

    @rule()
    def discard(self) -> None:
        self.store.discard()
        self.staged = {}

    @precondition(lambda self: self.staged)
    @rule()
    def commit(self) -> None:
        state = {**self.tip, **self.staged}
        self.store.commit("")
        self.versions[self.store.version] = {
            name: values for name, values in sorted(state.items()) if values is not None
        }
        self.staged, self.checked = {}, False

    @precondition(lambda self: len(self.tags) < 3)
    @rule(data=st.data())
    def tag(self, data: Any) -> None:
        version = data.draw(st.sampled_from([v.id for v in self.store.history()]))
        name = f"v{len(self.tags)}"
        self.store.tag(name, version)
        self.tags[name] = version

    @rule()
    def reopen(self) -> None:
        self.store = AdapterStore.open(self.store.address)
        self.staged, self.checked = {}, False

    @rule(data=st.data(), forget=st.sampled_from(["nothing", "some", "all"]))
    def gc(self, data: Any, forget: str) -> None:
        moment: datetime | None = None
        if forget == "some":
            moment = data.draw(st.sampled_from([v.written_at for v in self.store.history()]))
        elif forget == "all":
            moment = datetime.now(UTC)
        before = self.store.version
        report = self.store.gc(forget_before=moment)
        if report.compacted is not None:
            assert self.store.version == report.compacted != before
            self.versions[report.compacted] = self.versions[before]
        for version in report.forgotten:
            assert version not in (self.store.version, *self.tags.values())
            del self.versions[version]
            with pytest.raises(UnknownVersionError):
                self.store.resolve(version)
        self.checked = False

    @invariant()
    def every_version_is_what_it_was(self) -> None:
        if self.checked:
            return
        store = AdapterStore.open(self.store.address)
        assert store.version == self.store.version
        assert store.tags() == self.tags
        for version, expected in self.versions.items():
            at = store.checkout(version)
            assert at.names() == tuple(expected)
            for name, (values, note) in expected.items():
                assert content(at.read_adapter(name)) == values
                assert at.info(name).note == note
        assert store.verify().ok
        self.checked = True

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


def test_histories() -> None:
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=12,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            database=None,
            phases=(Phase.generate,),  # making a failure shorter would take minutes
        ),
    )
