"""The end of a run: the final model and the last lines."""

import os
import shlex
import sys
from functools import partial
from pathlib import Path

from coati.cli.aliases import SAME
from coati.parallel.atomic_dirs import write_directory
from coati.parallel.engine import Engine
from coati.parallel.weights import ModelAssets, save_model
from coati.recipes.command import PROGRAM, is_command
from coati.recipes.launcher import ERROR_FILE
from coati.recipes.run import Run
from coati.trainer import OLTrainer, SLTrainer
from coati.trainer.run_report.run_record import PAGE
from coati.utils.distributed import world_size
from coati.utils.logging import get_logger
from coati.utils.phases import phase

logger = get_logger(__name__)

CHAT = "talk to it: coati chat {}"
SCORE = "score responses with it: coati score {} --input FILE"
BOUNDS = ("_low", "_high", "/count")  # metrics that say how sure another one is


def save_final(run: Run, trainer: SLTrainer, use: str = CHAT) -> None:
    """Write ``<save_dir>/modeling`` and say where it is and what to ``use`` it for; or how to go on
    after a graceful shutdown."""
    _save(run, trainer, {"modeling": (trainer.engine, trainer.assets)}, use)


def save_models_of(run: Run, trainer: OLTrainer) -> None:
    """:func:`save_final` of a run that trains several models: ``<save_dir>/actor/modeling``, and
    the critic's."""
    models = {
        f"{name}/modeling": (engine, trainer.model_assets[name])
        for name, engine in trainer.models.items()
    }
    _save(run, trainer, models, CHAT)


@phase("saving the model")
def _save(
    run: Run,
    trainer: SLTrainer | OLTrainer,
    models: dict[str, tuple[Engine, ModelAssets]],
    use: str,
) -> None:
    """``models``: by their place in ``--save_dir``, the policy first."""
    if trainer.stopped_early:
        logger.info(
            f"stopped after step {trainer.state.step}, everything is saved. To go on: "
            f"{run.extras.again or command_again()}"
        )
        return
    folder = Path(run.settings.output.save_dir)
    merge = run.settings.lora.merge_lora_weights
    for place, (engine, assets) in models.items():
        write = partial(save_model, engine, assets=assets, merge_lora=merge)
        write_directory(folder / place, write)
    _log_evaluations(run, trainer)
    final = folder / next(iter(models))
    report = folder / PAGE
    seen = f"; its report: {report}" if report.exists() else ""
    logger.info(f"the trained {_kind(run)} is in {final}; {use.format(final)}{seen}")


def _kind(run: Run) -> str:
    return "LoRA adapter" if run.settings.lora.saves_adapter else "model"


def _log_evaluations(run: Run, trainer: SLTrainer | OLTrainer) -> None:
    """The metrics of the first and the last evaluation, and of the best model."""
    for name, value in trainer.last_evaluation.items():
        if name.endswith(BOUNDS):
            continue
        logger.info(
            f"{name} {trainer.first_evaluation[name]:.4f} at the first evaluation, {value:.4f} at "
            "the last"
        )
    schedule = run.settings.schedule
    best = trainer.best
    if schedule.metric_for_best is not None and best:
        logger.info(
            f"the best {schedule.metric_for_best} was {best['value']:.4f} at step {best['step']}: "
            f"{schedule.save_dir}/best"
        )


def command_again() -> str:
    """This command line with ``--checkpoint_path auto``."""
    words = []
    dropping = False
    for word in sys.argv[1:]:
        if word.startswith("--"):
            # The flag and the value after it, whatever library's name it has.
            name = word.partition("=")[0].lstrip("-").replace("-", "_")
            dropping = SAME.get(name, name).startswith("checkpoint_")
        if not dropping:
            words.append(word)
    return f"{_program()} {shlex.join(words)} --checkpoint_path auto"


def _program() -> str:
    """How this program is started: the command, or a script with its launcher."""
    script = shlex.quote(sys.argv[0])
    if ERROR_FILE in os.environ or world_size() == 1:  # it starts its processes itself
        return PROGRAM if is_command() else f"python {script}"
    if is_command():
        return f"torchrun --nproc_per_node {world_size()} -m {PROGRAM}"
    return f"colossalai run --nproc_per_node {world_size()} {script}"
