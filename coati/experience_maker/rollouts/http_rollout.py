"""Rollouts by servers: vLLM or the library's own sampler (``coati rollout-server``) in processes
and environments of their own, on this host or others."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coati.experience_maker.rollouts.model_facts import difference
from coati.experience_maker.rollouts.remote_rollout import RemoteRollout
from coati.experience_maker.rollouts.rollout_client import RolloutServer, ServerFailed, is_whole
from coati.experience_maker.rollouts.server_worker import ServerWorker
from coati.experience_maker.rollouts.weight_store import make_store
from coati.parallel.engine import Engine
from coati.utils.distributed import broadcast_object
from coati.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class ServerOptions:
    """Where the servers are and how weights reach them.

    ``sync``: "disk" or "http" (:class:`~coati.experience_maker.rollouts.weight_store.WeightStore`),
    "ipc" or "nccl" (:class:`~coati.experience_maker.rollouts.weight_store.MemoryStore`).
    ``weights_dir``: a directory of this run alone, which is emptied. ``timeout``: seconds that a
    request may take, and that the run waits while no server works. ``facts``: of the model that is
    trained (:func:`~coati.experience_maker.rollouts.model_facts.facts_of`). ``max_length``: tokens
    of prompt and response; ``temperatures``: the lowest and the highest of the run.
    """

    urls: Sequence[str]
    weights_dir: Path
    facts: dict[str, Any]
    max_length: int
    sync: str = "http"
    timeout: float = 600.0
    token: str | None = None
    temperatures: tuple[float, float] = (1.0, 1.0)


class HttpRollout(RemoteRollout):
    """Raises ValueError on every rank for servers that cannot serve this run."""

    flag = "--rollout_url"
    samplers = "rollout server"

    def __init__(self, engine: Engine, options: ServerOptions, **settings: Any) -> None:
        """``settings``: of the class above."""
        self.options = options
        super().__init__(engine, options.timeout, **settings)
        own = all(worker.server.is_own for worker in self.workers)  # which rank 0 alone has
        self.gives_logprobs = broadcast_object(is_whole(self.sampling) or own)
        if not self.gives_logprobs:
            logger.warning_once(
                "vLLM gives log-probs of what top-k, top-p and the repetition penalty leave, not "
                "of the whole distribution: log-probs of servers are not used, and rollouts that "
                "are older than the policy are not corrected"
            )

    def _connect(self) -> None:
        options = self.options
        servers = []
        for url in options.urls:
            server = RolloutServer(url, token=options.token, timeout=options.timeout)
            server.connect()
            self._check(server)
            servers.append(server)
        self.store = make_store(
            options.weights_dir, options.sync, [*options.urls], self.engine.device, options.timeout
        )
        self.workers = [ServerWorker(server, self.queue, self.store) for server in servers]

    def _check(self, server: RolloutServer) -> None:
        """Raises ServerFailed for a server of another model, or that cannot serve this run."""
        if found := difference(server.facts.get("facts") or {}, self.options.facts):
            raise ServerFailed(f"{server.url} serves another model ({server.model}): {found}")
        most = server.facts.get("max_model_len")
        if most is not None and most < self.options.max_length:
            raise ServerFailed(
                f"{server.url} takes {most} tokens of prompt and response, --max_length is "
                f"{self.options.max_length}; start it with a larger --max_length, or lower it here"
            )
        mode = server.facts.get("logprobs_mode")
        if mode != "processed_logprobs" and self.options.temperatures != (1.0, 1.0):
            raise ServerFailed(
                f"{server.url} gives {mode}, which leave the temperature out; start it with "
                "--logprobs-mode processed_logprobs (coati rollout-server does), or sample at "
                "temperature 1"
            )
