"""Which name and network interface the ranks reach each other by, where a host's own name does not
say."""

import os
import socket
from typing import Any

from coati.parallel.agreement import Exchange
from coati.utils.errors import RunFailed
from coati.utils.host_address import (
    address_toward,
    addresses_of,
    hides_from_others,
    interface_of,
    is_loopback,
    own_address,
)
from coati.utils.logging import get_logger

logger = get_logger(__name__)

VARIABLE = "GLOO_SOCKET_IFNAME"
WAIT_S = 60.0


def reachable_name(name: str, rank: int) -> str:
    """``name`` (MASTER_ADDR), or its first part where only that is known here: torchrun names the
    first host in full as that host calls itself, which others need not know.

    Raises RunFailed where neither resolves.
    """
    first = name.partition(".")[0]
    if addresses_of(name):
        return name
    if addresses_of(first):
        logger.info(f"{name} is not known here, {first} is: the ranks meet there")
        return first
    raise RunFailed(
        f"rank {rank} on {socket.gethostname()}: no address is known for {name}, where the ranks "
        "meet; give an address instead of a name (--master_addr ADDRESS with coati, "
        "--local-addr ADDRESS to torchrun on each host), or add the name to /etc/hosts"
    )


def choose_interface(met: Exchange) -> None:
    """Have gloo offer an address that other hosts reach, where this host's own name leads to
    loopback (``127.0.1.1 name`` in Debian's /etc/hosts) or nowhere.

    Sets GLOO_SOCKET_IFNAME for this process unless it is set, and says so. Every rank must call it
    before the process group is made.
    """
    here = met.host
    toward = address_toward(os.environ["MASTER_ADDR"])
    met.say(f"address/{met.rank}", [here, toward])
    if VARIABLE in os.environ or not hides_from_others():
        return
    for other in range(met.world_size):
        told = met.hear(f"address/{other}", WAIT_S)
        if told is not None and told[0] != here:
            _choose(here, toward, told[1])
            return


def _choose(here: str, toward_master: str | None, other: str | None) -> None:
    """``other``: the address of another host, as that host sees itself."""
    mine: Any = toward_master
    if (mine is None or is_loopback(mine)) and other is not None:
        mine = address_toward(other)  # rank 0 is here
    interface = None if mine is None or is_loopback(mine) else interface_of(mine)
    leads = own_address()
    why = f"the name {here} leads to {leads} on its own host" if leads else f"{here} has no address"
    if interface is None:
        raise RunFailed(
            f"{why}, where no other host can reach it; put its address into /etc/hosts, or set "
            f"{VARIABLE} (and NCCL_SOCKET_IFNAME) to the interface that the hosts share"
        )
    os.environ[VARIABLE] = interface
    logger.info(f"{why}: gloo is told to use {interface} ({mine}), where other hosts reach it")
