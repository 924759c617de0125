"""A proxy before an S3 server that does what networks and servers do: errors, delays, connections that break."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# What may happen to a request; `Proxy.fault` returns one of these, or "" for nothing.
ERROR = "error"  # 500 and an S3 error document; the server never sees the request
BUSY = "busy"  # 503 SlowDown
SLOW = "slow"  # a second late
CUT_REQUEST = "cut request"  # the connection is reset when half of the body has come
LOST_ANSWER = "lost answer"  # the server does it, and the connection is reset before the answer
CUT_ANSWER = "cut answer"  # the connection is reset in the middle of the answer
FLIP = "flip"  # one byte of the answer's body is changed
IGNORE = "ignore conditions"  # a server that knows no conditional writes
DOWN = "down"  # the connection is reset at once
SLOW_SECONDS = 1.0
SECOND_HOP = ("connection", "expect", "transfer-encoding")


def every_second(fault: str, *methods: str) -> Callable[[str, str], str]:
    """A fault that meets every second request of these methods, the first included; never those of the probe."""
    seen = {"count": 0}

    def decide(method: str, path: str) -> str:
        if method not in methods or "/probes/" in path:
            return ""
        seen["count"] += 1
        return fault if seen["count"] % 2 else ""

    return decide


class Proxy:
    """`endpoint` stands for the server at `upstream`. fault: (method, path with query) -> what happens to a request."""

    def __init__(self, upstream: str, fault: Callable[[str, str], str] = lambda method, path: ""):
        self.upstream, self.fault = urlsplit(upstream), fault
        self.seen: list[tuple[str, str, str]] = []  # method, path, what happened
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def _handle(self) -> None:
        fault = self.proxy.fault(self.command, self.path)
        self.proxy.seen.append((self.command, self.path, fault))
        if fault == DOWN:
            return self._reset()
        length = int(self.headers.get("Content-Length", 0))
        if fault == CUT_REQUEST:
            self.rfile.read(length // 2)
            return self._reset()
        body = self.rfile.read(length)
        if fault in (ERROR, BUSY):
            status, code = (500, "InternalError") if fault == ERROR else (503, "SlowDown")
            return self._answer(status, [], f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode())
        if fault == SLOW:
            time.sleep(SLOW_SECONDS)
        status, headers, answer = self._forward(body, fault == IGNORE)
        if fault == LOST_ANSWER:
            return self._reset()
        if fault == FLIP and answer:
            answer = answer[:-1] + bytes([answer[-1] ^ 1])
        self._answer(status, headers, answer, cut=fault == CUT_ANSWER)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def _forward(self, body: bytes, ignore: bool) -> tuple[int, list[tuple[str, str]], bytes]:
        server = http.client.HTTPConnection(self.proxy.upstream.hostname, self.proxy.upstream.port, timeout=120)
        server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in SECOND_HOP and not (ignore and name.lower() in ("if-match", "if-none-match")):
                server.putheader(name, value)
        server.endheaders(body or None)
        answer = server.getresponse()
        data = answer.read()
        server.close()
        return answer.status, answer.getheaders(), data

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        named = {name.lower() for name, _ in headers}
        for name, value in headers:
            if name.lower() not in SECOND_HOP:
                self.send_header(name, value)
        if "content-length" not in named and status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self._reset()

    def _reset(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with RST
        self.connection.close()

    def finish(self) -> None:
        try:
            super().finish()
        except (OSError, ValueError):  # reset
            pass

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):
            pass

    def log_message(self, *_: object) -> None:
        pass
