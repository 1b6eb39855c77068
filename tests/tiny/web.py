"""Servers of this machine that behave as badly as those of the internet."""

import contextlib
import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from data import web_images
from tiny.data import encoded, picture

PNG = encoded(picture())
REVISION = "a" * 40  # a commit of the hub


def local(address: str) -> bool:
    """Whether the address may be asked."""
    return address == "127.0.0.1"


# Seconds of data.web_images for a path on which it gives up: of the two the other is too long to come first.
SILENT = {"SILENCE_S": 0.3, "TOTAL_S": 60.0}
SLOW = {"SILENCE_S": 60.0, "TOTAL_S": 0.6}


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # connections at a time; of more than that some would wait for a second


def impatient(monkeypatch, cache):
    """Fetching tries again at once, and keeps what it has in this folder.

    How long it waits for a server stays as it is: this machine may be too busy to answer in a moment. Tests of servers
    that do not answer use SILENT or SLOW.
    """
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    for name, value in {"WAITS_S": (0.0, 0.0), "MAX_BYTES": 2**20}.items():
        monkeypatch.setattr(web_images, name, value)


@contextlib.contextmanager
def serving(handler):
    """A server; `asked` are the paths, in their order, and `stop` ends what still waits."""
    made = Server(("127.0.0.1", 0), handler)
    made.asked, made.stop, made.garbled = [], threading.Event(), False
    made.url = f"http://127.0.0.1:{made.server_port}"
    made.handle_error = lambda *_: None  # a client that hangs up
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield made
    finally:
        made.stop.set()
        made.shutdown()
        made.server_close()


class PictureHandler(BaseHTTPRequestHandler):
    """What each path answers."""

    def do_GET(self):
        self.server.asked.append(self.path)
        path, _, query = self.path.partition("?")
        getattr(self, path.strip("/").replace("/", "_").replace(".", "_"), self.missing)(query)

    def log_message(self, *_):
        pass

    def say(self, data: bytes, length: int | None = None, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if length != -1:
            self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def missing(self, _):
        self.say(b"no", status=404)

    def a_png(self, _):
        self.say(PNG)

    def no_length(self, _):
        self.say(PNG, length=-1)

    def garbage(self, _):
        self.say(b"\x00\x01garbage", Content_Type="image/png")

    def html(self, _):
        self.say(b"<html>log in</html>", Content_Type="text/html")

    def longer(self, _):
        self.say(PNG, length=len(PNG) + 10)

    def shorter(self, _):
        self.say(PNG, length=60)

    def negative(self, _):
        self.say(PNG, length=-5)

    def digits(self, _):
        self.say(PNG, -1, Content_Length="9" * 5000)

    def large(self, _):
        self.say(b"", length=10**12)

    def endless(self, _):
        self.send_response(200)
        self.end_headers()
        with_data = b"\xff\xd8\xff" + b"x" * 2**16
        for _ in range(100):
            self.wfile.write(with_data)

    def stalls(self, _):
        self.server.stop.wait(5)

    def drips(self, _):
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        while not self.server.stop.wait(0.05):
            self.wfile.write(b"\xff")

    def busy(self, query):
        """Twice; a query asks for its status."""
        if self.server.asked.count(self.path) < 3:
            self.say(b"", status=int(query or 503))
        else:
            self.say(PNG)

    def always_busy(self, _):
        self.say(b"", status=503)

    def moved(self, query):
        self.say(b"", status=302, Location=query)

    def spaced(self, _):
        self.say(b"", status=302, Location="http://exa mple.org/a.png")

    def circle(self, _):
        self.say(b"", status=301, Location="/circle")

    def hangs_up(self, _):
        self.connection.shutdown(socket.SHUT_RDWR)


class HubHandler(PictureHandler):
    """The hub's interface for data sets as well: `repos` of the server: id -> files, all at its `revision`."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        if path.startswith("/api/datasets/"):
            self.server.asked.append(path)
            self.api("/".join(path.split("/")[3:5]), path.split("/")[5:])
        elif path.startswith("/datasets/"):
            self.server.asked.append(path)
            repo, rest = "/".join(path.split("/")[2:4]), path.split("/")[4:]
            self.file(self.server.repos[repo]["/".join(rest[2:])])
        elif path == "/":
            self.say(b"")
        else:
            super().do_GET()

    def api(self, repo: str, rest: list[str]) -> None:
        files = self.server.repos.get(repo)
        if files is None:
            self.say(b"{}", status=404, X_Error_Code="RepoNotFound")
        elif rest[:1] == ["revision"] and rest[1] not in ("main", self.server.revision):
            self.say(b"{}", status=404, X_Error_Code="RevisionNotFound")
        elif rest[:1] == ["tree"]:
            self.json([self.facts(name, data) for name, data in files.items()])
        else:
            found = [self.facts(name, data, "rfilename", "sha256") for name, data in files.items()]
            self.json({"id": repo, "sha": self.server.revision, "cardData": {"license": "odc-by"}, "siblings": found})

    @staticmethod
    def facts(name: str, data: bytes, path: str = "path", key: str = "oid") -> dict:
        lfs = {key: hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return {"type": "file", path: name, "size": len(data), "oid": "0" * 40, "blobId": "0" * 40, "lfs": lfs}

    def json(self, value) -> None:
        self.say(json.dumps(value).encode(), Content_Type="application/json")

    def file(self, data: bytes) -> None:
        start, status = 0, 200
        if wanted := self.headers.get("Range"):
            start, status = int(wanted.removeprefix("bytes=").split("-")[0]), 206
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        range_ = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if status == 206 else {}
        body = b"" if self.command == "HEAD" else data[start:]
        body = body[::-1] if self.server.garbled else body
        self.say(body, len(data) - start, status, ETag=etag, X_Repo_Commit=self.server.revision, **range_)
