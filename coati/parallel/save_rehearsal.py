"""Saving, tried before training: everything but the weights is written once where it will be, so
that what cannot be saved ends a run at its start and not at its end."""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from coati.models.lora.adapter_files import CONFIG, save_settings
from coati.parallel.atomic_dirs import SaveFailed, agreed_failure, attempt
from coati.parallel.engine import Engine
from coati.parallel.save_causes import REHEARSAL, SaveCause
from coati.parallel.weights import ModelAssets, asset_writers, is_lora
from coati.utils.distributed import is_rank_0


def rehearse_saving(
    save_dir: str | Path, models: Mapping[str, tuple[Engine, ModelAssets]], keep: bool = True
) -> None:
    """Write configuration, generation settings, tokenizer, template and adapter settings of every
    model into a temporary directory inside ``save_dir``, and remove it. ``keep``: the run writes
    into ``save_dir`` itself; else no directory is left that was not there. Every rank must call it.

    Raises:
        SaveFailed: on every rank, naming the file, the cause and what to do.
    """
    failure = _rehearse(Path(save_dir), models, keep) if is_rank_0() else None
    if (agreed := agreed_failure(failure)) is not None:
        named, remedy = agreed
        raise SaveFailed(
            f"--save_dir {save_dir}: the model could not be saved after training, so nothing was "
            f"trained ({named}); {remedy}"
        )


def _rehearse(
    save_dir: Path, models: Mapping[str, tuple[Engine, ModelAssets]], keep: bool
) -> SaveCause | None:
    there = save_dir.exists()
    place: list[Path] = []

    def make() -> None:
        save_dir.mkdir(parents=True, exist_ok=True)
        place.append(Path(tempfile.mkdtemp(prefix=REHEARSAL, dir=save_dir)))

    try:
        if failure := attempt(make, save_dir):
            return failure
        for name, (engine, assets) in models.items():
            folder = place[0] / name
            folder.mkdir(parents=True, exist_ok=True)
            for file, write in _writers(engine, assets).items():
                if failure := attempt(partial(write, folder / file), folder, file):
                    return failure
        return None
    finally:
        if place:
            shutil.rmtree(place[0], ignore_errors=True)
        if not there and not keep:
            shutil.rmtree(save_dir, ignore_errors=True)


def _writers(engine: Engine, assets: ModelAssets) -> dict[str, Callable[[Path], Any]]:
    """With adapters a run may save both: the adapter, and the model that it is merged into."""
    config = assets.config
    if assets.composite is not None:
        config = assets.composite.config_around(config)
    writers = asset_writers(assets, config)
    if is_lora(engine):
        writers[CONFIG] = lambda path: save_settings(engine.module, path.parent)
    return writers
