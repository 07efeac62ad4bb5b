"""What a rank of the streaming tests does: a run whose windows are small, so that few rows make
several of them."""

from unittest.mock import patch

from coati.dataset.stream import row_stream, source_order
from tests.end_to_end import worker
from tests.end_to_end.worker import Ended, Run


def small_windows():
    return patch.object(row_stream, "WINDOW", 10), patch.object(source_order, "CHUNK_ROWS", 4)


def train(run: Run) -> Ended:
    window, chunk = small_windows()
    with window, chunk:
        return worker.train(run)


def train_each(runs: dict[str, Run]) -> dict[str, Ended]:
    window, chunk = small_windows()
    with window, chunk:
        return worker.train_each(runs)
