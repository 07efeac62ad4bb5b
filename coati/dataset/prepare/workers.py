"""A pool of processes that work on chunks of rows, a few chunks ahead of what is consumed."""

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import groupby, takewhile
from typing import Any, Protocol, TypeVar

from coati.dataset.prepare.shard_plan import Bin, Chunk, Task, is_evaluation
from coati.utils.errors import no_early_exit

T = TypeVar("T")
# After a SIGTERM that all processes of a job get: the training process still ends its step.
GRACE_S = 30.0
AHEAD = 3  # chunks for each process that are worked on, or done and not yet consumed


class Worker(Protocol):
    """Copied once into every process, which then runs it on one chunk after the other."""

    def run(self, chunk: Chunk, evaluation: bool) -> Any: ...


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_by_bin(
    worker: Worker, tasks: Iterator[Task], num_proc: int, lock: int | None = None
) -> Iterator[tuple[Bin, Iterator[tuple[str, Any]]]]:
    """Each bin with ``(shard, result of worker.run)`` for each of its chunks, in order.

    Only a few chunks are in memory at a time. The results of a bin must be consumed before the next
    bin. ``lock``: a file descriptor that the workers must not inherit. Raises OSError when a worker
    dies.
    """
    results = (_run_here if num_proc <= 1 else _run_in_pool)(worker, tasks, num_proc, lock)
    for bin, of_bin in groupby(results, key=lambda done: done[0].bin):
        chunks = takewhile(lambda done: done[0].rows is not None, of_bin)
        yield bin, ((task.shard, result) for task, result in chunks)


def _run_here(worker: Worker, tasks: Iterator[Task], *_: Any) -> Iterator[tuple[Task, Any]]:
    for task in tasks:
        yield task, None if task.rows is None else worker.run(task.rows, is_evaluation(task.shard))


def _run_in_pool(
    worker: Worker, tasks: Iterator[Task], num_proc: int, lock: int | None
) -> Iterator[tuple[Task, Any]]:
    pool = _pool(worker, num_proc, lock)
    with _no_tokenizer_threads():
        try:
            yield from _in_order(pool, tasks, AHEAD * num_proc)
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process died, perhaps for lack of memory; use fewer with --num_proc"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _pool(
    worker: Worker, num_proc: int, lock: int | None = None, grace_s: float = 0.0
) -> ProcessPoolExecutor:
    fork = sys.platform == "linux"
    return ProcessPoolExecutor(
        num_proc,
        mp_context=multiprocessing.get_context("fork" if fork else "spawn"),
        initializer=_start_process,
        initargs=(worker, lock if fork else None, grace_s),
    )


class StandingPool:
    """``worker`` in ``num_proc`` processes that are started at once, before this process has
    threads or a GPU that a fork would copy; 0: in this process."""

    def __init__(self, worker: Worker, num_proc: int) -> None:
        self._worker = worker
        self._num_proc = num_proc
        self._pool = None
        if num_proc:
            self._pool = _pool(worker, num_proc, grace_s=GRACE_S)
            with _no_tokenizer_threads():
                self._pool.submit(os.getpid).result()

    def map(self, items: Iterable[tuple[T, Chunk]]) -> Iterator[tuple[T, Any]]:
        """Each item's first part with what ``worker.run`` makes of its chunk, in order; a few
        chunks are worked on ahead. Raises OSError when a worker dies."""
        if self._pool is None:
            for item, chunk in items:
                yield item, self._worker.run(chunk, False)
            return
        pending: deque = deque()
        try:
            for item, chunk in items:
                pending.append((item, self._pool.submit(_run_in_process, chunk, False)))
                if len(pending) > AHEAD * self._num_proc:
                    done, future = pending.popleft()
                    yield done, future.result()
            for done, future in pending:
                yield done, future.result()
        except BrokenProcessPool as error:
            raise OSError(
                "a process that tokenizes rows died, perhaps for lack of memory; use fewer with "
                "--stream_workers"
            ) from error

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, tasks: Iterator[Task], ahead: int
) -> Iterator[tuple[Task, Any]]:
    pending: deque = deque()
    for task in tasks:
        evaluation = is_evaluation(task.shard)
        pending.append((task, task.rows and pool.submit(_run_in_process, task.rows, evaluation)))
        if len(pending) > ahead:
            done, future = pending.popleft()
            yield done, future and future.result()
    for done, future in pending:
        yield done, future and future.result()


_worker: Worker | None = None  # of this process


def _start_process(worker: Worker, inherited: int | None, grace_s: float) -> None:
    global _worker
    _worker = worker
    # Objects from before the fork stay shared with the parent: collections do not touch them.
    gc.freeze()
    if inherited is not None:
        os.close(inherited)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends its workers
    if grace_s:
        signal.signal(signal.SIGTERM, lambda *_: threading.Timer(grace_s, os._exit, [1]).start())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A worker whose parent was killed would wait forever for its next chunk.
    multiprocessing.parent_process().join()
    os._exit(1)


def _run_in_process(chunk: Chunk, evaluation: bool) -> Any:
    with no_early_exit("a worker process"):
        return _worker.run(chunk, evaluation)


@contextmanager
def _no_tokenizer_threads() -> Iterator[None]:
    """The processes use all cores already; the tokenizer's own threads would only compete."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
