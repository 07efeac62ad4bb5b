"""Raw conversations to shards a trainer reads: read, tokenise on all cores, write, rename into place.

Rows keep their order and every row is encoded by itself, so the output is the same for any number of processes.
"""

import json
import multiprocessing
import os
import random
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coati.dataset.conversation import Conversation
from coati.dataset.reasons import REASONS, RowError
from coati.dataset.report import Segments, Tally, build_report, dropped_lines, format_report, segments
from coati.dataset.shards import ShardWriter, to_arrow, tokenizer_fingerprint
from coati.dataset.sources import READERS, decode, find_files, read_rows
from coati.dataset.tokenization import IGNORE_INDEX, TOKENIZERS
from coati.utils.json_io import save_json
from coati.utils.notice import say

CHUNK_ROWS = 128
MAX_BINS = 100_000  # part names have five digits
Chunk = list[tuple[int, int, Any]]  # (file index, line, row as read)


@dataclass
class Job:
    """What a worker needs to turn source rows into training rows."""

    type: str
    files: list[str]
    conversation: Conversation
    max_length: int
    jsonl: bool

    def run(self, chunk: Chunk) -> tuple[bytes, bytes, Tally]:
        """``(arrow stream, JSON lines, counts)`` of one chunk."""
        tally, rows = Tally(), []
        for file, line, raw in chunk:
            tally.read[file] += 1
            where = f"{self.files[file]}:{line}"
            try:
                made = TOKENIZERS[self.type](READERS[self.type](decode(raw)), self.conversation, self.max_length)
            except RowError as error:
                tally.drop(error, where)
                continue
            tally.kept[file] += 1
            tally.truncated += made[-1][1]
            rows += [row for row, _ in made]
            if tally.sample is None:
                row = made[0][0]
                tally.sample = where, segments(row["input_ids"], row["labels"], self.conversation.encoder.decode)
        tally.lengths.extend(row["seq_length"] for row in rows)
        tally.supervised = sum(row["seq_length"] - row["labels"].count(IGNORE_INDEX) for row in rows)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) if self.jsonl else ""
        return to_arrow(self.type, rows), text.encode("utf-8"), tally


_job: Job | None = None


def _start_worker(job: Job) -> None:
    global _job
    _job = job


def _run_in_worker(chunk: Chunk) -> tuple[bytes, bytes, Tally]:
    return _job.run(chunk)


def _results(job: Job, chunks: Iterator[Chunk], num_proc: int) -> Iterator[tuple[bytes, bytes, Tally]]:
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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plan_bins(total: int, bins: int, samples: int, seed: int) -> list[tuple[int, set[int] | None]]:
    """``(end, chosen)`` of each bin: it takes the rows before ``end`` that earlier bins left, or of them the chosen.

    Bins differ by one row at most. ``samples`` rows are drawn from each (negative: all are taken).
    """
    ends = [round(total * number / bins) for number in range(bins + 1)]
    if samples < 0:
        return [(end, None) for end in ends[1:]]
    plan = []
    for number, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        chosen = random.Random(f"{seed}/{number}").sample(range(start, end), min(samples, end - start))
        plan.append((end, set(chosen)))
    return plan


def _numbered_rows(files: list[Path]) -> Iterator[tuple[int, int, Any]]:
    for index, file in enumerate(files):
        for line, row in read_rows(file):
            yield index, line, row


def _chunks(files: list[Path], plan: list[tuple[int, set[int] | None]]) -> Iterator[tuple[int, Chunk]]:
    """``(bin, rows)``: chunks never reach over the border of a bin."""
    number, chunk = 0, []
    for position, row in enumerate(_numbered_rows(files)):
        while position >= plan[number][0]:
            if chunk:
                yield number, chunk
            number, chunk = number + 1, []
        if plan[number][1] is None or position in plan[number][1]:
            chunk.append(row)
        if len(chunk) == CHUNK_ROWS:
            yield number, chunk
            chunk = []
    if chunk:
        yield number, chunk


def prepare_dataset(
    *,
    inputs: Sequence[str | os.PathLike],
    tokenizer,
    template: Conversation,
    arrow_dir: str | os.PathLike,
    jsonl_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    type: str = "sft",
    tokenizer_name: str = "",
    max_length: int = 4096,
    num_bins: int = 10,
    num_samples_per_bin: int = -1,
    seed: int = 42,
    num_proc: int | None = None,
    strict: bool = False,
    show: Callable[[str], None] | None = print,
) -> dict[str, Any]:
    """Write ``num_bins`` shards of training rows and return the report, which is also given to ``show``.

    ``<arrow_dir>/part-XXXXX`` are ``datasets.load_from_disk`` folders beside ``preparation.json``;
    ``<jsonl_dir>/part-XXXXX.jsonl`` hold the same rows beside ``report.json``. Both appear under their names only when
    whole. ``strict``: the first malformed row ends the job. Raises ValueError for unusable input, settings or result.
    """
    outputs = [Path(path) for path in (jsonl_dir, arrow_dir) if path is not None]
    _check_settings(type, max_length, num_bins, num_samples_per_bin, outputs)
    files = find_files(inputs)
    total = sum(1 for _ in _numbered_rows(files))
    if total == 0:
        raise ValueError(
            f"{', '.join(map(str, files[:5]))}: no rows found; expected one JSON object per line or an array"
        )
    plan = plan_bins(total, num_bins, num_samples_per_bin, seed)
    job = Job(type, [str(file) for file in files], template, max_length, jsonl_dir is not None)
    workers = min(num_proc or _cores(), -(-total // CHUNK_ROWS))
    settings = {
        "type": type,
        "max_length": max_length,
        "seed": seed,
        "num_samples_per_bin": num_samples_per_bin,
        "rows_in_files": total,
    }
    with _renamed_when_whole(outputs, cache_dir) as (folders, cache):
        writer = ShardWriter(type, folders[-1], folders[0] if jsonl_dir is not None else None, cache, num_bins)
        tally = _write(job, files, plan, workers, writer, strict)
        report = build_report(tally, job.files, writer.rows, **settings)
        _check_result(report, job.files)
        if jsonl_dir is not None:
            save_json(report, folders[0] / "report.json")
        template.save(folders[-1] / "conversation_template.json")
        save_json(_preparation(report, tokenizer, tokenizer_name, template), folders[-1] / "preparation.json")
    _say_what_is_odd(report, tally)
    _show(report, tally.sample, show)
    return report


def _write(job: Job, files: list[Path], plan: list, workers: int, writer: ShardWriter, strict: bool) -> Tally:
    tally, bins = Tally(), deque()

    def chunks() -> Iterator[Chunk]:
        for number, chunk in _chunks(files, plan):
            bins.append(number)
            yield chunk

    for arrow, text, counts in _results(job, chunks(), workers):
        tally.merge(counts)
        if strict and tally.malformed():
            found = [f"{one} ({REASONS[reason]})" for reason, few in tally.first.items() for one in few]
            raise ValueError("malformed row and --strict:\n  " + "\n  ".join(found))
        writer.add(bins.popleft(), arrow, text)
    writer.close()
    return tally


def _check_settings(type: str, max_length: int, num_bins: int, samples: int, outputs: list[Path]) -> None:
    if type not in TOKENIZERS:
        raise ValueError(f"type must be one of {', '.join(TOKENIZERS)}, found {type!r}")
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens, found {max_length}")
    if not 1 <= num_bins < MAX_BINS:
        raise ValueError(f"the number of bins must be between 1 and {MAX_BINS - 1}, found {num_bins}")
    if samples == 0:
        raise ValueError("0 samples per bin leave nothing; give a positive number, or -1 for all rows")
    check_outputs(*outputs)


def check_outputs(*outputs: str | os.PathLike) -> None:
    """Raise ValueError for an output that exists, or is named twice."""
    if len({Path(path).resolve() for path in outputs}) < len(outputs):
        raise ValueError(f"{outputs[0]} is named for both the jsonl and the arrow output; name two folders")
    for path in outputs:
        if os.path.exists(path):
            raise ValueError(f"the output {path} exists already; name another folder, or remove it if it is not needed")


@contextmanager
def _renamed_when_whole(outputs: list[Path], cache_dir: str | os.PathLike | None):
    """Folders to build in, renamed to ``outputs`` at the end; a failure leaves none of them behind."""
    folders = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in outputs]
    cache = (Path(cache_dir) if cache_dir is not None else outputs[-1].parent) / f".tokenized.{os.getpid()}.tmp"
    try:
        for folder in (*folders, cache):
            folder.mkdir(parents=True)
        yield folders, cache
        # The arrow folder comes last: training reads it, so where it is everything is.
        for folder, path in zip(folders, outputs, strict=True):
            os.rename(folder, path)
    finally:
        for folder in (*folders, cache):
            shutil.rmtree(folder, ignore_errors=True)


def _check_result(report: dict[str, Any], files: list[str]) -> None:
    if report["rows_written"] == 0:
        reasons = "\n".join(dropped_lines(report["dropped"]))
        raise ValueError(
            f"nothing left: none of the {report['rows_read']} rows of {', '.join(files[:5])} can be trained on; mend "
            f"the rows, raise max_length or choose another template\n{reasons}"
        )


def _preparation(report: dict, tokenizer, tokenizer_name: str, template: Conversation) -> dict[str, Any]:
    return {
        "type": report["type"],
        "max_length": report["max_length"],
        "tokenizer": {
            "path": tokenizer_name or getattr(tokenizer, "name_or_path", ""),
            "vocab_size": len(tokenizer),
            "fingerprint": tokenizer_fingerprint(tokenizer),
        },
        "conversation_template": template.to_config(),
        "rows": report["rows_written"],
        "report": report,
    }


def _say_what_is_odd(report: dict[str, Any], tally: Tally) -> None:
    for entry in report["files"]:
        if entry["rows_read"] and not entry["rows_kept"]:
            say(f"{entry['file']}: none of its {entry['rows_read']} rows was kept")
    if 2 * tally.malformed() > report["rows_read"]:
        say("more than half of the rows are malformed: is this the right type and file?")
    if empty := report["shards"].count(0):
        say(f"{empty} of {len(report['shards'])} parts hold no row; choose fewer bins for so little data")


def _show(report: dict, sample: tuple[str, Segments] | None, show: Callable[[str], None] | None) -> None:
    if show is not None:
        colour = show is print and sys.stdout.isatty() and "NO_COLOR" not in os.environ
        show(format_report(report, sample[1] if sample else None, colour))
