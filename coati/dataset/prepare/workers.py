"""Source rows to training rows on all cores: what a worker does with a chunk of rows, and the pool
of workers."""

import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from coati.dataset.chat.conversation import Conversation
from coati.dataset.clean.cleaning import RowChecks
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.prepare.shard_plan import Chunk, Task, is_evaluation
from coati.dataset.prepare.shards import to_arrow
from coati.dataset.report.row_stats import Recorder, Tally
from coati.dataset.rows.formats import read_row
from coati.dataset.rows.input_files import decode
from coati.dataset.rows.row_errors import RowError

_to_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make one for every row


class Worker(Protocol):
    """What every process gets once; it is then given one chunk after the other."""

    def run(self, chunk: Chunk, evaluation: bool) -> Any: ...


@dataclass
class Job:
    """What a worker needs to turn source rows into training rows."""

    type: str
    format: str | None
    files: list[str]
    conversation: Conversation
    max_length: int
    jsonl: bool
    checks: RowChecks

    def run(self, chunk: Chunk, evaluation: bool) -> tuple[bytes, bytes, Tally]:
        """``(arrow stream, JSON lines, counts)`` of one chunk."""
        data_type = DATA_TYPES[self.type]
        recorder, rows = Recorder(data_type, self.conversation), []
        for file, line, raw in chunk:
            recorder.tally.read[file] += 1
            where = f"{self.files[file]}:{line}"
            try:
                source = read_row(self.type, decode(raw), self.format)
                self.checks.check(source, evaluation)
                made = data_type.tokenize(source, self.conversation, self.max_length)
            except RowError as error:
                recorder.tally.drop(error, where)
                continue
            recorder.keep(file, line, where, source, made)
            rows += [row for row, _ in made]
        text = "".join(_to_json(row) + "\n" for row in rows) if self.jsonl else ""
        return to_arrow(data_type, rows), text.encode("utf-8"), recorder.close()


_worker: Worker | None = None


def _start_worker(worker: Worker, inherited: int | None) -> None:
    """``inherited``: the file descriptor of a lock, which must be the parent's alone."""
    global _worker
    _worker = worker
    # What was there before the fork stays shared with the parent: collections do not touch it
    gc.freeze()
    if inherited is not None:
        os.close(inherited)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A worker whose parent was killed would wait for its next chunk for ever.
    multiprocessing.parent_process().join()
    os._exit(1)


def _run_in_worker(chunk: Chunk, evaluation: bool) -> Any:
    return _worker.run(chunk, evaluation)


def results(
    worker: Worker, tasks: Iterator[Task], num_proc: int, lock: int | None = None
) -> Iterator[tuple[Task, Any]]:
    """Each task, in order, with ``worker.run`` of its rows; a few chunks are in flight, never the
    whole data."""
    if num_proc <= 1:
        for task in tasks:
            yield (
                task,
                None if task.rows is None else worker.run(task.rows, is_evaluation(task.shard)),
            )
        return
    fork = sys.platform == "linux"
    pool = ProcessPoolExecutor(
        num_proc,
        mp_context=multiprocessing.get_context("fork" if fork else "spawn"),
        initializer=_start_worker,
        initargs=(worker, lock if fork else None),
    )
    with _one_thread_each():
        try:
            yield from _in_order(pool, tasks, 3 * num_proc)
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process died, perhaps for lack of memory; use fewer with --num_proc"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, tasks: Iterator[Task], ahead: int
) -> Iterator[tuple[Task, Any]]:
    pending: deque = deque()
    for task in tasks:
        pending.append(
            (task, task.rows and pool.submit(_run_in_worker, task.rows, is_evaluation(task.shard)))
        )
        if len(pending) > ahead:
            task, future = pending.popleft()
            yield task, future and future.result()
    while pending:
        task, future = pending.popleft()
        yield task, future and future.result()


@contextmanager
def _one_thread_each():
    """The processes are the parallelism; threads of the tokenizer beside them would only
    compete."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
