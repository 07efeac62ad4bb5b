"""When saving fails: the weights, and what else can be written, into another directory."""

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

from torch import Tensor

from coati.models import ilql_heads
from coati.models.lora.adapter_files import CONFIG, adapter_state, save_settings
from coati.models.lora.adapter_files import WEIGHTS as ADAPTER
from coati.parallel.atomic_dirs import SaveFailed, attempt
from coati.parallel.engine import Engine
from coati.parallel.save_causes import SaveCause
from coati.parallel.weights import (
    ModelAssets,
    asset_writers,
    gather,
    heads_state,
    is_lora,
    save_shard,
)
from coati.utils.distributed import all_gather_object, barrier, broadcast_object, is_rank_0, rank
from coati.utils.json_io import save_json
from coati.utils.logging import get_logger
from coati.utils.transformers_compat import disk_names

logger = get_logger(__name__)

SUFFIX = ".rescued"


def rescue(
    failure: SaveFailed, final: Path, models: dict[str, tuple[Engine, ModelAssets]]
) -> SaveFailed:
    """``failure`` of writing ``final``, with where the weights are now; ``models``: by their place
    in ``final``. Beside ``final`` if possible, else in the directory for temporary files. Every
    rank must call it; nothing is raised."""
    told = []
    for name, (engine, assets) in models.items():
        told.append(_rescue_one(final.with_name(f"{final.name}{SUFFIX}") / name, engine, assets))
    return SaveFailed(f"{failure}. {' '.join(told)}")


def _rescue_one(beside: Path, engine: Engine, assets: ModelAssets) -> str:
    tensors, values = ilql_heads.split(gather(engine))
    values = heads_state(engine, values) if values else {}
    name, tensors = _as_file(engine, tensors)
    held = (*tensors.values(), *values.values())
    size = max(all_gather_object(sum(t.numel() * t.element_size() for t in held)))
    causes: list[str] = []
    for place in (beside, None):
        folder = Path(broadcast_object(_make(place, size) if is_rank_0() else None))
        if not folder.is_absolute():
            causes.append(str(folder))
            continue
        write = partial(save_shard, tensors, folder / name)
        failures = all_gather_object(attempt(write, folder, name) if tensors else None)
        if not any(failures):
            return _described(folder, engine, assets, _index(name, tensors), values)
        causes += [one.text for one in failures if one][:1]
        if is_rank_0():
            shutil.rmtree(folder, ignore_errors=True)
        barrier()
    return f"The weights could not be rescued either ({'; '.join(causes)})"


def _as_file(engine: Engine, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """This rank's file, as peft or transformers names it and what is in it; a pipeline's stages
    have one each."""
    alone = sum(all_gather_object(bool(tensors))) == 1
    whole = (ADAPTER if is_lora(engine) else "model.safetensors") if alone else ""
    name = whole or f"model-rank-{rank():05d}.safetensors"  # named in an index, see _index
    try:
        if is_lora(engine):
            tensors = adapter_state(engine.module, tensors) if tensors else {}
        elif hasattr(engine.module, "base_model_prefix"):
            tensors = disk_names(engine.module, tensors)
    except Exception:  # names matter less than tensors here: those of memory serve too
        logger.exception("the rescued tensors have the names of state_dict, not those of files")
    return name, {key: tensor.contiguous() for key, tensor in tensors.items()}


def _make(place: Path | None, size: int) -> str:
    """A new folder that has room for ``size`` bytes, as an absolute path, or why there is none."""
    made: list[Path] = []

    def make() -> None:
        if place is None:
            made.append(Path(tempfile.mkdtemp(prefix="coati-rescued-")))
        else:
            made.append(_unused(place.absolute()))
            made[0].mkdir(parents=True)

    failed = attempt(make, place or Path(tempfile.gettempdir()))
    if failed:
        return failed.text
    free = shutil.disk_usage(made[0]).free
    if free < size:
        shutil.rmtree(made[0], ignore_errors=True)
        return f"{made[0].parent} has {free / 2**30:.2f} of {size / 2**30:.2f} GiB"
    return str(made[0])


def _unused(place: Path) -> Path:
    """``place``, or the first of ``place-2``, ``place-3``, ... that is not there: what an earlier
    failure left is somebody's work."""
    numbered = (place.with_name(f"{place.name}-{number}") for number in count(2))
    return next(each for each in chain([place], numbered) if not each.exists())


def _index(name: str, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    """What transformers needs to read the files of several ranks as one model; None of one file.
    Every rank must call it."""
    sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()}
    held = [(file, each) for file, each in all_gather_object((name, sizes)) if each]
    if len(held) < 2:
        return None
    return {
        "metadata": {"total_size": sum(sum(each.values()) for _, each in held)},
        "weight_map": {key: file for file, each in held for key in each},
    }


def _described(
    folder: Path,
    engine: Engine,
    assets: ModelAssets,
    index: dict[str, Any] | None,
    values: dict[str, Tensor],
) -> str:
    """After the weights: the rest, file by file; where all is and what is not there."""
    lost: list[SaveCause] = []
    if is_rank_0():
        rest = rest_of(engine, assets)
        if values:
            rest = {ilql_heads.FILE: partial(save_shard, values), **rest}
        if index is not None:
            rest = {"model.safetensors.index.json": partial(save_json, index), **rest}
        for name, write in rest.items():
            if failed := attempt(partial(write, folder / name), folder, name):
                lost.append(failed)
    names = broadcast_object([one.text for one in lost] if is_rank_0() else None)
    without = f"; without what cannot be written there either: {'; '.join(names)}" if names else ""
    kind = "adapter is" if is_lora(engine) else "weights are"
    return f"The trained {kind} in {folder}{without}"


def rest_of(engine: Engine, assets: ModelAssets) -> dict[str, Callable[[Path], object]]:
    """How each file beside the weights is written: of an adapter its settings and tokenizer, of a
    model its configuration too."""
    adapter = is_lora(engine)
    writers = asset_writers(assets, None if adapter else assets.config)
    if adapter:
        writers[CONFIG] = lambda path: save_settings(engine.module, path.parent)
    return writers
