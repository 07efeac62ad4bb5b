"""Real processes for a test: one per rank, their results back, none left behind.

``run(2, "tests.parallel.cases:train", {"lr": 0.1})`` calls that function in two processes that have
the variables a launcher sets (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, ...) and returns
``[result of rank 0, result of rank 1]``. The processes are forked from a server that has imported
ColossalAI (seconds) and done nothing else; where there is a GPU they are spawned afresh, because
CUDA does not survive a fork.
"""

import faulthandler
import importlib
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 5  # how long the others may live after one rank has failed
SHOWN_CHARACTERS = 6000
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class WorkerFailed(AssertionError):
    """A rank ended with an error, or the ranks did not finish in time. The text holds what each
    rank printed."""


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(
    nproc: int, target: str, *args: Any, timeout: float = 120, env: Mapping[str, str] | None = None
) -> list[Any]:
    """Call ``target`` ("module:function") with ``args`` in ``nproc`` processes; arguments and
    results are pickled.

    Raises WorkerFailed with the ends of all outputs when a rank fails or ``timeout`` (seconds) is
    over; every process that was started here has ended when this returns or raises.
    """
    with tempfile.TemporaryDirectory(prefix="coati-ranks-") as name:
        folder, port, context = Path(name), str(free_port()), forked_context()
        variables = [_launcher_variables(rank, nproc, port, env or {}) for rank in range(nproc)]
        ranks = [
            context.Process(target=_work, args=(folder, rank, variables[rank], timeout))
            for rank in range(nproc)
        ]
        (folder / "call").write_bytes(pickle.dumps((target, args)))
        try:
            for process in ranks:
                process.start()
            failure = _wait(ranks, timeout)
        finally:
            for process in ranks:
                _end(process)
        if failure:
            raise WorkerFailed(
                "\n".join([failure, *(_shown(folder, i, p.exitcode) for i, p in enumerate(ranks))])
            )
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(nproc)]


def join_group(timeout_s: float = 60) -> None:
    """In a worker: ColossalAI made ready for this machine, and a process group in which nobody
    waits long."""
    from datetime import timedelta

    import torch.distributed as dist

    from coati.parallel.boost import prepare_colossalai

    prepare_colossalai()
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))


@cache
def forked_context():
    """From which processes are forked that have imported what takes seconds; where there is a GPU
    they import it themselves."""
    if Path("/dev/nvidiactl").exists():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preload"])
    # The server takes its variables from here, once: the path to find the preload by, and no thread
    # pool to fork.
    os.environ.update(ONE_THREAD)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    return context


def _launcher_variables(rank: int, nproc: int, port: str, env: Mapping[str, str]) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        **ONE_THREAD,
        **env,
    }


def _wait(ranks, timeout: float) -> str | None:
    """Until all have ended well (None) or one has not (what to say about it)."""
    end = (
        time.monotonic() + timeout + GRACE_S
    )  # a rank dumps its stacks when its own timeout is over
    while time.monotonic() < end:
        codes = [process.exitcode for process in ranks]
        if all(code == 0 for code in codes):
            return None
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            for process in ranks:
                process.join(GRACE_S / len(ranks))
            return f"rank {failed[0]} failed"
        time.sleep(0.05)
    return f"the ranks did not finish within {timeout} s"


def _end(process) -> None:
    if process.pid is None:
        return
    try:
        os.killpg(
            process.pid, signal.SIGKILL
        )  # a session of its own, so that its children go with it
    except ProcessLookupError:
        process.kill()  # ended already, or too young to have a session
    process.join()


def _shown(folder: Path, rank: int, exit_code: int | None) -> str:
    output = folder / f"output-{rank}"
    text = (
        output.read_text(errors="replace")[-SHOWN_CHARACTERS:]
        if output.exists()
        else "(did not start)"
    )
    return f"--- rank {rank} (exit code {exit_code}) ---\n{text}"


def _work(folder: Path, rank: int, variables: dict[str, str], timeout: float) -> None:
    os.setsid()
    output = os.open(folder / f"output-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(variables)
    os.chdir(ROOT)
    faulthandler.enable()
    faulthandler.dump_traceback_later(timeout, exit=True)
    target, args = pickle.loads((folder / "call").read_bytes())
    module, function = target.split(":")
    result = getattr(importlib.import_module(module), function)(*args)
    partial = folder / f"partial-{rank}"
    partial.write_bytes(pickle.dumps(result))
    partial.rename(folder / f"result-{rank}")
    # A process group that still has threads may hang the interpreter's own way out.
    os._exit(0)
