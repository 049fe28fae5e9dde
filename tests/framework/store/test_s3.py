"""Repositories on S3, on a real server: addresses, the environment, creation, lost answers."""

from __future__ import annotations

import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import zarr

import s3
import writers
from unmerge.errors import ConfigError, StoreError, StoreExistsError, UnknownVersionError
from unmerge.store.remote import Connection, S3Place
from unmerge.store.repository import GarbageReport, StoreRepository

NOTHING = GarbageReport(objects=0, bytes=0)


@pytest.fixture
def repository(s3_address: str) -> StoreRepository:
    return StoreRepository.create(s3_address, writers.create_log)


def put(repository: StoreRepository, number: int) -> str:
    return repository.transact(lambda root, _: writers.append(root, number), str(number))[0]


def at(repository: StoreRepository, version: str) -> list[int]:
    return [int(n) for n in np.asarray(repository.read(version)[writers.LOG][...])]


def now() -> datetime:
    return datetime.now(UTC)


def test_a_repository_on_s3_does_what_one_on_a_disk_does(repository: StoreRepository) -> None:
    versions = [repository.tip(), *(put(repository, n) for n in range(3))]
    repository.tag("v1", versions[1])
    with pytest.raises(StoreError, match='tag "v1" already names'):
        repository.tag("v1", versions[2])
    cutoff = now()
    newest = put(repository, 3)

    again = StoreRepository.open(repository.address + "/")
    assert again.address == repository.address
    assert at(again, again.resolve("v1")) == [0]
    assert at(again, again.resolve(versions[2][:7].lower())) == [0, 1]
    assert [entry.message for entry in again.history(newest, limit=2)] == ["3", "2"]
    assert again.expire(cutoff) == sorted({versions[0], versions[2], versions[3]})
    assert again.collect_garbage(older_than=now() + timedelta(hours=1), force=True).bytes > 0
    fresh = StoreRepository.open(repository.address)
    assert [entry.id for entry in fresh.history(newest)] == [newest]
    assert (at(fresh, newest), at(fresh, versions[1])) == ([0, 1, 2, 3], [0])
    with pytest.raises(UnknownVersionError):
        fresh.resolve(versions[2])
    fresh.delete_tag("v1")
    with pytest.raises(StoreError, match="already was deleted"):
        fresh.tag("v1", newest)
    with pytest.raises(StoreError, match="is no local directory"):
        _ = fresh.path


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://", "names no bucket"),
        ("s3:///zoo", "names no bucket"),
        ("s3://-bucket/zoo", "names no bucket"),
        ("s3://bucket?x/zoo", "names no bucket"),
        ("s3://bucket", "needs a prefix of its own"),
        ("s3://bucket/", "needs a prefix of its own"),
        ("s3://bucket/a//b", "no part of it empty"),
        ("s3://bucket/a/../b", "no part of it empty"),
        ("s3://bucket/./b", "no part of it empty"),
        ("s3://bucket/a\nb", "printable"),
        ("s3://key:secret@bucket/zoo", "holds no credentials"),
        ("s3:/bucket/zoo", "expected a local directory or s3://bucket/prefix"),
        ("S3://bucket/zoo", "expected a local directory or s3://bucket/prefix"),
        ("gs://bucket/zoo", "^gs://bucket/zoo: is an address of a kind that holds no store"),
        ("az://bucket/zoo", "is an address of a kind"),
        ("https://host/bucket/zoo", "is an address of a kind"),
        ("file:///zoo", "is an address of a kind"),
        (Path("s3://bucket/zoo"), "give it as text, pathlib takes a slash away"),
    ],
)
def test_addresses_that_hold_no_store(address: str | Path, message: str) -> None:
    for use in (
        StoreRepository.open,
        lambda address: StoreRepository.create(address, writers.create_log),
    ):
        with pytest.raises(StoreError, match=message) as caught:
            use(address)
        assert str(caught.value).isprintable()
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Connection(None, None, path_style=False, anonymous=False)),
        (
            {"AWS_ENDPOINT_URL": "http://host:9000", "AWS_DEFAULT_REGION": "eu-north-1"},
            Connection("http://host:9000", "eu-north-1", path_style=True, anonymous=False),
        ),
        (
            {
                "AWS_ENDPOINT_URL": "http://host:9000",
                "AWS_ENDPOINT_URL_S3": "https://s3.host",
                "AWS_REGION": "a",
                "AWS_DEFAULT_REGION": "b",
                "AWS_ALLOW_HTTP": "false",
                "AWS_SKIP_SIGNATURE": "TRUE",
                "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "1",
            },
            Connection("https://s3.host", "a", path_style=False, anonymous=True),
        ),
        (
            {"AWS_ENDPOINT_URL": "", "AWS_REGION": "", "AWS_SKIP_SIGNATURE": "0"},
            Connection(None, None, path_style=False, anonymous=False),
        ),
    ],
)
def test_the_environment(environment: dict[str, str], expected: Connection) -> None:
    assert Connection.from_environment(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"AWS_ENDPOINT_URL": "localhost:9000"}, "AWS_ENDPOINT_URL is 'localhost:9000', expected"),
        ({"AWS_ENDPOINT_URL_S3": "http://host:port"}, "AWS_ENDPOINT_URL_S3 is 'http://host:port'"),
        ({"AWS_ENDPOINT_URL": "http://"}, "AWS_ENDPOINT_URL is"),
        ({"AWS_ENDPOINT_URL": "http://h", "AWS_ALLOW_HTTP": "false"}, "AWS_ALLOW_HTTP forbids"),
        ({"AWS_SKIP_SIGNATURE": "yes please"}, "AWS_SKIP_SIGNATURE is 'yes please', expected"),
    ],
)
def test_an_environment_that_means_nothing(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Connection.from_environment(environment)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "is no adapter store; create one"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, r"cannot open the store: .*\(SignatureDoesNotMatch\)"),
        ({"AWS_SKIP_SIGNATURE": "true"}, r"cannot open the store: Access Denied \(AccessDenied\)"),
        ({"AWS_ACCESS_KEY_ID": ""}, "cannot open the store: no credentials were found; set AWS_"),
    ],
)
def test_what_the_server_refuses(
    s3_address: str, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], message: str
) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreError, match=f"^{s3_address}: {message}") as caught:
        StoreRepository.open(s3_address)
    assert str(caught.value).isprintable()


def test_no_such_bucket(s3_address: str) -> None:
    with pytest.raises(StoreError, match="bucket does not exist"):
        StoreRepository.create("s3://no-such-bucket/zoo", writers.create_log)
    # Icechunk 2 tells a lost bucket from an empty one only when it writes.
    with pytest.raises(StoreError, match=r"NoSuchBucket|is no adapter store"):
        StoreRepository.open("s3://no-such-bucket/zoo")


def test_nobody_at_the_endpoint(s3_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound, so that nobody else is there, and not listening
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(StoreError, match="cannot be reached: Connection refused; check that"):
            StoreRepository.open(s3_address)


def test_a_server_behind_a_proxy_is_not_asked_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*args: object) -> None:
        pytest.fail("only the proxy can reach it")

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    Connection("https://host", None, path_style=True, anonymous=False).check("s3://b/p")


def test_create_refuses_what_is_there(repository: StoreRepository) -> None:
    tip = put(repository, 1)
    with pytest.raises(StoreExistsError, match="already exists; choose another prefix"):
        StoreRepository.create(repository.address, writers.create_log)
    with pytest.raises(StoreExistsError, match="holds objects but no store; choose another"):
        StoreRepository.create(repository.address.removesuffix("/zoo"), writers.create_log)
    assert StoreRepository.open(repository.address).tip() == tip


@pytest.mark.parametrize("error", [ValueError("disk is full"), KeyboardInterrupt()])
def test_a_creation_that_stopped_can_be_repeated(s3_address: str, error: BaseException) -> None:
    def fail(root: zarr.Group) -> None:
        writers.create_log(root)
        raise error

    expected = StoreError if isinstance(error, Exception) else type(error)
    with pytest.raises(expected):
        StoreRepository.create(s3_address, fail)
    with pytest.raises(StoreError, match="creation of this store did not finish; create it again"):
        StoreRepository.open(s3_address)
    repository = StoreRepository.create(s3_address, writers.create_log)
    assert [v.message for v in repository.history(repository.tip())] == ["create store"]
    assert at(repository, put(repository, 1)) == [1]


def test_losing_a_race_to_create(s3_address: str) -> None:
    def meanwhile(root: zarr.Group) -> None:
        StoreRepository.create(s3_address, lambda root: root.attrs.put({"whose": "theirs"}))
        root.attrs.put({"whose": "ours"})

    with pytest.raises(StoreExistsError, match="already exists"):
        StoreRepository.create(s3_address, meanwhile)
    repository = StoreRepository.open(s3_address)
    assert repository.read(repository.tip()).attrs["whose"] == "theirs"


def test_a_lost_race_is_run_again(repository: StoreRepository) -> None:
    other = StoreRepository.open(repository.address)
    calls: list[str] = []
    theirs: list[str] = []

    def write(root: zarr.Group, version: str) -> int:
        calls.append(version)
        place = writers.append(root, 100)
        if len(calls) <= 2:
            theirs.append(put(other, len(calls)))
        return place

    first = repository.tip()
    version, place = repository.transact(write, "mine")
    assert calls == [first, *theirs]
    assert place == 2
    assert at(other, other.tip()) == [1, 2, 100]
    assert other.tip() == version


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt()])
def test_what_write_raises_aborts(repository: StoreRepository, error: BaseException) -> None:
    def write(root: zarr.Group, version: str) -> None:
        writers.append(root, 2)
        raise error

    tip = repository.tip()
    with pytest.raises(type(error)):
        repository.transact(write, "m")
    assert StoreRepository.open(repository.address).tip() == tip


@pytest.mark.parametrize("followed", [False, True])
def test_a_commit_whose_answer_is_lost_is_not_written_twice(
    s3_server: s3.Server,
    repository: StoreRepository,
    monkeypatch: pytest.MonkeyPatch,
    followed: bool,
) -> None:
    direct = StoreRepository.open(repository.address)
    lost: list[str] = []

    def lose(method: str, path: str) -> bool:
        if armed and not lost and method == "PUT" and "/refs/branch.main/" in path:
            lost.append(path)
            if followed:  # somebody commits on top before the client asks again
                put(direct, 2)
            return True
        return False

    armed = False
    with s3.proxy(s3_server, lose) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        behind = StoreRepository.open(repository.address)
        armed = True
        version = put(behind, 1)
    assert len(lost) == 1
    assert at(direct, version) == [1]
    assert at(direct, direct.tip()) == ([1, 2] if followed else [1])


def test_a_tag_whose_answer_is_lost(
    s3_server: s3.Server, repository: StoreRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[str] = []

    def lose(method: str, path: str) -> bool:
        if not lost and method == "PUT" and "/refs/tag." in path:
            lost.append(path)
            return True
        return False

    with s3.proxy(s3_server, lose) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        StoreRepository.open(repository.address).tag("v1", repository.tip())
    assert len(lost) == 1
    assert repository.tags() == {"v1": repository.tip()}


def test_collection_spares_what_a_commit_under_way_has_written(repository: StoreRepository) -> None:
    other = StoreRepository.open(repository.address)

    def write(root: zarr.Group, version: str) -> None:
        array = root.create_array("big", shape=(2, 1000), chunks=(1, 1000), dtype="float64")
        array[...] = 1.5
        assert other.collect_garbage() == NOTHING
        with pytest.raises(ConfigError, match="expected at least 24 hours ago: a commit under way"):
            other.collect_garbage(older_than=now() - timedelta(hours=23))

    version, _ = repository.transact(write, "m")
    assert np.asarray(other.read(version)["big"][...]).tolist() == [[1.5] * 1000] * 2


def test_collection_reclaims_what_failed_commits_left(repository: StoreRepository) -> None:
    tip = put(repository, 1)

    def write(root: zarr.Group, version: str) -> None:
        array = root.create_array("big", shape=(2, 1000), chunks=(1, 1000), dtype="float64")
        array[...] = np.random.default_rng(0).random((2, 1000))
        raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        repository.transact(write, "m")
    later = now() + timedelta(hours=1)  # the server's clock is its own
    report = repository.collect_garbage(older_than=later, force=True)
    assert (report.objects, report.bytes > 10_000) == (2, True)
    assert repository.collect_garbage(older_than=later, force=True) == NOTHING
    assert at(StoreRepository.open(repository.address), tip) == [1]


def test_what_took_too_long_is_not_committed(
    repository: StoreRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert S3Place.longest_transaction == timedelta(hours=12)
    monkeypatch.setattr(S3Place, "longest_transaction", timedelta(0))
    tip = repository.tip()
    with pytest.raises(StoreError, match=r"writing took 0\.0 hours, expected at most 0: what was"):
        put(repository, 1)
    assert repository.tip() == tip
