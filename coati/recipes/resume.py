"""Where a run starts: from --pretrain, from the weights of a model, or bitwise exactly from a
checkpoint."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from coati.utils.distributed import broadcast_object, is_rank_0
from coati.utils.environment import save_environment
from coati.utils.json_io import load_json, save_json
from coati.utils.logging import get_logger

logger = get_logger(__name__)

# What also decides the order of an epoch, in checkpoints that do not say it.
WHERE_UNSAID: dict[str, Any] = {"packed_to": None, "dataset_weights": []}


@dataclass
class Resume:
    """Where a run starts from: ``weights`` is a model directory, ``folder`` the whole checkpoint or
    None."""

    weights: str | None = None
    folder: Path | None = None
    state: RunningState | None = None


def find_resume(output: OutputSettings) -> Resume:
    """What ``--checkpoint_path`` stands for; refuses to write a new run over an old one."""
    path = output.checkpoint_path
    if Path(output.save_dir).exists():
        clean(output.save_dir)  # what an interrupted save left
    if elastic.is_restart(output.save_dir) and (newest := _after_restart(output.save_dir)):
        state = read_checkpoint(newest)
        return Resume(weights=weights_of(newest), folder=newest, state=state)
    if path == "auto":
        # Rank 0 looks: a rank that found another one, or none, would train on something else.
        path = broadcast_object(latest_checkpoint(output.save_dir) if is_rank_0() else None)
        if path is None:
            _refuse_finished(output)
        found = f"going on from {path}" if path else f"no checkpoint in {output.save_dir}, starting"
        logger.info(f"--checkpoint_path auto: {found}")
    if path is None:
        held = checkpoints(output.save_dir)
        if held and output.checkpoint_path is None and not output.dry_run:
            raise ValueError(
                f"--save_dir {output.save_dir} already holds {held[-1].name}; go on with "
                "--checkpoint_path auto, or choose another directory"
            )
        _refuse_finished(output)
        return Resume()
    folder = Path(path)
    if not (folder / "running_states.json").exists() and any(folder.glob("*config.json")):
        logger.info(
            f"--checkpoint_path {folder} is a model directory: its weights are taken, everything "
            "else starts anew."
        )
        return Resume(weights=str(folder))
    state = read_checkpoint(folder)
    if output.checkpoint_weights_only or not state.layout:
        why = "--checkpoint_weights_only" if state.layout else "a checkpoint of another system"
        logger.info(
            f"{folder}: {why}; its weights are taken, optimizer, schedule and sample order start "
            "anew."
        )
        return Resume(weights=weights_of(folder))
    return Resume(weights=weights_of(folder), folder=folder, state=state)


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
    finished = _finished(output.save_dir)
    if finished and not output.dry_run:
        name = finished[0].relative_to(output.save_dir)
        raise ValueError(
            f"--save_dir {output.save_dir} holds a finished model ({name}) and no checkpoint to "
            "go on from; starting anew would replace it. Choose another --save_dir, "
            f"train further from it with --pretrain {finished[0]}, or remove that directory"
        )


def _finished(save_dir: str) -> list[Path]:
    """The final models in ``save_dir``, the policy's first."""
    return [
        folder
        for name in ("modeling", "actor/modeling")
        if (folder := Path(save_dir) / name).is_dir()
    ]


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
        if key in wanted and mine is not None and wanted[key] != mine:
            raise ValueError(
                f"--checkpoint_path {settings.output.checkpoint_path} is of another model than "
                f"--pretrain {pretrain}: {key} is {mine} there and {wanted[key]} here; name the "
                "checkpoint of this model"
            )


def running_state(resume: Resume, settings: TrainingSettings, rows: Any) -> RunningState:
    """The state a trainer starts from. Raises ValueError when the data or the seed are not those of
    the checkpoint."""
    now = {"rows": len(rows), "seed": settings.seed, "fingerprint": data_fingerprint(rows)}
    now |= {
        "packed_to": settings.data.pack_length,
        "dataset_weights": settings.data.dataset_weights,
    }
    if resume.state is None:
        return RunningState(data=now)
    stored = WHERE_UNSAID | resume.state.data
    changed = [key for key, value in now.items() if stored.get(key, value) != value]
    if changed:
        before = {key: stored[key] for key in changed}
        raise ValueError(
            f"--checkpoint_path {resume.folder}: its sample position belongs to other data "
            f"({before}, now { {key: now[key] for key in changed} }); give the same --dataset, "
            "--seed, --dataset_weights, --packing and --max_length, or --checkpoint_weights_only"
        )
    resume.state.data = now
    return resume.state


def data_fingerprint(rows: Any) -> str:
    """Of every row's length and of the first and last rows' tokens."""
    digest = hashlib.sha256(np.ascontiguousarray(row_lengths(rows)).tobytes())
    tokens = [name for name in TOKEN_COLUMNS if name in rows.column_names]
    for index in {0, len(rows) - 1}:
        for name in tokens:
            digest.update(json.dumps(rows[index][name]).encode())
    return digest.hexdigest()[:16]
