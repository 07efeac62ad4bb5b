"""From --dataset to rows a trainer reads: prepared directories as they are, raw files and hub names
prepared first."""

import hashlib
import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np

from coati.dataset.chat.conversation import Conversation
from coati.dataset.data_types import DATA_TYPES, types_of
from coati.dataset.load.epoch_order import EpochOrder, Mixture
from coati.dataset.load.loader import (
    check_global_batch,
    load_tokenized_dataset,
    part_directories,
    row_lengths,
)
from coati.dataset.prepare.preparation import prepare_dataset
from coati.dataset.rows.input_files import find_files
from coati.dataset.rows.readers import kind_of
from coati.parallel.plugins import ParallelOptions
from coati.recipes.resume import pack_length
from coati.utils.distributed import all_gather_object, is_rank_0, world_size
from coati.utils.logging import get_logger

logger = get_logger(__name__)

HELD_OUT = (
    "validation",
    "test",
)  # in the order in which a split of that name is taken to evaluate on


def rows_of(
    paths: list[str],
    args: Namespace,
    tokenizer: Any,
    template: Conversation | None,
    mode: str = "train",
    type: str = "sft",
    flag: str | None = None,
):
    """The rows of ``paths``, None without paths. Raises ValueError for rows of another type or
    another tokenizer.

    ``flag``: what named the paths, for messages. Rows that are too long are cut by the collator
    (sft) or left out here (the other types).
    """
    flag = flag or ("dataset" if mode == "train" else "eval_dataset")
    ready = [
        _prepare_raw(
            path, args, tokenizer, template, type, _train_split(path) if mode == "train" else None
        )
        if is_raw(path)
        else path
        for path in paths
    ]
    rows = load_tokenized_dataset(ready, mode)
    if rows is None:
        return None
    _remember(args, mode, ready)
    _check_type(rows, paths[0], type, flag)
    if mode == "train" and args.dataset_weights:
        args._dataset_sizes = [len(load_tokenized_dataset(path, mode)) for path in ready]
    if mode == "train" and args.max_samples:
        rows = rows.select(range(min(args.max_samples, len(rows))))
    first = rows[: min(len(rows), 256)]
    largest = max(
        (max(row) for name in DATA_TYPES[type].token_columns for row in first[name] if row),
        default=0,
    )
    if largest >= len(tokenizer):
        raise ValueError(
            f"--{flag} {paths[0]} holds token id {largest}, the tokenizer has {len(tokenizer)} "
            "tokens; prepare the "
            "data with this model's tokenizer"
        )
    return rows if DATA_TYPES[type].is_cut else _fitting(rows, args, flag, type)


def evaluation_rows(args: Namespace, tokenizer: Any, template: Conversation | None, type: str):
    """The rows of ``--eval_dataset``; without it those of the test or validation split of a raw
    ``--dataset``."""
    if args.eval_dataset:
        return rows_of(args.eval_dataset, args, tokenizer, template, mode="valid", type=type)
    for path in filter(is_raw, args.dataset):
        for split in HELD_OUT:
            if _has_split(path, split):
                logger.info(f"{path}: its {split} split becomes the evaluation set")
                folder = _prepare_raw(path, args, tokenizer, template, type, split)
                _remember(args, "valid", [folder])
                return _fitting(load_tokenized_dataset([folder]), args, "dataset", type)
    return None


def _remember(args: Namespace, mode: str, ready: list[str]) -> None:
    args._prepared = {**getattr(args, "_prepared", {}), mode: ready}


def is_raw(path: str) -> bool:
    """Whether ``path`` is a file or folder of rows that still have to be prepared, or the name of a
    data set."""
    folder = Path(path)
    if folder.is_file() or not folder.exists():
        return True
    if (folder / "preparation.json").exists() or any(folder.glob("part-*")):
        return False
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        return not _holds_tokens(folder)
    return any(kind_of(file) for file in folder.rglob("*"))


def _holds_tokens(folder: Path) -> bool:
    text = "".join(info.read_text(encoding="utf-8") for info in folder.rglob("dataset_info.json"))
    return any(
        f'"{name}"' in text for name in ("input_ids", "chosen_input_ids", "completion_decode")
    )


def _has_split(path: str, split: str) -> bool:
    if Path(path).is_file():
        return False
    try:
        return bool(find_files([path], split))
    except ValueError:
        return False


def _train_split(path: str) -> str | None:
    """ "train" where ``path`` has a split of that name and one to evaluate on; else all is for
    training."""
    held_out = any(_has_split(path, split) for split in HELD_OUT)
    return "train" if held_out and _has_split(path, "train") else None


def _check_type(rows: Any, path: str, type: str, flag: str) -> None:
    found, needed = types_of(rows.column_names), DATA_TYPES[type].needed_columns
    remedy = f"prepare them with prepare_dataset.py --type {type}"
    if missing := [name for name in needed if name not in rows.column_names]:
        what = (
            f"prepared for {found[0].name}" if found else f"columns {', '.join(rows.column_names)}"
        )
        raise ValueError(
            f"--{flag} {path} has no {missing[0]}: {what}. This script reads rows of type {type} "
            f"there; {remedy}"
        )
    # Rows for sft hold a prompt's columns, too, and its answer with them.
    fuller = found[0]
    if set(needed) < set(fuller.needed_columns):
        column = next(name for name in fuller.needed_columns if name not in needed)
        raise ValueError(
            f"--{flag} {path} is prepared for {fuller.name} (column {column}), this script reads "
            f"rows of type {type} there; {remedy}"
        )


def _longest(args: Namespace, type: str) -> int:
    """Tokens that a row may have; a prompt leaves room for its response."""
    return args.max_length - (args.max_seq_len if DATA_TYPES[type].leaves_room else 0)


def _fitting(rows: Any, args: Namespace, flag: str, type: str):
    """Pairs, judged answers and prompts are never cut: without those that are too long, which are
    counted."""
    most, limit = _longest(args, type), f"--max_length {args.max_length}"
    if DATA_TYPES[type].leaves_room:
        limit = f"{most} tokens ({limit} less --max_seq_len {args.max_seq_len})"
    fits = np.flatnonzero(row_lengths(rows) <= most)
    if left_out := len(rows) - len(fits):
        longest = int(row_lengths(rows).max())
        what = f"--{flag}: {left_out} of {len(rows)} rows are longer than {limit}"
        if not len(fits):
            raise ValueError(
                f"{what} (the longest has {longest} tokens): nothing is left; raise --max_length"
            )
        logger.info(f"{what} (the longest has {longest} tokens) and are left out")
        return rows.select(fits)
    return rows


def _prepare_raw(
    path: str, args: Namespace, tokenizer: Any, template: Conversation, type: str, split: str | None
) -> str:
    folder = _cache_folder(path, args, tokenizer, template, type, split)
    failure = None
    if not (folder / "preparation.json").exists() and os.environ.get("LOCAL_RANK", "0") == "0":
        logger.info(
            f"{path} holds raw conversations: preparing them into {folder} (prepare_dataset.py "
            "does this once for all)"
        )
        try:
            prepare_dataset(
                inputs=[path],
                tokenizer=tokenizer,
                template=template,
                arrow_dir=folder,
                type=type,
                split=split,
                max_length=_longest(args, type),
                num_bins=1,
                tokenizer_name=args.tokenizer_dir or args.pretrain,
                seed=args.seed,
                show=print if is_rank_0() else None,
            )
        except (ValueError, OSError) as error:
            failure = str(error)
    # The others wait here: they must end with it, not hang.
    if failures := [text for text in all_gather_object(failure) if text]:
        raise ValueError(failures[0])
    return str(folder)


def _cache_folder(
    path: str, args: Namespace, tokenizer: Any, template: Conversation, type: str, split: str | None
) -> Path:
    files = find_files([path], split)
    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    vocabulary = hashlib.sha256(
        json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    ).hexdigest()
    key = json.dumps([stamps, vocabulary, template.to_config(), _longest(args, type), type])
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "coati" / "prepared" / hashlib.sha256(key.encode()).hexdigest()[:24]


def beside(args: Namespace, mode: str, name: str) -> Path:
    """Where something that belongs to the rows of ``mode`` is kept: a folder ``name`` next to their
    prepared parts."""
    return part_directories(args._prepared[mode][0])[0].parent / name


def epoch_plan(args: Namespace, rows: Any) -> EpochOrder:
    """The order of the training rows of :func:`rows_of`: mixed by ``--dataset_weights``, packed by
    ``--packing``."""
    mixture = None
    if args.dataset_weights:
        mixture = Mixture(
            tuple(args.dataset), tuple(args._dataset_sizes), tuple(args.dataset_weights)
        )
    return EpochOrder(
        row_lengths(rows), seed=args.seed, mixture=mixture, pack_length=pack_length(args)
    )


def check_rows(args: Namespace, options: ParallelOptions, rows: Any) -> None:
    """Refuse fewer ``rows`` (or packs of an :class:`EpochOrder`) than one step needs before a model
    is loaded."""
    plan = rows if isinstance(rows, EpochOrder) else epoch_plan(args, rows)
    check_global_batch(
        plan, args.batch_size, args.accumulation_steps, world_size() // options.model_parallel_size
    )
    if plan.mixture is not None:
        logger.info(plan.mixture.describe())
    if plan.pack_length is not None:
        logger.info(plan.describe_packing(args.batch_size))
