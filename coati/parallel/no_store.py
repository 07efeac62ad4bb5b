"""Why the ranks find no store to meet at, and how long they look for one."""

import os
import re
import socket
import threading
from collections.abc import Callable
from queue import Empty, Queue
from typing import Any

import torch.distributed as dist

from coati.utils.host_address import addresses_of, is_loopback, port_in_use

IN_USE = re.compile("EADDRINUSE|address already in use", re.IGNORECASE)


def in_time(connect: Callable[[], Any], wait_s: float) -> Any:
    """What ``connect()`` returns. torch's own time limit does not hold where another program has
    the port and waits to be told more.

    Raises DistStoreError after ``wait_s``, DistNetworkError where torch says that it cannot listen.
    """
    made: Queue[tuple[Any, BaseException | None]] = Queue()

    def work() -> None:
        try:
            made.put((connect(), None))
        except BaseException as error:
            made.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        store, error = made.get(timeout=wait_s)
    except Empty:
        raise dist.DistStoreError("what listens there does not answer as rank 0 would") from None
    if isinstance(error, RuntimeError) and not isinstance(error, dist.DistError):
        # So torch 2.5 says that a port is in use, and later ones by a DistNetworkError.
        raise dist.DistNetworkError(str(error)) from error
    if error is not None:
        raise error
    return store


def no_store(error: Exception, rank: int, world_size: int, hosted: bool, wait_s: float) -> str:
    """Why there is no store to meet at."""
    host = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    here = socket.gethostname()
    if rank == 0 and not hosted and IN_USE.search(str(error)):
        return (
            f"rank 0: {port_in_use(port)}, and the ranks cannot meet there; end it, or choose "
            "another port: --master_port, or MASTER_PORT on every host"
        )
    text = (
        f"rank {rank} on {here}: no sign of rank 0 of {world_size} at {host}:{port} within "
        f"{wait_s:.0f} s ({error}); is the port open and rank 0 running?"
    )
    found = addresses_of(host)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if found and is_loopback(found[0]) and local < world_size:
        text += (
            f" {host} is {found[0]} on {here}, which is {here} itself: give the address of rank "
            "0's host instead of its name (--master_addr), or mend /etc/hosts"
        )
    return text
