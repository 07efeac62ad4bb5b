"""Raw conversations to shards a trainer reads: read, tokenise on all cores, write, rename into place.

Rows keep their order and every row is encoded by itself, so the output is the same for any number of processes.
"""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from coati.dataset.conversation import Conversation
from coati.dataset.outputs import check_outputs, renamed_when_whole
from coati.dataset.plan import CHUNK_ROWS, MAX_BINS, Chunk, numbered_rows, plan_bins, plan_chunks
from coati.dataset.provenance import command_line, describe_template, describe_tokenizer
from coati.dataset.reasons import REASONS
from coati.dataset.report import build_report, dropped_lines, format_report, save_report
from coati.dataset.shapes import FORMATS_OF
from coati.dataset.shards import ShardWriter
from coati.dataset.sources import find_files
from coati.dataset.tally import Tally
from coati.dataset.tokenization import TOKENIZERS
from coati.dataset.workers import Job, cores, results
from coati.utils.json_io import save_json
from coati.utils.notice import say


def prepare_dataset(
    *,
    inputs: Sequence[str | os.PathLike],
    tokenizer,
    template: Conversation,
    arrow_dir: str | os.PathLike,
    jsonl_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    type: str = "sft",
    format: str | None = None,
    split: str | None = None,
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
    whole. ``format`` names the one shape that rows have (see shapes.py), ``split`` the part of a data set with several.
    ``strict``: the first malformed row ends the job. Raises ValueError for unusable input, settings or result.
    """
    outputs = [Path(path) for path in (jsonl_dir, arrow_dir) if path is not None]
    _check_settings(type, format, max_length, num_bins, num_samples_per_bin, outputs)
    files = find_files(inputs, split)
    total = sum(1 for _ in numbered_rows(files))
    if total == 0:
        raise ValueError(
            f"{', '.join(map(str, files[:5]))}: no rows found; expected one JSON object per line, an array, "
            "or records under a header"
        )
    plan = plan_bins(total, num_bins, num_samples_per_bin, seed)
    job = Job(type, [str(file) for file in files], template, max_length, jsonl_dir is not None, format)
    workers = min(num_proc or cores(), -(-total // CHUNK_ROWS))
    settings = {"type": type, "format": format, "split": split, "max_length": max_length, "seed": seed} | {
        "num_samples_per_bin": num_samples_per_bin,
        "rows_in_files": total,
        "command": command_line(),
        "tokenizer": describe_tokenizer(tokenizer, tokenizer_name),
        "template": describe_template(template),
    }
    with renamed_when_whole(outputs, cache_dir) as (folders, cache):
        writer = ShardWriter(type, folders[-1], folders[0] if jsonl_dir is not None else None, cache, num_bins)
        tally = _write(job, files, plan, workers, writer, strict)
        report = build_report(tally, job.files, writer.rows, **settings)
        _check_result(report, job.files)
        for folder in folders:
            save_report(report, folder)
        template.save(folders[-1] / "conversation_template.json")
        save_json(_preparation(report, template), folders[-1] / "preparation.json")
    for warning in report["warnings"]:
        say(warning)
    _show(report, show)
    return report


def _write(job: Job, files: list[Path], plan: list, workers: int, writer: ShardWriter, strict: bool) -> Tally:
    tally, bins = Tally(), deque()

    def chunks() -> Iterator[Chunk]:
        for number, chunk in plan_chunks(files, plan):
            bins.append(number)
            yield chunk

    for arrow, text, counts in results(job, chunks(), workers):
        tally.merge(counts)
        if strict and tally.malformed():
            found = [f"{one} ({REASONS[reason]})" for reason, few in tally.first.items() for one in few]
            raise ValueError("malformed row and --strict:\n  " + "\n  ".join(found))
        writer.add(bins.popleft(), arrow, text)
    writer.close()
    return tally


def _check_settings(
    type: str, format: str | None, max_length: int, num_bins: int, samples: int, outputs: list[Path]
) -> None:
    if type not in TOKENIZERS:
        raise ValueError(f"type must be one of {', '.join(TOKENIZERS)}, found {type!r}")
    if format not in (None, *FORMATS_OF[type]):
        raise ValueError(f"format {format!r} does not exist for type {type}; known: {', '.join(FORMATS_OF[type])}")
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens, found {max_length}")
    if not 1 <= num_bins < MAX_BINS:
        raise ValueError(f"the number of bins must be between 1 and {MAX_BINS - 1}, found {num_bins}")
    if samples == 0:
        raise ValueError("0 samples per bin leave nothing; give a positive number, or -1 for all rows")
    check_outputs(*outputs)


def _check_result(report: dict[str, Any], files: list[str]) -> None:
    if report["rows_written"] == 0:
        reasons = "\n".join(dropped_lines(report["dropped"]))
        raise ValueError(
            f"nothing left: none of the {report['rows_read']} rows of {', '.join(files[:5])} can be trained on; mend "
            f"the rows, raise max_length or choose another template\n{reasons}"
        )


def _preparation(report: dict, template: Conversation) -> dict[str, Any]:
    return {
        "type": report["type"],
        "max_length": report["max_length"],
        "tokenizer": report["tokenizer"],
        "conversation_template": template.to_config(),
        "rows": report["rows_written"],
        "report": report,
    }


def _show(report: dict, show: Callable[[str], None] | None) -> None:
    if show is not None:
        colour = show is print and sys.stdout.isatty() and "NO_COLOR" not in os.environ
        show(format_report(report, colour))
