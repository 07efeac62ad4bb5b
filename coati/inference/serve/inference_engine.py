"""The inference engine of the server: continuous batching in a thread of its own. Requests queue,
join the batch between two tokens, and leave it as they end."""

import copy
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from coati.inference.model_loading import Loaded, stop_sequences
from coati.inference.serve.server_metrics import ServerMetrics
from coati.inference.serve.stop_strings import StopStringFilter
from coati.inference.stream import TextStream
from coati.models.generation.decoder import Decoder
from coati.models.generation.mkl_prepack import PAYS_AFTER, MklPrepacked
from coati.models.generation.sampling import Sampling
from coati.utils.logging import get_logger

logger = get_logger(__name__)

INCOMPLETE = ("timeout", "error", "closed", "canceled")


class QueueFull(RuntimeError):
    """The queue takes no more requests."""


class PromptTooLong(ValueError):
    """Prompt and response together exceed the context that the server gives the model."""


class StreamChunk(NamedTuple):
    """A part of a response. ``finish``, of the last one: stop, length, content_filter; or one of
    INCOMPLETE where there is no whole response. ``tokens``: of the response so far."""

    text: str
    finish: str | None
    tokens: int


@dataclass(frozen=True)
class SamplingParams:
    """How a response is generated. ``stop``: texts that end it and are not part of it. ``seed``
    None draws differently each time; otherwise the response depends on the request alone, not on
    what is batched with it."""

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 512
    stop: Sequence[str] = ()
    seed: int | None = None


class Request:
    """One request on its way through the engine. ``tokens``: its response so far, the stop sequence
    included; ``number``: of its row in the decoder."""

    def __init__(
        self,
        number: int,
        prompt: list[int],
        params: SamplingParams,
        stream: TextStream,
        stop_filter: StopStringFilter,
        deliver: Callable[[StreamChunk], None],
        timeout: float,
    ):
        self.number = number
        self.prompt = prompt
        self.params = params
        self.stream = stream
        self.stop_filter = stop_filter
        self.deliver = deliver
        self.arrived = time.monotonic()
        self.deadline = self.arrived + timeout
        self.tokens: list[int] = []
        self.canceled = False

    @property
    def elapsed(self) -> float:
        """Seconds since it arrived."""
        return time.monotonic() - self.arrived

    @property
    def complete(self) -> bool:
        """Whether the model has nothing to add."""
        return self.stream.stopped or len(self.tokens) >= self.params.max_new_tokens

    def cancel(self) -> None:
        """Nobody waits for the response any more: its place is free before the next token."""
        self.canceled = True

    def interrupted(self) -> str | None:
        """Why the request ends whatever the model says."""
        if self.canceled:
            return "canceled"
        return "timeout" if time.monotonic() > self.deadline else None

    def take(self, token: int) -> str | None:
        """Deliver the text that ``token`` makes certain; why the response ends with it, or None."""
        self.tokens.append(token)
        text = self.stream.push(token)
        complete = self.complete
        if complete:
            text += self.stream.finish()
        text = self.stop_filter.push(text, final=complete)
        finish = self.stop_filter.reason
        if finish is None and complete:
            finish = "stop" if self.stream.stopped else "length"
        if text or finish:
            self.deliver(StreamChunk(text, finish, len(self.tokens)))
        return finish


class InferenceEngine:
    """Generates responses in a thread of its own, up to ``max_batch`` at a time; ``max_queue`` more
    may wait.

    Args:
        max_length: tokens of prompt and response together (never more than the model has
            positions).
        timeout: seconds that a request may take, waiting included.
        words: a response ends before any of them.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        max_length: int = 2048,
        max_batch: int = 8,
        max_queue: int = 64,
        timeout: float = 300.0,
        words: Sequence[str] = (),
    ):
        positions = getattr(loaded.model.config, "max_position_embeddings", None) or max_length
        self.loaded = loaded
        self.words = list(words)
        self.max_length = min(max_length, positions)
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.timeout = timeout
        self.metrics = ServerMetrics()
        self.stops = stop_sequences(loaded.tokenizer, loaded.conversation)
        # A fast tokenizer may not be used by two threads at once: the engine has one of its own.
        self._tokenizer = copy.deepcopy(loaded.tokenizer)
        self._encoding = threading.Lock()
        self._device = next(loaded.model.parameters()).device
        self._decoder: Decoder | None = None
        # Only a number of rows that stays for a while is worth prepacking for.
        self._prepacked = MklPrepacked(loaded.model, patience=PAYS_AFTER)
        self._numbers = itertools.count()
        self._waiting: deque[Request] = deque()
        self._running: dict[int, Request] = {}
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="coati-engine", daemon=True)
        self._thread.start()

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """The prompt's token ids. Raises RowError when the template refuses ``messages``."""
        with self._encoding:
            return self.loaded.conversation.encode_prompt(messages).input_ids

    def submit(
        self, prompt: list[int], params: SamplingParams, deliver: Callable[[StreamChunk], None]
    ) -> Request:
        """Queue ``prompt``; ``deliver`` gets each chunk of the response, in the engine's thread.

        Raises:
            PromptTooLong: with both numbers.
            QueueFull: too many requests wait, or the engine is closed.
        """
        if len(prompt) + params.max_new_tokens > self.max_length:
            raise PromptTooLong(
                f"the prompt takes {len(prompt)} tokens and the response up to "
                f"{params.max_new_tokens}, together more than the {self.max_length} that this "
                "server gives the model; shorten the prompt or ask for fewer tokens"
            )
        stream = TextStream(self._tokenizer, self.stops)
        stop_filter = StopStringFilter(params.stop, self.words)
        number = next(self._numbers)
        request = Request(number, prompt, params, stream, stop_filter, deliver, self.timeout)
        with self._wake:
            if len(self._waiting) >= self.max_queue:
                self.metrics.outcome("queue_full")
                raise QueueFull(f"{len(self._waiting)} requests wait already; try again later")
            if self._closed:
                raise QueueFull("the server is shutting down")
            self._waiting.append(request)
            self.metrics.levels(len(self._running), len(self._waiting))
            self._wake.notify()
        return request

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """End the thread. Requests without a whole response get a last chunk "closed"."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._waiting or self._running)
            try:
                self._turn()
            except Exception as error:  # a response that fails must not end the server
                logger.error(
                    f"an error ended {len(self._running)} responses: {type(error).__name__}: "
                    f"{error}"
                )
                self._clear()
                self._end(dict.fromkeys(self._running, "error"))
        with self._wake:
            left, self._waiting = self._waiting, deque()
        self._running |= {request.number: request for request in left}
        self._end(dict.fromkeys(self._running, "closed"))

    def _turn(self) -> None:
        """One token more for each row of the batch, and one prompt, so that no response waits for
        many prompts."""
        with self._wake:
            leaving = [request for request in self._waiting if request.interrupted()]
            self._waiting = deque(each for each in self._waiting if each not in leaving)
            room = len(self._running) < self.max_batch and self._waiting
            admitted = [self._waiting.popleft()] if room else []
            self._running |= {request.number: request for request in [*leaving, *admitted]}
        running = self._running.items()
        self._end({number: why for number, each in running if (why := each.interrupted())})
        if self._decoder is not None:
            self._step()
        for request in admitted:
            if request.number in self._running:
                self._join(request)

    def _step(self) -> None:
        """One token more for each row of the batch."""
        numbers = self._decoder.row_ids.tolist()
        self._prepacked.use(len(numbers))
        tokens = self._decoder.step().tokens.tolist()
        self.metrics.generated.inc(len(numbers))
        pairs = zip(numbers, tokens, strict=True)
        ends = {number: self._running[number].take(token) for number, token in pairs}
        self._end({number: why for number, why in ends.items() if why})

    def _join(self, request: Request) -> None:
        """The first token of ``request``, and its place in the batch unless that ends it."""
        ids = torch.tensor([request.prompt], device=self._device)
        params = request.params
        drawn = np.random.default_rng(params.seed).random((1, params.max_new_tokens))
        decoder = Decoder(
            self.loaded.model,
            ids,
            torch.ones_like(ids),
            params.sampling,
            noise=torch.from_numpy(drawn),
            row_ids=torch.tensor([request.number]),
        )
        [token] = decoder.step().tokens.tolist()
        self.metrics.joined(len(request.prompt), request.elapsed)
        if why := request.take(token):
            self._end({request.number: why})
        elif self._decoder is None:
            self._decoder = decoder
        else:
            self._decoder.join(decoder)

    def _end(self, ended: dict[int, str]) -> None:
        """Take requests out of the batch, {number: why}; those without a whole response get a last
        chunk that says so."""
        if ended and self._decoder is not None:
            staying = [number not in ended for number in self._decoder.row_ids.tolist()]
            if any(staying):
                self._decoder.leave(torch.tensor(staying, device=self._device))
            else:
                self._clear()
        for number, why in ended.items():
            request = self._running.pop(number)
            if why in INCOMPLETE:
                request.deliver(StreamChunk("", why, len(request.tokens)))
            self.metrics.outcome(why, request.elapsed)
        self.metrics.levels(len(self._running), len(self._waiting))

    def _clear(self) -> None:
        """No row is left."""
        self._decoder = None
        self._prepacked.end()
