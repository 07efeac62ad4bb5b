"""From --dataset to rows a trainer reads: prepared directories as they are, raw files and hub names
prepared first."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from coati.cli.online_settings import OnlineSettings
from coati.cli.settings import DataSettings, SLSettings
from coati.dataset.chat.plain_text import PlainText
from coati.dataset.data_types import DATA_TYPES, types_of
from coati.dataset.fingerprint import row_options
from coati.dataset.load.epoch_order import EpochOrder, Mixture
from coati.dataset.load.loader import (
    check_global_batch,
    load_tokenized_dataset,
    preparation_of,
    row_lengths,
)
from coati.dataset.prepare.preparation import OF_AN_EARLIER_RELEASE, prepare_dataset
from coati.dataset.prepare.validation import BadRowBudget, documents_of
from coati.dataset.rows.input_files import find_sources, read_as
from coati.dataset.stream.row_sources import is_hub_name
from coati.parallel.agreement import local_leader
from coati.recipes.eval_split import evaluation_mask
from coati.recipes.mixed_rows import check_whole, joined, type_of_path
from coati.recipes.prepared import held_out_split, is_raw, train_split
from coati.recipes.run import PreparedRows, Run
from coati.utils.distributed import all_gather_object, is_rank_0
from coati.utils.logging import get_logger
from coati.utils.phases import phase
from coati.utils.user_cache import cache_root, hold, trim

logger = get_logger(__name__)

# For rows of another type than the command trains on.
TRAINED_BY = (
    "each command reads its own type: sft: coati sft; preference: coati rm, dpo and orpo; "
    "kto: coati kto; prompt: coati ppo and grpo; text: coati pretrain; scored: coati ilql"
)


def training_rows(run: Run, type: str, flag: str = "dataset") -> PreparedRows:
    """The rows to train on. ``flag``: what named their paths, for messages.

    Rows that are too long are truncated by the collator (sft) or left out here (the other types).
    Raises ValueError for rows of another type or another tokenizer.
    """
    return _training_rows(run, run.settings.data, type, flag)


def ptx_rows(run: Run[OnlineSettings]) -> PreparedRows | None:
    """The rows of ``--ptx_dataset``, or None where they count for nothing."""
    ptx = run.settings.ptx
    if not ptx.ptx_coef:
        return None
    # Weights, --max_samples and --columns are the prompts'.
    data = replace(
        run.settings.data,
        dataset=ptx.ptx_dataset,
        dataset_weights=[],
        max_samples=None,
        columns=[],
    )
    return _training_rows(run, data, "sft", "ptx_dataset")


def training_and_evaluation_rows(
    run: Run, type: str, flag: str = "dataset"
) -> tuple[PreparedRows, PreparedRows | None]:
    """:func:`training_rows` and :func:`evaluation_rows`; the latter are taken out of the former by
    ``--eval_ratio``."""
    train = training_rows(run, type, flag)
    ratio = run.settings.data.eval_ratio
    if ratio is None:
        return train, evaluation_rows(run, type)
    held = evaluation_mask(train.rows, type, ratio, run.settings.seed)
    logger.info(
        f"--eval_ratio {ratio:g}: {int(held.sum())} of {len(held)} rows of --{flag} are held out "
        "for evaluation"
    )
    return _chosen(train, ~held), _chosen(train, held)


def _chosen(found: PreparedRows, mask: np.ndarray) -> PreparedRows:
    """The rows where ``mask`` is true."""
    sets = np.split(mask, np.cumsum(found.sizes)[:-1])
    sizes = [int(kept.sum()) for kept in sets]
    return PreparedRows(found.rows.select(np.flatnonzero(mask)), found.folders, sizes)


def evaluation_rows(run: Run, type: str) -> PreparedRows | None:
    """The rows of ``--eval_dataset``; without it those of the test or validation split of a raw
    ``--dataset``; None where there are none."""
    data = run.settings.data
    if data.eval_dataset:
        types = [type_of_path(path, type, layout=data.layout) for path in data.eval_dataset]
        folders = [
            _prepared(run, data, path, of_path, None, "evaluation")
            for path, of_path in zip(data.eval_dataset, types, strict=True)
        ]
        rows = _checked(run, data.eval_dataset, folders, types, "eval_dataset", "valid")
        return _fitting(PreparedRows(rows, folders, [len(rows)]), data, "eval_dataset", type)
    for path in filter(is_raw, data.dataset):
        if data.stream.streaming and is_hub_name(path):
            continue  # looking for a split would fetch all of them
        if split := held_out_split(path):
            if train_split(path) is None:  # all of it is trained on
                logger.warning(
                    f"{path}: nothing is named after a train split, so all of it is trained on, "
                    f"the {split} split too, and that is no evaluation set; name one with "
                    "--eval_dataset, or use --eval_ratio"
                )
                continue
            logger.info(f"{path}: its {split} split becomes the evaluation set")
            of_path = type_of_path(path, type, split, data.layout)
            folder = _prepared(run, data, path, of_path, split, "evaluation")
            rows = load_tokenized_dataset([folder])
            return _fitting(PreparedRows(rows, [folder], [len(rows)]), data, "dataset", type)
    return None


def _training_rows(run: Run, data: DataSettings, type: str, flag: str) -> PreparedRows:
    splits = [train_split(path) if is_raw(path) else None for path in data.dataset]
    types = [
        type_of_path(path, type, split, data.layout)
        for path, split in zip(data.dataset, splits, strict=True)
    ]
    folders = [
        _prepared(run, data, path, of_path, split)
        for path, of_path, split in zip(data.dataset, types, splits, strict=True)
    ]
    rows = _checked(run, data.dataset, folders, types, flag)
    sizes = [len(rows)]
    if data.dataset_weights:
        sizes = [len(load_tokenized_dataset(folder)) for folder in folders]
    if data.max_samples:
        rows = rows.select(range(min(data.max_samples, len(rows))))
        sizes = [len(rows)]
    return _fitting(PreparedRows(rows, folders, sizes), data, flag, type)


def _checked(
    run: Run,
    paths: Sequence[str],
    folders: Sequence[str],
    types: Sequence[str],
    flag: str,
    mode: str = "train",
) -> Any:
    """The rows of all ``folders``, each checked as rows of its type."""
    rows = joined(folders, types, mode)
    if len(set(types)) == 1:
        _check_rows(run, rows, paths[0], types[0], flag)
        check_whole(rows, paths[0], types[0], run.settings.data.max_length, flag)
        return rows
    for path, folder, of_path in zip(paths, folders, types, strict=True):
        part = load_tokenized_dataset(folder, mode)
        _check_rows(run, part, path, of_path, flag)
        check_whole(part, path, of_path, run.settings.data.max_length, flag)
        logger.info(f"--{flag} {path}: {len(part)} rows of type {of_path}")
    return rows


def _check_rows(run: Run, rows: Any, path: str, type: str, flag: str) -> None:
    _check_type(rows, path, type, flag)
    first = rows[: min(len(rows), 256)]
    columns = DATA_TYPES[type].token_columns
    largest = max((max(row) for name in columns for row in first[name] if row), default=0)
    if largest >= len(run.tokenizer):
        raise ValueError(
            f"--{flag} {path} holds token id {largest}, the tokenizer has {len(run.tokenizer)} "
            "tokens; prepare the data with this model's tokenizer"
        )


def _check_type(rows: Any, path: str, type: str, flag: str) -> None:
    found = types_of(rows.column_names)
    needed = DATA_TYPES[type].needed_columns
    remedy = f"prepare them with coati prepare --type {type}"
    if missing := [name for name in needed if name not in rows.column_names]:
        what = (
            f"prepared for {found[0].name}" if found else f"columns {', '.join(rows.column_names)}"
        )
        raise ValueError(
            f"--{flag} {path} has no {missing[0]}: {what}. This script reads rows of type {type} "
            f"there; {remedy}"
        )
    # Rows for sft hold a prompt's columns, too, and its response with them.
    fuller = found[0]
    if set(needed) < set(fuller.needed_columns):
        column = next(name for name in fuller.needed_columns if name not in needed)
        raise ValueError(
            f"--{flag} {path} is prepared for {fuller.name} (column {column}), this script reads "
            f"rows of type {type} there; {remedy}"
        )


def _longest(data: DataSettings, type: str) -> int:
    """Tokens that a row may have."""
    return data.longest_prompt if DATA_TYPES[type].leaves_room else data.max_length


def _fitting(found: PreparedRows, data: DataSettings, flag: str, type: str) -> PreparedRows:
    """Pairs, labeled responses and prompts are never truncated: without those that are too long,
    which are counted."""
    if DATA_TYPES[type].is_cut:
        return found
    most = _longest(data, type)
    limit = f"--max_length {data.max_length}"
    if DATA_TYPES[type].leaves_room:
        limit = f"{most} tokens ({limit} less --max_seq_len {data.max_seq_len})"
    lengths = row_lengths(found.rows)
    fits = lengths <= most
    left_out = len(fits) - int(fits.sum())
    if not left_out:
        return found
    what = f"--{flag}: {left_out} of {len(fits)} rows are longer than {limit}"
    longest = int(lengths.max())
    if left_out == len(fits):
        raise ValueError(
            f"{what} (the longest has {longest} tokens): nothing is left; raise --max_length"
        )
    logger.info(f"{what} (the longest has {longest} tokens) and are left out")
    return _chosen(found, fits)


def _prepared(
    run: Run,
    data: DataSettings,
    path: str,
    type: str,
    split: str | None,
    part: str = "training",
) -> str:
    """The prepared directory of ``path``: itself, or one in the cache. ``data``: says what its
    columns are."""
    if not is_raw(path):
        return path
    folder = Path()
    failure = None
    try:
        folder = _cache_folder(run, data, path, type, split, part)
        hold(folder)
        if (folder / "preparation.json").exists():
            _repeat_report(data, path, folder)
        elif local_leader():
            _prepare(run, data, path, type, split, part, folder)
    except (ValueError, OSError) as error:
        failure = str(error)
    # The others wait here: they must end with it, not hang.
    with phase("waiting for the other processes"):
        failures = [text for text in all_gather_object(failure) if text]
    if failures:
        raise ValueError(failures[0])
    return str(folder)


def _prepare(
    run: Run,
    data: DataSettings,
    path: str,
    type: str,
    split: str | None,
    part: str,
    folder: Path,
) -> None:
    data_type = DATA_TYPES[type]
    if data_type.templated and run.template is None:
        raise ValueError(
            f"--dataset {path} holds conversations, and the tokenizer has no chat template to "
            "write them with: give one by --conversation_template_config"
        )
    what = "conversations" if data_type.templated else "texts"
    logger.info(
        f"{path} holds raw {what}: preparing them into {folder} (coati prepare does this "
        "once for all)"
    )
    longest = _longest(data, type)
    if longest != data.max_length:
        logger.info(
            f"prompts may have {longest} tokens: --max_length {data.max_length} less --max_seq_len "
            f"{data.max_seq_len} of the response"
        )
    try:
        with phase(f"preparing {path}"):
            prepare_dataset(
                inputs=[path],
                tokenizer=run.tokenizer,
                template=template_for(run, type),
                arrow_dir=folder,
                type=type,
                split=split,
                max_length=longest,
                num_bins=1,
                tokenizer_name=run.settings.model.tokenizer,
                seed=run.settings.seed,
                max_bad_ratio=data.max_bad_ratio,
                show=print if is_rank_0() else None,
                part=part,
                verifiable=False,
                documents=documents_for(run, type),
                columns=data.layout.columns,
                strict_columns=data.strict_columns,
            )
    except ValueError as error:
        if "wrong_type" not in str(error):
            raise
        raise ValueError(f"{error}\n{TRAINED_BY}") from error
    trim()


def template_for(run: Run, type: str) -> Any:
    """What writes rows of ``type``: the run's template, or none where they need none."""
    return run.template if DATA_TYPES[type].templated else PlainText(run.tokenizer)


def documents_for(run: Run, type: str) -> str | None:
    """What of a .txt file is a row of ``type``; only texts take ``--documents``."""
    return documents_of(type, None if DATA_TYPES[type].templated else run.settings.data.documents)


def _repeat_report(data: DataSettings, path: str, folder: Path) -> None:
    """What was said when the rows of ``path`` were prepared. Raises ValueError for what this run
    does not tolerate of it."""
    report = (preparation_of(str(folder)) or {}).get("report")
    if report is None:  # of a release that did not keep it
        return
    logger.info(
        f"{path}: {report['rows_written']} rows of {report['rows_read']}, prepared before into "
        f"{folder}"
    )
    if "unused_columns" not in report:
        logger.info(OF_AN_EARLIER_RELEASE)
    read = report["rows_read"]
    budget = BadRowBudget(False, data.max_bad_ratio, data.strict_columns)
    budget.check_counts(report["dropped"], read, expected=read)
    budget.check_columns(report.get("unused_content", {}))
    for warning in report["warnings"]:
        logger.warning(warning)


def _cache_folder(
    run: Run, data: DataSettings, path: str, type: str, split: str | None, part: str
) -> Path:
    sources = find_sources([path], split, data.layout)
    files = [source.path for source in sources]
    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    vocabulary = hashlib.sha256(
        json.dumps(sorted(run.tokenizer.get_vocab().items())).encode()
    ).hexdigest()
    template = template_for(run, type)
    config = None if template is None else template.to_config()
    key: list[Any] = [stamps, vocabulary, config, _longest(run.settings.data, type), type]
    if template is not None and (options := row_options(template)):
        key.append(options)
    if documents := documents_for(run, type):
        key.append(documents)
    if part != "training":  # its report speaks of these rows as what they are
        key.append(part)
    if any(known := [read_as(source) for source in sources]):
        key.append(known)
    return cache_root() / "prepared" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]


def epoch_order(run: Run, train: PreparedRows, fill: int = 1) -> EpochOrder:
    """The order of the training rows: mixed by ``--dataset_weights``, packed by ``--packing``,
    filled up to a multiple of ``fill``."""
    data = run.settings.data
    mixture = None
    if data.dataset_weights:
        mixture = Mixture(tuple(data.dataset), tuple(train.sizes), tuple(data.dataset_weights))
    return EpochOrder(
        row_lengths(train.rows),
        seed=run.settings.seed,
        mixture=mixture,
        pack_length=data.pack_length,
        fill=fill,
    )


def rows_of_a_step(run: Run[SLSettings]) -> int:
    """Rows, or packs, of a global batch."""
    batches = run.settings.batches
    return batches.batch_size * batches.accumulation_steps * run.data_parallel_size


def check_order(run: Run[SLSettings], order: EpochOrder) -> None:
    """Refuse fewer rows (or packs) than one optimizer step needs, before a model is loaded."""
    batches = run.settings.batches
    check_global_batch(
        order, batches.batch_size, batches.accumulation_steps, run.data_parallel_size
    )
    entries = "rows" if order.pack_length is None else "packs"
    size = rows_of_a_step(run)
    most = run.settings.schedule.max_steps
    reaches_the_end = most is None or most * size > order.count(0) - size
    if order.fill == 1 and reaches_the_end:
        say_left_out(order.count(0), size, entries, "--batch_size x --accumulation_steps")
    if order.mixture is not None:
        logger.info(order.mixture.describe())
    if order.pack_length is not None:
        logger.info(order.describe_packing(batches.batch_size))


def say_left_out(count: int, size: int, entries: str, flags: str) -> None:
    """Log what does not fill the last step of an epoch. ``count``: ``entries`` of an epoch,
    ``size``: of a step, which ``flags`` decide."""
    if left := count % size:
        logger.info(
            f"{left} of {count} {entries} of an epoch do not fill its last step of {size} and are "
            f"left out, in every epoch others; {flags} x processes decides how many fill one"
        )
