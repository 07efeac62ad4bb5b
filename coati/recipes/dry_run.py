"""``--dry_run``: two real steps, a checkpoint saved and loaded again, nothing kept."""

import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coati.cli.online_settings import OnlineSettings
from coati.cli.settings import SLSettings
from coati.dataset.stream.stream_loader import StreamLoader
from coati.models.critic import Critic
from coati.models.loading import load_causal_lm
from coati.parallel.checkpoint import (
    RunningState,
    read_checkpoint,
    save_checkpoint,
    save_models,
)
from coati.parallel.save_causes import existing_folder
from coati.recipes.memory_plan import measured_memory, memory_lines
from coati.recipes.run import Run
from coati.trainer import OLTrainer, SLTrainer
from coati.utils.distributed import barrier, broadcast_object, is_rank_0
from coati.utils.logging import get_logger
from coati.utils.memory import describe_memory, in_units, peak_memory_of_ranks

logger = get_logger(__name__)

LOADERS = {"actor": load_causal_lm, "critic": Critic.from_pretrained}
SHOWN = (
    "reward",
    "reward_std",
    "approx_kl",
    "response_length",
    "stop_rate",
    "policy_loss",
    "value_loss",
    "ptx_loss",
)


def dry_run(
    run: Run[SLSettings], trainer: SLTrainer, loader: Any, load: Callable[..., Any] | None = None
) -> None:
    """Two optimizer steps, so that the second has the optimizer states of the first; saved beside
    ``--save_dir`` under a temporary name and loaded again by ``load`` (by default as a language
    model). Prints what the run would be."""
    logger.info(_describe(run, trainer, loader))
    first = trainer.training_batches(list(next(iter(loader.global_batches(0)))))
    step, _ = (trainer.engine.train_step(first, trainer.objective) for _ in range(2))
    peaks = peak_memory_of_ranks()
    with place_beside(run.settings.output.save_dir) as place:
        folder = save_checkpoint(place, trainer.engine, trainer.assets, RunningState(step=2))
        size = sum(read_checkpoint(folder).files.values())
        if is_rank_0():
            (load or load_causal_lm)(folder / "modeling")
    logger.info(
        f"{measured_memory(run, peaks)}\n"
        f"dry run: two steps taken (loss {step.loss:.4f} at first, {describe_memory(peaks)}), a "
        f"checkpoint of {in_units(size)} saved and loaded again. Nothing was kept."
    )


def rl_dry_run(run: Run[OnlineSettings], trainer: OLTrainer, prompts: Any, ptx: Any = None) -> None:
    """One collect phase and two optimizer steps, saved beside ``--save_dir`` under a temporary name
    and loaded again; prints what the run would be. Every rank must call it."""
    logger.info(_describe_rl(run, trainer, prompts, ptx))
    metrics = trainer.rehearse(prompts, ptx)
    peaks = peak_memory_of_ranks()
    with place_beside(run.settings.output.save_dir) as place:
        models = {
            name: (engine, trainer.model_assets[name]) for name, engine in trainer.models.items()
        }
        folder = save_models(place, models, RunningState(step=2), trainer.buffer.state_dict())
        size = sum(read_checkpoint(folder).files.values())
        if is_rank_0():
            for name in models:
                LOADERS[name](str(Path(folder) / name / "modeling"))
    shown = ", ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics)
    seconds = sum(metrics[f"seconds_{phase}"] for phase in ("rollout", "scoring", "update"))
    hours = seconds * run.settings.rollout.num_episodes / 3600
    logger.info(
        f"{measured_memory(run, peaks)}\n"
        f"dry run: one episode's responses and two updates ({shown}; "
        f"{describe_memory(peaks)}), a checkpoint of {in_units(size)} saved and "
        "loaded again. Nothing was kept.\n"
        f"an episode would take about {seconds:.3g} s, the run {hours:.2g} h"
    )


@contextmanager
def place_beside(save_dir: str) -> Iterator[str]:
    """A directory that every rank sees, on the disk that must have room, removed afterward: not in
    /tmp."""
    near = existing_folder(Path(save_dir))
    place = broadcast_object(
        tempfile.mkdtemp(prefix=".coati-dry-run-", dir=near) if is_rank_0() else None
    )
    try:
        yield place
        barrier()
    finally:
        if is_rank_0():
            shutil.rmtree(place)


def _describe(run: Run[SLSettings], trainer: SLTrainer, loader: Any) -> str:
    """Rows, steps, tokens, memory and flags of the run to come."""
    longest = run.settings.data.max_length
    if isinstance(loader, StreamLoader):
        rows = [
            f"rows of a stream, as many as {run.settings.schedule.max_steps} steps take (up to "
            f"{longest} tokens each), {loader.rows_per_step} {_entries(run)} a step"
        ]
    else:
        longest = int(loader.lengths.max())
        rows = _describe_rows(run, loader)
    return _lines(*rows, *memory_lines(run, {"actor": trainer.engine}, longest), *given(run.flags))


def _describe_rows(run: Run[SLSettings], loader: Any) -> list[str]:
    epochs = run.settings.batches.max_epochs
    max_steps = run.settings.schedule.max_steps
    steps = sum(loader.count(epoch) // loader.rows_per_step for epoch in range(epochs))
    steps = min(steps, max_steps or steps)
    return [
        f"rows {len(loader.lengths)}, tokens {int(loader.lengths.sum())} (longest row "
        f"{int(loader.lengths.max())}), {loader.rows_per_step} {_entries(run)} a step",
        f"steps {steps} ({len(loader)} an epoch, {epochs} epochs)",
    ]


def _entries(run: Run[SLSettings]) -> str:
    return "packs" if run.settings.data.packing else "rows"


def _describe_rl(run: Run[OnlineSettings], trainer: OLTrainer, prompts: Any, ptx: Any) -> str:
    """Prompts, episodes, steps, memory and flags of the run to come."""
    episodes = trainer.episodes
    settings = trainer.maker.settings
    number = run.settings.rollout.num_episodes
    times = prompts.rows_per_step * number / len(prompts.lengths)
    responses = prompts.rows_per_step * settings.num_generations // episodes.steps_per_pass
    sft = ptx and f"SFT rows {len(ptx.lengths)}, {ptx.rows_per_step} a step"
    return _lines(
        f"prompts {len(prompts.lengths)}, tokens {int(prompts.lengths.sum())} (longest "
        f"{int(prompts.lengths.max())})",
        f"episodes {number}, each of {prompts.rows_per_step} prompts x {settings.num_generations} "
        f"responses of up to {settings.max_new_tokens} tokens; every prompt {times:.2g} times",
        f"optimizer steps {episodes.total_steps} ({episodes.num_update_steps} passes x "
        f"{episodes.steps_per_pass} global batches an episode), each of {responses} responses",
        *([sft] if sft else []),
        *memory_lines(run, trainer.models, int(prompts.lengths.max())),
        *given(run.flags),
    )


def _lines(*lines: str) -> str:
    return "\n".join(["dry run: what the run would be", *lines])


def given(flags: Mapping[str, Any]) -> list[str]:
    """The resolved flags, a line each."""
    return [
        f"  --{name} {_word(value)}"
        for name, value in sorted(flags.items())
        if value not in (None, False, [])
    ]


def _word(value: Any) -> str:
    return shlex.join(map(str, value)) if isinstance(value, list) else str(value)
