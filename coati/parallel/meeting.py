"""How the processes of a run find each other: all at one store, each named that does not come.

The store may be that of torchrun's agent, which outlives the processes: after an elastic restart
it still holds what the last ones wrote. So every process signs in with a nonce, rank 0 proposes a
group of nonces, and a process accepts only a group that holds its own. Restarts need not be
counted, and the counts of different hosts may differ.
"""

import json
import os
import secrets
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from coati.parallel.interfaces import reachable_name
from coati.parallel.no_store import in_time, no_store
from coati.utils.errors import RunFailed

POLL_S = 0.02
SLACK_S = 5.0  # beyond torch's own time limit
LEAVE_S = 5.0  # for the others to read that some are missing


class LaunchFailed(RunFailed):
    """The processes did not come together."""


@dataclass(frozen=True)
class Meeting:
    """Who met where. ``store``: of this group alone; ``hosts``: by rank; ``hosted_by_rank_0``:
    whether the store ends with that process."""

    store: Any
    rank: int
    hosts: list[str]
    prefix: str
    address: tuple[str, int]
    hosted_by_rank_0: bool

    def connect(self, timeout: timedelta) -> Any:
        """A connection of its own to the same store, for another thread."""
        host, port = self.address
        store = dist.TCPStore(host, port, None, False, timeout, wait_for_workers=False)
        return dist.PrefixStore(self.prefix, store)


def meet(handshake_s: float, timeout: timedelta) -> Meeting:
    """Wait until every rank has signed in. ``timeout``: of the store afterwards.

    Raises:
        LaunchFailed: on every rank, naming the ranks that did not appear within ``handshake_s``
            seconds.
    """
    missing_variables = [
        name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    if missing_variables:
        raise LaunchFailed(
            f"RANK is set but {', '.join(missing_variables)} not: start with colossalai run or "
            "torchrun, or unset RANK to run one process without a launcher"
        )
    rank = int(os.environ["RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    address = (reachable_name(os.environ["MASTER_ADDR"], rank), int(os.environ["MASTER_PORT"]))
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun itself
    try:
        base = _store(address, rank, world_size, hosted, timedelta(seconds=handshake_s))
        # A run that meets another one's store, whose port it was given, must not answer for it.
        store = dist.PrefixStore(f"coati/{os.environ.get('COATI_RUN_ID', '')}", base)
        if rank == 0:
            group = _gather(store, world_size, handshake_s)
        else:
            # Rank 0 may have begun to wait later than this one.
            group = _join(store, rank, world_size, 2 * handshake_s)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise LaunchFailed(no_store(error, rank, world_size, hosted, handshake_s)) from error
    base.set_timeout(timeout)
    prefix = f"coati/group-{group['name']}"
    hosts = [host for host, _ in group["members"]]
    return Meeting(dist.PrefixStore(prefix, base), rank, hosts, prefix, address, not hosted)


def _store(
    address: tuple[str, int], rank: int, world_size: int, hosted: bool, wait: timedelta
) -> Any:
    """What torch's env:// rendezvous makes, but without its wait for all, which cannot say who is
    missing."""
    host, port = address
    is_master = rank == 0 and not hosted
    return in_time(
        lambda: dist.TCPStore(
            host, port, world_size, is_master, wait, wait_for_workers=False, multi_tenant=True
        ),
        wait.total_seconds() + SLACK_S,
    )


def _sign_in(store: Any, rank: int) -> list[str]:
    """What this process writes: its host, and a number that no other process has."""
    mine = [socket.gethostname(), secrets.token_hex(8)]
    store.set(f"here/{rank}", json.dumps(mine))
    return mine


def _gather(store: Any, world_size: int, handshake_s: float) -> dict[str, Any]:
    """Rank 0: propose groups until all members of one have agreed to it."""
    mine = _sign_in(store, 0)
    end = time.monotonic() + handshake_s
    proposed: dict[str, Any] = {}
    while True:
        members = [mine, *(_read(store, f"here/{rank}") for rank in range(1, world_size))]
        agreed = [0]
        if None not in members:
            if members != proposed.get("members"):
                proposed = {"name": secrets.token_hex(8), "members": members, "missing": ""}
                store.set("proposed", json.dumps(proposed))
            others = range(1, world_size)
            agreed += [r for r in others if _read(store, f"agreed/{r}") == proposed["name"]]
            if len(agreed) == world_size:
                store.set("begun", json.dumps(proposed["name"]))
                return proposed
        if time.monotonic() > end:
            # Those that signed in for an earlier group only, after a restart, are missing, too.
            there = [rank for rank in range(1, world_size) if members[rank] is not None]
            missing = [r for r in range(1, world_size) if r not in (agreed if proposed else there)]
            _refuse(store, members, missing, world_size, handshake_s)
        time.sleep(POLL_S)


def _refuse(
    store: Any, members: list[Any], missing: list[int], world_size: int, handshake_s: float
) -> None:
    text = ", ".join(map(str, missing))
    store.set("proposed", json.dumps({"name": "", "members": members, "missing": text}))
    # They read it before this process takes the store with it.
    end = time.monotonic() + LEAVE_S
    there = [rank for rank in range(1, world_size) if members[rank] is not None]
    while time.monotonic() < end and not all(_has_read(store, rank, members) for rank in there):
        time.sleep(POLL_S)
    raise LaunchFailed(_who_is_missing(0, text, world_size, handshake_s))


def _has_read(store: Any, rank: int, members: list[Any]) -> bool:
    return _read(store, f"read/{rank}") == members[rank]


def _join(store: Any, rank: int, world_size: int, wait_s: float) -> dict[str, Any]:
    """Any other rank: agree to the group that holds this process, until one has begun."""
    mine = _sign_in(store, rank)
    end = time.monotonic() + wait_s
    agreed: dict[str, Any] = {}
    while True:
        proposed = _read(store, "proposed") or {"members": [], "name": "", "missing": ""}
        if mine in proposed["members"]:
            if proposed["missing"]:
                missing = proposed["missing"]
                store.set(f"read/{rank}", json.dumps(mine))
                raise LaunchFailed(_who_is_missing(rank, missing, world_size, wait_s / 2))
            if proposed["name"] != agreed.get("name"):
                agreed = proposed
                store.set(f"agreed/{rank}", json.dumps(agreed["name"]))
        if agreed and _read(store, "begun") == agreed["name"]:
            return agreed
        if time.monotonic() > end:
            raise LaunchFailed(_who_is_missing(rank, "0", world_size, wait_s / 2))
        time.sleep(POLL_S)


def _read(store: Any, key: str) -> Any:
    return json.loads(store.get(key)) if store.check([key]) else None


def _who_is_missing(rank: int, missing: str, world_size: int, handshake_s: float) -> str:
    return (
        f"rank {rank}: no sign of rank {missing} of {world_size} within {handshake_s:.0f} s; look "
        "at its host's log, at --nproc_per_node (the same on every host) and at the firewall"
    )
