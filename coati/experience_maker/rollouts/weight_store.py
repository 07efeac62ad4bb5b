"""The published weights of a run on rank 0's host: each version is kept as long as a response that
was asked for with it is not in."""

import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from coati.experience_maker.rollouts.weight_files import Place, Published, write_weights
from coati.experience_maker.rollouts.weight_server import WeightServer


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
            if published.name not in names:
                shutil.rmtree(published.folder, ignore_errors=True)

    def close(self) -> None:
        """Remove everything."""
        self._writer.shutdown(wait=True)
        if self._server is not None:
            self._server.close()
        shutil.rmtree(self.folder, ignore_errors=True)
