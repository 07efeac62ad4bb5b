"""Loaders that give each judged answer its mismatched partner: the answer of the next row, for
KTO's baseline.

The partners of a training step are those of its whole window, over all micro-batches and processes:
z does not depend on how the window is cut. An evaluation is one window.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from coati.dataset.load.loader import EvaluationLoader, WindowLoader


def following(rows: Sequence) -> list[int | None]:
    """For each entry of a window the next one, the first after the last; never itself, so None in a
    window of one."""
    rows = [int(row) for row in rows]
    return [
        next((r for r in (*rows[i + 1 :], *rows[:i]) if r != row), None)
        for i, row in enumerate(rows)
    ]


def with_partner(row: dict[str, Any], partner: dict[str, Any] | None) -> dict[str, Any]:
    """``row`` with the answer of ``partner`` as ``kl_completion``; empty without one."""
    return row | {"kl_completion": partner["completion"] if partner is not None else []}


class KTOWindowLoader(WindowLoader):
    """Windows whose rows know their partner in the window."""

    def windows(self, epoch: int, start_row: int = 0) -> Iterator[list[dict]]:
        for start in range(start_row, self.count(epoch) - self.window_rows + 1, self.window_rows):
            window = self.plan.entries(epoch)[start : start + self.window_rows]
            batches = zip(self._mine(window), self._mine(following(window)), strict=True)
            yield [
                self.collate([self._row(*pair) for pair in zip(*both, strict=True)])
                for both in batches
            ]

    def _row(self, row: int, partner: int | None) -> dict[str, Any]:
        return with_partner(
            self.dataset[int(row)], None if partner is None else self.dataset[int(partner)]
        )


class KTOEvaluationLoader(EvaluationLoader):
    """Batches whose rows know their partner in the whole data set."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.dataset = _Partnered(self.dataset, self.order)


class _Partnered:
    """``rows[i]`` with its partner, which is the row after it in ``order``."""

    def __init__(self, rows: Any, order: Sequence) -> None:
        self.rows, self.partner = rows, dict(zip(map(int, order), following(order), strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        partner = self.partner[row]
        return with_partner(self.rows[row], None if partner is None else self.rows[partner])
