"""Reference log-probs of a whole data set, computed once."""

import numpy as np
import torch

from coati.parallel.inference_model import InferenceModel
from coati.trainer.dpo import DPOObjective
from coati.trainer.preference import PreferenceObjective
from coati.utils.distributed import all_gather_object
from coati.utils.phases import phase


@phase("computing reference log-probs")
def reference_of_rows(objective: DPOObjective, reference: InferenceModel, loader) -> np.ndarray:
    """(N, 2) fp32, chosen and rejected, in the order of the data set, on every rank; every rank
    must call it.

    ``loader``: an :class:`~coati.dataset.load.loader.EvaluationLoader` of the pairs.
    """
    found: dict[int, list[float]] = {}
    for batch, rows in zip(loader, loader.rows(), strict=True):
        pairs = PreferenceObjective.prepare(objective, batch)
        logps = reference.forward_only(pairs, objective.row_logps.read, rows_together=2)
        values = logps.view(-1, 2).cpu()
        if reference.engine.mesh.is_loss_rank:
            found |= {row: value.tolist() for row, value in zip(rows, values, strict=False)}
    whole = {row: value for rank in all_gather_object(found) for row, value in rank.items()}
    return np.asarray([whole[row] for row in range(len(whole))], dtype=np.float32).reshape(-1, 2)


class WithReference:
    """A collator whose batches also hold the rows' stored log-probs, ``chosen_reference`` and
    ``reject_reference``."""

    def __init__(self, collate) -> None:
        self.collate = collate
        self.blank = collate.blank

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        stored = torch.tensor([[row.get(name, 0.0) for name in REFERENCE_COLUMNS] for row in rows])
        return self.collate(rows) | {
            "chosen_reference": stored[:, 0],
            "reject_reference": stored[:, 1],
        }


REFERENCE_COLUMNS = ("chosen_reference", "rejected_reference")


def with_columns(rows, values: np.ndarray):
    """``rows`` with the columns of :data:`REFERENCE_COLUMNS`, from ``values`` (N, 2)."""
    for name, column in zip(REFERENCE_COLUMNS, values.T, strict=True):
        rows = rows.add_column(name, column)
    return rows
