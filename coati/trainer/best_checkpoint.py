"""The best model so far, by a metric of the evaluations: ``<save_dir>/best``, a model directory as
``modeling`` is."""

from pathlib import Path
from typing import Any

from coati.parallel.atomic_dirs import SaveFailed, write_directory, write_file
from coati.parallel.engine import Engine
from coati.parallel.save_rescue import rescue
from coati.parallel.weights import ModelAssets, save_model
from coati.utils.distributed import is_rank_0
from coati.utils.json_io import save_json


def value_of(metric: str, evaluation: dict[str, float]) -> float:
    """The value of ``metric`` ("accuracy" or "eval/accuracy"). Raises ValueError naming what the
    evaluations give."""
    name = metric if metric in evaluation else f"eval/{metric}"
    if name not in evaluation:
        there = ", ".join(key.removeprefix("eval/") for key in evaluation)
        raise ValueError(
            f"--metric_for_best {metric}: evaluations of this run give {there}; choose one of them"
        )
    return evaluation[name]


def save_best(save_dir: str, engine: Engine, assets: ModelAssets, found: dict[str, Any]) -> Path:
    """Write ``<save_dir>/best`` in place of an older one; ``found`` goes into its best.json. Every
    rank calls it."""
    folder = Path(save_dir) / "best"

    def write(path: Path) -> None:
        save_model(engine, path, assets)
        if is_rank_0():
            write_file(path / "best.json", lambda file: save_json(found, file))

    try:
        write_directory(folder, write)
    except SaveFailed as failure:
        raise rescue(failure, folder, {"": (engine, assets)}) from failure
    return folder
