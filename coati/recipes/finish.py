"""The end of a run: the final model and the last lines."""

import os
import shlex
import sys
from functools import partial
from pathlib import Path

from coati.cli.aliases import SAME
from coati.inference.export.hub_upload import check_hub, upload
from coati.parallel.atomic_dirs import SaveFailed, write_directory
from coati.parallel.engine import Engine
from coati.parallel.save_rehearsal import rehearse_saving
from coati.parallel.save_rescue import rescue
from coati.parallel.weights import ModelAssets, save_model
from coati.recipes.command import PROGRAM, is_command
from coati.recipes.launcher import ERROR_FILE
from coati.recipes.run import Run
from coati.recipes.started_by import ancestors, started_again
from coati.trainer import OLTrainer, SLTrainer
from coati.trainer.run_report.run_record import PAGE
from coati.utils.distributed import broadcast_object, is_rank_0
from coati.utils.errors import RunFailed
from coati.utils.logging import get_logger
from coati.utils.phases import phase
from coati.utils.redaction import redacted_words

logger = get_logger(__name__)

CHAT = "talk to it: coati chat {}"
SCORE = "score responses with it: coati score {} --input FILE"
# By which a run is resumed, or begun from a checkpoint; Hugging Face's name too.
RESUME_FLAGS = ("--checkpoint_", "--resume_from_checkpoint")
BOUNDS = ("_low", "_high", "/count")  # metrics that say how sure another one is


def save_final(run: Run, trainer: SLTrainer, use: str = CHAT) -> None:
    """Write ``<save_dir>/modeling`` and say where it is and what to ``use`` it for; or how to go on
    after a graceful shutdown.

    Raises SaveFailed where that fails, with the place that the weights were rescued to."""
    _save(run, trainer, {"modeling": (trainer.engine, trainer.assets)}, use)


def rehearse(run: Run, models: dict[str, tuple[Engine, ModelAssets]]) -> None:
    """Before the first step: see that all but the weights can be saved, and that the hub can be
    reached where the model is to be uploaded.

    Raises SaveFailed, naming the cause, ValueError for the hub."""
    output = run.settings.output
    rehearse_saving(output.save_dir, models, keep=not output.dry_run)
    if output.push_to_hub is not None:
        problem = _hub_problem(output.push_to_hub) if is_rank_0() else None
        if problem := broadcast_object(problem):
            raise ValueError(problem)


def _hub_problem(repository: str) -> str | None:
    """Why nothing could be uploaded; None where it can."""
    try:
        check_hub(repository)
    except ValueError as error:
        return str(error)
    return None


def _push(run: Run, final: Path) -> None:
    """Upload the finished model where that was asked for. A model that is not uploaded is saved all
    the same: it is said, and what to do."""
    repository = run.settings.output.push_to_hub
    if repository is None or not is_rank_0():
        return
    try:
        place = upload(final, repository)
    except ValueError as error:
        raise RunFailed(str(error)) from error
    logger.info(f"uploaded to {place}")


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
    failures = []
    for place, (engine, assets) in models.items():
        write = partial(save_model, engine, assets=assets, merge_lora=merge)
        try:
            write_directory(folder / place, write)
        except SaveFailed as failure:  # the other models may still be saved
            failures.append(rescue(failure, folder / place, {"": (engine, assets)}))
    if failures:
        raise SaveFailed("; ".join(map(str, failures)))
    _log_evaluations(run, trainer)
    final = folder / next(iter(models))
    report = folder / PAGE
    seen = f"; its report: {report}" if report.exists() else ""
    logger.info(f"the trained {_kind(run)} is in {final}; {use.format(final)}{seen}")
    _push(run, final)


def _kind(run: Run) -> str:
    return "LoRA adapter" if run.settings.lora.saves_adapter else "model"


def _log_evaluations(run: Run, trainer: SLTrainer | OLTrainer) -> None:
    """The metrics of the first and the last evaluation, where there were two, and of the best
    model."""
    for name, value in trainer.last_evaluation.items():
        if name.endswith(BOUNDS) or trainer.first_evaluation == trainer.last_evaluation:
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
            dropping = f"--{SAME.get(name, name)}".startswith(RESUME_FLAGS)
        if not dropping:
            words.append(word)
    program, where = _program()
    # Where stands in front, so that the rest of the line can be copied.
    place = f"({where}) " if where else ""
    return f"{place}{shlex.join([*program, *redacted_words(words)])} --checkpoint_path auto"


def _program() -> tuple[list[str], str]:
    """How this program is started, the command or a script with its launcher, and on which
    hosts."""
    script = sys.argv[0]
    module = PROGRAM if is_command() else None
    if ERROR_FILE in os.environ or "RANK" not in os.environ:  # it starts its processes itself
        return [PROGRAM] if module else ["python", script], ""
    return started_again(ancestors(), script, module, os.environ)
