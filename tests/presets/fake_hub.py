"""The part of the Hugging Face Hub's HTTP interface that a snapshot of a repository needs, on localhost."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """Repositories by commit: `commits[commit][path]` are a file's bytes; `branches` name commits."""

    repository: str
    commits: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""

    def commit_of(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            for api in (f"/api/models/{hub.repository}/revision/", f"/api/models/{hub.repository}/tree/"):
                if path.startswith(api):
                    return self._describe(path.removeprefix(api).split("/")[0], tree="/tree/" in api, body=body)
            if path == f"/api/models/{hub.repository}":
                return self._describe("main", tree=False, body=body)
            prefix = f"/{hub.repository}/resolve/"
            if path.startswith(prefix):
                revision, _, name = path.removeprefix(prefix).partition("/")
                commit = hub.commit_of(revision)
                if commit is None:
                    return self._refuse("RevisionNotFound")
                if name not in hub.commits[commit]:
                    return self._refuse("EntryNotFound")
                data = hub.commits[commit][name]
                return self._send(data, {"ETag": f'"{etag(data)}"', "X-Repo-Commit": commit}, body=body)
            return self._refuse("RepoNotFound")

        def _describe(self, revision: str, *, tree: bool, body: bool) -> None:
            commit = hub.commit_of(revision)
            if commit is None:
                return self._refuse("RevisionNotFound")
            files = hub.commits[commit]
            data: Any = {
                "_id": "0", "id": hub.repository, "modelId": hub.repository, "sha": commit, "private": False,
                "tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": name} for name in files],
            }  # fmt: skip
            if tree:
                data = [
                    {"type": "file", "path": name, "size": len(file), "oid": etag(file)} for name, file in files.items()
                ]
            self._send(json.dumps(data).encode(), {"Content-Type": "application/json"}, body=body)

        def _send(self, data: bytes, headers: Mapping[str, str], *, body: bool) -> None:
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def _refuse(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
