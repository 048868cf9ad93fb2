"""A hub on loopback that keeps repositories in memory: as much of its interface as uploads and downloads ask for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "1234567890abcdef1234567890abcdef12345678"


class Hub(ThreadingHTTPServer):
    """The server; `files` are those of each repository, by name."""

    def __init__(self, token: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.token = token
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(f"POST {self.path}")
        if not self._allowed():
            return
        if self.path == "/api/repos/create":
            values = json.loads(body)
            name = "/".join(filter(None, (values.get("organization"), values["name"])))
            self.server.files.setdefault(name, {})
            self._json({"url": f"{self.server.address}/{name}", "name": name, "id": name})
        elif self.path.startswith("/api/validate-yaml"):
            self._json({"errors": [], "warnings": []})
        elif match := re.match(r"/api/models/(.+)/preupload/", self.path):
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self._json({"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]})
        elif match := re.match(r"/api/models/(.+)/commit/", self.path):
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.server.files[match[1]][entry["value"]["path"]] = content
            address = f"{self.server.address}/{match[1]}/commit/{COMMIT}"
            self._json({"success": True, "commitOid": COMMIT, "commitUrl": address})
        else:
            self._json({"error": f"unknown {self.path}"}, 404)

    def _get(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if not self._allowed():
            return
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+(/.*)?", path):
            files = self.server.files.get(match[1], {})
            self._json([{"type": "file", "path": n, "size": len(c), "oid": _etag(c)} for n, c in files.items()])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            if match[1] not in self.server.files:
                self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                return
            siblings = [{"rfilename": name} for name in self.server.files[match[1]]]
            self._json({"id": match[1], "modelId": match[1], "sha": COMMIT, "siblings": siblings, "private": False})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(self.server.files.get(match[1], {}).get(match[2]))
        else:
            self._json({"error": f"unknown {path}"}, 404)

    def _file(self, content: bytes | None) -> None:
        if content is None:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        self.send_response(200)
        self.send_header("ETag", f'"{_etag(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _allowed(self) -> bool:
        if self.server.token is None or self.headers.get("Authorization") == f"Bearer {self.server.token}":
            return True
        self._json({"error": "Invalid credentials"}, 401)
        return False

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        known = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for name, each in {**known, **(headers or {})}.items():
            self.send_header(name, each)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@contextmanager
def running(token: str | None = None) -> Iterator[Hub]:
    """A hub for the length of a block."""
    hub = Hub(token)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
