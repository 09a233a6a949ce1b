"""A web server on this machine for the tests: it sends what it is told to, and notes who asked."""

import re
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass(frozen=True)
class Reply:
    """An answer to a GET."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    ranges: bool = False  # whether a part can be asked for
    length: bool = True  # whether it says how long it is
    chunked: bool = False
    cut: int | None = None  # bytes after which the connection ends
    wait: float = 0.0  # seconds before every piece of `piece` bytes
    piece: int = 1 << 20
    stays_open: bool = False  # after the last byte, whatever was asked


@dataclass
class FileServer:
    """What is served and what was asked; the last reply of a path is repeated."""

    origin: str = ""
    replies: dict[str, list[Reply]] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)  # path, headers
    closing: threading.Event = field(default_factory=threading.Event)

    def serve(self, path: str, *replies: Reply) -> str:
        """Answer a path so, one after the other; returns its address."""
        self.replies[path] = list(replies)
        return self.origin + path

    def headers_of(self, path: str) -> list[dict[str, str]]:
        """Of every request for a path, names in lower case."""
        return [headers for asked, headers in self.asked if asked.partition("?")[0] == path]

    def next_reply(self, path: str) -> Reply:
        replies = self.replies.get(path.partition("?")[0], [Reply(status=404)])
        return replies.pop(0) if len(replies) > 1 else replies[0]


@contextmanager
def file_server(certificate: Path | None = None) -> Iterator[FileServer]:
    """A running server, over TLS if it has a certificate (with its key in the same file)."""
    files = FileServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            files.asked.append((self.path, headers))
            self.close_connection = True
            with suppress(OSError):  # the other side may have had enough
                _send(self, files.next_reply(self.path), headers, files.closing)

        def log_message(self, format: str, *args: object) -> None:
            """Be quiet."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """Be quiet: a client may refuse the certificate."""

    server = Server(("127.0.0.1", 0), Handler)
    scheme = "http"
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "https"
    files.origin = f"{scheme}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield files
    finally:
        files.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _send(
    handler: BaseHTTPRequestHandler,
    reply: Reply,
    asked: Mapping[str, str],
    closing: threading.Event,
) -> None:
    body, status, headers = reply.body, reply.status, dict(reply.headers)
    found = re.fullmatch(r"bytes=(\d+)-", asked.get("range", ""))
    same = asked.get("if-range") in (None, headers.get("ETag"))
    if reply.ranges and found and same:
        start = int(found[1])
        status = 206 if start < len(body) else 416
        span = f"{start}-{len(body) - 1}" if status == 206 else "*"
        headers["Content-Range"] = f"bytes {span}/{len(body)}"
        body = body[start:]
    handler.send_response(status)
    if reply.chunked:
        headers["Transfer-Encoding"] = "chunked"
    elif reply.length:
        headers["Content-Length"] = str(len(body))
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    body = body[: reply.cut]
    for first in range(0, len(body), reply.piece):
        piece = body[first : first + reply.piece]
        closing.wait(reply.wait)
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if reply.chunked else piece)
    if reply.chunked and reply.cut is None:
        handler.wfile.write(b"0\r\n\r\n")
    if reply.stays_open:
        closing.wait(60)
