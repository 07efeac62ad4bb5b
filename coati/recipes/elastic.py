"""Restarts by torchrun (``--max-restarts``): a run that its launcher starts again goes on from its
newest checkpoint by itself.

What tells a restart from a new run is the launcher: a run writes down which torchrun agents began
it, and goes on if one of them is starting it again. Counts of restarts do not tell: they differ by
host, and stay at 0 where another host failed.
"""

import os
import socket
from pathlib import Path

import psutil

from coati.utils.distributed import all_gather_object, broadcast_object, is_rank_0
from coati.utils.json_io import load_json, save_json

FILE = ".torchrun.json"
RUN_ID = "TORCHELASTIC_RUN_ID"


def agents() -> list[str]:
    """The torchrun processes of all hosts, each by host, id and start; [] without torchrun. Every
    rank must call it."""
    if RUN_ID not in os.environ:
        return []
    parent = psutil.Process(os.getppid())
    mine = f"{socket.gethostname()} {parent.pid} {parent.create_time():.2f}"
    return sorted(set(all_gather_object(mine)))


def is_restart(save_dir: str) -> bool:
    """Whether one of these agents has begun the run in ``save_dir``. Every rank must call it."""
    now = agents()
    file = Path(save_dir) / FILE
    begun = load_json(file)["agents"] if now and is_rank_0() and file.is_file() else []
    return broadcast_object(bool(set(now) & set(begun)))


def record_agents(save_dir: str) -> None:
    """Write down who begins this run, once it is sure that it may. Every rank must call it."""
    now = agents()
    if now and is_rank_0():
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        save_json({"agents": now}, Path(save_dir) / FILE)
