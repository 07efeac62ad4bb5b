"""The versions of the weights that samplers elsewhere need: each is kept as long as a response that
was asked for with it is not in."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor


class Named(Protocol):
    """Published weights. Two that are not equal have different names."""

    @property
    def name(self) -> str:
        """What requests call them."""
        ...


Published = TypeVar("Published", bound=Named)


class Weights(Generic[Published]):
    """A version that is published, or being written."""

    def __init__(self, version: int, writing: "Future[Published]") -> None:
        self.version = version
        self._writing = writing

    def published(self) -> Published:
        """Where they are, once they are written. Raises OSError where they could not be."""
        return self._writing.result()

    def wait(self) -> None:
        """Until they are written, or could not be."""
        self._writing.exception()

    @property
    def is_written(self) -> bool:
        """Whether they are there, and not merely to come."""
        return self._writing.done() and self._writing.exception() is None


class WeightVersions(ABC, Generic[Published]):
    """Writes weights in a thread of its own, and says where samplers find them."""

    def __init__(self) -> None:
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._kept: list[Weights[Published]] = []

    @abstractmethod
    def write(self, version: int, tensors: Mapping[str, Tensor]) -> Published:
        """Put ``tensors`` where samplers find them. Raises OSError."""

    @abstractmethod
    def offered(
        self, weights: Weights[Published], url: str, workers: int
    ) -> AbstractContextManager[Any]:
        """Where the sampler at ``url``, of so many ``workers``, takes ``weights`` within the
        context; waits until they are written. Raises OSError where they could not be."""

    @abstractmethod
    def remove(self, published: Published) -> None:
        """Nobody needs ``published`` any more."""

    def put(self, version: int, tensors: Mapping[str, Tensor]) -> Weights[Published]:
        """Keep ``tensors``, which must not change any more. Waits for the version before, so that
        no third copy is in memory."""
        if self._kept:
            self._kept[-1].wait()
        weights = Weights(version, self._writer.submit(self.write, version, tensors))
        self._kept.append(weights)
        return weights

    def keep_only(self, in_use: Callable[[], Iterable[Weights[Published]]]) -> None:
        """Remove, behind what is being written, all but the weights that are then in use."""
        self._writer.submit(self._remove, in_use)

    def _remove(self, in_use: Callable[[], Iterable[Weights[Published]]]) -> None:
        needed = set(in_use())
        written = [w for w in self._kept if w.is_written]  # the others come after this
        names = {w.published().name for w in written if w in needed}
        for weights in [w for w in written if w not in needed]:
            self._kept.remove(weights)
            published = weights.published()
            if published.name not in names:
                self.remove(published)

    def close(self) -> None:
        """Remove everything."""
        self._writer.shutdown(wait=True)
        self._kept.clear()
