"""The server's inference engine: continuous batching in a background thread. Requests are queued,
join the running batch between two tokens, and leave it when they finish."""

import copy
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from coati.dataset.chat.response_reader import Reader
from coati.inference.chat_templates import ChatTemplate, ChatTemplates
from coati.inference.model_loading import Loaded
from coati.inference.serve.server_metrics import ServerMetrics
from coati.inference.serve.stop_strings import StopStringFilter
from coati.inference.serve.token_logprobs import TokenLogprob, TokenScorer
from coati.inference.stream import TextStream
from coati.models.generation.decoder import Decoder
from coati.models.generation.prepacked_linear import PAYS_AFTER, Prepacked
from coati.models.generation.sampling import Sampling
from coati.models.positions import within_positions
from coati.utils.logging import get_logger

logger = get_logger(__name__)

INCOMPLETE = ("timeout", "error", "closed", "canceled")


class QueueFull(RuntimeError):
    """The queue is full, or the engine is closed."""


class PromptTooLong(ValueError):
    """Prompt and ``max_new_tokens`` together exceed the engine's ``max_length``."""


class StreamChunk(NamedTuple):
    """A part of a response. ``finish`` is None except in the last one: "stop", "length",
    "content_filter", or one of INCOMPLETE if the response is not whole. ``tokens``: number of
    tokens of the response so far; ``logprobs``: of those of this part, where asked for."""

    text: str
    finish: str | None
    tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class SamplingParams:
    """How a response is generated. ``stop``: strings that end it and are not part of it. ``seed``:
    makes the response reproducible, whatever it is batched with; None: a random one. ``choice``:
    the number of the response among several to one prompt. ``logprobs``: how many likeliest tokens
    to give beside each log-prob; None: no log-probs. ``continues``: whether the response goes on
    in the middle of the prompt's text. ``shown``: special tokens that are part of the text.
    ``one_call``: makes what ends the response with the first call of a tool."""

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 512
    stop: Sequence[str] = ()
    seed: int | None = None
    choice: int = 0
    logprobs: int | None = None
    continues: bool = False
    shown: frozenset[int] = frozenset()
    one_call: "Callable[[], FirstCall] | None" = None

    def noise(self) -> torch.Tensor:
        """(1, max_new_tokens) fp64 uniform on [0, 1)."""
        seed = np.random.SeedSequence(self.seed, spawn_key=(self.choice,) if self.choice else ())
        return torch.from_numpy(np.random.default_rng(seed).random((1, self.max_new_tokens)))


class ChatPrompt(NamedTuple):
    """What the model is given: token ids, and their text up to ``forced``, the beginning of a call
    that the response has to go on with."""

    ids: list[int]
    text: str
    forced: str = ""


class FirstCall:
    """Passes text on up to the end of the first call that ``reader`` reads; ``ended`` then.
    ``read``: characters that it has read already."""

    def __init__(self, reader: Reader, read: int = 0) -> None:
        self._reader = reader
        self._passed = read
        self.ended = False

    def push(self, text: str) -> str:
        """The part of ``text`` that can be passed on."""
        self._reader.push(text)
        end = self._reader.first_call_end
        if end is not None:
            self.ended = True
            text = text[: max(0, end - self._passed)]
        self._passed += len(text)
        return text


@dataclass(eq=False)
class Request:
    """A queued or running request. ``number``: its row id in the decoder; ``tokens``: token ids of
    the response so far, stop sequence included."""

    number: int
    prompt: list[int]
    params: SamplingParams
    stop_filter: StopStringFilter
    deliver: Callable[[StreamChunk], None]
    timeout: float
    arrived: float = field(default_factory=time.monotonic)
    tokens: list[int] = field(default_factory=list)
    canceled: bool = False
    stream: TextStream = field(init=False)  # made in the engine's thread
    _scored: deque[TokenLogprob] = field(default_factory=deque)
    _passed: int = 0  # characters that were delivered
    _first_call: FirstCall | None = field(init=False)

    def __post_init__(self) -> None:
        self._first_call = None if self.params.one_call is None else self.params.one_call()

    @property
    def elapsed(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self.arrived

    @property
    def complete(self) -> bool:
        """Whether the response has ended by a stop sequence or at ``max_new_tokens``."""
        return self.stream.stopped or len(self.tokens) >= self.params.max_new_tokens

    def cancel(self) -> None:
        """Abandon the request; it leaves the batch before the next token."""
        self.canceled = True

    def interrupted(self) -> str | None:
        """Why the request must end before its response is complete ("canceled", "timeout"), or
        None."""
        if self.canceled:
            return "canceled"
        return "timeout" if self.elapsed > self.timeout else None

    def take(self, token: int, logits: torch.Tensor | None, scorer: TokenScorer) -> str | None:
        """Append ``token`` and deliver the text that is final by now; returns the finish reason if
        it ends the response, else None. ``logits`` (V,): what it was drawn from, for log-probs."""
        self.tokens.append(token)
        if logits is not None and self.params.logprobs is not None:
            offset = len(self.stream.text)
            self._scored.append(scorer(token, logits, self.params.logprobs, offset))
        text = self.stream.push(token)
        complete = self.complete
        if complete:
            text += self.stream.finish()
        text = self.stop_filter.push(text, final=complete)
        finish = self.stop_filter.reason
        if self._first_call is not None:
            text = self._first_call.push(text)
        if finish is None and (complete or self._ended_by_call):
            finish = "stop" if self.stream.stopped or self._ended_by_call else "length"
        if text or finish:
            self._passed += len(text)
            scored = self._scored_until(finish)
            self.deliver(StreamChunk(text, finish, len(self.tokens), scored))
        return finish

    @property
    def _ended_by_call(self) -> bool:
        return self._first_call is not None and self._first_call.ended

    def _scored_until(self, finish: str | None) -> tuple[TokenLogprob, ...]:
        """Log-probs of the tokens whose text has been delivered. At the end also of those that are
        skipped, but not of the stop sequence nor of what a stop string cut off."""
        if finish == "length":
            found = tuple(self._scored)
            self._scored.clear()
            return found
        taken = []
        while self._scored and self._scored[0].offset < self._passed:
            taken.append(self._scored.popleft())
        return tuple(taken)


class InferenceEngine:
    """Generates responses in a background thread.

    Args:
        max_length: limit on prompt plus response tokens, capped at the model's positions; None:
            the model's positions.
        max_batch: requests that run at a time.
        max_queue: requests that may wait besides.
        timeout: seconds that a request may take, waiting included.
        words: filtered words; a response is cut before the first of them.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        max_length: int | None = None,
        max_batch: int = 8,
        max_queue: int = 64,
        timeout: float = 300.0,
        words: Sequence[str] = (),
    ):
        self.loaded = loaded
        self.words = list(words)
        self.max_length = within_positions(loaded.model.config, max_length)
        self.limited = max_length is not None  # by whoever started it
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.timeout = timeout
        self.metrics = ServerMetrics(lambda: self.running, lambda: self.waiting)
        self.stops = loaded.stop_sequences()
        # A fast tokenizer is not thread-safe, so the engine's thread has its own copy.
        self._tokenizer = copy.deepcopy(loaded.tokenizer)
        self._scorer = TokenScorer(self._tokenizer)
        self._encoding = threading.Lock()
        self._templates = ChatTemplates(loaded.conversation)
        self._device = next(loaded.model.parameters()).device
        self._decoder: Decoder | None = None
        # Prepacking pays only if the number of rows stays the same for some steps.
        self._prepacked = Prepacked(loaded.model, patience=PAYS_AFTER)
        self._numbers = itertools.count()
        self._waiting: deque[Request] = deque()
        self._running: dict[int, Request] = {}
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="coati-engine", daemon=True)
        self._thread.start()

    def template(
        self, args: dict[str, Any] | None = None, effort: str | None = None
    ) -> ChatTemplate:
        """See :meth:`ChatTemplates.of`."""
        with self._encoding:
            return self._templates.of(args, effort)

    def encode(self, messages: list[dict[str, Any]], begun: str = "") -> list[int]:
        """The prompt's token ids; ``begun``: how the response begins. Raises RowError if the
        template rejects ``messages``."""
        return self.encode_chat(self.template(), messages, begun).ids

    def encode_chat(
        self,
        template: ChatTemplate,
        messages: list[dict[str, Any]],
        begun: str = "",
        tools: Sequence[dict[str, Any]] = (),
        forced: str = "",
    ) -> ChatPrompt:
        """The prompt under ``template``; ``forced``: how a call begins, as the template writes it.
        Raises RowError."""
        conversation = template.conversation
        with self._encoding:
            encoded = conversation.encode_prompt(messages, begun, tools=list(tools) or None)
            ids = encoded.input_ids
            if forced:
                ids = ids + conversation.encoder.encode_inside(forced)
            return ChatPrompt(ids, encoded.text, forced)

    def encode_text(self, prompt: str | list[int]) -> list[int]:
        """The ids of a text that no template surrounds, with what the tokenizer puts before it; ids
        as they are. Raises ValueError for ids that the vocabulary does not have."""
        if not isinstance(prompt, str):
            size = self.loaded.model.get_input_embeddings().weight.shape[0]
            if any(not 0 <= id < size for id in prompt):
                raise ValueError(f"token ids must be from 0 to {size - 1}")
            return prompt
        with self._encoding:
            return list(self.loaded.tokenizer(prompt)["input_ids"])

    def submit(
        self, prompt: list[int], params: SamplingParams, deliver: Callable[[StreamChunk], None]
    ) -> Request:
        """Queue ``prompt``; ``deliver`` is called with each chunk of the response, in the engine's
        thread.

        Raises:
            PromptTooLong: if prompt and ``max_new_tokens`` exceed ``max_length``.
            QueueFull: if too many requests are waiting, or the engine is closed.
        """
        if len(prompt) + params.max_new_tokens > self.max_length:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens and the response up to "
                f"{params.max_new_tokens}, together more than this server's limit of "
                f"{self.max_length}; shorten the prompt or ask for fewer tokens"
            )
        stop_filter = StopStringFilter(params.stop, self.words)
        number = next(self._numbers)
        request = Request(number, prompt, params, stop_filter, deliver, self.timeout)
        with self._wake:
            if len(self._waiting) >= self.max_queue:
                self.metrics.outcome("queue_full")
                raise QueueFull(
                    f"{len(self._waiting)} requests are already waiting; try again later"
                )
            if self._closed:
                raise QueueFull("the server is shutting down")
            self._waiting.append(request)
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
        """Stop the thread. Unfinished requests get a last chunk that says "closed"."""
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
            except BaseException as error:  # a model's own code may exit: this must go on
                logger.error(
                    f"an error ended {len(self._running)} responses: {type(error).__name__}: "
                    f"{error}"
                )
                self._clear()
                self._end(dict.fromkeys(self._running, "error"))
        with self._wake:
            self._running |= {request.number: request for request in self._waiting}
            self._waiting = deque()
        self._end(dict.fromkeys(self._running, "closed"))

    def _turn(self) -> None:
        """One token for each row of the batch, then the prefill of at most one waiting request, so
        that running responses never wait for several prompts."""
        with self._wake:
            expired = [request for request in self._waiting if request.interrupted()]
            self._waiting = deque(each for each in self._waiting if each not in expired)
            room = len(self._running) < self.max_batch and self._waiting
            admitted = self._waiting.popleft() if room else None
            for request in expired if admitted is None else [*expired, admitted]:
                self._running[request.number] = request
        running = self._running.items()
        self._end({number: why for number, each in running if (why := each.interrupted())})
        if self._decoder is not None:
            self._step()
        if admitted is not None and admitted.number in self._running:
            self._join(admitted)

    def _step(self) -> None:
        """Generate one token for each row of the batch."""
        numbers = self._decoder.row_ids.tolist()
        self._prepacked.use(len(numbers))
        self._decoder.prepacked = self._prepacked
        requests = [self._running[number] for number in numbers]
        self._decoder.keep_logits = any(each.params.logprobs is not None for each in requests)
        step = self._decoder.step()
        self.metrics.generated.inc(len(numbers))
        logits = [None] * len(numbers) if step.logits is None else step.logits
        rows = zip(requests, step.tokens.tolist(), logits, strict=True)
        ends = {each.number: each.take(token, row, self._scorer) for each, token, row in rows}
        self._end({number: why for number, why in ends.items() if why})

    def _join(self, request: Request) -> None:
        """Generate the first token of ``request`` and, unless that ends it, add it to the batch.
        What goes wrong before that ends this request alone."""
        try:
            decoder, why = self._begin(request)
        except BaseException as error:  # a prompt too long for the memory, say
            logger.error(f"an error ended a response: {type(error).__name__}: {error}")
            why = "error"
        if why:
            self._end({request.number: why})
        elif self._decoder is None:
            self._decoder = decoder
        else:
            self._decoder.join(decoder)

    def _begin(self, request: Request) -> tuple[Decoder, str | None]:
        """The first token of ``request``: its decoder, and the finish reason if that ends it."""
        ids = torch.tensor([request.prompt], device=self._device)
        params = request.params
        before = request.prompt if params.continues else ()
        request.stream = TextStream(self._tokenizer, self.stops, before, params.shown)
        decoder = Decoder(
            self.loaded.model,
            ids,
            torch.ones_like(ids),
            params.sampling,
            noise=params.noise(),
            row_ids=torch.tensor([request.number]),
        )
        decoder.keep_logits = params.logprobs is not None
        step = decoder.step()
        self.metrics.joined(len(request.prompt), request.elapsed)
        logits = None if step.logits is None else step.logits[0]
        return decoder, request.take(int(step.tokens[0]), logits, self._scorer)

    def _end(self, ended: dict[int, str]) -> None:
        """Remove requests, {number: finish reason}, from the batch; those without a whole response
        get a last chunk with the reason."""
        if ended and self._decoder is not None:
            staying = [number not in ended for number in self._decoder.row_ids.tolist()]
            if any(staying):
                self._decoder.leave(torch.tensor(staying, device=self._device))
            else:
                self._clear()
        for number, why in ended.items():
            request = self._running[number]
            # Counted first: who sees no request running sees each of them in the metrics.
            self.metrics.outcome(why, request.elapsed)
            if why in INCOMPLETE:
                request.deliver(StreamChunk("", why, len(request.tokens)))
            del self._running[number]

    def _clear(self) -> None:
        """Drop the decoder and the prepacked weights."""
        self._decoder = None
        self._prepacked.end()
