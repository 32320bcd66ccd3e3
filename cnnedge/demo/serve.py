"""Serve a site: Python's own file server, with the headers and types that the page gains from."""

from __future__ import annotations

import errno
import socket
import socketserver
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cnnedge.errors import CnnEdgeError, first_line

# Browsers share memory between threads, which WebAssembly's need, only on isolated pages.
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


_FOREIGN = "This is not the host that was asked for"
IDLE_SECONDS = 30  # for which a connection may say nothing, or take nothing


class SiteHandler(SimpleHTTPRequestHandler):
    """Gives the files of a site, and nothing else, to who asks for this very server."""

    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    error_message_format = "%(code)d %(message)s\n"
    error_content_type = "text/plain; charset=utf-8"
    # What is said here goes before the machine's own table, which may know .mjs as anything.
    extensions_map = {  # noqa: RUF012 - the base class has it thus
        "": "application/octet-stream",
        ".css": "text/css; charset=utf-8",
        ".html": "text/html; charset=utf-8",
        ".jpeg": "image/jpeg",
        ".jpg": "image/jpeg",
        ".json": "application/json",
        ".mjs": "text/javascript; charset=utf-8",
        ".onnx": "application/octet-stream",
        ".png": "image/png",
        ".svg": "image/svg+xml",
        ".txt": "text/plain; charset=utf-8",
        ".wasm": "application/wasm",
    }

    def parse_request(self) -> bool:
        """Refuse what is meant for another host: a page elsewhere may have a name that leads here.

        That is how a stranger's page would read what only this machine's browser may.
        """
        if not super().parse_request():
            return False
        hosts = self.headers.get_all("Host") or []
        if len(hosts) == 1 and self._is_ours(hosts[0].strip().lower()):
            return True
        self.close_connection = True
        self.send_error(400, _FOREIGN)
        return False

    def _is_ours(self, host: str) -> bool:
        server: Any = self.server
        here = str(self.connection.getsockname()[0]).partition("%")[0]
        names = {"localhost", "127.0.0.1", "[::1]", socket.gethostname(), server.host, here}
        names |= {f"[{name}]" for name in (server.host, here) if ":" in name}
        port = server.server_address[1]
        known = {f"{name}:{port}".lower() for name in names}
        return host in known or (port == 80 and f"{host}:80" in known)

    def send_head(self) -> Any:
        """Answer 404 also to a name that no file can have, such as one with a NUL."""
        try:
            return super().send_head()
        except (OSError, ValueError):
            self.send_error(404)
            return None

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Say in one line what is wrong; what a client has sent is not repeated."""
        if code == 501:  # a method that is not known
            code = 405
        super().send_error(code, message if message == _FOREIGN else None, explain)

    def end_headers(self) -> None:
        """Add `HEADERS` to every answer."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def list_directory(self, path: Any) -> None:
        """Show no folder."""
        self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""


class SiteServer(ThreadingHTTPServer):
    """Serves a site until it is shut down.

    Attributes:
        url: Where a browser on this machine finds it.
        host: The address that it was given.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int, folder: Path) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        self.host = host
        super().__init__((host, port), partial(SiteHandler, directory=str(folder)))
        # A wildcard address is no place a browser can go to, and only localhost may use a camera.
        shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host) or "127.0.0.1"
        shown = f"[{shown}]" if ":" in shown else shown
        self.url = f"http://{shown}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        """Bind without asking a name server what the address is called, which can take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over a browser that went away in the middle of an answer; say the rest in a line."""
        error = sys.exception()
        if error is not None and not isinstance(error, OSError):
            print(f"error: a request could not be answered: {first_line(error)}", file=sys.stderr)


def open_server(folder: Path, host: str, port: int) -> SiteServer:
    """Return a server of a folder that listens; `serve_forever` makes it answer.

    Args:
        folder: The site.
        host: An address of this machine; 0.0.0.0: all of them.
        port: 0: any that is free.

    Raises:
        CnnEdgeError: the port is in use, or there is no such address here.
    """
    try:
        return SiteServer(host, port, folder)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise CnnEdgeError(
                f"port {port} of {host} is in use",
                fix="choose another with --port, or --port 0 for any that is free",
            ) from error
        if error.errno == errno.EACCES:
            raise CnnEdgeError(
                f"port {port} of {host} may not be opened", fix="choose one above 1023"
            ) from error
        raise CnnEdgeError(
            f"cannot serve on {host} ({error.strerror or error})",
            fix="choose an address of this machine with --host, such as 127.0.0.1",
        ) from error
