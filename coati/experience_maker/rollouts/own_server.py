"""The routes of vLLM that training needs, in front of the library's own sampler; standard library
only."""

import json
import secrets
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import socket
from threading import Condition
from typing import Any
from urllib.parse import urlsplit

from coati.experience_maker.rollouts.own_sampler import OtherWeights, OwnSampler
from coati.utils.errors import RunFailed
from coati.utils.logging import get_logger

logger = get_logger(__name__)

LARGEST_BODY = 256 << 20
METHODS = ("describe_model", "load_published")  # all that /collective_rpc runs
OPEN = ("/health",)  # what needs no token


class Gate:
    """Requests pass unless the server is paused; a pause begins when the last one is through."""

    def __init__(self) -> None:
        self.paused = False
        self._inside = 0
        self._changed = Condition()

    def __enter__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self.paused)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def pause(self) -> None:
        """Let nobody in, and wait for those inside."""
        with self._changed:
            self.paused = True
            self._changed.wait_for(lambda: not self._inside)

    def resume(self) -> None:
        """Let requests in again."""
        with self._changed:
            self.paused = False
            self._changed.notify_all()


class OwnServer(ThreadingHTTPServer):
    """Serves ``sampler`` on a listening socket, to all who have ``token`` where there is one."""

    daemon_threads = True

    def __init__(
        self, listening: socket, sampler: OwnSampler, name: str, token: str | None = None
    ) -> None:
        super().__init__(listening.getsockname()[:2], _Routes, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.sampler = sampler
        self.name = name
        self.token = token
        self.gate = Gate()


class _Routes(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: OwnServer

    def do_GET(self) -> None:
        """Routes that only tell."""
        self._answer(
            {
                "/health": lambda _: {},
                "/v1/models": self._models,
                "/weight_info": lambda _: {"weight_version": self.server.sampler.loaded},
                "/is_paused": lambda _: {"is_paused": self.server.gate.paused},
            }
        )

    def do_POST(self) -> None:
        """Routes that do something."""
        self._answer(
            {
                "/v1/completions": self._complete,
                "/pause": self._pause,
                "/resume": self._resume,
                "/collective_rpc": self._call,
                "/update_weight_version": self._name_weights,
                "/reset_prefix_cache": lambda _: {"success": True},  # there is none
                "/weight_checker": self._checksums,
            }
        )

    def _models(self, _: dict) -> dict[str, Any]:
        length = self.server.sampler.max_length
        return {"object": "list", "data": [{"id": self.server.name, "max_model_len": length}]}

    def _complete(self, body: dict) -> dict[str, Any]:
        with self.server.gate:
            choices = self.server.sampler.complete(body)
        return {"object": "text_completion", "model": self.server.name, "choices": choices}

    def _pause(self, _: dict) -> dict[str, Any]:
        self.server.gate.pause()
        return {"status": "paused"}

    def _resume(self, _: dict) -> dict[str, Any]:
        self.server.gate.resume()
        return {"status": "resumed"}

    def _call(self, body: dict) -> dict[str, Any]:
        method = body.get("method")
        if method not in METHODS:
            raise ValueError(f"method {method!r}: this server runs {', '.join(METHODS)}")
        arguments = body.get("args") or []
        return {"results": [getattr(self.server.sampler, method)(*arguments)]}

    def _name_weights(self, body: dict) -> dict[str, Any]:
        loaded = self.server.sampler.loaded
        if body.get("new_version") != loaded:
            raise OtherWeights(f"weights {loaded} are loaded, not {body.get('new_version')}")
        return {"success": True, "new_version": loaded}

    def _checksums(self, body: dict) -> dict[str, Any]:
        if body.get("action") != "checksum":
            raise ValueError(f"action {body.get('action')!r}: this server answers checksum")
        return {"checksums": self.server.sampler.weight_checksums()}

    def _answer(self, routes: dict[str, Callable[[dict], dict[str, Any]]]) -> None:
        path = urlsplit(self.path).path
        if path not in OPEN and not self._has_token():
            return self._send(401, "a bearer token is needed")
        if path not in routes:
            return self._send(404, f"no route {self.command} {path}")
        try:
            body = self._body()
            found = routes[path](body)
        except (ValueError, TypeError, KeyError) as error:
            return self._send(400, str(error))
        except OtherWeights as error:
            return self._send(409, str(error))
        except (OSError, RunFailed) as error:
            return self._send(500, str(error))
        except Exception as error:  # out of memory, say: who asks shall not guess
            logger.exception(f"{self.command} {path} failed")
            return self._send(500, f"{type(error).__name__}: {error}")
        self._send(200, found)

    def _has_token(self) -> bool:
        if self.server.token is None:
            return True
        sent = self.headers.get("Authorization", "")
        return secrets.compare_digest(sent.encode(), f"Bearer {self.server.token}".encode())

    def _body(self) -> dict:
        size = int(self.headers.get("Content-Length") or 0)
        if size > LARGEST_BODY:
            raise ValueError(f"a body of {size} bytes; at most {LARGEST_BODY} are read")
        text = self.rfile.read(size)
        found = json.loads(text) if text else {}
        if not isinstance(found, dict):
            raise ValueError("expected a JSON object")
        return found

    def _send(self, status: int, found: Any) -> None:
        content = found if isinstance(found, dict) else {"error": {"message": found}}
        data = json.dumps(content).encode()
        if status != 200:
            self.close_connection = True  # what is left of a body is not read
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """One line a request would drown what matters."""
