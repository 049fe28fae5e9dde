"""A store's repository on S3: addresses, the AWS_* environment, and creation that can be repeated.

Icechunk's own S3 storage does the work. Commits are conditional writes there, so nothing needs a
lock; the server has to honour `If-Match` and `If-None-Match`, as S3 and most others do.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import icechunk
import zarr

from unmerge.errors import ConfigError, StoreError, StoreExistsError
from unmerge.store.engine import BRANCH, create_empty, new_root, prepare
from unmerge.store.failures import is_failure, reason

# Objects that a running transaction has written belong to no version yet: collecting younger ones
# could take them away from it. A transaction that takes longer than half of this is not committed,
# which leaves the other half for clocks that differ.
SAFE_AGE = timedelta(hours=24)

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]+")
# Icechunk itself would try ten times, for more than half a minute, before it says anything.
_CONNECT_SECONDS = 5.0


class S3Place:
    """A prefix of an S3 bucket that holds a repository, or will.

    Attributes:
        address: `s3://bucket/prefix`, for messages.
    """

    longest_transaction: timedelta | None = SAFE_AGE / 2

    def __init__(self, address: str) -> None:
        """Read an address.

        Raises:
            StoreError: It names no bucket or no usable prefix.
        """
        bucket, _, prefix = address.removeprefix("s3://").partition("/")
        prefix = prefix.rstrip("/")
        if "@" in bucket:  # what stands before it may be a password: do not repeat it
            raise StoreError(
                "s3://…@…: an address holds no credentials, expected s3://bucket/prefix; "
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        if not _BUCKET.fullmatch(bucket):
            raise StoreError(f"{address}: names no bucket, expected s3://bucket/prefix")
        # Icechunk lists "a//b" as "a/b", so it would take another store's objects for its own.
        if not prefix.isprintable() or {"", ".", ".."} & set(prefix.split("/")):
            raise StoreError(
                f"{address!a}: expected s3://bucket/prefix, the prefix of printable characters "
                "and no part of it empty, . or ..: a store needs a prefix of its own"
            )
        self.address = f"s3://{bucket}/{prefix}"
        self._bucket = bucket
        self._prefix = prefix

    def open(self) -> icechunk.Repository:
        """Open the repository, creating nothing.

        Raises:
            StoreError: There is none, the server cannot be reached, or it refuses.
        """
        storage = self._storage()
        if not icechunk.Repository.exists(storage):
            raise StoreError(
                f"{self.address}: is no adapter store; create one with AdapterStore.create "
                "(unmerge init on the command line)"
            )
        repository = icechunk.Repository.open(storage)
        if _is_empty(repository):
            raise StoreError(
                f"{self.address}: the creation of this store did not finish; create it again"
            )
        return repository

    def create(self, initialise: Callable[[zarr.Group], None]) -> None:
        """Create a repository, or finish a creation that stopped on its way.

        Of several creators at once one succeeds: whoever commits the first version.

        Raises:
            StoreExistsError: There is a store, or the prefix holds other objects.
        """
        storage = self._storage()
        if not icechunk.Repository.exists(storage):
            try:
                create_empty(storage)
            except BaseException as error:
                if not is_failure(error):
                    raise
                # Another creator may have been faster; its repository will do.
                if not icechunk.Repository.exists(storage):
                    if "clean prefix" not in str(error):
                        raise
                    raise StoreExistsError(
                        f"{self.address}: holds objects but no store; choose another prefix, "
                        "or delete what is there if you know that nobody needs it"
                    ) from error
        repository = icechunk.Repository.open(storage)
        session = repository.writable_session(BRANCH)
        if not _is_empty(repository):
            raise self._exists()
        initialise(new_root(session))
        try:
            session.commit("create store")
        except icechunk.ConflictError as error:
            raise self._exists() from error

    def lock(self) -> AbstractContextManager[object]:
        """Return a context that does nothing: the server excludes other writers."""
        return nullcontext()

    def cutoff(self, older_than: datetime | None, *, force: bool) -> datetime:
        """Return before when an unreferenced object may be collected.

        Raises:
            ConfigError: It would be less than `SAFE_AGE` ago and `force` is not set.
        """
        newest = datetime.now(UTC) - SAFE_AGE
        if older_than is None:
            return newest
        if older_than > newest and not force:
            hours = int(SAFE_AGE.total_seconds()) // 3600
            raise ConfigError(
                f"{self.address}: cannot collect what is older than {older_than.isoformat()}, "
                f"expected at least {hours} hours ago: a commit under way would lose what it has "
                "written; force it if you know that nobody else is writing"
            )
        return older_than

    def check_tags(self, tags: Iterable[str]) -> None:
        """Do nothing: requests that fail are repeated, and the server keeps its objects whole."""

    def sweep(self, cutoff: datetime) -> tuple[int, int]:  # noqa: ARG002
        """Return zeros: an object on S3 is whole or not there, and creation leaves no other."""
        return 0, 0

    def _exists(self) -> StoreExistsError:
        return StoreExistsError(
            f"{self.address}: already exists; choose another prefix, or open the store there"
        )

    def _storage(self) -> icechunk.Storage:
        prepare()
        connection = Connection.from_environment(os.environ)
        connection.check(self.address)
        return icechunk.s3_storage(
            bucket=self._bucket,
            prefix=self._prefix,
            region=connection.region,
            endpoint_url=connection.endpoint,
            allow_http=connection.endpoint is not None,
            anonymous=True if connection.anonymous else None,
            from_env=None if connection.anonymous else True,
            force_path_style=connection.path_style,
        )


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach a server, as the environment says; credentials are left to the AWS SDK.

    Attributes:
        endpoint: Address of the server, None for Amazon's.
        region: Region, None for that of the AWS configuration.
        path_style: Whether the bucket stands in the path rather than in the host name.
        anonymous: Whether requests are not signed.
    """

    endpoint: str | None
    region: str | None
    path_style: bool
    anonymous: bool

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Connection:
        """Read the variables that AWS's tools and the `object_store` library read.

        AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL; AWS_REGION or AWS_DEFAULT_REGION;
        AWS_ALLOW_HTTP, AWS_SKIP_SIGNATURE, AWS_VIRTUAL_HOSTED_STYLE_REQUEST (true or false).

        Raises:
            ConfigError: One of them has no usable value.
        """
        name = "AWS_ENDPOINT_URL_S3" if environment.get("AWS_ENDPOINT_URL_S3") else _ENDPOINT
        endpoint = environment.get(name) or None
        if endpoint is not None:
            scheme = _host_and_port(name, endpoint)[0]
            # Who writes http:// means it, unless another variable says otherwise.
            if scheme == "http" and not _flag(environment, "AWS_ALLOW_HTTP", default=True):
                raise ConfigError(
                    f"{name} is {endpoint} and AWS_ALLOW_HTTP forbids http; use an https endpoint"
                )
        hosted = _flag(environment, "AWS_VIRTUAL_HOSTED_STYLE_REQUEST", default=endpoint is None)
        return cls(
            endpoint=endpoint,
            region=environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or None,
            path_style=not hosted,
            anonymous=_flag(environment, "AWS_SKIP_SIGNATURE", default=False),
        )

    def check(self, address: str) -> None:
        """Find out within seconds whether a given endpoint answers at all.

        Raises:
            StoreError: It does not.
        """
        if self.endpoint is None:
            return
        scheme, host, port = _host_and_port(_ENDPOINT, self.endpoint)
        if scheme in getproxies() and not proxy_bypass(host):
            return  # only the proxy can tell
        try:
            with contextlib.closing(socket.create_connection((host, port), _CONNECT_SECONDS)):
                pass
        except OSError as error:
            raise StoreError(
                f"{address}: the endpoint {self.endpoint} cannot be reached: {reason(error)}; "
                f"check that {_ENDPOINT} is right and the server runs"
            ) from error


_ENDPOINT = "AWS_ENDPOINT_URL"


def _host_and_port(name: str, endpoint: str) -> tuple[str, str, int]:
    with contextlib.suppress(ValueError):  # of a port that is no number
        parts = urlsplit(endpoint)
        if parts.scheme in ("http", "https") and parts.hostname:
            return parts.scheme, parts.hostname, parts.port or (80, 443)[parts.scheme == "https"]
    raise ConfigError(f"{name} is {endpoint!r}, expected an address such as https://host:9000")


def _flag(environment: Mapping[str, str], name: str, *, default: bool) -> bool:
    text = environment.get(name, "").strip().lower()
    if text in ("", "1", "true", "0", "false"):
        return text in ("1", "true") if text else default
    raise ConfigError(f"{name} is {environment[name]!r}, expected true or false")


def _is_empty(repository: icechunk.Repository) -> bool:
    """Return whether there is no version yet but Icechunk's own, which every repository has."""
    return repository.lookup_snapshot(repository.lookup_branch(BRANCH)).parent_id is None
