"""A page of traces on 127.0.0.1: the documents at once, the steps of one where it is looked at."""

from __future__ import annotations

import contextlib
import zlib
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from lm_eval_deepen.results.trace_page import Shown


def server(shown: Shown, port: int = 0) -> ThreadingHTTPServer:
    """Return a server that listens on 127.0.0.1, by default on a free port; its owner starts and ends it.

    It answers two paths from memory and opens no file. Only requests that name this address or ``localhost`` are
    answered: a page elsewhere whose name leads here reads nothing.
    """
    steps, page = shown.packed, shown.html().encode("utf-8", "backslashreplace")

    def key(query: str) -> tuple[str, str, str]:
        asked = parse_qs(query)
        system, task, at = (asked.get(name, [""])[0] for name in ("system", "task", "at"))
        return system, task, at

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            if (self.headers.get("Host") or "") not in hosts:
                self._send(HTTPStatus.FORBIDDEN, b"this server answers to 127.0.0.1 only\n", "text/plain")
            elif self.path == "/":
                self._send(HTTPStatus.OK, page, "text/html; charset=utf-8")
            elif asked.path == "/steps" and (packed := steps.get(key(asked.query))) is not None:
                self._send(HTTPStatus.OK, zlib.decompress(packed), "application/json")
            else:
                self._send(HTTPStatus.NOT_FOUND, b"there is / and /steps\n", "text/plain")

        def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Content-Type-Options", "nosniff")
            with contextlib.suppress(ConnectionError):  # of a browser that has left
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing of requests."""

    serving = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    hosts = {f"{name}:{serving.server_port}" for name in ("127.0.0.1", "localhost")}
    return serving
