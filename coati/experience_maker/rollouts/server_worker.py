"""The thread that keeps one rollout server at work: brings it to the weights that its next rows
need, gives it rows, and leaves it out while it fails."""

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

from coati.experience_maker.rollouts.rollout_client import (
    RequestRefused,
    RolloutSampler,
    ServerFailed,
)
from coati.experience_maker.rollouts.row_queue import RowQueue, Share
from coati.experience_maker.rollouts.weight_versions import Weights, WeightVersions
from coati.utils.logging import get_logger

logger = get_logger(__name__)

VLLM_REQUESTS = 64  # at once: rows that vLLM batches by itself
IDLE_S = 1.0
SHORTEST_WAIT_S = 0.5
LONGEST_WAIT_S = 10.0


class ServerWorker(Thread):
    """``out_since``: when the server last failed without having done anything since (None: it
    works); ``reason``: how."""

    def __init__(self, server: RolloutSampler, queue: RowQueue, store: WeightVersions) -> None:
        super().__init__(daemon=True, name=server.title)
        self.server = server
        self.queue = queue
        self.store = store
        self.out_since: float | None = None
        self.reason = ""
        self.rows = 0
        self._held: Weights | None = None
        self._wait = SHORTEST_WAIT_S
        self._compared = False

    def run(self) -> None:
        """Until the queue is closed."""
        while not self.queue.closed:
            weights = self.queue.next_weights(self._held, IDLE_S)
            if weights is None:
                continue
            try:
                self._bring_to(weights)
                self._answer_rows(weights)
            except RequestRefused as error:
                self.queue.fail(str(error))
            except ServerFailed as error:
                self._leave_out(error)
            except OSError as error:  # the weights could not be written, or shared
                self.queue.fail(
                    f"the weights of step {weights.version} cannot be published: {error}"
                )
            except Exception as error:  # the run would wait for a thread that has ended
                if not self.queue.closed:
                    logger.exception(f"{self.server.title} cannot be used")
                self.queue.fail(f"{self.server.title}: {type(error).__name__}: {error}")
            finally:
                self.queue.let_go()

    def take_first(self, weights: Weights) -> None:
        """Bring the server to ``weights`` and compare bytes, before the thread is started. Raises
        ServerFailed."""
        self._bring_to(weights)

    def _bring_to(self, weights: Weights) -> None:
        if self._held is weights and self.out_since is None:
            return
        weights.published()  # before the server is asked anything
        if self.out_since is not None:
            self.server.connect()
        self._held = None
        workers = self.server.facts.get("world", 1)
        with self.store.offered(weights, self.server.url, workers) as place:
            self.server.take_weights(place)
        if not self._compared:
            self.server.compare(weights.published())
            self._compared = True
        self._held = weights

    def _answer_rows(self, weights: Weights) -> None:
        """All rows that wait for ``weights``, one request after the other, or many at once where
        the server batches requests by itself."""
        if self.server.is_own:
            return self._requests(weights, None)
        with ThreadPoolExecutor(VLLM_REQUESTS) as pool:
            lanes = [pool.submit(self._requests, weights, 1) for _ in range(VLLM_REQUESTS)]
        for lane in lanes:
            lane.result()

    def _requests(self, weights: Weights, most: int | None) -> None:
        name = weights.published().name
        while share := self.queue.take(weights, most):
            self._request(share, name)

    def _request(self, share: Share, name: str) -> None:
        try:
            answers = self.server.complete(share.rows, share.ask.wanted, name)
            if not self.server.is_own:  # which names its weights in the request
                self.server.check_weights(name)
        except BaseException:
            self.queue.put_back(share)
            raise
        self.queue.answered(share, answers)
        self.rows += len(answers)
        if self.out_since is not None:
            logger.info(f"{self.server.title} is back")
        self.out_since = None
        self._wait = SHORTEST_WAIT_S

    def _leave_out(self, error: ServerFailed) -> None:
        if self.queue.closed:
            return  # what the end of a run broke off is no failure
        self._held = None
        self._compared = False
        self.reason = str(error)
        if self.out_since is None:
            self.out_since = time.monotonic()
            logger.warning(
                f"{self.server.kind} left out, its rows go to the others until it returns: {error}"
            )
        self.queue.pause(self._wait)
        self._wait = min(2 * self._wait, LONGEST_WAIT_S)
