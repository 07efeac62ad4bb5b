"""Prepared data sets from disk, cut into the batches of each process; dataset/order.py says in
which order."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DistributedSampler

from coati.dataset.load.epoch_order import EpochOrder
from coati.utils.json_io import load_json

MODES = {"train": "train", "valid": "validation", "dev": "validation", "test": "test"}


def load_tokenized_dataset(
    dataset_paths: str | Sequence[str], mode: str = "train", mode_map: dict[str, str] | None = None
):
    """The prepared rows of one or several directories as one ``datasets.Dataset``, in the order
    given.

    A path is a part directory or a directory of ``part-*`` directories. Returns None for no paths.

    Raises: ValueError: naming the path that is missing, empty or not a prepared data set, and what
        to do.
    """
    from datasets import DatasetDict, concatenate_datasets, load_from_disk

    paths = [dataset_paths] if isinstance(dataset_paths, str) else list(dataset_paths)
    split = (mode_map or MODES).get(mode, mode)
    parts = []
    for part in (part for path in paths for part in part_directories(path)):
        loaded = load_from_disk(str(part))
        if isinstance(loaded, DatasetDict):
            if split not in loaded:
                raise ValueError(f"{part}: has the splits {', '.join(loaded)}; expected {split!r}")
            loaded = loaded[split]
        parts.append(loaded)
    return concatenate_datasets(parts) if parts else None


def part_directories(path: str) -> list[Path]:
    """The ``load_from_disk`` directories that ``path`` stands for."""
    folder = Path(path)
    if not folder.exists():
        raise ValueError(
            f"--dataset {path}: does not exist; expected a directory written by prepare_dataset.py"
        )
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        return [folder]
    parts = (
        sorted(child for child in folder.glob("part-*") if (child / "dataset_info.json").exists())
        if folder.is_dir()
        else []
    )
    if not parts:
        raise ValueError(
            f"--dataset {path}: no prepared rows found (expected part-* directories with "
            "dataset_info.json); run "
            "prepare_dataset.py first and pass its --data_arrow_output_dir"
        )
    return parts


def preparation_of(path: str) -> dict[str, Any] | None:
    """What ``preparation.json`` beside the prepared rows says (tokenizer, template, report), or
    None."""
    folder = Path(path)
    for place in (folder, folder.parent):
        if (place / "preparation.json").exists():
            return load_json(place / "preparation.json")
    return None


def row_lengths(dataset) -> np.ndarray:
    """(N,) token counts."""
    if "seq_length" in getattr(dataset, "column_names", []):
        return np.asarray(dataset["seq_length"], dtype=np.int64)
    return np.asarray([len(row["input_ids"]) for row in dataset], dtype=np.int64)


def _token_columns(dataset):
    """The same rows without the columns that are there for people to read."""
    readable = [name for name in getattr(dataset, "column_names", []) if name.endswith("_decode")]
    return dataset.remove_columns(readable) if readable else dataset


class WindowLoader:
    """Windows of one optimizer step each: ``accumulation_steps`` micro-batches for this
    data-parallel rank.

    Every rank sees a slice of the same window of ``batch_size x accumulation_steps x dp_size``
    entries of the plan: rows, or packs of rows. Those of the last, incomplete window of an epoch
    are left out of it; another epoch's order leaves out others.

    Args: collate: rows to tensors; with packing, lists of rows (PackCollator). plan: the order of
        the entries; by default rows in an order made of ``seed``, ``shuffle``, ``group_by_length``.

    Raises:
        ValueError: when the first epoch has fewer entries than one window.
    """

    def __init__(
        self,
        dataset,
        collate: Callable[[list], dict],
        *,
        batch_size: int,
        accumulation_steps: int = 1,
        dp_rank: int = 0,
        dp_size: int = 1,
        seed: int = 42,
        shuffle: bool = True,
        group_by_length: bool = True,
        plan: EpochOrder | None = None,
    ) -> None:
        self.dataset, self.collate = _token_columns(dataset), collate
        self.batch_size, self.accumulation_steps = batch_size, accumulation_steps
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.plan = plan or EpochOrder(
            row_lengths(dataset), seed=seed, shuffle=shuffle, group_by_length=group_by_length
        )
        self.lengths = self.plan.lengths
        self.window_rows = batch_size * accumulation_steps * dp_size
        check_window(self.plan, batch_size, accumulation_steps, dp_size)

    def __len__(self) -> int:
        """Optimizer steps of the first epoch."""
        return self.count(0) // self.window_rows

    def count(self, epoch: int) -> int:
        """Rows, or packs, of ``epoch``."""
        return self.plan.count(epoch)

    @property
    def figures(self) -> dict[str, float]:
        """What is worth logging about the data once."""
        return self.plan.packing_figures(self.batch_size)

    def windows(self, epoch: int, start_row: int = 0) -> Iterator[list[dict]]:
        """This rank's windows of ``epoch`` from entry ``start_row`` of its order on."""
        for start in range(start_row, self.count(epoch) - self.window_rows + 1, self.window_rows):
            window = self.plan.entries(epoch)[start : start + self.window_rows]
            yield [self._batch(entries) for entries in self._mine(window)]

    def rows_at(self, epoch: int, start_row: int) -> list[int]:
        """Rows of the data set in the window that starts at ``start_row`` of ``epoch``, on all
        ranks together."""
        window = self.plan.entries(epoch)[start_row : start_row + self.window_rows]
        return [int(row) for entry in window for row in np.atleast_1d(entry)]

    def _mine(self, window: Sequence) -> list[Sequence]:
        starts = range(self.dp_rank * self.batch_size, len(window), self.dp_size * self.batch_size)
        return [window[start : start + self.batch_size] for start in starts]

    def _batch(self, entries: Sequence) -> dict:
        if self.plan.pack_length is None:
            return self.collate([self.dataset[int(row)] for row in entries])
        return self.collate([[self.dataset[int(row)] for row in pack] for pack in entries])


def check_window(plan: EpochOrder, batch_size: int, accumulation_steps: int, dp_size: int) -> None:
    """Raise ValueError when the first epoch has fewer entries than one optimizer step needs."""
    needed, held = batch_size * accumulation_steps * dp_size, plan.count(0)
    if held >= needed:
        return
    what = (
        f"{held} rows"
        if plan.pack_length is None
        else f"{held} packs of up to {plan.pack_length} tokens"
    )
    raise ValueError(
        f"--dataset holds {what}, one step needs {needed} (--batch_size {batch_size} x "
        "--accumulation_steps "
        f"{accumulation_steps} x {dp_size} data-parallel processes); lower one of them or add rows"
    )


class EvaluationLoader:
    """Batches of the whole data set: no shuffle, nothing dropped, every rank equally many.

    A rank that runs out of rows gets blank ones, in which nothing is supervised.
    """

    def __init__(
        self, dataset, collate, *, batch_size: int, dp_rank: int = 0, dp_size: int = 1
    ) -> None:
        self.dataset, self.collate, self.batch_size = _token_columns(dataset), collate, batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.order = np.argsort(row_lengths(dataset), kind="stable")

    def __len__(self) -> int:
        return -(-len(self.dataset) // (self.batch_size * self.dp_size))

    def rows(self) -> Iterator[list[int]]:
        """This rank's rows of each batch, those that fill it up left out."""
        step = self.batch_size * self.dp_size
        for start in range(0, len(self.order), step):
            yield self.order[start : start + step][self.dp_rank :: self.dp_size].tolist()

    def __iter__(self) -> Iterator[dict]:
        for mine in self.rows():
            rows = [self.dataset[row] for row in mine]
            while len(rows) < self.batch_size:
                rows.append(self.collate.blank(self.dataset[int(self.order[0])]))
            yield self.collate(rows)


class StatefulDistributedSampler(DistributedSampler):
    """A ``DistributedSampler`` that can start inside an epoch: the first ``set_start_index`` rows
    of this rank are skipped once, in the epoch that was interrupted, and no later one."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.start_index = 0

    def set_start_index(self, start_index: int) -> None:
        if not 0 <= start_index <= self.num_samples:
            raise ValueError(
                f"start_index {start_index}: expected 0 to {self.num_samples}, this rank's rows of "
                "an epoch"
            )
        self.start_index = start_index

    def __iter__(self):
        start, self.start_index = self.start_index, 0
        return iter(list(super().__iter__())[start:])

    def __len__(self) -> int:
        return self.num_samples - self.start_index
