"""A hub on this machine that speaks as much of both protocols as their clients need, and misbehaves on request."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

MODEL = "lab/tiny"
LFS_FROM = 1000
"""Files of this many bytes or more are announced by SHA-256, smaller ones by their git id, as real hubs do."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Hub:
    """What is served. `sent` replaces a file's bytes on the wire; `cut` ends its next transfer after n bytes."""

    files: dict[str, bytes]
    commit: str = "a" * 40
    status: int = 200
    error_code: str = ""
    garbage: bool = False
    sent: dict[str, bytes] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    ignore_range: bool = False
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    url: str = ""

    def downloads(self) -> list[str]:
        """Names of files asked for with GET, in order."""
        return [path for method, path, _ in self.requests if method == "GET" and path in self.files]

    def ranges(self) -> list[str]:
        """Range headers of those requests that had one."""
        return [span for _, _, span in self.requests if span]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        if self.hub.status != 200:
            self.reply(self.hub.status, b"{}", {"X-Error-Code": self.hub.error_code})
        elif self.hub.garbage:
            self.reply(200, b"<html>please log in</html>", {})
        elif path == f"/api/v1/models/{MODEL}/repo":
            self.file(query["FilePath"][0])
        elif path.startswith(f"/{MODEL}/resolve/"):
            self.file(path.split("/", 5)[5])
        else:
            self.listing(path, query)

    def listing(self, path: str, query: dict[str, list[str]]) -> None:
        if path == f"/api/v1/models/{MODEL}/repo/files" and query["Revision"] == ["master"]:
            self.reply_json({"Code": 200, "Success": True, "Data": {"Files": self.modelscope_files()}})
        elif path in (f"/api/models/{MODEL}/revision/main", f"/api/models/{MODEL}/revision/{self.hub.commit}"):
            self.reply_json({"id": MODEL, "modelId": MODEL, "sha": self.hub.commit, "siblings": self.siblings()})
        elif path == f"/api/models/{MODEL}/tree/{self.hub.commit}":
            self.reply_json(self.tree())
        else:
            known = f"/{MODEL}/" in path
            code = "RevisionNotFound" if known else "RepoNotFound"
            self.reply(404, b"{}", {"X-Error-Code": code})

    def siblings(self) -> list[dict[str, Any]]:
        return [
            {"rfilename": name, "size": len(data), "blobId": git_id(data)}
            | ({"lfs": {"size": len(data), "sha256": sha256(data), "pointerSize": 1}} if len(data) >= LFS_FROM else {})
            for name, data in self.hub.files.items()
        ]

    def tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": git_id(data)}
            | ({"lfs": {"size": len(data), "oid": sha256(data), "pointerSize": 1}} if len(data) >= LFS_FROM else {})
            for name, data in self.hub.files.items()
        ]

    def modelscope_files(self) -> list[dict[str, Any]]:
        blobs = [
            {"Type": "blob", "Path": name, "Size": len(data), "Sha256": sha256(data), "Revision": self.hub.commit}
            for name, data in self.hub.files.items()
        ]
        return [{"Type": "tree", "Path": "sub", "Size": 0}, *blobs]

    def file(self, name: str) -> None:
        span = self.headers.get("Range", "")
        self.hub.requests.append((self.command, name, span))
        if name not in self.hub.files:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        whole = self.hub.files[name]
        data = self.hub.sent.get(name, whole)
        headers = {"ETag": f'"{sha256(whole) if len(whole) >= LFS_FROM else git_id(whole)}"'}
        headers |= {"X-Repo-Commit": self.hub.commit, "Accept-Ranges": "bytes"}
        if span and not self.hub.ignore_range:
            start = int(span.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.reply(206, data[start:], headers, cut=self.hub.cut.pop(name, None))
        else:
            cut = self.hub.cut.pop(name, None) if self.command == "GET" else None
            self.reply(200, data, headers, cut=cut)

    def reply_json(self, value: Any) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


class LocalHub:
    """Runs a hub in a thread: `with LocalHub(hub) as hub: ...`."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
        self.server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self.hub

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
