"""Where a run starts: from --pretrain, from the weights of a model, or bitwise exactly from a
checkpoint."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from coati.cli.settings import OutputSettings, TrainingSettings
from coati.dataset.data_types import TOKEN_COLUMNS
from coati.dataset.load.loader import row_lengths
from coati.parallel.checkpoint import (
    RunningState,
    checkpoints,
    clean,
    latest_checkpoint,
    read_checkpoint,
)
from coati.recipes import elastic
from coati.recipes.resume_changes import apply_changes, as_json, digests
from coati.recipes.run_dir import finished_models
from coati.utils.distributed import broadcast_object, is_rank_0
from coati.utils.environment import save_environment
from coati.utils.json_io import load_json, save_json
from coati.utils.logging import get_logger
from coati.utils.run_identity import record_of

logger = get_logger(__name__)

# What also decides the order of an epoch, in checkpoints that do not say it.
WHERE_UNSAID: dict[str, Any] = {"packed_to": None, "dataset_weights": []}
# The flags that decide it; each verb has its own.
POSITION = ("dataset", "prompt_dataset", "seed", "dataset_weights", "packing", "max_length")
# What decides the order of an epoch -> its name in messages.
IN_WORDS = {
    "rows": "rows",
    "seed": "--seed",
    "packed_to": "length of a pack",
    "dataset_weights": "--dataset_weights",
}


@dataclass
class Resume:
    """Where a run starts from: ``weights`` is a model directory, ``folder`` the whole checkpoint or
    None. ``goes_on``: the run is the one that lies in --save_dir; ``began``: what a new one begins
    with, by kind. ``flags`` and ``inputs``: of this run, as its checkpoints hold them."""

    weights: str | None = None
    folder: Path | None = None
    state: RunningState | None = None
    goes_on: bool = False
    began: dict[str, str] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)


def find_resume(output: OutputSettings) -> Resume:
    """What ``--checkpoint_path`` stands for; refuses to write a new run over, or among, an old
    one."""
    path = output.checkpoint_path
    if Path(output.save_dir).exists() and not output.dry_run:
        clean(output.save_dir)  # what an interrupted save left
    if elastic.is_restart(output.save_dir) and (newest := _after_restart(output.save_dir)):
        return Resume(weights_of(newest), newest, read_checkpoint(newest), goes_on=True)
    if path is None:
        _refuse_other_run(
            output, "; go on with --checkpoint_path auto, or choose another directory"
        )
        return Resume()
    if path == "auto":
        return _newest(output)
    folder = Path(path)
    if not (folder / "running_states.json").exists() and any(folder.glob("*config.json")):
        why = f"--checkpoint_path {folder} is a model directory"
        return _from_weights(output, folder, why)
    state = read_checkpoint(folder)
    if output.checkpoint_weights_only or not state.layout:
        why = "--checkpoint_weights_only" if state.layout else "a checkpoint of another system"
        return _from_weights(output, Path(weights_of(folder)), f"{folder}: {why}")
    if _same(folder.parent, output.save_dir):
        _refuse_later(output, folder)
        return Resume(weights_of(folder), folder, state, goes_on=True)
    return _begun_from(output, "checkpoint", folder) or _from_elsewhere(output, folder, state)


def _newest(output: OutputSettings) -> Resume:
    """What ``auto`` finds in ``--save_dir``: the newest checkpoint, or what its run began from."""
    # Rank 0 looks: a rank that found another one, or none, would train on something else.
    path = broadcast_object(latest_checkpoint(output.save_dir) if is_rank_0() else None)
    if path is not None:
        logger.info(f"--checkpoint_path auto: going on from {path}")
        return Resume(weights_of(path), path, read_checkpoint(path), goes_on=True)
    _refuse_finished(output)
    record = broadcast_object(record_of(output.save_dir) if is_rank_0() else None)
    none = f"--checkpoint_path auto: no checkpoint in {output.save_dir}, starting"
    if record.get("checkpoint"):
        logger.info(f"{none} from {record['checkpoint']}, as its run did")
        folder = Path(record["checkpoint"])
        return Resume(weights_of(folder), folder, read_checkpoint(folder), goes_on=True)
    if record.get("weights"):
        none += f" from the weights of {record['weights']}, as its run did"
    logger.info(none)
    return Resume(weights=record.get("weights"), goes_on=True)


def _from_weights(output: OutputSettings, weights: Path, why: str) -> Resume:
    """A new run from ``weights``; or the one in ``--save_dir``, if it began from the same."""
    if found := _begun_from(output, "weights", weights):
        return found
    remedy = "go on with that run by --checkpoint_path auto alone, or choose another --save_dir"
    mixed = f" of another run; a new one from weights alone ({why}) would mix with it: {remedy}"
    _refuse_other_run(output, mixed)
    logger.info(f"{why}: its weights are taken, optimizer, schedule and sample order start anew.")
    return Resume(weights=str(weights), began={"weights": str(weights.resolve())})


def _from_elsewhere(output: OutputSettings, folder: Path, state: RunningState) -> Resume:
    """A run in a directory of its own that goes on from another one's checkpoint."""
    mixed = f" of another run than --checkpoint_path {folder}; choose another --save_dir"
    _refuse_other_run(output, mixed)
    began = {"checkpoint": str(folder.resolve())}
    return Resume(weights_of(folder), folder, state, began=began)


def _begun_from(output: OutputSettings, kind: str, path: Path) -> Resume | None:
    """The run in ``--save_dir``, if it began from ``path``: the command that began it goes on with
    its newest checkpoint, or begins it again where there is none."""
    record = broadcast_object(record_of(output.save_dir) if is_rank_0() else None)
    if output.dry_run or kind not in record or not _same(record[kind], path):
        return None
    held = broadcast_object(latest_checkpoint(output.save_dir) if is_rank_0() else None)
    if held is not None:
        logger.info(f"the run in {output.save_dir} began from {path}: going on from {held}")
        return Resume(weights_of(held), held, read_checkpoint(held), goes_on=True)
    _refuse_finished(output)
    logger.info(f"the run in {output.save_dir} began from {path} and has no checkpoint: again")
    if kind == "weights":
        return Resume(weights=str(path), goes_on=True)
    return Resume(weights_of(path), path, read_checkpoint(path), goes_on=True)


def _same(one: str | Path, other: str | Path) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def _refuse_other_run(output: OutputSettings, what: str) -> None:
    """A run never begins in a directory that holds another one's checkpoints, or its best model.
    ``what``: of the checkpoint, and what to do."""
    held = [path.name for path in checkpoints(output.save_dir)]
    held = held or ["best"] * (Path(output.save_dir) / "best").is_dir()
    if held and not output.dry_run:
        raise ValueError(f"--save_dir {output.save_dir} already holds {held[-1]}{what}")
    _refuse_finished(output)


def _refuse_later(output: OutputSettings, folder: Path) -> None:
    """Going back in a run's own directory would leave later checkpoints of another future there."""
    later = broadcast_object(_later(folder) if is_rank_0() else None)
    if later and not output.dry_run:
        raise ValueError(
            f"--checkpoint_path {folder}: --save_dir {output.save_dir} also holds {later[-1]}, "
            "which is later; choose another --save_dir to go on from the earlier one, or remove "
            f"what is later ({', '.join(later)})"
        )


def _later(folder: Path) -> list[str]:
    """The names of the whole checkpoints beside ``folder`` that are later; those that ``auto``
    skips do not matter."""
    ordered = checkpoints(folder.parent)
    names = [path.name for path in ordered]
    after = ordered[names.index(folder.name) + 1 :] if folder.name in names else []
    return [path.name for path in after if _is_whole(path)]


def _is_whole(folder: Path) -> bool:
    try:
        read_checkpoint(folder)
    except ValueError:
        return False
    return True


def compare_with_checkpoint(resume: Resume, flags: Mapping[str, Any]) -> None:
    """Apply or refuse what differs from the checkpoint (:mod:`coati.cli.resume_flags`), and keep
    the run's flags for its own checkpoints. Every rank must call it."""
    resume.flags = as_json(flags)
    resume.inputs = digests(flags)
    if resume.folder is not None and resume.state is not None:
        apply_changes(resume.folder, resume.state, flags, resume.inputs)


def _after_restart(save_dir: str) -> Path | None:
    """The newest checkpoint of a run that its launcher has started again, whatever flags it was
    started with; before the first one, the run starts as it did."""
    newest = broadcast_object(latest_checkpoint(save_dir) if is_rank_0() else None)
    what = f"it goes on from {newest}" if newest else "it had no checkpoint yet and starts anew"
    logger.info(f"torchrun has started this run again: {what}")
    return newest


def weights_of(folder: Path, model: str = "actor") -> str:
    """The model directory of a checkpoint; of several models that were trained together, the one of
    that name."""
    return str(folder / model / "modeling" if (folder / model).is_dir() else folder / "modeling")


def _refuse_finished(output: OutputSettings) -> None:
    """A finished model without a checkpoint is nothing to go on from, and a new run would end by
    replacing it."""
    finished = finished_models(output.save_dir)
    if finished and not output.dry_run:
        name = finished[0].relative_to(output.save_dir)
        raise ValueError(
            f"--save_dir {output.save_dir} holds a finished model ({name}) and no checkpoint to "
            "go on from; starting anew would replace it. Choose another --save_dir, "
            f"train further from it with --pretrain {finished[0]}, or remove that directory"
        )


def record_arguments(
    output: OutputSettings, flags: Mapping[str, Any], given: Sequence[str] = ()
) -> None:
    """Write the resolved flags and the environment beside the output, and the flags to
    ``--config_file``; once it is sure that the run may write. Every rank must call it.

    ``given``: the names of the flags that were not left at their default.
    """
    if not output.dry_run:
        save_environment(output.save_dir, flags_given=list(given))
        elastic.record_agents(output.save_dir)
    if not is_rank_0():
        return
    if output.config_file is not None:
        save_json(dict(flags), output.config_file)
    if not output.dry_run:
        save_json(dict(flags), Path(output.save_dir) / "arguments.json")


def check_same_model(config: Any, settings: TrainingSettings) -> None:
    """A checkpoint resumes the model that --pretrain names, not another."""
    pretrain = settings.model.pretrain
    named = Path(pretrain) / "config.json"
    if not named.is_file():
        return
    wanted = load_json(named)
    for key in (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "vocab_size",
        "num_attention_heads",
    ):
        mine = getattr(config, key, None)
        if key == "vocab_size" and settings.model.add_tokens and mine and mine > wanted.get(key, 0):
            continue  # the tokens that the run added
        if key in wanted and mine is not None and wanted[key] != mine:
            raise ValueError(
                f"--checkpoint_path {settings.output.checkpoint_path} is of another model than "
                f"--pretrain {pretrain}: {key} is {mine} there and {wanted[key]} here; name the "
                "checkpoint of this model"
            )


def running_state(resume: Resume, settings: TrainingSettings, rows: Any) -> RunningState:
    """The state a trainer starts from. Raises ValueError when the data or the seed are not those of
    the checkpoint."""
    now: dict[str, Any] = {
        "rows": len(rows),
        "seed": settings.seed,
        "fingerprint": data_fingerprint(rows),
    }
    now |= {
        "packed_to": settings.data.pack_length,
        "dataset_weights": settings.data.dataset_weights,
    }
    if resume.state is None:
        return RunningState(data=now, flags=resume.flags, inputs=resume.inputs)
    stored = WHERE_UNSAID | resume.state.data
    changed = [key for key, value in now.items() if stored.get(key, value) != value]
    if changed:
        same = ", ".join(f"--{name}" for name in POSITION if name in settings.flags)
        raise ValueError(
            f"--checkpoint_path {resume.folder}: its position is one in other rows "
            f"({_what_changed(stored, now, changed)}); give the same {same}, or start anew from "
            "its weights: --checkpoint_weights_only with another --save_dir"
        )
    resume.state.data = now
    resume.state.flags = resume.flags
    resume.state.inputs = resume.inputs
    return resume.state


def _what_changed(stored: dict[str, Any], now: dict[str, Any], changed: list[str]) -> str:
    if changed == ["fingerprint"]:
        return f"{now['rows']} too, of other lengths or tokens"
    return ", ".join(
        f"{words} {stored[key]} -> {now[key]}" for key, words in IN_WORDS.items() if key in changed
    )


def data_fingerprint(rows: Any) -> str:
    """Of every row's length and of the first and last rows' tokens."""
    digest = hashlib.sha256(np.ascontiguousarray(row_lengths(rows)).tobytes())
    # Rows without weights keep their fingerprint
    names = (*TOKEN_COLUMNS, "loss_weights", "weight")
    tokens = [name for name in names if name in rows.column_names]
    for index in {0, len(rows) - 1}:
        for name in tokens:
            digest.update(json.dumps(rows[index][name]).encode())
    return digest.hexdigest()[:16]
