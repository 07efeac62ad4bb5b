"""The experience buffer: responses in, micro-batches of global batches out, in an order that is
independent of the number of processes.

The responses of an episode have indices over all ranks. Of every k consecutive ones, where k is the
number of optimizer steps of a pass, each goes to another global batch; which to which is drawn from
(seed, episode, pass, block). A rank holds whole blocks, so every global batch takes equally many of
its rows, and together the ranks' shares hold the same rows as one process's would.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np

from coati.experience_maker.experience import (
    Experience,
    concatenate,
    make_experience_batch,
    split_experience_batch,
)
from coati.utils.logging import get_logger

logger = get_logger(__name__)

__all__ = ["BufferItem", "NaiveExperienceBuffer", "make_experience_batch", "split_experience_batch"]

BufferItem = Experience  # of a single row
_ORDER = 0x62756666  # keeps these draws apart from those of the data order, which are seeded alike


class NaiveExperienceBuffer:
    """This rank's responses of one episode.

    Args:
        sample_batch_size: rows of a micro-batch.
        limit: the newest rows that are kept; 0: all.
        cpu_offload: whether rows wait in system memory.

    :attr:`by_prompt`: rows of one prompt are neighbors in a global batch, for models whose rows
    share it (:meth:`Engine.shares_prefixes <coati.parallel.engine.Engine.shares_prefixes>`).
    """

    def __init__(self, sample_batch_size: int, limit: int = 0, cpu_offload: bool = True) -> None:
        if sample_batch_size < 1 or limit < 0:
            raise ValueError(
                f"sample_batch_size {sample_batch_size} must be at least 1, limit {limit} at least "
                "0"
            )
        self.sample_batch_size = sample_batch_size
        self.limit = limit
        self.cpu_offload = cpu_offload
        self.by_prompt = False
        self.items: list[BufferItem] = []

    def __len__(self) -> int:
        return len(self.items)

    def append(self, experience: Experience) -> None:
        """Add the rows of ``experience``; beyond the limit the oldest are dropped, with a
        warning."""
        experience = experience.to_device("cpu") if self.cpu_offload else experience
        self.items += self._split(experience)
        if self.limit and len(self.items) > self.limit:
            logger.warning_once(
                f"the buffer holds {self.limit} responses: the oldest of {len(self.items)} are "
                "dropped untrained"
            )
            self.items = self.items[-self.limit :]

    def clear(self) -> None:
        self.items.clear()

    def global_batches(
        self, count: int, *, seed: int, episode: int, update: int = 0, start: int = 0
    ) -> Iterator[list[Experience]]:
        """This rank's share of the ``count`` global batches of update pass ``update``, from number
        ``start`` on: each a list of micro-batches, padded to their own longest rows.

        Inside a global batch rows are sorted by length, so that micro-batches hold little padding;
        with :attr:`by_prompt` those of one prompt stay together.
        Raises ValueError when the rows cannot be divided into ``count`` equal global batches.
        """
        size = self.sample_batch_size
        for rows in self._order(count, seed, episode, update)[start:]:
            rows = self._sorted(rows)
            batches = [rows[i : i + size] for i in range(0, len(rows), size)]
            yield [make_experience_batch([self.items[row] for row in batch]) for batch in batches]

    def _split(self, experience: Experience) -> list[BufferItem]:
        return split_experience_batch(experience)

    def _index_of(self, item: BufferItem) -> int:
        return int(item.sample_index)

    def _length_and_index(self, row: int) -> tuple[int, int]:
        return int(self.items[row].lengths().max()), self._index_of(self.items[row])

    def _sorted(self, rows: list[int]) -> list[int]:
        rows = sorted(rows, key=self._length_and_index)
        if not self.by_prompt:
            return rows
        groups: dict[tuple[int, ...], list[int]] = {}
        for row in rows:
            groups.setdefault(self._prompt(row), []).append(row)
        return list(chain.from_iterable(groups.values()))

    def _prompt(self, row: int) -> tuple[int, ...]:
        item = self.items[row]
        columns = slice(item.prompt_width)
        return tuple(item.sequences[0, columns][item.attention_mask[0, columns].bool()].tolist())

    def _order(self, count: int, seed: int, episode: int, update: int) -> list[list[int]]:
        """Positions in :attr:`items` of each global batch."""
        indices = [self._index_of(item) for item in self.items]
        # Dropped rows leave gaps, so the remaining ones are renumbered in their order
        if self.limit:
            numbers = {index: number for number, index in enumerate(sorted(indices))}
            indices = [numbers[index] for index in indices]
        position = {index: row for row, index in enumerate(indices)}
        if count < 1 or len(position) != len(indices) or not self._whole_blocks(indices, count):
            raise ValueError(
                f"{len(indices)} responses in the buffer cannot be divided into {count} global "
                "batches: expected every response once, in whole runs of as many consecutive "
                "indices as there are global batches"
            )
        batches: list[list[int]] = [[] for _ in range(count)]
        for block in sorted({index // count for index in indices}):
            goal = np.random.default_rng([_ORDER, seed, episode, update, block]).permutation(count)
            for offset in range(count):
                batches[goal[offset]].append(position[block * count + offset])
        return batches

    @staticmethod
    def _whole_blocks(indices: list[int], count: int) -> bool:
        return len({index // count for index in indices}) * count == len(indices)

    def state_dict(self) -> dict[str, Any]:
        """The rows, as tensors by field; the trainer knows which global batches are done."""
        return concatenate(self.items).to_device("cpu").tensors() if self.items else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; the global batches are then bitwise the same."""
        if "rows" in state:  # the name of sample_index in older checkpoints
            state = {("sample_index" if name == "rows" else name): state[name] for name in state}
        self.items = self._split(Experience(**state)) if state else []
