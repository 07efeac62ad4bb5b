"""The end of a run: the final model, the last lines, and errors as one sentence instead of a
traceback."""

import shlex
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coati.parallel.atomic_dirs import SaveFailed, existing_folder, write_directory
from coati.parallel.checkpoint import RunningState, read_checkpoint, save_checkpoint
from coati.parallel.engine import NonFiniteLoss
from coati.parallel.launch import LaunchFailed, shut_down
from coati.parallel.weights import save_model
from coati.utils.distributed import barrier, broadcast_object, is_rank_0, rank, world_size
from coati.utils.logging import get_logger
from coati.utils.memory import describe_memory, in_units, peak_memory_of_ranks

logger = get_logger(__name__)

CHAT = "talk to it: python examples/inference/inference.py --model_path"
SCORE = "score answers with it: python examples/inference/score.py --model_path"
BOUNDS = ("_low", "_high", "/count")  # metrics that say how sure another one is
EXPECTED = (ValueError, OSError, LaunchFailed, SaveFailed, NonFiniteLoss)


def save_final(args: Namespace, trainer: Any, use: str = CHAT) -> None:
    """Write ``<save_dir>/modeling`` and say where it is and what to ``use`` it for; or how to go on
    after a polite end."""
    if _ended_early(trainer):
        return
    final = Path(args.save_dir) / "modeling"
    _write_final(args, trainer.engine, trainer.assets, final)
    _tell_evaluations(args, trainer)
    logger.info(f"the trained {_kind(args)} is in {final}; {use} {final}")


def save_models_of(args: Namespace, trainer: Any) -> None:
    """:func:`save_final` of a run that trains several models: ``<save_dir>/actor/modeling``, and
    the critic's."""
    if _ended_early(trainer):
        return
    final = {name: Path(args.save_dir) / name / "modeling" for name in trainer.models}
    for name, engine in trainer.models.items():
        _write_final(args, engine, trainer.model_assets[name], final[name])
    _tell_evaluations(args, trainer)
    logger.info(f"the trained {_kind(args)} is in {final['actor']}; {CHAT} {final['actor']}")


def _ended_early(trainer: Any) -> bool:
    if trainer.stopped_early:
        logger.info(
            f"stopped after step {trainer.state.step}, everything is saved. To go on: "
            f"{command_again()}"
        )
    return trainer.stopped_early


def _write_final(args: Namespace, engine: Any, assets: Any, folder: Path) -> None:
    write_directory(
        folder, lambda path: save_model(engine, path, assets, merge_lora=args.merge_lora_weights)
    )


def _kind(args: Namespace) -> str:
    return "LoRA adapter" if args.lora_rank and not args.merge_lora_weights else "model"


def _tell_evaluations(args: Namespace, trainer: Any) -> None:
    for name, value in trainer.last_evaluation.items():
        if name.endswith(BOUNDS):
            continue
        logger.info(
            f"{name} {trainer.first_evaluation[name]:.4f} at the first evaluation, {value:.4f} at "
            "the last"
        )
    if args.metric_for_best is not None and trainer.best:
        best = trainer.best
        logger.info(
            f"the best {args.metric_for_best} was {best['value']:.4f} at step {best['step']}: "
            f"{args.save_dir}/best"
        )


def command_again() -> str:
    """This command line with ``--checkpoint_path auto``."""
    words, dropping = [], False
    for word in sys.argv:
        if word.startswith("--"):
            dropping = word.startswith("--checkpoint_")  # the flag and the value after it
        if not dropping:
            words.append(word)
    launcher = f"colossalai run --nproc_per_node {world_size()}" if world_size() > 1 else "python"
    return f"{launcher} {shlex.join(words)} --checkpoint_path auto"


def dry_run(
    args: Namespace, trainer: Any, loader: Any, load: Callable[..., Any] | None = None
) -> None:
    """One real step, saved beside ``--save_dir`` under a temporary name and loaded again by
    ``load`` (by default as a language model); prints what the run would be."""
    from coati.models.loading import load_causal_lm

    logger.info(describe(args, trainer, loader))
    step = trainer.engine.train_step(next(iter(loader.global_batches(0))), trainer.objective)
    with place_beside(args.save_dir) as place:
        folder = save_checkpoint(place, trainer.engine, trainer.assets, RunningState(step=1))
        size = sum(read_checkpoint(folder).files.values())
        if is_rank_0():
            (load or load_causal_lm)(folder / "modeling")
    logger.info(
        f"dry run: one step taken (loss {step.loss:.4f}, "
        f"{describe_memory(peak_memory_of_ranks())}), a checkpoint of "
        f"{in_units(size)} saved and loaded again. Nothing was kept."
    )


@contextmanager
def place_beside(save_dir: str) -> Iterator[str]:
    """A directory that every rank sees, on the disk that must have room, gone afterward: not in
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


def describe(args: Namespace, trainer: Any, loader: Any) -> str:
    """Rows, steps, tokens, memory and arguments of the run to come."""
    from coati.parallel.estimate import estimate_memory

    tokens = int(loader.lengths.sum())
    steps = sum(loader.count(epoch) // loader.rows_per_step for epoch in range(args.max_epochs))
    steps = min(steps, args.max_steps or 2**62)
    entries = "rows" if loader.epoch_order.pack_length is None else "packs"
    lines = [
        "dry run: what the run would be",
        f"rows {len(loader.lengths)}, tokens {tokens} (longest row {int(loader.lengths.max())}), "
        f"{loader.rows_per_step} {entries} a step",
        f"steps {steps} ({len(loader)} an epoch, {args.max_epochs} epochs)",
        estimate_memory(trainer.engine),
        *given(args),
    ]
    return "\n".join(lines)


def given(args: Namespace) -> list[str]:
    """The resolved flags, a line each."""
    flags = [
        (name, value) for name, value in sorted(vars(args).items()) if not name.startswith("_")
    ]
    return [f"  --{name} {_word(value)}" for name, value in flags if value not in (None, False, [])]


def _word(value: Any) -> str:
    return shlex.join(map(str, value)) if isinstance(value, list) else str(value)


def guarded(program: str, main: Callable[[Namespace], None], args: Namespace) -> None:
    """Run ``main(args)``; a foreseen error ends the process with code 1 and one line on standard
    error."""
    try:
        main(args)
    except EXPECTED as error:
        who = f"[rank {rank()}] " if rank() else ""
        print(f"{who}{program}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    shut_down()
