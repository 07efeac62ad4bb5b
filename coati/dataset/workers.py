"""Source rows to training rows on all cores: what a worker does with a chunk of rows, and the pool of workers."""

import json
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from coati.dataset.conversation import Conversation
from coati.dataset.plan import Chunk
from coati.dataset.reasons import RowError
from coati.dataset.shards import to_arrow
from coati.dataset.sources import READERS, decode
from coati.dataset.tally import Recorder, Tally
from coati.dataset.tokenization import TOKENIZERS


@dataclass
class Job:
    """What a worker needs to turn source rows into training rows."""

    type: str
    files: list[str]
    conversation: Conversation
    max_length: int
    jsonl: bool
    format: str | None = None

    def run(self, chunk: Chunk) -> tuple[bytes, bytes, Tally]:
        """``(arrow stream, JSON lines, counts)`` of one chunk."""
        recorder, rows = Recorder(self.type, self.conversation), []
        for file, line, raw in chunk:
            where = f"{self.files[file]}:{line}"
            recorder.tally.read[file] += 1
            try:
                source = READERS[self.type](decode(raw), self.format)
                made = TOKENIZERS[self.type](source, self.conversation, self.max_length)
            except RowError as error:
                recorder.tally.drop(error, where)
                continue
            recorder.keep(file, line, where, source, made)
            rows += [row for row, _ in made]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) if self.jsonl else ""
        return to_arrow(self.type, rows), text.encode("utf-8"), recorder.close()


_job: Job | None = None


def _start_worker(job: Job) -> None:
    global _job
    _job = job


def _run_in_worker(chunk: Chunk) -> tuple[bytes, bytes, Tally]:
    return _job.run(chunk)


def results(job: Job, chunks: Iterator[Chunk], num_proc: int) -> Iterator[tuple[bytes, bytes, Tally]]:
    """``job.run`` of each chunk, in order; a few chunks are in flight, never the whole data."""
    if num_proc <= 1:
        yield from map(job.run, chunks)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(num_proc, mp_context=context, initializer=_start_worker, initargs=(job,))
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    try:
        pending = deque()
        for chunk in chunks:
            pending.append(pool.submit(_run_in_worker, chunk))
            if len(pending) > 3 * num_proc:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise OSError("a worker process died, perhaps for lack of memory; use fewer with --num_proc") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
