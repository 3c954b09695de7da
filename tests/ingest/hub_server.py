"""A hub on this machine: the two requests by which huggingface_hub downloads a file, for tests of downloads.

Repositories are folders OWNER/NAME under `root`, each at one commit. Files of 64 KiB and more carry their sha256 as
their publisher's hash, as large files do on the hub; smaller ones the hash that git gives them.
"""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

LARGE = 1 << 16


@dataclass
class Hub:
    """The server's address, its repositories' folder and commits, what was asked of it, and how it misbehaves.

    `cut` says after how many bytes the connection of a file's first download breaks, `altered` which files
    are sent with a flipped byte.
    """

    root: Path
    commits: dict[str, str]
    address: str = ""
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    altered: set[str] = field(default_factory=set)


@contextmanager
def serving(root: Path, commits: dict[str, str]) -> Iterator[Hub]:
    """A hub for as long as the block runs."""
    hub = Hub(root, commits)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        self.hub.asked.append((self.command, self.path, self.headers.get("Range")))
        repository, _, rest = unquote(self.path).lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        commit = self.hub.commits.get(repository)
        path = self.hub.root / repository / file
        if commit is None:
            self._refuse(404, "RepoNotFound")
        elif revision not in ("main", commit):
            self._refuse(404, "RevisionNotFound")
        elif not path.is_file():
            self._refuse(404, "EntryNotFound")
        else:
            self._send(file, path.read_bytes(), commit, body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, file: str, content: bytes, commit: str, body: bool) -> None:
        large = len(content) >= LARGE
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest() if large else git}"')
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return
        if file in self.hub.altered:
            content = content[:-1] + bytes([content[-1] ^ 1])
        stop = self.hub.cut.pop(file, len(content))
        self.wfile.write(content[start:stop])
        self.wfile.flush()
        self.close_connection = True
