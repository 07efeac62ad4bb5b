"""What has to be the same on every rank is compared before anything depends on it.

Over the store at which the ranks met, not by collectives: ranks that differ may not call the same
ones, and hosts that cannot reach each other have the store in common all the same.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch.distributed as dist

from coati.utils.errors import RunFailed

Result = TypeVar("Result")
Facts = Mapping[str, Any]

# For work that every rank does before it answers, such as reading rows from a slow disk: as long as
# it lives, which heartbeats tell.
PATIENCE_S = 20 * 24 * 3600.0
LEAVE_S = 10.0  # for ranks to read why the run ends, before rank 0 takes the store with it
UNKNOWN = "(unknown)"  # a fact that a rank cannot find out: not compared
SHOWN = 8  # differences of one message
WIDEST = 120  # characters of a value in a message
_calls = count()


class RanksDiffer(RunFailed):
    """The ranks do not agree; the message is the same on each of them."""


class Exchange:
    """The store of a group. ``rank``, ``world_size``: of this process and of all; ``host``: its
    name."""

    def __init__(self, store: Any, rank: int, world_size: int, host: str | None = None) -> None:
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.host = host or socket.gethostname()
        self._rounds = count()

    def answers(
        self, key: str, mine: Any, judge: Callable[[list[Any]], str], wait_s: float | None = None
    ) -> None:
        """Every rank hands in ``mine``, and rank 0 ``judge``s what all have: a text ends them all.

        Raises RanksDiffer with it on every rank, or naming the ranks that did not answer within
        ``wait_s``, by default PATIENCE_S.
        """
        wait_s = PATIENCE_S if wait_s is None else wait_s
        key = f"{key}-{next(self._rounds)}"
        self.store.set(f"{key}/{self.rank}", json.dumps(mine))
        if self.rank == 0:
            end = time.monotonic() + wait_s
            found = [
                self._read(f"{key}/{who}", end - time.monotonic()) for who in range(self.world_size)
            ]
            missing = [who for who, one in enumerate(found) if one is None]
            text = _did_not_answer(missing, wait_s) if missing else judge(found)
            self.store.set(f"{key}/verdict", json.dumps(text))
        else:
            text = self._read(f"{key}/verdict", wait_s + LEAVE_S)
        if text is None:
            raise RanksDiffer(
                f"rank {self.rank} on {self.host}: rank 0 did not answer within "
                f"{wait_s:.0f} s; look at its log"
            )
        if text:
            self.leave_together(key)
            raise RanksDiffer(text)

    def hear(self, key: str, wait_s: float = PATIENCE_S) -> Any:
        """What another rank has said under ``key``; None where it does not within ``wait_s``."""
        return self._read(key, wait_s)

    def say(self, key: str, value: Any) -> None:
        """Let the other ranks :meth:`hear` it."""
        self.store.set(key, json.dumps(value))

    def leave_together(self, key: str) -> None:
        """Rank 0 stays until all others know what it knows, since the store goes with it."""
        self.store.set(f"{key}/left/{self.rank}", "1")
        if self.rank == 0:
            end = time.monotonic() + LEAVE_S
            for who in range(self.world_size):
                self._read(f"{key}/left/{who}", end - time.monotonic())

    def _read(self, key: str, wait_s: float) -> Any:
        try:
            self.store.wait([key], timedelta(seconds=max(wait_s, 0.01)))
        except dist.DistStoreError:
            return None
        except dist.DistNetworkError:  # rank 0 is gone, and the store with it
            return None
        return json.loads(self.store.get(key))


def group_exchange() -> Exchange | None:
    """That of this process's group; None for one process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    store = dist.distributed_c10d._get_default_store()
    store = dist.PrefixStore(f"agreement-{next(_calls)}", store)
    return Exchange(store, dist.get_rank(), dist.get_world_size())


def agree(
    facts: Callable[[Result], Facts],
    work: Callable[[], Result],
    met: Exchange | None = None,
    remedy: str = "start all of them with the same flags, files and packages",
) -> Result:
    """What ``work()`` returns on this rank, when ``facts`` of it are the same on every rank.

    Every rank must call it; ``met``: by default that of the process group. A fact that is None is
    left to another rank of the same host, one that is UNKNOWN is not compared.

    Raises RanksDiffer on every rank, naming what differs with hosts, ranks and values; or, where
    ``work`` raised ValueError, OSError or RunFailed on some ranks, that error on them and its text
    on the others.
    """
    met = met or group_exchange()
    if met is None:
        return work()
    failure: Exception | None = None
    answer: dict[str, Any] = {"host": met.host}
    try:
        result = work()
        answer["facts"] = {name: str(value) for name, value in _known(facts(result)).items()}
    except (ValueError, OSError, RunFailed) as error:
        failure = error
        answer["error"] = str(error)
    # Where this rank has failed, another may wait for it in a collective, and for this one's end.
    wait_s = None if failure is None else LEAVE_S
    try:
        met.answers("facts", answer, lambda found: verdict(found, remedy), wait_s)
    except RanksDiffer:
        if failure is None:
            raise
    if failure is not None:
        raise failure
    return result


def _known(facts: Facts) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}


def local_leader() -> bool:
    """Whether this rank speaks for its host, where one answer a host is enough."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def verdict(answers: list[dict[str, Any]], remedy: str) -> str:
    """The message about what differs between the ranks' ``answers``; "" where nothing does."""
    failed = [(who, one) for who, one in enumerate(answers) if "error" in one]
    if failed:
        return "; ".join(
            f"rank {who} on {one['host']}: {one['error']}"
            for who, one in _once(failed, lambda one: one["error"])
        )
    names = dict.fromkeys(name for one in answers for name in one["facts"])
    differences = [text for name in names if (text := _difference(name, answers))]
    if not differences:
        return ""
    more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
    return (
        f"the processes of this run differ: {'; '.join(differences[:SHOWN])}{more}. Each would "
        f"train something else; {remedy}"
    )


def _once(found: list[tuple[int, Any]], key: Callable[[Any], Any]) -> list[tuple[int, Any]]:
    """The first of those with equal keys."""
    first: dict[Any, tuple[int, Any]] = {}
    for who, one in found:
        first.setdefault(key(one), (who, one))
    return list(first.values())


def _difference(name: str, answers: list[dict[str, Any]]) -> str:
    """``name is A on node1 (rank 0), B on node2 (ranks 1 and 2)``; "" where it is the same."""
    answered = {one["host"] for one in answers if name in one["facts"]}
    values: dict[str, dict[str, list[int]]] = {}
    for who, one in enumerate(answers):
        if name not in one["facts"] and one["host"] in answered:
            continue  # another rank of its host has said it
        value = one["facts"].get(name, "not given")
        if value == UNKNOWN:
            continue
        values.setdefault(value, {}).setdefault(one["host"], []).append(who)
    if len(values) < 2:
        return ""
    alike = len(os.path.commonprefix(list(values)))
    places = [
        f"{_short(value, alike)} on {', '.join(_place(*host) for host in hosts.items())}"
        for value, hosts in values.items()
    ]
    return f"{name} is {', '.join(places)}"


def _place(host: str, ranks: list[int]) -> str:
    return f"{host} ({_ranks(ranks)})"


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 4 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def _short(text: str, alike: int) -> str:
    """``text``, of a long one what stands near its character ``alike``."""
    if len(text) <= WIDEST:
        return text or "empty"
    start = max(0, min(alike - WIDEST // 2, len(text) - WIDEST))
    end = start + WIDEST
    return ("..." if start else "") + text[start:end] + ("..." if end < len(text) else "")


def _did_not_answer(missing: list[int], wait_s: float) -> str:
    return (
        f"{_ranks(missing)} did not answer within {wait_s:.0f} s before the training; look at the "
        "log of that host"
    )
