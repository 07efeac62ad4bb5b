"""An engine that answers many at once: requests queue, join the batch between two tokens, and leave
it as they end."""

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from coati.inference.model_loading import Loaded, stop_sequences
from coati.inference.serve.batch import Batch, Row
from coati.inference.serve.server_metrics import ServiceMetrics
from coati.inference.serve.stop_strings import StopStringFilter
from coati.inference.stream import TextStream
from coati.models.generation.sampling import Sampling
from coati.utils.logging import get_logger

logger = get_logger(__name__)


class QueueFull(RuntimeError):
    """As many requests wait as may."""


class PromptTooLong(ValueError):
    """Prompt and answer together exceed what the model is given."""


class StreamChunk(NamedTuple):
    """A part of an answer. ``finish``, of the last one: stop, length, content_filter; or timeout,
    error, canceled, closed where there is no whole answer. ``tokens``: of the answer so far."""

    text: str
    finish: str | None
    tokens: int


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is wanted. ``stop``: texts that end it and are not part of it."""

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 512
    stop: Sequence[str] = ()
    seed: int | None = None


class Request:
    """One request on its way through the engine."""

    def __init__(
        self,
        row: Row,
        stream: TextStream,
        cut: StopStringFilter,
        deliver: Callable[[StreamChunk], None],
        timeout: float,
    ):
        self.row, self.stream, self.cut, self.deliver = row, stream, cut, deliver
        self.came = time.monotonic()
        self.deadline = self.came + timeout
        self.canceled = False
        self.taken = 0  # tokens that the stream has seen

    def cancel(self) -> None:
        """Nobody waits for the answer any more: its place is free before the next token."""
        self.canceled = True

    def overdue(self) -> str | None:
        """Why the request ends whatever the model says."""
        if self.canceled:
            return "canceled"
        return "timeout" if time.monotonic() > self.deadline else None

    def advance(self) -> str | None:
        """Give the text of new tokens; why the answer ends with them, or None."""
        row = self.row
        text = "".join(self.stream.push(token) for token in row.tokens[self.taken :])
        self.taken = len(row.tokens)
        if row.ended:
            text += self.stream.finish()
        text = self.cut.push(text, final=row.ended)
        finish = self.cut.reason or ("stop" if row.stopped else "length" if row.ended else None)
        if text or finish:
            self.deliver(StreamChunk(text, finish, self.taken))
        return finish


class InferenceEngine:
    """Answers prompts in a thread of its own, up to ``max_batch`` at a time; ``max_queue`` more may
    wait.

    ``max_length``: tokens of prompt and answer together (never more than the model has positions).
    ``timeout``: seconds that a request may take, waiting included. ``words``: an answer ends before
    any of them.
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
        self.loaded, self.words = loaded, list(words)
        positions = getattr(loaded.model.config, "max_position_embeddings", None) or max_length
        self.max_length, self.max_batch, self.max_queue = (
            min(max_length, positions),
            max_batch,
            max_queue,
        )
        self.timeout, self.metrics = timeout, ServiceMetrics()
        self.stops = stop_sequences(loaded.tokenizer, loaded.conversation)
        # A fast tokenizer may not be used by two threads at once: the engine decodes with one of
        # its own.
        self._decoder, self._encoding = copy.deepcopy(loaded.tokenizer), threading.Lock()
        self._batch = Batch(loaded.model)
        self._waiting: deque[Request] = deque()
        self._running: dict[Row, Request] = {}
        self._wake, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="coati-engine", daemon=True)
        self._thread.start()

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """The prompt's token ids. Raises RowError when the template refuses ``messages``."""
        with self._encoding:
            return self.loaded.conversation.encode_prompt(messages).input_ids

    def submit(
        self, prompt: list[int], wish: SamplingParams, deliver: Callable[[StreamChunk], None]
    ) -> Request:
        """Have ``prompt`` answered; ``deliver`` gets each piece, in the engine's thread.

        Raises QueueFull, and PromptTooLong with both numbers.
        """
        if len(prompt) + wish.max_new_tokens > self.max_length:
            raise PromptTooLong(
                f"the prompt takes {len(prompt)} tokens and the answer up to "
                f"{wish.max_new_tokens}, together more than "
                f"the {self.max_length} that this server gives the model; shorten the prompt or "
                "ask for fewer tokens"
            )
        row = Row(prompt, wish.sampling, wish.max_new_tokens, self.stops, wish.seed)
        ticket = Request(
            row,
            TextStream(self._decoder, self.stops),
            StopStringFilter(wish.stop, self.words),
            deliver,
            self.timeout,
        )
        with self._wake:
            if len(self._waiting) >= self.max_queue:
                self.metrics.outcome("queue_full")
                raise QueueFull(f"{len(self._waiting)} requests wait already; try again later")
            if self._closed:
                raise QueueFull("the server is shutting down")
            self._waiting.append(ticket)
            self.metrics.levels(len(self._running), len(self._waiting))
            self._wake.notify()
        return ticket

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """End what is left and the thread. Requests that are not answered by then get a last piece
        "closed"."""
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
            except Exception as error:  # an answer that fails must not end the server
                logger.info(
                    f"an error ended {len(self._running)} answers: {type(error).__name__}: {error}"
                )
                self._end({row: "error" for row in self._running})
                self._batch.clear()
        with self._wake:
            left, self._waiting = self._waiting, deque()
        self._running |= {ticket.row: ticket for ticket in left}
        self._end({row: "closed" for row in self._running})

    def _turn(self) -> None:
        """One token more for each row of the batch, and one newcomer, so that nobody waits for many
        prompts."""
        with self._wake:
            late = [ticket for ticket in self._waiting if ticket.overdue()]
            self._waiting = deque(ticket for ticket in self._waiting if ticket not in late)
            free = len(self._running) < self.max_batch and self._waiting
            new = self._waiting.popleft() if free else None
            self._running |= {ticket.row: ticket for ticket in [*late, *([new] if new else [])]}
        self._end({row: why for row, ticket in self._running.items() if (why := ticket.overdue())})
        if self._batch.rows:
            self._batch.step()
            self.metrics.generated.inc(len(self._batch.rows))
        if new and new.row in self._running:
            self._batch.join(new.row)
            self.metrics.joined(len(new.row.prompt), time.monotonic() - new.came)
        self._end({row: why for row, ticket in self._running.items() if (why := ticket.advance())})

    def _end(self, ended: dict[Row, str]) -> None:
        """Let rows go; those without a whole answer are told why."""
        self._batch.leave(set(ended))
        for row, why in ended.items():
            ticket = self._running.pop(row)
            if why in ("timeout", "error", "closed", "canceled"):
                ticket.deliver(StreamChunk("", why, len(row.tokens)))
            self.metrics.outcome(why, time.monotonic() - ticket.came)
        self.metrics.levels(len(self._running), len(self._waiting))
