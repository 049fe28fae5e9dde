"""A Hugging Face hub of one's own: the few endpoints its client asks for, served from memory."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """Repositories by id: commits with their files, and branches and tags that name commits.

    Attributes:
        commits: Files by path, by commit, by repository.
        refs: Commits by branch or tag, by repository.
        gated: Repositories that ask for a token.
        requests: `METHOD path` of every request, in order.
    """

    commits: dict[str, dict[str, Mapping[str, bytes]]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)

    def push(self, repository: str, files: Mapping[str, bytes], *refs: str) -> str:
        """Make a commit of `files`, let `refs` name it, and return it."""
        commits = self.commits.setdefault(repository, {})
        commit = hashlib.sha1(f"{repository} {len(commits)}".encode()).hexdigest()  # noqa: S324
        commits[commit] = files
        self.refs.setdefault(repository, {}).update(dict.fromkeys(refs, commit))
        return commit

    def downloaded(self) -> list[str]:
        """Return the files that were asked for whole, sorted."""
        paths = [request.split("/") for request in self.requests if request.startswith("GET ")]
        return sorted("/".join(path[5:]) for path in paths if path[3] == "resolve")


@contextmanager
def serve(hub: Hub) -> Iterator[str]:
    """Serve `hub` on a free port of this machine; yields the endpoint."""

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class' name
        self.served.requests.append(f"{self.command} {unquote(urlsplit(self.path).path)}")

    def _answer(self, *, body: bool) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            repository, what, revision = "/".join(parts[2:4]), *(parts[4:6] or ["revision", "main"])
        else:
            repository, what, revision = "/".join(parts[:2]), parts[2], parts[3]
        commits = self.served.commits.get(repository)
        if commits is None:
            return self._send(401, {}, b"", error="RepoNotFound")
        if repository in self.served.gated:
            return self._send(403, {}, b"", error="GatedRepo")
        commit = self.served.refs[repository].get(revision, revision)
        files = commits.get(commit)
        if files is None:
            return self._send(404, {}, b"", error="RevisionNotFound")
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            return self._json({"id": repository, "sha": commit, "siblings": siblings})
        if what == "tree":
            return self._json([_entry(path, data) for path, data in sorted(files.items())])
        data = files.get("/".join(parts[4:]))
        if data is None:
            return self._send(404, {"X-Repo-Commit": commit}, b"", error="EntryNotFound")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_blob(data)}"'}
        return self._send(200, headers, data, body=body)

    def _json(self, document: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(document).encode())

    def _send(
        self,
        status: int,
        headers: Mapping[str, str],
        data: bytes,
        *,
        body: bool = True,
        error: str | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if error is not None:
            self.send_header("X-Error-Code", error)
            self.send_header("X-Error-Message", f"Access is refused: {error}.")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data)


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324 - as git names it


def _entry(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
