"""A server that answers what huggingface_hub asks of the hub, from a folder: what a repository has, and its files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = hashlib.sha1(b"one").hexdigest()


class Hub(BaseHTTPRequestHandler):
    """Repositories are the folders ``organisation/name`` of ``root``; one that is called ``gated`` is."""

    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._info("/".join(parts[2:4]), parts[5] if parts[4:5] == ["revision"] else "main")
        if len(parts) > 4 and parts[2] == "resolve":
            return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body=body)
        return self._refused(404, "")

    def _info(self, repository: str, revision: str) -> None:
        if error := self._wrong(repository, revision):
            return self._refused(*error)
        files = sorted(
            p.relative_to(self.root / repository).as_posix()
            for p in (self.root / repository).rglob("*")
            if p.is_file()
        )
        siblings = [{"rfilename": name} for name in files]
        known = {
            "id": repository,
            "modelId": repository,
            "sha": COMMIT,
            "siblings": siblings,
            "tags": [],
            "downloads": 0,
        }
        content = json.dumps({**known, "private": False, "gated": False, "_id": "0"}).encode()
        self._send(200, content, {"Content-Type": "application/json"})

    def _file(self, repository: str, revision: str, name: str, *, body: bool) -> None:
        if error := self._wrong(repository, revision):
            return self._refused(*error)
        file = self.root / repository / name
        if not file.is_file():
            return self._refused(404, "EntryNotFound", {"X-Repo-Commit": COMMIT})
        content = file.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        self._send(
            200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, body=body
        )

    def _wrong(self, repository: str, revision: str) -> tuple[int, str] | None:
        if repository.endswith("/gated"):
            return 403, "GatedRepo"
        if not (self.root / repository).is_dir():
            return 401, "RepoNotFound"
        return None if revision in ("main", COMMIT) else (404, "RevisionNotFound")

    def _refused(self, code: int, error: str, headers: dict[str, str] | None = None) -> None:
        self._send(code, b"", {**(headers or {}), **({"X-Error-Code": error} if error else {})})

    def _send(self, code: int, content: bytes, headers: dict[str, str], *, body: bool = True) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(root: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a server of some repositories, and what it was asked so far."""
    asked: list[str] = []
    handler = type("Served", (Hub,), {"root": root, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
