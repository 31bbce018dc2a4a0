"""A server between a client and an S3 server that fails now and then.

`python -m helpers.faulty_s3 PORT TARGET` starts it. `POST /-/faults` sets which requests fail, and `GET` says
how many did. All others are passed on with their headers.
"""

import collections
import http.client
import http.server
import json
import socket
import struct
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from helpers.processes import environment
from helpers.servers import Server

CONTROL = "/-/faults"
BUSY = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
)


class Faults(http.server.ThreadingHTTPServer):
    """Passes requests on, but every `every`-th one of those read meets the next of the faults."""

    daemon_threads = True

    def __init__(self, port: int, target: str) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.target = target.removeprefix("http://")
        self.every, self.kinds = 0, list[str]()
        self.met: collections.Counter[str] = collections.Counter()
        self.delay_s = 0.0
        self._requests, self._lock = 0, threading.Lock()

    def fault(self) -> str:
        """The fault that the next request meets; empty for none."""
        with self._lock:
            self._requests += 1
            if not self.every or self._requests % self.every:
                return ""
            kind = self.kinds[(self._requests // self.every) % len(self.kinds)]
            self.met[kind] += 1
            return kind

    def control(self, body: bytes) -> bytes:
        """Set the faults, and tell how many requests and faults there were since they were last set."""
        with self._lock:
            told = json.dumps({"requests": self._requests, **self.met}).encode()
            if body:
                wanted = json.loads(body)
                self.every, self.kinds = wanted.get("every", 0), wanted.get("kinds", [])
                self.delay_s = wanted.get("delay_s", 0.0)
                self._requests, self.met = 0, collections.Counter()
        return told


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Faults
    protocol_version = "HTTP/1.1"

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == CONTROL:
            return self._answer(200, {}, self.server.control(body))
        kind = self.server.fault() if self.command in ("GET", "HEAD") else ""
        time.sleep(self.server.delay_s + (0.5 if kind == "slow" else 0))
        if kind == "reset":  # an RST rather than a FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return self.connection.close()
        if kind == "503":
            return self._answer(503, {"Content-Type": "application/xml"}, BUSY)
        upstream = http.client.HTTPConnection(self.server.target, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        upstream.request(self.command, self.path, body or None, headers)
        found = upstream.getresponse()
        content = found.read()
        upstream.close()
        length = found.headers.get("Content-Length", len(content))
        if kind == "cut":  # half of the promised bytes
            self.close_connection = True
            content = content[: len(content) // 2]
        return self._answer(found.status, dict(found.getheaders()), content, length)

    def _answer(self, status: int, headers: dict[str, str], content: bytes, length: object = "") -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length or len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _pass_on

    def log_message(self, *args: object) -> None:
        """Print nothing."""


def faulty_server(folder: Path, target: str) -> Server:
    """The server in its own process, because TileDB holds the interpreter lock during some reads."""
    words = ["helpers.faulty_s3", "{port}", target]
    return Server(folder, words, ready=CONTROL, environment=environment())


def set_faults(
    server: Server, kinds: Sequence[str] = (), *, every: int = 0, delay_s: float = 0.0
) -> dict[str, int]:
    """Set the faults of a running server; returns requests and faults since they were last set."""
    body = json.dumps({"kinds": list(kinds), "every": every, "delay_s": delay_s}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{server.url}{CONTROL}", data=body)) as answer:
        found: dict[str, int] = json.load(answer)
    return found


if __name__ == "__main__":
    Faults(int(sys.argv[1]), sys.argv[2]).serve_forever()
