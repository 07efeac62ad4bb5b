"""Rows that wait for a server: those of one ask after those of another, each with the weights that
were published when it was asked."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Condition, Event, get_ident

from coati.experience_maker.rollouts.rollout_client import Answer, Row, Wanted
from coati.experience_maker.rollouts.weight_versions import Weights


@dataclass
class Ask:
    """Rows that are asked for together. ``together``: at most so many of them in one request."""

    rows: Sequence[Row]
    weights: Weights
    wanted: Wanted
    together: int
    answers: list[Answer | None] = field(init=False)
    waiting: deque[int] = field(init=False)
    finished: Event = field(default_factory=Event)

    def __post_init__(self) -> None:
        self.answers = [None] * len(self.rows)
        self.waiting = deque(range(len(self.rows)))


@dataclass(frozen=True)
class Share:
    """Rows of an ask that one server answers next."""

    ask: Ask
    numbers: list[int]

    @property
    def rows(self) -> list[Row]:
        """The rows themselves."""
        return [self.ask.rows[number] for number in self.numbers]


class RowQueue:
    """The asks of a run, oldest first. Used by the trainer's thread and one of each server."""

    def __init__(self) -> None:
        self._asks: list[Ask] = []
        self._changed = Condition()
        self._newest: Weights | None = None
        self._taken: dict[int, Weights] = {}  # by the thread that brings a server to them
        self.closed = False
        self.failure: str | None = None

    def add(self, ask: Ask) -> None:
        """Let servers answer ``ask``."""
        with self._changed:
            self._asks.append(ask)
            if not ask.rows or self.failure:
                self._finish(ask)
            self._changed.notify_all()

    def announce(self, weights: Weights) -> None:
        """Servers without work take ``weights`` beforehand."""
        with self._changed:
            self._newest = weights
            self._changed.notify_all()

    def next_weights(self, held: Weights | None, seconds: float) -> Weights | None:
        """The weights that a server which holds ``held`` needs next: those of the oldest ask with
        rows that wait, else the newest. None: nothing to do within ``seconds``, or ever again.
        They are in use until this thread calls :meth:`let_go`."""
        with self._changed:
            if self._needed(held) is None and not self.closed:
                self._changed.wait(seconds)
            needed = None if self.closed else self._needed(held)
            if needed is not None:
                self._taken[get_ident()] = needed
            return needed

    def let_go(self) -> None:
        """This thread does not need the weights any more that :meth:`next_weights` gave it."""
        with self._changed:
            self._taken.pop(get_ident(), None)

    def pause(self, seconds: float) -> None:
        """Sleep, but not beyond the end of the queue."""
        with self._changed:
            self._changed.wait_for(lambda: self.closed, seconds)

    def _needed(self, held: Weights | None) -> Weights | None:
        ask = self._oldest()
        if ask is not None:
            return ask.weights
        return self._newest if self._newest is not held else None

    def _oldest(self) -> Ask | None:
        return next((ask for ask in self._asks if ask.waiting), None)

    def take(self, weights: Weights, most: int | None = None) -> Share | None:
        """The next rows, where they are to be sampled with ``weights``."""
        with self._changed:
            ask = self._oldest()
            if self.closed or ask is None or ask.weights is not weights:
                return None
            share = Share(ask, [ask.waiting.popleft()])
            number = share.numbers[0]
            # Whoever answers them, the same rows are sampled together: batches of other shapes
            # have log-probs of other roundings.
            while (
                ask.waiting
                and len(share.numbers) < (most or ask.together)
                and ask.waiting[0] // ask.together == number // ask.together
            ):
                share.numbers.append(ask.waiting.popleft())
            return share

    def put_back(self, share: Share) -> None:
        """Another server has to answer ``share``."""
        with self._changed:
            if share.ask in self._asks:
                share.ask.waiting.extendleft(reversed(share.numbers))
            self._changed.notify_all()

    def answered(self, share: Share, answers: Sequence[Answer]) -> None:
        """The answers to ``share``."""
        with self._changed:
            for number, answer in zip(share.numbers, answers, strict=True):
                share.ask.answers[number] = answer
            if all(answer is not None for answer in share.ask.answers):
                self._finish(share.ask)

    def _finish(self, ask: Ask) -> None:
        if ask in self._asks:
            self._asks.remove(ask)
        ask.finished.set()

    def drop(self, ask: Ask) -> None:
        """Nobody waits for ``ask`` any more."""
        with self._changed:
            ask.waiting.clear()
            self._finish(ask)

    def fail(self, reason: str) -> None:
        """Every ask ends here, and every later one: nothing can answer it."""
        with self._changed:
            self.failure = self.failure or reason
            for ask in list(self._asks):
                self._finish(ask)
            self._changed.notify_all()

    def in_use(self) -> list[Weights]:
        """The weights that an unfinished ask needs, those that a server is being brought to, and
        the newest."""
        with self._changed:
            found = [*(ask.weights for ask in self._asks), *self._taken.values()]
            return found if self._newest is None else [*found, self._newest]

    def close(self) -> None:
        """Nothing is answered any more."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
