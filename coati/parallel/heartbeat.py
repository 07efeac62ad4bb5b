"""Heartbeats: every rank tells the others that it lives, whatever its main thread waits for.

Two threads a rank. One beats: through a connection of its own to the store it writes what this rank
does, and rank 0 reads all, the others what rank 0 makes of it, so that the load grows with the
number of ranks and not with its square. A cut network blocks this thread for as long as it likes.
The other thread only looks at clocks: a rank that has not beaten for ``--collective_timeout``, a
store that could not be reached for that long, or ranks that all wait inside collectives for that
long end this process with one sentence, also when its main thread is stuck.

Work that one rank does alone is waited for as long as that rank beats: the process groups
themselves have no timeout that matters (:data:`NO_TIMEOUT`).
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

from coati.parallel.stall import Stall, StallClock
from coati.utils.errors import RunFailed
from coati.utils.liveness import CURRENT, forced_end_callbacks

NO_TIMEOUT = timedelta(days=20)  # fits 32 bits of milliseconds
INTERVAL_S = 2.0
LAST_WORDS_S = 5.0  # for what has to be done before the process ends
RUNS = "runs"
LOST = "lost"  # a collective failed: a victim, not the cause
ENDED = "ended"
# What a process that has ended leaves behind; all else may be a network that is cut.
GONE = re.compile(r"refused|reset by peer|closed by peer|broken pipe|failed to recv, got 0", re.I)
CONNECTION_LOST = re.compile(
    r"gloo[/\\]transport|connection (closed|reset|refused)|NCCL (error|communicator)"
    r"|remote process exited|broken pipe|failed to recv, got 0",
    re.I,
)


@dataclass
class Beat:
    """What a rank says of itself. ``stalled``: seconds for which its main thread has waited inside
    one collective, at ``place``."""

    count: int = 0
    host: str = "?"
    state: str = RUNS
    phase: str = ""
    step: int | None = None
    saved: int | None = None
    stalled: float = 0.0
    place: str = ""


@dataclass
class Peer:
    """A rank as it was last seen, and when its beat last changed."""

    beat: Beat
    changed: float

    def see(self, beat: Beat, now: float) -> None:
        """Take in what it says now."""
        if beat.count != self.beat.count or beat.state != self.beat.state:
            self.changed = now
        self.beat = beat


@dataclass
class Table:
    """What rank 0 tells the others: that it lives, and what ends the run."""

    count: int = 0
    verdict: str = ""


@dataclass
class Places:
    """Who takes part: ``connect(timeout)`` makes a new connection to the store at ``address``,
    which rank 0 holds itself if ``hosted_by_rank_0``."""

    rank: int
    hosts: Sequence[str]
    connect: Callable[[timedelta], Any]
    address: str
    hosted_by_rank_0: bool = True
    on_gpu: bool = False
    peers: list[Peer] = field(default_factory=list)

    def name(self, rank: int) -> str:
        """ "rank 1 on node2"."""
        return f"rank {rank} on {self.hosts[rank]}"


class Heartbeat:
    """The beats of this rank and its watch over the others; made by the main thread.

    Args:
        timeout_s: within this many seconds of what happened the process has ended.
    """

    def __init__(self, places: Places, timeout_s: float) -> None:
        self.places = places
        self.timeout_s = timeout_s
        self.interval = min(INTERVAL_S, timeout_s / 20)
        # A beat is seen up to an interval after it was written; a verdict takes two to be read.
        self.limit = timeout_s - 4 * self.interval
        self.peers = [Peer(Beat(host=host), time.monotonic()) for host in places.hosts]
        self._clock = StallClock(places.on_gpu)
        self._stall = Stall(0.0, "")
        self._mine = Beat(host=places.hosts[places.rank])
        self._table = Table()
        self._answered = time.monotonic()  # when the store last did
        self._gone_at: float | None = None  # when it was first found gone
        self._wake = threading.Event()
        self._said_goodbye = threading.Event()
        self._stopping = threading.Event()
        self._ending = threading.Lock()
        self._explained: str | None = None
        self._threads = [
            threading.Thread(target=run, name=f"coati-{run.__name__}", daemon=True)
            for run in (self._beat_on, self._watch_on)
        ]

    def start(self) -> None:
        """Begin to beat and to watch."""
        for thread in self._threads:
            thread.start()

    # The thread that beats.

    def _beat_on(self) -> None:
        store = None
        while not self._stopping.is_set():
            try:
                store = store or self.places.connect(timedelta(seconds=max(self.limit / 4, 1)))
                self._exchange(store)
            except RuntimeError as error:  # of the store, in all its kinds
                store = None
                if GONE.search(str(error)):
                    self._gone_at = self._gone_at or time.monotonic()
            else:
                self._answered = time.monotonic()
                self._gone_at = None
                if self._mine.state == ENDED:
                    self._said_goodbye.set()
            hurry = self._mine.state == ENDED and self.places.rank == 0
            self._wake.wait(0.05 if hurry else self.interval)
            self._wake.clear()

    def _exchange(self, store: Any) -> None:
        mine = self._mine
        mine.count += 1
        mine.phase = CURRENT.phase
        mine.step = CURRENT.step
        mine.saved = CURRENT.saved
        mine.stalled = self._stall.seconds
        mine.place = self._stall.place
        store.set(f"beat/{self.places.rank}", json.dumps(asdict(mine)))
        if self.places.rank == 0:
            self._table.count += 1
            store.set("table", json.dumps(asdict(self._table)))
        elif store.check(["table"]):
            told = Table(**json.loads(store.get("table")))
            if told.count != self._table.count:
                self.peers[0].changed = time.monotonic()
            self._table = told
        if self.places.rank == 0 or mine.state == LOST:
            self._read_all(store)

    def _read_all(self, store: Any) -> None:
        keys = [f"beat/{rank}" for rank in range(len(self.peers))]
        if not store.check(keys):  # some have not begun: a multi_get would wait for them
            keys = [key for key in keys if store.check([key])]
        now = time.monotonic()
        for key, text in zip(keys, store.multi_get(keys), strict=True):
            self.peers[int(key.partition("/")[2])].see(Beat(**json.loads(text)), now)

    # The thread that watches. It must never touch the store.

    def _watch_on(self) -> None:
        looked = time.monotonic()
        while not self._stopping.wait(self.interval / 2):
            now = time.monotonic()
            asleep = now - looked - self.interval / 2
            if asleep > self.limit / 2:  # this process was stopped itself, and saw nothing
                self._forgive(asleep)
            looked = now
            self._stall = self._clock.sample()
            verdict = self._table.verdict or self._verdict(now)
            if verdict:
                self._end(verdict)

    def _forgive(self, seconds: float) -> None:
        self._answered += seconds
        for peer in self.peers:
            peer.changed += seconds

    def _verdict(self, now: float) -> str | None:
        if self._gone_at is not None and self._mine.state != ENDED:
            waits = min(self._stall.seconds, now - self._gone_at) > 3 * self.interval
            return self._of_gone_store() if waits else None
        if now - self._answered > self.limit:
            return self._of_silence([0], now - self._answered)
        if self.places.rank:
            age = now - self.peers[0].changed
            return self._of_silence([0], age) if age > self.limit else None
        others = [rank for rank in range(1, len(self.peers)) if not self._has_ended(rank)]
        silent = [rank for rank in others if now - self.peers[rank].changed > self.limit]
        if silent:
            return self._of_silence(silent, now - self.peers[silent[0]].changed)
        alive = [self.peers[0].beat, *(self.peers[rank].beat for rank in others)]
        if self._mine.state == RUNS and all(beat.stalled > self.limit for beat in alive):
            return self._of_deadlock([0, *others])
        return None

    def _has_ended(self, rank: int) -> bool:
        return self.peers[rank].beat.state == ENDED

    # What is said.

    def _of_silence(self, ranks: list[int], seconds: float) -> str:
        who = shortened([self.places.name(rank) for rank in ranks], 8)
        steps = {self.peers[rank].beat.step for rank in ranks} - {None}
        step = max(steps) if steps else CURRENT.step
        at = "before the first step" if step is None else f"last step {step}"
        has, it = ("has", "it is") if len(ranks) == 1 else ("have", "they are")
        here = self.places.hosts[self.places.rank]
        there = [host for rank in ranks if (host := self.places.hosts[rank]) != here]
        cut = f", or the network between {here} and {there[0]} is cut" if there else ""
        return (
            f"{who} {has} not been heard of for {seconds:.0f} s ({at}): {it} frozen or without "
            f"power{cut}; --collective_timeout {self.timeout_s:g} ends the run{go_on()}"
        )

    def _of_gone_store(self) -> str:
        if self.places.hosted_by_rank_0:
            return f"{self.places.name(0)} has ended{_its_message()}{go_on()}"
        return f"the launcher at {self.places.address} has ended{go_on()}"

    def _of_deadlock(self, ranks: list[int]) -> str:
        by_place: dict[str, list[int]] = {}
        for rank in ranks:
            by_place.setdefault(self.peers[rank].beat.place, []).append(rank)
        where = [
            f"{shortened([self.places.name(rank) for rank in there], 4)} at {place}"
            for place, there in by_place.items()
        ]
        return (
            f"all ranks have waited for each other for {self.limit:.0f} s, each in a collective: "
            f"{shortened(where, 4, '; ')}. They take different ways: look for code that only some "
            f"ranks run{go_on()}"
        )

    def _end(self, verdict: str) -> None:
        """End this process with ``verdict``, whatever its main thread does."""
        if not self._ending.acquire(blocking=False):
            return
        if self.places.rank == 0:
            self._table.verdict = verdict
            self._wake.set()
            time.sleep(2 * self.interval)  # until the others have read it
        words = threading.Thread(target=_last_words, args=(verdict,), daemon=True)
        words.start()
        words.join(LAST_WORDS_S)  # a disk may be on the far side of the cut, too
        os._exit(1)

    # What the main thread asks for.

    def explain(self) -> str:
        """After a collective has failed: which rank has ended. Waits for two beats of the others
        at most; the same answer at each call."""
        if self._explained is None:
            began = time.monotonic()
            self._mine.state = LOST
            self._wake.set()
            enough = began + max(2.5 * self.interval, 1.5)
            while time.monotonic() < enough and self._gone_at is None:
                time.sleep(self.interval / 10)
            self._explained = self._of_lost(began)
        return self._explained

    def _of_lost(self, began: float) -> str:
        if self._gone_at is not None:
            return self._of_gone_store()
        dead = [
            rank
            for rank, peer in enumerate(self.peers)
            if rank != self.places.rank
            and peer.changed < began + self.interval / 2
            and peer.beat.state != LOST  # those have ended because of another one
        ]
        if not dead:
            return f"another rank has left the run{_its_message()}{go_on()}"
        who = shortened([self.places.name(rank) for rank in dead], 8)
        steps = {self.peers[rank].beat.step for rank in dead} - {None}
        last = f" (last step {max(steps)})" if steps else ""
        return f"{who} {'has' if len(dead) == 1 else 'have'} ended{last}{_its_message()}{go_on()}"

    def leave(self, wait: bool) -> None:
        """Say goodbye. ``wait``: for the goodbyes of the others, if this process holds the store
        through which they watch each other."""
        self._mine.state = ENDED
        self._said_goodbye.clear()
        self._wake.set()
        if wait and self.places.rank == 0 and self.places.hosted_by_rank_0:
            while not all(map(self._has_ended, range(1, len(self.peers)))):
                time.sleep(0.02)
        self._said_goodbye.wait(self.interval + 1)
        self.stop()

    def stop(self) -> None:
        """End both threads: one that is inside the store must not outlive the interpreter."""
        self._stopping.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(self.interval + 1)


def shortened(words: Sequence[str], count: int, between: str = ", ") -> str:
    """The first ``count`` of ``words``, and how many more there are."""
    rest = len(words) - count
    return between.join(words[:count]) + (f" and {rest} more" if rest > 0 else "")


def go_on() -> str:
    """How to, when there is a checkpoint."""
    if CURRENT.saved is None:
        return ""
    return f"; --checkpoint_path auto goes on from step {CURRENT.saved}"


def _its_message() -> str:
    return ": its own message, or the log of its host, says why"


def _last_words(verdict: str) -> None:
    callbacks = forced_end_callbacks()
    if not callbacks:
        print(f"[rank {os.environ.get('RANK', '0')}] {verdict}", file=sys.stderr, flush=True)
    for callback in callbacks:
        callback(verdict)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def is_lost_connection(error: BaseException) -> bool:
    """Whether ``error`` is that of a collective whose other side has gone."""
    return (
        isinstance(error, RuntimeError)
        and not isinstance(error, RunFailed)
        and CONNECTION_LOST.search(str(error)) is not None
    )
