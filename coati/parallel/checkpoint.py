"""The one checkpoint layout, and exact resume from it.

``<save_dir>/epoch-E_step-S/``: ``modeling/`` (a Hugging Face directory),
``optimizer/rank-XXXXX.pt`` (each rank's own optimizer states, fp32 master weights and random
states: ColossalAI saves neither of the latter two), ``lr_scheduler``,
``running_states.json``. A directory of this name is whole: it was renamed into place last. A run
that trains several models has the first three in a folder for each, ``actor/`` and ``critic/``, and
``buffer/rank-XXXXX.pt`` when it was stopped between two updates of an episode.
"""

import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from coati.parallel.atomic_dirs import file_sizes, make_folder, write_directory, write_file
from coati.parallel.engine import Engine
from coati.parallel.optimizer_state import load_rank_state, rank_state
from coati.parallel.weights import ModelAssets, save_model
from coati.utils.distributed import all_gather_object, barrier, is_rank_0, rank, world_size
from coati.utils.json_io import load_json, save_json
from coati.utils.logging import get_logger

logger = get_logger(__name__)

NAME = re.compile(r"epoch-(\d+)_step-(\d+)")
HELD = "buffer"
Models = dict[
    str, tuple[Engine, ModelAssets]
]  # by name: an engine and what is saved beside its weights


@dataclass
class RunningState:
    """Where a run stands: ``step`` optimizer steps done in all, ``sample_start_index`` rows done of
    epoch ``epoch``."""

    epoch: int = 0
    step: int = 0
    sample_start_index: int = 0
    layout: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)


def layout_of(engine: Engine) -> dict[str, Any]:
    """What an optimizer state is bound to: another layout cannot take it."""
    options = engine.options
    names = (
        "plugin",
        "precision",
        "tp",
        "pp",
        "sp",
        "sp_mode",
        "zero_stage",
        "zero_cpu_offload",
        "plugin_args",
        "lora",
    )
    optimizer = type(engine.optimizer.optim).__name__
    return {"world_size": world_size(), "optimizer": optimizer} | {
        name: getattr(options, name) for name in names
    }


def save_checkpoint(
    save_dir: str | Path, engine: Engine, assets: ModelAssets, state: RunningState
) -> Path:
    """Write ``epoch-E_step-S`` below ``save_dir`` and return it. Every rank must call it.

    Raises:
        SaveFailed: on every rank, when one could not write; no directory of that name is left then.
    """
    return _save(save_dir, {".": (engine, assets)}, state, None)


def save_models(
    save_dir: str | Path, models: Models, state: RunningState, held: dict[str, Any] | None = None
) -> Path:
    """The same for a run that trains several models: each in a folder of its name,
    ``epoch-E_step-S/actor`` and so on.

    ``held``: tensors of this rank, as nested dictionaries, that a run stopped between two steps
    goes on with.
    """
    return _save(save_dir, models, state, held)


def _save(
    save_dir: str | Path, models: Models, state: RunningState, held: dict[str, Any] | None
) -> Path:
    final = Path(save_dir) / f"epoch-{state.epoch}_step-{state.step}"
    state.layout = layout_of(next(iter(models.values()))[0])

    def write(folder: Path) -> None:
        for name, (engine, assets) in models.items():
            _write_engine(folder / name, engine, assets)
        if held is not None:
            make_folder(folder / HELD)
            write_file(folder / HELD / f"rank-{rank():05d}.pt", lambda path: torch.save(held, path))
        barrier()  # the list of files is complete
        if is_rank_0():
            state.files = file_sizes(folder)
            write_file(folder / "running_states.json", lambda path: save_json(asdict(state), path))

    write_directory(final, write)
    return final


def _write_engine(folder: Path, engine: Engine, assets: ModelAssets) -> None:
    save_model(engine, folder / "modeling", assets)
    make_folder(folder / "optimizer")
    mine = rank_state(engine)
    write_file(folder / "optimizer" / f"rank-{rank():05d}.pt", lambda path: torch.save(mine, path))
    if is_rank_0():
        write_file(
            folder / "lr_scheduler", lambda path: torch.save(engine.lr_scheduler.state_dict(), path)
        )


def buffer_states_by_rank(
    folder: str | Path, state: RunningState, **layout: Any
) -> dict[str, Any] | None:
    """What this rank gave :func:`save_models` to hold; None where nothing was held, or by other
    ranks than there are now, which is said. ``layout``: what else decides which rank holds what, as
    :func:`layout_of` names it."""
    file = Path(folder) / HELD / f"rank-{rank():05d}.pt"
    if not file.parent.is_dir():
        return None
    layout["world_size"] = world_size()
    changed = [
        f"{name} {state.layout.get(name)} -> {now}"
        for name, now in layout.items()
        if state.layout.get(name) != now
    ]
    if changed:
        logger.info(
            f"{folder} was stopped inside an episode of other processes ({', '.join(changed)}): it "
            "starts anew."
        )
        return None
    return torch.load(file, weights_only=True)


def read_checkpoint(folder: str | Path) -> RunningState:
    """The running state of a whole checkpoint.

    Raises:
        ValueError: when a file is missing, shorter or longer than when it was saved, naming it.
    """
    folder = Path(folder)
    if not (folder / "running_states.json").exists():
        raise ValueError(
            f"--checkpoint_path {folder}: no running_states.json; expected an epoch-E_step-S "
            "directory of this library, or its modeling/ directory to take the weights alone"
        )
    stored = load_json(folder / "running_states.json")
    known = {name: stored[name] for name in RunningState.__dataclass_fields__ if name in stored}
    state = RunningState(**known)
    found = file_sizes(folder)
    for name, size in state.files.items():
        if found.get(name) != size:
            raise ValueError(
                f"--checkpoint_path {folder}: {name} has {found.get(name, 0)} of {size} bytes; the "
                "checkpoint was truncated or changed after it was saved. Resume from an earlier one"
            )
    return state


def restore(folder: str | Path, engine: Engine, state: RunningState) -> bool:
    """Put optimizer, master weights, schedule and random states of ``folder`` into ``engine``,
    whose weights were loaded from ``folder/modeling`` before boosting. Every rank must call it.

    Returns True when the run goes on to the bit; False, said with the reason, when the layout
    changed and the optimizer starts anew.
    """
    folder, now = Path(folder), layout_of(engine)
    changed = {k: (state.layout.get(k), v) for k, v in now.items() if state.layout.get(k) != v}
    schedule = folder / "lr_scheduler"
    if schedule.exists():
        engine.lr_scheduler.load_state_dict(torch.load(schedule, weights_only=True))
        for group, lr in zip(
            engine.optimizer.param_groups, engine.lr_scheduler.get_last_lr(), strict=True
        ):
            group["lr"] = lr
    if changed:
        what = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changed.items())
        logger.info(
            f"{folder} was written with another layout ({what}): its weights and position are "
            "taken, the optimizer starts anew. With the same layout the run would go on exactly."
        )
        return False
    mine = folder / "optimizer" / f"rank-{rank():05d}.pt"
    absent = [who for who, there in enumerate(all_gather_object(mine.exists())) if not there]
    if absent:
        raise ValueError(
            f"--checkpoint_path {folder}: rank {absent[0]} does not see its file {mine.name}; the "
            "directory must be on a disk that every host shares"
        )
    load_rank_state(engine, torch.load(mine, weights_only=True, map_location="cpu"))
    return True


def checkpoints(save_dir: str | Path) -> list[Path]:
    """The whole checkpoints below ``save_dir``, oldest first."""
    found = [
        child
        for child in Path(save_dir).glob("epoch-*_step-*")
        if NAME.fullmatch(child.name) and child.is_dir()
    ]
    return sorted(found, key=lambda path: int(NAME.fullmatch(path.name)[2]))


def latest_checkpoint(save_dir: str | Path) -> Path | None:
    """The newest whole checkpoint, found by reading; one whose files do not add up is named and
    passed over."""
    for folder in reversed(checkpoints(save_dir)):
        try:
            read_checkpoint(folder)
        except ValueError as error:
            logger.info(f"passed over: {error}")
            continue
        return folder
    return None


def clean(save_dir: str | Path, keep_last_k: int | None = None) -> None:
    """On rank 0: remove what interrupted saves left, and all but the ``keep_last_k`` newest
    checkpoints."""
    if not is_rank_0():
        return
    for leftover in [
        *Path(save_dir).glob(".epoch-*_step-*.tmp"),
        *Path(save_dir).glob(".epoch-*_step-*.old"),
    ]:
        shutil.rmtree(leftover, ignore_errors=True)
    if keep_last_k:
        for folder in checkpoints(save_dir)[:-keep_last_k]:
            doomed = folder.with_name(f".{folder.name}.old")
            folder.rename(
                doomed
            )  # at once, so that a kill in between leaves no half a checkpoint of that name
            shutil.rmtree(doomed, ignore_errors=True)
