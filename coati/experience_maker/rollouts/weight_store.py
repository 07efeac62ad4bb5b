"""The published weights of a run on rank 0's host, in files or in memory: each version is kept as
long as a response that was asked for with it is not in."""

import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from coati.experience_maker.rollouts.weight_files import (
    Digest,
    Place,
    Published,
    digest_of,
    write_weights,
)
from coati.experience_maker.rollouts.weight_server import WeightServer, address_of
from coati.experience_maker.rollouts.weight_transfer import (
    Broadcast,
    Sending,
    Shared,
    leave_last,
)
from coati.utils.logging import get_logger

logger = get_logger(__name__)


class Weights:
    """A version that is published, or being written."""

    def __init__(self, version: int, writing: "Future[Published]") -> None:
        self.version = version
        self._writing = writing

    def published(self) -> Published:
        """Where they are, once they are written. Raises OSError where they could not be."""
        return self._writing.result()

    @property
    def is_written(self) -> bool:
        """Whether they are there, and not merely to come."""
        return self._writing.done() and self._writing.exception() is None


class WeightStore:
    """Writes weights below ``folder``, in a thread of its own, and says where servers find them.

    ``sync``: "disk": servers see the same directory; "http": they fetch from this host. Raises
    ValueError for a server that cannot reach this host, OSError for a folder that cannot be made.
    """

    def __init__(self, folder: Path, sync: str, urls: list[str]) -> None:
        self.folder = folder.absolute()
        shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed
        self.folder.mkdir(parents=True)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._kept: list[Weights] = []
        self._server = WeightServer(self.folder, urls) if sync == "http" else None

    def put(self, version: int, tensors: Mapping[str, Tensor]) -> Weights:
        """Keep ``tensors``, which must not change any more. Waits for the version before, so that
        no third copy is in memory."""
        if self._kept:
            self._kept[-1]._writing.exception()
        writing = self._writer.submit(write_weights, self.folder, version, tensors)
        weights = Weights(version, writing)
        self._kept.append(weights)
        return weights

    def place(self, weights: Weights, url: str) -> Place:
        """Where the server at ``url`` finds ``weights``; waits until they are written. Raises
        OSError where they could not be."""
        published = weights.published()
        if self._server is not None:
            return self._server.place(published, url)
        return Place(published.name, path=str(published.folder))

    @contextmanager
    def offered(self, weights: Weights, url: str, workers: int) -> Iterator[Place]:
        """:meth:`place`, for a server of so many ``workers`` that takes the weights now."""
        yield self.place(weights, url)

    def keep_only(self, in_use: Callable[[], Iterable[Weights]]) -> None:
        """Remove, behind what is being written, all but the weights that are then in use."""
        self._writer.submit(self._remove, in_use)

    def _remove(self, in_use: Callable[[], Iterable[Weights]]) -> None:
        needed = set(in_use())
        written = [w for w in self._kept if w.is_written]  # the others come after this
        names = {w.published().name for w in written if w in needed}
        for weights in [w for w in written if w not in needed]:
            self._kept.remove(weights)
            published = weights.published()
            if published.folder is not None and published.name not in names:
                shutil.rmtree(published.folder, ignore_errors=True)

    def close(self) -> None:
        """Remove everything."""
        self._writer.shutdown(wait=True)
        if self._server is not None:
            self._server.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class _Digests(Mapping[str, Digest]):
    """Of tensors, worked out when they are asked for: once in a run."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Digest:
        return digest_of(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class MemoryStore:
    """Keeps weights in this process and sends them to each server that needs them.

    ``sync``: "nccl": from GPU to GPU; "ipc": in memory of one GPU. ``device``: this rank's; on a
    CPU gloo and shared memory take their places. ``timeout``: seconds that a transfer may take.
    Raises ValueError for a server that cannot reach this host.
    """

    def __init__(self, sync: str, urls: list[str], device: torch.device, timeout: float) -> None:
        self.sync = sync
        self.device = device
        self.timeout = timeout
        self._hosts = {url: address_of(url) for url in urls}
        self._kept: dict[Weights, Mapping[str, Tensor]] = {}
        self._sending: list[Sending] = []  # changed by the thread of each server
        self._lock = Lock()
        self._closed = False
        if device.type == "cpu":
            instead = {"nccl": "gloo carries the weights", "ipc": "weights go by shared memory"}
            logger.info(f"--rollout_sync {sync}: there is no GPU here, so {instead[sync]}")

    def put(self, version: int, tensors: Mapping[str, Tensor]) -> Weights:
        """Keep ``tensors``, which must not change any more."""
        name = f"{version}-{secrets.token_hex(8)}"
        there: Future[Published] = Future()
        there.set_result(Published(version, name, None, _Digests(tensors)))
        weights = Weights(version, there)
        self._kept[weights] = tensors
        return weights

    @contextmanager
    def offered(self, weights: Weights, url: str, workers: int) -> Iterator[Place]:
        """Where the ``workers`` of the server at ``url`` receive ``weights``. Raises OSError where
        they cannot be sent."""
        with self._lock:
            if self._closed:
                raise OSError("the run is over")
            sending = self._send(self._kept[weights], url, workers)
            self._sending.append(sending)
        try:
            yield Place(weights.published().name, transfer=sending.described)
        finally:
            sending.end()
            with self._lock:
                self._sending = [one for one in self._sending if one.is_going_on]
            if sending.failure is not None:  # of which the server knows only that nothing came
                logger.warning(
                    f"--rollout_sync {self.sync}: the weights of step {weights.version} could not "
                    f"be sent to {url}: {sending.failure}"
                )

    def _send(self, tensors: Mapping[str, Tensor], url: str, workers: int) -> Sending:
        if self.sync == "ipc":
            return Shared(tensors, self.device)
        return Broadcast(tensors, self._hosts[url], workers, self.device, self.timeout)

    def keep_only(self, in_use: Callable[[], Iterable[Weights]]) -> None:
        """Let go of all but the weights that are in use."""
        needed = set(in_use())
        for weights in [one for one in self._kept if one not in needed]:
            del self._kept[weights]

    def close(self) -> None:
        """Let go of everything, once what is being sent has arrived or failed."""
        with self._lock:
            self._closed = True
            left = list(self._sending)
        for sending in left:
            sending.close()
        leave_last()
        self._kept.clear()


AnyStore = WeightStore | MemoryStore


def make_store(
    folder: Path, sync: str, urls: list[str], device: torch.device, timeout: float
) -> AnyStore:
    """The store of ``--rollout_sync``; errors as of its kind."""
    if sync in ("disk", "http"):
        return WeightStore(folder, sync, urls)
    return MemoryStore(sync, urls, device, timeout)
