"""A run stopped after any step and gone on with trains on the rows, and the partners, of the
uninterrupted run.

Trainer and loader are the library's own; the engine only notes what it is given.
"""

import json
from dataclasses import asdict

import numpy as np
import pytest

from coati.dataset.load.loader import GlobalBatchLoader
from coati.parallel.checkpoint import RunningState
from coati.parallel.objective import Objective, Step
from coati.parallel.weights import ModelAssets
from coati.trainer.base import SLTrainer
from tests.trainer.fake_engine import FakeEngine

EPOCHS = 3
GRID = [
    (rows, batch, accumulation, share)
    for rows in (24, 31, 97, 1000)
    for batch, accumulation in ((1, 1), (1, 4), (2, 2), (4, 1), (3, 2), (8, 3))
    for share in (0.01, 0.4, 0.9)  # of all steps, after which the run stops
]


class Rows:
    """``count`` judged answers of several lengths; an answer is the number of its row."""

    column_names = ("prompt", "completion", "label", "seq_length")

    def __init__(self, count: int) -> None:
        self.lengths = np.random.default_rng(count).integers(5, 60, count)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, key):
        return (
            list(self.lengths)
            if key == "seq_length"
            else {"row": key, "completion": [key], "label": True}
        )


class Noting(FakeEngine):
    """An engine: every row of every window, and its partner where there is one; asks to stop after
    ``stop`` steps."""

    module = None

    def __init__(self, stop: int | None = None) -> None:
        super().__init__()
        self.windows, self.stop = [], stop

    def train_step(self, window, hooks, stop: bool = False) -> Step:
        self.windows.append(window)
        return Step(1.0, 1, 1, len(self.windows) == self.stop, None, {})


def noted(batch: list[dict]) -> list[tuple]:
    return [(row["row"], *row.get("kl_completion", ())) for row in batch]


def trained(
    loader, state: RunningState | None = None, stop: int | None = None
) -> tuple[list, RunningState]:
    """The windows of a run from ``state`` on, and where it stood at its end, as a checkpoint would
    keep it."""
    engine = Noting(stop)
    trainer = SLTrainer(engine, Objective(), EPOCHS, state=state, assets=ModelAssets(config=None))
    trainer.fit(loader)
    return engine.windows, RunningState(**json.loads(json.dumps(asdict(trainer.state))))


@pytest.mark.parametrize("partners", [False, True])
@pytest.mark.parametrize("rows, batch, accumulation, share", GRID)
def test_stopped_and_gone_on_with(partners, rows, batch, accumulation, share, capsys):
    shares = {"batch_size": batch, "accumulation_steps": accumulation, "partners": partners}
    loader = GlobalBatchLoader(Rows(rows), noted, **shares)
    whole, end = trained(loader)
    steps = rows // (batch * accumulation)
    assert end.step == len(whole) == EPOCHS * steps
    for epoch in range(EPOCHS):
        seen = [
            row for window in whole[epoch * steps :][:steps] for part in window for row, *_ in part
        ]
        assert len(seen) == len(set(seen)) == steps * batch * accumulation
    stop = min(max(1, round(share * len(whole))), len(whole) - 1)
    before, state = trained(loader, stop=stop)
    after, _ = trained(GlobalBatchLoader(Rows(rows), noted, **shares), state)
    assert len(before) == stop and before + after == whole


@pytest.mark.parametrize(
    "batch, accumulation, size", [(4, 2, 1), (2, 2, 2), (2, 1, 4), (1, 4, 2), (8, 1, 1)]
)
@pytest.mark.parametrize("stop", [1, 11, 12, 13, 30])
def test_other_processes_go_on_at_the_same_row_with_the_same_partners(
    batch, accumulation, size, stop
):
    """A checkpoint of one process, windows of 8; 12 an epoch."""
    _, state = trained(GlobalBatchLoader(Rows(97), noted, batch_size=8, partners=True), stop=stop)
    ranks = []
    for rank in range(size):
        shares = {
            "batch_size": batch,
            "accumulation_steps": accumulation,
            "dp_rank": rank,
            "dp_size": size,
            "partners": True,
        }
        ranks.append(
            trained(GlobalBatchLoader(Rows(97), noted, **shares), RunningState(**asdict(state)))[0]
        )
    together = [
        [row for part in zip(*windows, strict=True) for batch in part for row in batch]
        for windows in zip(*ranks, strict=True)
    ]
    whole, _ = trained(GlobalBatchLoader(Rows(97), noted, batch_size=8, partners=True))
    assert together == [[row for part in window for row in part] for window in whole[stop:]]


def test_thousand_rows_in_batches_of_128_lose_none():
    """The position is the next row, 128 after a step, however many batches a step has: 7 steps are
    896 rows."""
    loader = GlobalBatchLoader(Rows(1000), noted, batch_size=16, accumulation_steps=8)
    _, state = trained(loader, stop=1)
    assert (state.epoch, state.sample_start_index) == (0, 128)
    after, _ = trained(loader, RunningState(**asdict(state)))
    assert sum(len(part) for window in after[:6] for part in window) == 768
