"""Rows of several types in one run: which type a path has, and the rows of all of them as one data
set."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

from coati.dataset.data_types import DATA_TYPES, types_of
from coati.dataset.load.loader import load_tokenized_dataset, row_lengths
from coati.dataset.rows.column_names import Layout
from coati.dataset.rows.formats import read_row
from coati.dataset.rows.input_files import decode, find_sources
from coati.dataset.rows.joined_rows import whole_rows
from coati.dataset.rows.readers import kind_of
from coati.dataset.rows.row_errors import RowError
from coati.recipes.prepared import is_raw

WEIGHTS = "loss_weights"  # of the tokens of a row, where some are neither 0 nor 1
LOOKED_AT = 100  # rows of a raw file


def type_of_path(
    path: str, wanted: str, split: str | None = None, layout: Layout | None = None
) -> str:
    """``wanted``, or the type beside it that the rows of ``path`` have: of prepared rows by their
    columns, of raw ones by their keys. What is neither is left to the reader of ``wanted``, who
    says what is wrong. ``layout``: what the columns of raw rows are, as of find_sources."""
    others = DATA_TYPES[wanted].beside
    if not others:
        return wanted
    if not is_raw(path):
        found = types_of(load_tokenized_dataset(path).column_names)
        return found[0].name if found and found[0].name in others else wanted
    return next((other for other in others if _reads_as(path, other, split, layout)), wanted)


def _reads_as(path: str, type: str, split: str | None, layout: Layout | None) -> bool:
    """Whether the first rows of ``path`` that can be read are conversations for ``type``."""
    for source in find_sources([path], split, layout):
        if kind_of(source.path) == ".txt":
            return False
        for _, raw in islice(whole_rows(source.path, layout=source.layout), LOOKED_AT):
            try:
                return read_row(type, decode(raw), layout=source.layout).text is None
            except RowError as error:
                if error.reason in ("wrong_keys", "wrong_type"):
                    return False
    return False


def joined(folders: Sequence[str], types: Sequence[str], mode: str = "train") -> Any:
    """The rows of all ``folders`` end to end; of several types with the columns that all have.
    Where some have weights of their tokens, those of the others weigh 1."""
    if len(set(types)) == 1:
        return load_tokenized_dataset(folders, mode)
    from datasets import concatenate_datasets

    parts = [load_tokenized_dataset(folder, mode) for folder in folders]
    kind = next((part.features[WEIGHTS] for part in parts if WEIGHTS in part.features), None)
    if kind is not None:
        parts = [part if WEIGHTS in part.features else _weighted(part, kind) for part in parts]
    shared = [
        name for name in parts[0].column_names if all(name in part.column_names for part in parts)
    ]
    return concatenate_datasets([part.select_columns(shared) for part in parts])


def _weighted(rows: Any, kind: Any) -> Any:
    """``rows`` whose tokens all weigh 1, as numbers of ``kind``."""
    from datasets import Features

    return rows.map(
        lambda batch: {WEIGHTS: [[1.0] * len(ids) for ids in batch["input_ids"]]},
        batched=True,
        keep_in_memory=True,
        features=Features({**rows.features, WEIGHTS: kind}),
    )


def check_whole(rows: Any, path: str, type: str, max_length: int, flag: str) -> None:
    """Raise ValueError for pieces of documents that would lose their end: they were cut so as not
    to."""
    if type != "text":
        return
    lengths = row_lengths(rows)
    longer = int((lengths > max_length).sum())
    if longer:
        raise ValueError(
            f"--{flag} {path}: {longer} of {len(lengths)} pieces of documents are longer than "
            f"--max_length {max_length} (the longest has {int(lengths.max())} tokens), and what is "
            f"cut off them would be lost; use --max_length {int(lengths.max())}, or prepare the "
            "documents again with a lower --max_length"
        )
