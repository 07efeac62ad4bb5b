"""The checkpoint layout, and bitwise exact resume from it.

``<save_dir>/epoch-E_step-S/``: ``modeling/`` (a Hugging Face directory),
``optimizer/rank-XXXXX.pt`` (each rank's optimizer states, fp32 master weights and random states;
ColossalAI saves neither of the latter two), ``lr_scheduler``, ``running_states.json``. A directory
of this name is complete: it is renamed into place last. A run that trains several models has the
first three in a folder for each, ``actor/`` and ``critic/``, ``buffer/rank-XXXXX.pt`` if it was
stopped between two updates of an episode, and ``rollouts/rank-XXXXX.pt`` if responses had been
asked for ahead.
"""

import re
import shutil
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from coati.models.lora.lora import expert_parameters
from coati.parallel.atomic_dirs import (
    SaveFailed,
    file_sizes,
    make_folder,
    write_directory,
    write_file,
)
from coati.parallel.engine import Engine
from coati.parallel.lr_schedule import set_position
from coati.parallel.optimizer_state import load_rank_state, rank_state
from coati.parallel.save_causes import REHEARSAL
from coati.parallel.save_rescue import rescue
from coati.parallel.weights import ModelAssets, save_model
from coati.utils.distributed import all_gather_object, barrier, is_rank_0, rank, world_size
from coati.utils.json_io import load_object, save_json
from coati.utils.logging import get_logger
from coati.utils.packages import releases
from coati.utils.phases import phase

logger = get_logger(__name__)

NAME = re.compile(r"epoch-(\d+)_step-(\d+)")
BUFFER = "buffer"
ROLLOUTS = "rollouts"
# Name -> an engine, and what is saved beside its weights.
Models = dict[str, tuple[Engine, ModelAssets]]


@dataclass
class RunningState:
    """The position of a run: ``step`` optimizer steps done in total, and ``sample_start_index``
    rows done in epoch ``epoch``. ``packages``: the releases that it was saved with; ``flags`` and
    ``inputs``: the settings of the run, and digests of the files that they name."""

    epoch: int = 0
    step: int = 0
    sample_start_index: int = 0
    layout: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)


def layout_of(engine: Engine) -> dict[str, Any]:
    """The settings that an optimizer state depends on; it cannot be loaded under others."""
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
        SaveFailed: on every rank, if one could not write; no directory of that name is then left,
            and the message says where the weights are.
    """
    return _save(save_dir, {".": (engine, assets)}, state, {})


def save_models(
    save_dir: str | Path,
    models: Models,
    state: RunningState,
    buffer: dict[str, Any] | None = None,
    rollouts: dict[str, Any] | None = None,
) -> Path:
    """:func:`save_checkpoint` for a run that trains several models: each in a folder of its name,
    ``epoch-E_step-S/actor`` and so on.

    ``buffer``: this rank's experience buffer, as nested dictionaries of tensors, of a run that is
    stopped inside an episode. ``rollouts``: this rank's responses that were asked for ahead,
    likewise. A folder is there if any rank's is given.
    """
    return _save(save_dir, models, state, {BUFFER: buffer, ROLLOUTS: rollouts})


def _save(
    save_dir: str | Path,
    models: Models,
    state: RunningState,
    of_rank: dict[str, dict[str, Any] | None],
) -> Path:
    final = Path(save_dir) / f"epoch-{state.epoch}_step-{state.step}"
    state.layout = layout_of(next(iter(models.values()))[0])
    state.packages = releases()

    def write(folder: Path) -> None:
        for name, (engine, assets) in models.items():
            _write_engine(folder / name, engine, assets)
        for name, held in of_rank.items():
            if held is not None:
                make_folder(folder / name)
                file = folder / name / f"rank-{rank():05d}.pt"
                write_file(file, partial(torch.save, held))
        barrier()  # all files are written
        if is_rank_0():
            state.files = file_sizes(folder)
            write_file(folder / "running_states.json", lambda path: save_json(asdict(state), path))

    try:
        write_directory(final, write)
    except SaveFailed as failure:
        raise rescue(failure, final, models) from failure
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
    """The ``buffer`` that this rank passed to :func:`save_models`; None if there is none, or if it
    was saved under another layout, which is logged. ``layout``: the settings besides the number of
    processes that decide which rank holds which rows, named as in :func:`layout_of`."""
    was = "was saved inside an episode under another layout"
    return _state_of_rank(Path(folder) / BUFFER, state, was, "the episode starts over", layout)


def rollouts_by_rank(
    folder: str | Path, state: RunningState, **layout: Any
) -> dict[str, Any] | None:
    """The ``rollouts`` that this rank passed to :func:`save_models`, as
    :func:`buffer_states_by_rank`."""
    was = "holds responses that were asked for ahead under another layout"
    again = "they are asked for again, of the weights of now"
    return _state_of_rank(Path(folder) / ROLLOUTS, state, was, again, layout)


def _state_of_rank(
    place: Path, state: RunningState, was: str, then: str, layout: dict[str, Any]
) -> dict[str, Any] | None:
    if not place.is_dir():
        return None
    layout = layout | {"world_size": world_size()}
    changed = [
        f"{name} {state.layout.get(name)} -> {now}"
        for name, now in layout.items()
        if state.layout.get(name) != now
    ]
    if changed:
        logger.info(f"{place.parent} {was} ({', '.join(changed)}): {then}.")
        return None
    return torch.load(place / f"rank-{rank():05d}.pt", weights_only=True)


def read_checkpoint(folder: str | Path) -> RunningState:
    """The running state of a complete checkpoint.

    Raises:
        ValueError: naming the file that is missing or has another size than when it was saved.
    """
    folder = Path(folder)
    if not (folder / "running_states.json").exists():
        raise ValueError(
            f"--checkpoint_path {folder}: no running_states.json; expected an epoch-E_step-S "
            "directory of this library, or its modeling/ directory to take the weights alone"
        )
    stored = load_object(folder / "running_states.json")
    known = {name: stored[name] for name in RunningState.__dataclass_fields__ if name in stored}
    state = RunningState(**known)
    _check_fields(folder / "running_states.json", stored, state)
    found = file_sizes(folder)
    for name, size in state.files.items():
        if found.get(name) != size:
            raise ValueError(
                f"--checkpoint_path {folder}: {name} has {found.get(name, 0)} of {size} bytes; the "
                "checkpoint was truncated or changed after it was saved. Resume from an earlier one"
            )
    return state


def _check_fields(file: Path, stored: dict[str, Any], state: RunningState) -> None:
    """Raise ValueError for a running state that does not say where the run was."""
    remedy = "the file was changed or damaged; resume from an earlier checkpoint"
    if missing := [name for name in ("epoch", "step") if name not in stored]:
        raise ValueError(f"--checkpoint_path {file}: no {missing[0]}; {remedy}")
    for name in ("epoch", "step", "sample_start_index"):
        value = getattr(state, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(
                f"--checkpoint_path {file}: {name} is {value!r}; expected a whole number, 0 or "
                f"more; {remedy}"
            )
    for name in ("layout", "trainer", "data", "files", "packages", "flags", "inputs"):
        if not isinstance(getattr(state, name), dict):
            raise ValueError(f"--checkpoint_path {file}: {name} is no object; {remedy}")


@phase("restoring the checkpoint")
def restore(folder: str | Path, engine: Engine, state: RunningState) -> bool:
    """Load optimizer, master weights, schedule and random states of ``folder`` into ``engine``,
    whose weights were loaded from ``folder/modeling`` before boosting. Every rank must call it.

    Learning rates, weight decay and Adam's betas stay those that ``engine`` was made with.

    Returns True if the resume is bitwise exact; False, with a logged reason, if the layout differs,
    in which case the optimizer state is not loaded.

    Raises:
        ValueError: if a rank does not see its file.
    """
    folder, now = Path(folder), layout_of(engine)
    changed = {k: (state.layout.get(k), v) for k, v in now.items() if state.layout.get(k) != v}
    changed |= _other_set(state, engine)
    if changed:
        what = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changed.items())
        logger.info(
            f"{folder} was saved under another layout ({what}): its weights and position are used, "
            "and the optimizer state starts over. Under the same layout the resume would be exact."
        )
        _set_schedule(folder, engine)
        return False
    mine = folder / "optimizer" / f"rank-{rank():05d}.pt"
    absent = [who for who, there in enumerate(all_gather_object(mine.exists())) if not there]
    if absent:
        raise ValueError(
            f"--checkpoint_path {folder}: rank {absent[0]} does not see its file {mine.name}; the "
            "directory must be on a disk that every host shares"
        )
    load_rank_state(engine, torch.load(mine, weights_only=True, map_location="cpu"))
    _set_schedule(folder, engine)
    return True


def _set_schedule(folder: Path, engine: Engine) -> None:
    """Put the schedule of ``engine``, which this run's settings made, where the one of ``folder``
    stood. Only the number of steps is read: rates are those of this run."""
    file = folder / "lr_scheduler"
    if engine.lr_scheduler is not None and file.exists():
        steps = torch.load(file, weights_only=True)["last_epoch"]
        set_position(engine.lr_scheduler, engine.optimizer, steps)


def _other_set(state: RunningState, engine: Engine) -> dict[str, tuple[str, str]]:
    """What makes the optimizer state of a checkpoint of other releases another one: transformers 4
    and 5 hold experts, and split layers over processes, each in their own way. Where nothing does,
    the releases are logged once."""
    now = releases()
    # Checkpoints that do not say are of the time before transformers 5.
    then = state.packages or {"transformers": "4.51.3"}
    others = {name: (old, now.get(name, "none")) for name, old in then.items()}
    others = {name: pair for name, pair in others.items() if pair[0] != pair[1]}
    majors = {release.split(".")[0] for release in others.get("transformers", ())}
    split = engine.options.model_parallel_size > 1
    if len(majors) > 1 and (split or expert_parameters(engine.module)):
        return {"transformers": others["transformers"]}
    if others:
        what = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in others.items())
        logger.warning_once(
            f"the checkpoint was saved with other releases ({what}); going on with it is exact up "
            "to the rounding of their arithmetic"
        )
    return {}


def checkpoints(save_dir: str | Path) -> list[Path]:
    """The checkpoints in ``save_dir``, oldest first."""
    found = [
        child
        for child in Path(save_dir).glob("epoch-*_step-*")
        if NAME.fullmatch(child.name) and child.is_dir()
    ]
    return sorted(found, key=lambda path: int(NAME.fullmatch(path.name)[2]))


def latest_checkpoint(save_dir: str | Path) -> Path | None:
    """The newest complete checkpoint in ``save_dir``, or None. Incomplete ones are logged and
    skipped."""
    for folder in reversed(checkpoints(save_dir)):
        try:
            read_checkpoint(folder)
        except ValueError as error:
            logger.warning(f"skipped: {error}")
            continue
        return folder
    return None


def clean(save_dir: str | Path, keep_last_k: int | None = None) -> None:
    """On rank 0: remove the leftovers of interrupted saves, and all but the ``keep_last_k`` newest
    checkpoints. A best or final model whose replacement was interrupted is put back."""
    if not is_rank_0():
        return
    for old in [*Path(save_dir).glob(".best.old"), *Path(save_dir).rglob(".modeling.old")]:
        if not (whole := old.with_name(old.name[1:].removesuffix(".old"))).exists():
            old.rename(whole)
    for leftover in [
        *Path(save_dir).glob(".epoch-*_step-*.tmp"),
        *Path(save_dir).glob(".epoch-*_step-*.old"),
        *(Path(save_dir) / place for place in (".best.tmp", ".best.old")),
        *Path(save_dir).rglob(".modeling.tmp"),
        *Path(save_dir).rglob(".modeling.old"),
        *Path(save_dir).glob(f"{REHEARSAL}*"),
    ]:
        shutil.rmtree(leftover, ignore_errors=True)
    if keep_last_k:
        for folder in checkpoints(save_dir)[:-keep_last_k]:
            doomed = folder.with_name(f".{folder.name}.old")
            # Renaming is atomic: a kill during the removal leaves no partial checkpoint.
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
