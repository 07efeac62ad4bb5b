"""Serves published weights from rank 0 to samplers elsewhere: files of one directory, to who has
the run's token."""

import secrets
import shutil
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

from coati.experience_maker.rollouts.weight_files import Place, Published
from coati.utils.host_address import address_toward


def address_of(url: str) -> str:
    """The address of this host from which it reaches the server at ``url``. Raises ValueError where
    no way leads there."""
    host = urlsplit(url).hostname or ""
    address = address_toward(host)
    if address is None:
        raise ValueError(f"--rollout_url {url}: no way from this host leads to {host}")
    return address


class WeightServer:
    """Listens on the addresses of this host from which it reaches ``urls``, and no others.

    Raises ValueError for a URL whose host no address of this one leads to.
    """

    def __init__(self, folder: Path, urls: list[str]) -> None:
        self.token = secrets.token_urlsafe(24)
        self._servers: dict[str, ThreadingHTTPServer] = {}
        self._address: dict[str, str] = {}
        handler = partial(_Files, folder, self.token)
        for url in urls:
            address = address_of(url)
            self._address[url] = address
            if address not in self._servers:
                server = _listener(address, handler)
                self._servers[address] = server
                Thread(target=server.serve_forever, daemon=True).start()

    def place(self, published: Published, url: str) -> Place:
        """Where the server at ``url`` finds ``published``."""
        address = self._address[url]
        port = self._servers[address].server_address[1]
        host = f"[{address}]" if ":" in address else address
        return Place(published.name, url=f"http://{host}:{port}/{published.name}", token=self.token)

    def close(self) -> None:
        """Stop listening."""
        for server in self._servers.values():
            server.shutdown()
            server.server_close()


def _listener(address: str, handler) -> ThreadingHTTPServer:
    kind = _IPv6Server if ":" in address else ThreadingHTTPServer
    server = kind((address, 0), handler)
    server.daemon_threads = True
    return server


class _IPv6Server(ThreadingHTTPServer):
    import socket

    address_family = socket.AF_INET6


class _Files(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, token: str, *args) -> None:
        self.folder = folder
        self.token = token
        super().__init__(*args)

    def do_GET(self) -> None:
        """``/<name of the weights>/<file>``."""
        sent = self.headers.get("Authorization", "")
        if not secrets.compare_digest(sent.encode(), f"Bearer {self.token}".encode()):
            return self._refuse(401)
        words = self.path.strip("/").split("/")
        file = self.folder.joinpath(*words)
        if len(words) != 2 or ".." in words or not file.is_file():
            return self._refuse(404)
        with open(file, "rb") as opened:
            self.send_response(200)
            self.send_header("Content-Length", str(file.stat().st_size))
            self.end_headers()
            shutil.copyfileobj(opened, self.wfile, 1 << 20)

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args) -> None:
        """Nothing is logged of a request."""
