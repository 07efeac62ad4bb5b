"""Ranks of which some are to fail: how each ended, what it said, and after how many seconds."""

import importlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed.spawn import ROOT, _end, _launcher_variables, forked_context, free_port


@dataclass
class Ended:
    """``code``: the exit code, negative for a signal, None where it had to be ended; ``seconds``
    from the fault on."""

    code: int | None
    text: str
    seconds: float


def run_until_ended(
    folder: Path,
    nproc: int,
    target: str,
    *args: Any,
    fault: Callable[[list[int]], object] | None = None,
    ready: int | None = None,
    timeout: float = 60,
) -> list[Ended]:
    """Call ``target`` in ``nproc`` ranks, which share ``folder``; when ``ready`` files
    ``ready-RANK`` are there, ``fault(process ids)``. Waits until all have ended, or ``timeout``
    seconds."""
    port = str(free_port())
    ranks = [
        forked_context().Process(
            target=_work,
            args=(folder, rank, _launcher_variables(rank, nproc, port, {}), target, args),
        )
        for rank in range(nproc)
    ]
    found: list[Ended | None] = [None] * nproc
    try:
        for process in ranks:
            process.start()
        begun = time.monotonic()
        while ready and len(list(folder.glob("ready-*"))) < ready:
            assert time.monotonic() - begun < timeout, _texts(folder)
            time.sleep(0.02)
        struck = time.monotonic()
        if fault is not None:
            fault([process.pid for process in ranks])
        while None in found and time.monotonic() - struck < timeout:
            for rank, process in enumerate(ranks):
                if found[rank] is None and process.exitcode is not None:
                    found[rank] = Ended(process.exitcode, "", time.monotonic() - struck)
            time.sleep(0.02)
    finally:
        for process in ranks:
            _end(process)
    texts = _texts(folder)
    ended = [one or Ended(None, "", float("inf")) for one in found]
    return [Ended(one.code, texts[rank], one.seconds) for rank, one in enumerate(ended)]


def _texts(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("output-*"))]


def _work(folder: Path, rank: int, variables: dict[str, str], target: str, args: tuple) -> None:
    os.setsid()
    output = os.open(folder / f"output-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(variables)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.chdir(ROOT)
    module, function = target.split(":")
    getattr(importlib.import_module(module), function)(folder, *args)
