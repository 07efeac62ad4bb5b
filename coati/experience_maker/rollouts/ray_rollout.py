"""Rollouts by actors of a Ray cluster, on its hosts and in environments of their own. Rank 0 is
Ray's driver; weights travel through Ray's object store, once to each host."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from coati.experience_maker.rollouts.model_facts import difference
from coati.experience_maker.rollouts.ray_actor import RolloutActor, arrays_of
from coati.experience_maker.rollouts.remote_rollout import RemoteRollout
from coati.experience_maker.rollouts.rollout_client import (
    RequestRefused,
    RolloutSampler,
    ServerFailed,
)
from coati.experience_maker.rollouts.server_worker import ServerWorker
from coati.experience_maker.rollouts.weight_versions import Weights, WeightVersions
from coati.parallel.engine import Engine
from coati.utils.environment import code_version
from coati.utils.logging import get_logger
from coati.utils.ray_cluster import check_python, check_room, connect, disconnect
from coati.utils.redaction import without_credentials

logger = get_logger(__name__)

NEEDED = ("ray", "torch", "transformers", "coati")  # by an actor's environment
END_S = 10.0  # that the threads get after their actors were ended


@dataclass(frozen=True)
class RayOptions:
    """``workers``: how many actors sample, each with ``cpus`` and ``gpus`` of the cluster at
    ``address`` (:func:`~coati.utils.ray_cluster.connect`), run by ``python`` (None: that of Ray on
    their hosts). ``model_path``: a directory that their hosts see, or a hub name. ``spare``: CPUs
    that they must leave. ``precision``: of ``--mixed_precision``.
    ``facts``, ``max_length``, ``timeout``: as of
    :class:`~coati.experience_maker.rollouts.http_rollout.ServerOptions`."""

    workers: int
    model_path: str
    facts: dict[str, Any]
    max_length: int
    address: str = "auto"
    python: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    spare: float = 0.0
    precision: str = "bf16"
    timeout: float = 600.0
    trust_remote_code: bool = False


@dataclass(frozen=True)
class RayWeights:
    """``refs``: the one reference to the arrays; none where nobody needs them any more."""

    name: str
    refs: list[Any] = field(default_factory=list)


class RayStore(WeightVersions[RayWeights]):
    """Weights in the object store of rank 0's host, from which those of the others copy them."""

    def __init__(self, ray: Any) -> None:
        super().__init__()
        self.ray = ray

    def write(self, version: int, tensors: Mapping[str, Tensor]) -> RayWeights:
        """Raises OSError where the store cannot take them."""
        try:
            ref = self.ray.put(arrays_of(tensors))
        except self.ray.exceptions.RayError as error:
            raise OSError(f"Ray's object store cannot take them: {_said(error)}") from error
        return RayWeights(f"{version}-{ref.hex()}", [ref])

    @contextmanager
    def offered(self, weights: Weights[RayWeights], url: str, workers: int) -> Iterator[RayWeights]:
        """The same for every actor."""
        yield weights.published()

    def remove(self, published: RayWeights) -> None:
        """Ray frees what nothing refers to."""
        published.refs.clear()


class RayWorker(RolloutSampler):
    """One actor, by number. It is started again by Ray when its process ends, and anew by
    :meth:`connect` where Ray gives it up; a call that it had is made again with whoever is free."""

    kind = "rollout worker"

    def __init__(self, ray: Any, number: int, options: RayOptions) -> None:
        self.ray = ray
        self.url = f"worker {number}"
        self.options = options
        self.facts = {}
        self._weights = RayWeights("none")
        self._actor: Any = None

    @property
    def title(self) -> str:
        return f"rollout {self.url}"

    def start(self) -> None:
        """Ask Ray for the actor, and wait for nothing."""
        options = self.options
        environment = {} if options.python is None else {"py_executable": options.python}
        settings = {
            "dtype": options.precision,
            "trust_remote_code": options.trust_remote_code,
            "max_length": options.max_length,
            "device": "cuda" if options.gpus else "cpu",
            "threads": max(int(options.cpus), 1),
        }
        remote = self.ray.remote(
            num_cpus=options.cpus,
            num_gpus=options.gpus,
            max_restarts=-1,  # as often as its process ends
            max_task_retries=0,  # others may be free before it is back
            runtime_env=environment,
        )
        self._actor = remote(RolloutActor).remote(options.model_path, settings)

    def stop(self) -> None:
        """End the actor's process."""
        actor = self._actor  # which the thread that asks it may let go meanwhile
        if actor is not None:
            with suppress(self.ray.exceptions.RayError):
                self.ray.kill(actor)

    def connect(self) -> None:
        if self._actor is None:
            self.start()
        self.facts = self._call("describe")

    def take_weights(self, place: RayWeights) -> None:
        self._weights = place
        self.check_weights(self._call("take", place.name, list(place.refs)))

    def check_weights(self, name: str) -> None:
        if name != self._weights.name:
            raise ServerFailed(f"{self.url} has weights {name}, not {self._weights.name}")

    def compare(self, published: RayWeights) -> int:
        """None: what is in the object store is what was put there."""
        return 0

    def _choices(self, body: dict[str, Any]) -> Any:
        return self._call("complete", self._weights.name, list(self._weights.refs), body)

    def _call(self, method: str, *arguments: Any) -> Any:
        errors = self.ray.exceptions
        limit = self.options.timeout
        try:
            answer = getattr(self._actor, method).remote(*arguments)
            return self.ray.get(answer, timeout=limit)
        except errors.GetTimeoutError as error:
            raise ServerFailed(
                f"{self.url}: no answer within {limit:g} s (--rollout_timeout): it starts or "
                "computes still, or Ray has no room for it"
            ) from error
        except errors.RayTaskError as error:
            cause = error.cause
            text = f"{self.url}: {type(cause).__name__}: {_one_line(cause)}"
            refused = method == "complete" and isinstance(cause, ValueError)
            raise (RequestRefused if refused else ServerFailed)(text) from error
        except errors.ActorDiedError as error:
            self._actor = None  # Ray does not bring it back
            raise ServerFailed(f"{self.url}: {_said(error)}") from error
        except errors.RayError as error:
            raise ServerFailed(f"{self.url}: {_said(error)}") from error


class RayRollout(RemoteRollout):
    """Raises ValueError on every rank for a cluster and workers that cannot serve this run."""

    flag = "--rollout_workers"
    samplers = "rollout worker"

    def __init__(self, engine: Engine, options: RayOptions, **settings: Any) -> None:
        """``settings``: of the class above."""
        self.options = options
        self._ray: Any = None
        super().__init__(engine, options.timeout, **settings)

    def close(self) -> None:
        """End the actors and leave the cluster."""
        super().close()
        if self._ray is not None:
            for worker in self.workers:
                worker.server.stop()
            # After Ray is left, a call would start a cluster of its own.
            until = time.monotonic() + END_S
            for worker in self.workers:
                if worker.is_alive():
                    worker.join(max(until - time.monotonic(), 0.0))
            self._ray = None
            disconnect(self.options.address)

    def _connect(self) -> None:
        options = self.options
        try:
            self._ray = connect(options.address)
        except ValueError as error:
            raise ValueError(f"{options.workers}: --ray_address {error}") from error
        ray = self._ray
        check_room(ray, options.workers, options.cpus, options.gpus, options.spare)
        if options.python is not None:
            try:
                check_python(ray, options.python, NEEDED)
            except ValueError as error:
                raise ValueError(f"{options.workers}: --rollout_python {error}") from error
        self.store = RayStore(ray)
        samplers = [RayWorker(ray, number, options) for number in range(options.workers)]
        self.workers = [ServerWorker(one, self.queue, self.store) for one in samplers]
        for one in samplers:
            one.start()
        for one in samplers:
            one.connect()
            self._check(one)
        hosts = ", ".join(sorted({one.facts["host"] for one in samplers}))
        logger.info(f"responses come from {options.workers} rollout workers on {hosts}")
        if not options.gpus and ray.cluster_resources().get("GPU"):
            logger.warning_once(
                "the Ray cluster has GPUs, and rollout workers sample on CPUs; give each of them "
                "some with --rollout_worker_gpus"
            )

    def _check(self, worker: RayWorker) -> None:
        """Raises ServerFailed for an actor that would sample otherwise than this process."""
        where = f"{worker.url} (host {worker.facts['host']})"
        if found := difference(worker.facts["facts"], self.options.facts):
            raise ServerFailed(
                f"{where} has loaded another model ({self.options.model_path}): {found}"
            )
        theirs = _code(worker.facts["coati"])
        if theirs != _code(code_version()):
            raise ServerFailed(
                f"{where} has coati {worker.facts['coati']}, this process {code_version()}; "
                "install the same there, or name a Python that has it with --rollout_python"
            )


def _code(release: str) -> tuple[str, str]:
    """Version and hash of files, without the commit, which an installed package does not know."""
    return release.partition(",")[0], release.rpartition(" ")[2]


def _said(error: Exception) -> str:
    """Ray's errors are paragraphs, the reason is in the last lines."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return _one_line(lines[-1] if len(lines) > 3 else " ".join(lines))


def _one_line(found: Any) -> str:
    return " ".join(without_credentials(str(found)).split())[:300]
