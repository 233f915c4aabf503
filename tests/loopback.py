"""A web server on the loopback interface that answers by a script."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Answers by the script of its server: one function per request, the last one again and again."""

    server: Server

    def do_GET(self) -> None:
        self.server.requests.append({key.lower(): value for key, value in self.headers.items()})
        number = min(len(self.server.requests), len(self.server.script)) - 1
        self.server.script[number](self)

    def log_message(self, *_: Any) -> None:
        pass

    def start(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


Answer = Callable[[Handler], None]


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Answer] = []
        self.requests: list[dict[str, str]] = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}/file.bin"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up are part of the tests


def give(body: bytes, etag: str = '"one"') -> Answer:
    """A good server: Range and If-Range as RFC 9110 wants them."""

    def answer(handler: Handler) -> None:
        wanted = handler.headers.get("Range")
        if wanted and handler.headers.get("If-Range", etag) == etag:
            first = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if first >= len(body):
                handler.start(416, Content_Range=f"bytes */{len(body)}", Content_Length="0")
                return
            rest = body[first:]
            span = f"bytes {first}-{len(body) - 1}/{len(body)}"
            handler.start(206, Content_Length=str(len(rest)), Content_Range=span, ETag=etag)
            handler.wfile.write(rest)
            return
        handler.start(200, Content_Length=str(len(body)), ETag=etag)
        handler.wfile.write(body)

    return answer


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server that runs."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
