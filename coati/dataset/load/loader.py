"""Prepared data sets from disk, cut into the batches of each process; epoch_order.py says in which
order."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DistributedSampler

from coati.dataset.load.epoch_order import EpochOrder
from coati.utils.json_io import load_object

MODES = {"train": "train", "valid": "validation", "dev": "validation", "test": "test"}


def load_tokenized_dataset(
    dataset_paths: str | Sequence[str], mode: str = "train", mode_map: dict[str, str] | None = None
):
    """The prepared rows of one or several directories as one ``datasets.Dataset``, in the order
    given.

    A path is a part directory or a directory of ``part-*`` directories. Returns None for no paths.

    Raises:
        ValueError: naming the path that is missing, empty or not a prepared data set, and what to
            do.
    """
    from datasets import DatasetDict, concatenate_datasets, load_from_disk

    paths = [dataset_paths] if isinstance(dataset_paths, str) else list(dataset_paths)
    split = (mode_map or MODES).get(mode, mode)
    parts = []
    for part in (part for path in paths for part in part_directories(path)):
        try:
            loaded = load_from_disk(str(part))
        except Exception as error:  # of json, pyarrow and datasets, none of which names the part
            raise ValueError(
                f"--dataset {part}: not readable as prepared rows ({type(error).__name__}: "
                f"{error}); copy it again, or prepare the data again with coati prepare"
            ) from error
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
            f"--dataset {path}: does not exist; expected a directory written by coati prepare"
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
            "dataset_info.json); run coati prepare first and pass its --data_arrow_output_dir"
        )
    _check_all_there(folder, parts)
    return parts


def _check_all_there(folder: Path, parts: Sequence[Path]) -> None:
    """Raise ValueError where the preparation made more parts than there are."""
    if not (folder / "preparation.json").is_file():
        return
    report = load_object(folder / "preparation.json").get("report")
    made = report.get("shards") if isinstance(report, dict) else None
    wanted = sum(map(bool, made)) if isinstance(made, list) else 0
    if len(parts) < wanted:
        raise ValueError(
            f"--dataset {folder}: {len(parts)} of the {wanted} parts that coati prepare wrote are "
            "there; copy the others, or prepare the data again"
        )


def preparation_of(path: str) -> dict[str, Any] | None:
    """What ``preparation.json`` beside the prepared rows says (tokenizer, template, report), or
    None."""
    places = (folder / "preparation.json" for folder in (Path(path), Path(path).parent))
    found = next(filter(Path.exists, places), None)
    return None if found is None else load_object(found)


def row_lengths(dataset) -> np.ndarray:
    """(N,) token counts."""
    if "seq_length" in getattr(dataset, "column_names", []):
        return np.asarray(dataset["seq_length"], dtype=np.int64)
    return np.asarray([len(row["input_ids"]) for row in dataset], dtype=np.int64)


def _token_columns(dataset):
    """The same rows without the columns that are there for people to read."""
    readable = [name for name in getattr(dataset, "column_names", []) if name.endswith("_decode")]
    return dataset.remove_columns(readable) if readable else dataset


class GlobalBatchLoader:
    """The global batch of each optimizer step: ``accumulation_steps`` micro-batches for this
    data-parallel rank.

    Every rank gets a slice of the same ``batch_size x accumulation_steps x dp_size`` entries of the
    epoch order: rows, or packs of rows. Those of the last, incomplete global batch of an epoch are
    left out of it; another epoch's order leaves out others. An order with ``fill`` has none such:
    blank entries fill that batch up, in which nothing is supervised.

    Args:
        collate: rows to tensors; with packing, lists of rows (PackCollator).
        epoch_order: the order of the entries; by default rows in an order made of ``seed``,
            ``shuffle``, ``group_by_length``.
        partners: each row comes with the response of the row after it in the global batch as
            ``kl_completion`` (for KTO's baseline), however the global batch is cut.

    Raises:
        ValueError: when the first epoch has fewer entries than one global batch.
    """

    def __init__(
        self,
        dataset,
        collate: Any,
        *,
        batch_size: int,
        accumulation_steps: int = 1,
        dp_rank: int = 0,
        dp_size: int = 1,
        seed: int = 42,
        shuffle: bool = True,
        group_by_length: bool = True,
        epoch_order: EpochOrder | None = None,
        partners: bool = False,
    ) -> None:
        self.dataset = _token_columns(dataset)
        self.collate = collate
        self.batch_size = batch_size
        self.accumulation_steps = accumulation_steps
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.partners = partners
        self.epoch_order = epoch_order or EpochOrder(
            row_lengths(dataset), seed=seed, shuffle=shuffle, group_by_length=group_by_length
        )
        self.lengths = self.epoch_order.lengths
        self.rows_per_step = batch_size * accumulation_steps * dp_size
        check_global_batch(self.epoch_order, batch_size, accumulation_steps, dp_size)

    def __len__(self) -> int:
        """Optimizer steps of the first epoch."""
        return self.count(0) // self.rows_per_step

    def count(self, epoch: int) -> int:
        """Rows, or packs, of ``epoch``."""
        return self.epoch_order.count(epoch)

    @property
    def figures(self) -> dict[str, float]:
        """What is worth logging about the data once."""
        return self.epoch_order.packing_figures(self.batch_size)

    def global_batches(self, epoch: int, start_row: int = 0) -> Iterator[list[dict]]:
        """This rank's micro-batches of each step of ``epoch``, from entry ``start_row`` of its
        order on."""
        for start in range(
            start_row, self.count(epoch) - self.rows_per_step + 1, self.rows_per_step
        ):
            entries = self._entries(epoch, start)
            if self.partners:
                pairs = list(zip(entries, following(entries), strict=True))
                yield [
                    self.collate([_with_partner(self.dataset, *pair) for pair in mine])
                    for mine in self._mine(pairs)
                ]
            else:
                yield [self._batch(mine) for mine in self._mine(entries)]

    def next_entries(self, epoch: int, start: int, count: int) -> tuple[list[Any], tuple[int, int]]:
        """``count`` entries from number ``start`` of ``epoch`` on, after its last those of the next
        epoch, and where the one after them stands."""
        found: list[Any] = []
        while len(found) < count:
            if start >= self.count(epoch):
                epoch = epoch + 1
                start = 0
            more = list(self.epoch_order.entries(epoch)[start : start + count - len(found)])
            found += more
            start += len(more)
        return found, (epoch, start)

    def batch_of(self, entries: Sequence) -> dict:
        """The micro-batch of ``entries``."""
        return self._batch(entries)

    def position_after(self, epoch: int, start_row: int) -> tuple[int, int]:
        """Where the step after the one at ``start_row`` of ``epoch`` begins."""
        return epoch, start_row + self.rows_per_step

    def rows_at(self, epoch: int, start_row: int) -> list[int]:
        """Rows of the data set in the global batch that starts at ``start_row`` of ``epoch``, on
        all ranks together."""
        entries = (entry for entry in self._entries(epoch, start_row) if entry is not None)
        return [int(row) for entry in entries for row in np.atleast_1d(entry)]

    def _entries(self, epoch: int, start: int) -> Sequence:
        """Of a global batch; None for a blank one."""
        found = self.epoch_order.entries(epoch)[start : start + self.rows_per_step]
        if self.epoch_order.fill == 1:
            return found
        return [*found, *[None] * (self.rows_per_step - len(found))]

    def _mine(self, entries: Sequence) -> list[Sequence]:
        starts = range(self.dp_rank * self.batch_size, len(entries), self.dp_size * self.batch_size)
        return [entries[start : start + self.batch_size] for start in starts]

    def _batch(self, entries: Sequence) -> dict:
        return self.collate([self._entry(entry) for entry in entries])

    def _entry(self, entry: Any) -> Any:
        """A row, or the list of the rows of a pack."""
        if entry is None:
            return self.collate.blank(self.dataset[0])
        if self.epoch_order.pack_length is None:
            return self.dataset[int(entry)]
        return [self.dataset[int(row)] for row in entry]


def check_global_batch(
    epoch_order: EpochOrder, batch_size: int, accumulation_steps: int, dp_size: int
) -> None:
    """Raise ValueError when the first epoch has fewer entries than one optimizer step needs."""
    needed = batch_size * accumulation_steps * dp_size
    held = epoch_order.count(0)
    if held >= needed:
        return
    what = (
        f"{held} rows"
        if epoch_order.pack_length is None
        else f"{held} packs of up to {epoch_order.pack_length} tokens"
    )
    raise ValueError(
        f"--dataset holds {what}, one step needs {needed} (--batch_size {batch_size} x "
        f"--accumulation_steps {accumulation_steps} x {dp_size} data-parallel processes); lower "
        "one of them or add rows"
    )


def following(entries: Sequence) -> list[int | None]:
    """For each row of a global batch the next one, the first after the last; never itself, so None
    in a global batch of one."""
    rows = [int(row) for row in entries]
    return [
        next((r for r in (*rows[i + 1 :], *rows[:i]) if r != row), None)
        for i, row in enumerate(rows)
    ]


def _with_partner(rows: Any, row: int, partner: int | None) -> dict[str, Any]:
    """``rows[row]`` with the response of ``partner`` as ``kl_completion``; empty without one."""
    found = rows[int(row)]
    return found | {
        "kl_completion": rows[int(partner)]["completion"] if partner is not None else []
    }


class EvaluationLoader:
    """Batches of the whole data set: no shuffle, nothing dropped, every rank equally many.

    A rank that runs out of rows gets blank ones, in which nothing is supervised. ``partners``: as
    of GlobalBatchLoader, the whole data set being one global batch.
    """

    def __init__(
        self,
        dataset,
        collate,
        *,
        batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        partners: bool = False,
    ) -> None:
        self.dataset = _token_columns(dataset)
        self.collate = collate
        self.batch_size = batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.order = np.argsort(row_lengths(dataset), kind="stable")
        self._partner = (
            dict(zip(map(int, self.order), following(self.order), strict=True))
            if partners
            else None
        )

    def __len__(self) -> int:
        return -(-len(self.dataset) // (self.batch_size * self.dp_size))

    def rows(self) -> Iterator[list[int]]:
        """This rank's rows of each batch, those that fill it up left out."""
        step = self.batch_size * self.dp_size
        for start in range(0, len(self.order), step):
            yield self.order[start : start + step][self.dp_rank :: self.dp_size].tolist()

    def __iter__(self) -> Iterator[dict]:
        for mine in self.rows():
            rows = [self._row(row) for row in mine]
            while len(rows) < self.batch_size:
                rows.append(self.collate.blank(self._row(int(self.order[0]))))
            yield self.collate(rows)

    def _row(self, row: int) -> dict[str, Any]:
        if self._partner is None:
            return self.dataset[row]
        return _with_partner(self.dataset, row, self._partner[row])


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
