"""The published weights of a run on rank 0's host, in files or in memory."""

import secrets
import shutil
from collections.abc import Iterator, Mapping
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
from coati.experience_maker.rollouts.weight_versions import Weights, WeightVersions
from coati.utils.logging import get_logger

logger = get_logger(__name__)


class WeightStore(WeightVersions[Published]):
    """Writes weights below ``folder``.

    ``sync``: "disk": servers see the same directory; "http": they fetch from this host. Raises
    ValueError for a server that cannot reach this host, OSError for a folder that cannot be made.
    """

    def __init__(self, folder: Path, sync: str, urls: list[str]) -> None:
        super().__init__()
        self.folder = folder.absolute()
        shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed
        self.folder.mkdir(parents=True)
        self._server = WeightServer(self.folder, urls) if sync == "http" else None

    def write(self, version: int, tensors: Mapping[str, Tensor]) -> Published:
        """Safetensors files, whole or not at all. Raises OSError."""
        return write_weights(self.folder, version, tensors)

    @contextmanager
    def offered(self, weights: Weights[Published], url: str, workers: int) -> Iterator[Place]:
        """Where the server at ``url`` finds ``weights``."""
        published = weights.published()
        if self._server is not None:
            yield self._server.place(published, url)
        else:
            yield Place(published.name, path=str(published.folder))

    def remove(self, published: Published) -> None:
        """Remove its directory."""
        if published.folder is not None:
            shutil.rmtree(published.folder, ignore_errors=True)

    def close(self) -> None:
        """Remove everything."""
        super().close()
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


class MemoryStore(WeightVersions[Published]):
    """Keeps weights in this process and sends them to each server that needs them.

    ``sync``: "nccl": from GPU to GPU; "ipc": in memory of one GPU. ``device``: this rank's; on a
    CPU gloo and shared memory take their places. ``timeout``: seconds that a transfer may take.
    Raises ValueError for a server that cannot reach this host.
    """

    def __init__(self, sync: str, urls: list[str], device: torch.device, timeout: float) -> None:
        super().__init__()
        self.sync = sync
        self.device = device
        self.timeout = timeout
        self._hosts = {url: address_of(url) for url in urls}
        self._tensors: dict[str, Mapping[str, Tensor]] = {}  # by name
        self._sending: list[Sending] = []  # changed by the thread of each server
        self._lock = Lock()
        self._closed = False
        if device.type == "cpu":
            instead = {"nccl": "gloo carries the weights", "ipc": "weights go by shared memory"}
            logger.info(f"--rollout_sync {sync}: there is no GPU here, so {instead[sync]}")

    def write(self, version: int, tensors: Mapping[str, Tensor]) -> Published:
        """Keep ``tensors`` as they are."""
        name = f"{version}-{secrets.token_hex(8)}"
        self._tensors[name] = tensors
        return Published(version, name, None, _Digests(tensors))

    def remove(self, published: Published) -> None:
        """Let go of them."""
        del self._tensors[published.name]

    @contextmanager
    def offered(self, weights: Weights[Published], url: str, workers: int) -> Iterator[Place]:
        """Where the ``workers`` of the server at ``url`` receive ``weights``. Raises OSError where
        they cannot be sent."""
        with self._lock:
            if self._closed:
                raise OSError("the run is over")
            sending = self._send(self._tensors[weights.published().name], url, workers)
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

    def close(self) -> None:
        """Let go of everything, once what is being sent has arrived or failed."""
        with self._lock:
            self._closed = True
            left = list(self._sending)
        for sending in left:
            sending.close()
        leave_last()
        super().close()
        self._tensors.clear()


def make_store(
    folder: Path, sync: str, urls: list[str], device: torch.device, timeout: float
) -> WeightVersions[Published]:
    """The store of ``--rollout_sync``; errors as of its kind."""
    if sync in ("disk", "http"):
        return WeightStore(folder, sync, urls)
    return MemoryStore(sync, urls, device, timeout)
