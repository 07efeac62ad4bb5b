"""``--streaming``: from the settings of a run to its stream of rows, and whether a checkpoint's
position belongs to the same files."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from coati.cli.settings import DataSettings, SLSettings
from coati.dataset.clean.cleaning import Cleaning
from coati.dataset.prepare.validation import BadRowBudget
from coati.dataset.prepare.workers import cores
from coati.dataset.prepare.write_pass import TokenizeWorker
from coati.dataset.rows.column_names import Layout
from coati.dataset.stream.row_sources import (
    HubSource,
    RowSource,
    Stamp,
    change_of,
    is_hub_name,
    revisions_of,
    sources_of,
)
from coati.dataset.stream.row_stream import WINDOW, RowStream, StreamOptions, as_lists
from coati.dataset.stream.source_order import SourceOrder, SourceRows
from coati.dataset.stream.stream_loader import ENDLESS
from coati.models.positions import check_tokens, positions_in
from coati.parallel.checkpoint import RunningState
from coati.recipes.data import documents_for, template_for
from coati.recipes.mixed_rows import type_of_path
from coati.recipes.prepared import is_raw, train_split
from coati.recipes.resume import WHERE_UNSAID, Resume
from coati.recipes.run import PreparedRows, Run
from coati.utils.distributed import is_rank_0
from coati.utils.logging import get_logger

logger = get_logger(__name__)

MOST_WORKERS = 4  # they make some thousand rows a second, more than a process trains on
SAME = "go on with the files of the checkpoint, or take its weights alone into another --save_dir"


@dataclass(frozen=True)
class EndlessOrder:
    """What a trainer and its model are told of rows that are still to be read."""

    lengths: np.ndarray  # (1,) the longest that a row may be
    pack_length: int | None

    def count(self, epoch: int) -> int:
        return ENDLESS


def open_stream(
    run: Run[SLSettings], type: str
) -> tuple[RowStream, PreparedRows, EndlessOrder, RunningState]:
    """The stream of ``--dataset``, its first rows as prepared ones, and the state that a trainer
    starts from.

    Raises ValueError for what cannot be streamed, rows that cannot be trained on, and a checkpoint
    of other files.
    """
    data = run.settings.data
    _check_raw(data)
    stored = run.resume.state.data.get("stream", []) if run.resume.state else []
    streams, types = _streams(run, type, revisions_of(stored))
    _check_length(run)
    state = _running_state(run.resume, run.settings, streams)
    stream = _row_stream(run, type, streams, types, state)
    if data.packing:
        logger.info(f"--packing: {WINDOW} rows of the stream at a time are packed")
    order = EndlessOrder(np.asarray([data.max_length]), data.pack_length)
    return stream, _first_rows(stream), order, state


def epochs(settings: SLSettings) -> int:
    """Those of the run; a stream begins again as often as its steps take."""
    return ENDLESS if settings.data.stream.streaming else settings.batches.max_epochs


def commits(stream: RowStream) -> dict[str, str]:
    """Of data sets of the hub: fact -> the commit that this rank reads, by which ranks are
    compared; files are compared by what they hold."""
    sources = [source for order in stream.source.orders for source in order.sources]
    return {
        f"--dataset {source.label} (its commit)": source.revision
        for source in sources
        if isinstance(source, HubSource)
    }


def _check_raw(data: DataSettings) -> None:
    prepared = next((path for path in data.dataset if not is_raw(path)), None)
    if prepared is not None:
        raise ValueError(
            f"--streaming reads raw rows, --dataset {prepared} is prepared already; drop "
            "--streaming, or name the files that it was made of"
        )


def _streams(
    run: Run[SLSettings], type: str, revisions: dict[str, str]
) -> tuple[list[list[RowSource]], list[str]]:
    """The sources of each stream, of each path with ``--dataset_weights``, else of all paths; and
    the type of each source."""
    data = run.settings.data
    found = []
    types = []
    for path in data.dataset:
        hub = is_hub_name(path)
        split = None if hub else train_split(path)
        of_path = type if hub else type_of_path(path, type, split, data.layout)
        documents = documents_for(run, of_path)
        sources = sources_of(path, split, revisions, documents, data.layout)
        found.append(sources)
        types += [of_path] * len(sources)
    return (found if data.dataset_weights else [sum(found, [])]), types


def _check_length(run: Run[SLSettings]) -> None:
    model = run.settings.model
    positions = positions_in(model.pretrain, model.trust_remote_code)
    if positions is not None:
        multiple = run.options.sequence_multiple
        longest = -(-run.settings.data.max_length // multiple) * multiple
        remedy = f"use --max_length {positions.count // multiple * multiple}"
        check_tokens(positions, longest, "--streaming: a row of --max_length", remedy)


def _row_stream(
    run: Run[SLSettings],
    type: str,
    streams: list[list[RowSource]],
    types: list[str],
    state: RunningState,
) -> RowStream:
    data = run.settings.data
    settings = data.stream
    seed = run.settings.seed
    orders = []
    files: list[str] = []
    layouts: list[Layout] = []
    for number, sources in enumerate(streams):
        buffer = settings.shuffle_buffer
        order = SourceOrder(sources, seed=seed, buffer=buffer, first=len(files), number=number)
        orders.append(order)
        files += [source.name for source in sources]
        layouts += [source.layout for source in sources]
    workers = {one: _worker(run, one, files, layouts) for one in {type, *types}}
    others = {number: workers[one] for number, one in enumerate(types) if one != type}
    batches = run.settings.batches
    step = batches.batch_size * batches.accumulation_steps * run.data_parallel_size
    options = StreamOptions(
        type=type,
        max_length=data.max_length,
        seed=seed,
        shuffle=settings.shuffle_buffer > 0,
        pack_length=data.pack_length,
        num_proc=_workers(settings.stream_workers),
        ahead=1 + -(-step // WINDOW),
    )
    source = SourceRows(orders, data.dataset_weights or [1.0], seed)
    budget = BadRowBudget(False, data.max_bad_ratio, data.strict_columns, "--max_bad_ratio")
    return RowStream(source, workers[type], options, budget, state.trainer.get("stream"), others)


def _worker(
    run: Run[SLSettings], type: str, files: list[str], layouts: list[Layout]
) -> TokenizeWorker:
    template = template_for(run, type)
    if template is None:
        raise ValueError(
            "--dataset holds conversations, and the tokenizer has no chat template to write them "
            "with: give one by --conversation_template_config"
        )
    return TokenizeWorker(
        type=type,
        format=None,
        files=files,
        conversation=template,
        max_length=run.settings.data.max_length,
        jsonl=False,
        cleaning=Cleaning(),
        overlap=None,
        layouts=layouts,
    )


def _workers(asked: int | None) -> int:
    if asked is not None:
        return asked
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_WORKERS, cores() // here - 1))


def _first_rows(stream: RowStream) -> PreparedRows:
    """The rows of the first window."""
    from datasets import Dataset

    rows = [as_lists(row) for row in stream.peek().rows]
    return PreparedRows(Dataset.from_list(rows), [], [len(rows)])


def _running_state(
    resume: Resume, settings: SLSettings, streams: list[list[RowSource]]
) -> RunningState:
    """As :func:`~coati.recipes.resume.running_state`. What files are is looked at on rank 0, which
    writes the checkpoints: those of other hosts may be copies of another time."""
    now: dict[str, Any] = {
        "seed": settings.seed,
        "packed_to": settings.data.pack_length,
        "dataset_weights": settings.data.dataset_weights,
    }
    stamps = [[source.stamp() for source in each] for each in streams] if is_rank_0() else []
    flat = [stamp for each in stamps for stamp in each]
    if resume.state is None:
        state = RunningState(data=now | {"stream": flat})
    else:
        state = resume.state
        stored = WHERE_UNSAID | state.data
        changed = [
            f"{key} {stored.get(key)} -> {now[key]}" for key in now if stored[key] != now[key]
        ]
        changed += _changed(stored.get("stream", []), flat) if is_rank_0() else []
        if changed:
            raise ValueError(
                f"--checkpoint_path {resume.folder}: its position belongs to another stream of "
                f"rows: {'; '.join(changed[:5])}. {SAME}"
            )
        state.data = now | {"stream": flat}
    state.flags = resume.flags
    state.inputs = resume.inputs
    return state


def _changed(before: list[Stamp], now: list[Stamp]) -> list[str]:
    """What differs between the files of a checkpoint and these, in words."""
    if len(before) != len(now):
        names = {stamp["name"] for stamp in before}
        new = [stamp["name"] for stamp in now if stamp["name"] not in names]
        gone = sorted(names - {stamp["name"] for stamp in now})
        parts = [f"new: {', '.join(new[:3])}"] if new else []
        parts += [f"gone: {', '.join(gone[:3])}"] if gone else []
        return [f"it read {len(before)} files, now there are {len(now)} ({'; '.join(parts)})"]
    return [what for pair in zip(before, now, strict=True) if (what := change_of(*pair))]
