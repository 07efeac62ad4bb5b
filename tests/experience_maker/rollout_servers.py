"""Rollout servers in threads of the test, and ways in which they go wrong."""

import copy
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import torch

from coati.experience_maker.rollouts.http_rollout import HttpRollout, ServerOptions
from coati.experience_maker.rollouts.model_facts import facts_of
from coati.experience_maker.rollouts.own_sampler import OwnSampler
from coati.experience_maker.rollouts.own_server import OwnServer
from coati.models.generation.loop import Sampling
from coati.parallel.options import ParallelOptions
from coati.parallel.step_work import PassWork


class FakeEngine(SimpleNamespace):
    """What sampling and publishing need of an engine that splits nothing."""

    def __init__(self, model):
        mesh = SimpleNamespace(
            sharded_forward=False, tp_group=None, pp_size=1, dp_rank=0, is_loss_rank=True
        )
        super().__init__(
            model=model,
            module=model,
            mesh=mesh,
            options=ParallelOptions(),
            plugin=None,
            padding_free=None,
            device=torch.device("cpu"),
            lr_scheduler=SimpleNamespace(last_epoch=0),
            work=PassWork.of(model, scalar=False),
        )


class Server:
    """The own sampler on a port of its own; ``stop()`` breaks what is being answered, as the end of
    its process does, and ``start()`` brings it back with the weights of its checkpoint."""

    def __init__(self, model, token: str | None = None, max_length: int | None = None) -> None:
        self.first = model
        self.token = token
        self.max_length = max_length
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", self.port))
        listening.listen()
        self.port = listening.getsockname()[1]
        self.sampler = OwnSampler(copy.deepcopy(self.first), self.max_length)
        self.server = _Breakable(listening, self.sampler, "tiny", self.token)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.server.break_all()


class _Breakable(OwnServer):
    def __init__(self, *args) -> None:
        self.connections: list[socket.socket] = []
        super().__init__(*args)

    def process_request(self, request, client_address) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request, client_address) -> None:
        """A connection that was broken on purpose."""

    def break_all(self) -> None:
        for connection in self.connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


@contextmanager
def serving(*models, **options) -> Iterator[list[Server]]:
    servers = [Server(model, **options) for model in models]
    try:
        yield servers
    finally:
        for server in servers:
            server.stop()


def http_rollout(
    engine,
    urls: list[str],
    folder: Path,
    *,
    stops=((30,), (7, 8)),
    count: int = 6,
    sampling: Sampling | None = None,
    **options,
) -> HttpRollout:
    """The engine on ``urls``, for responses of ``count`` tokens."""
    given = {
        "facts": facts_of(engine.module.config),
        "max_length": 16,
        "timeout": 20.0,
        **options,
    }
    return HttpRollout(
        engine,
        ServerOptions(urls, folder / "weights", **given),
        sampling=sampling or Sampling(),
        stop_sequences=[list(stop) for stop in stops],
        max_new_tokens=count,
        pad_token_id=0,
    )


class Answering(BaseHTTPRequestHandler):
    """Answers each route with what ``server.says`` has for it: JSON, text, or a status."""

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        found = self.server.says.get(self.path.partition("?")[0], 404)
        data = b"" if isinstance(found, int) else found
        if not isinstance(data, bytes):
            data = json.dumps(data).encode()
        self.send_response(found if isinstance(found, int) else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


@contextmanager
def answering(says: dict) -> Iterator[str]:
    """The URL of a server that answers with ``says``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    server.says = says
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
