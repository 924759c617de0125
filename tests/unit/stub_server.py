"""An HTTP server on loopback that answers as a function of the test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Asked:
    """A request: its method, path with query, headers and body."""

    method: str
    path: str
    headers: Any
    body: bytes


@contextmanager
def serving(answer: Callable[[Asked], tuple[int, Any, dict[str, str]] | None]) -> Iterator[str]:
    """The server's address. answer: (status, bytes or what JSON holds, headers), or None to hang up without a word."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            asked = Asked(self.command, self.path, self.headers, self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            if (found := answer(asked)) is None:
                self.close_connection = True
                return
            status, content, headers = found
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else data)

        do_POST = do_PUT = do_DELETE = do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
