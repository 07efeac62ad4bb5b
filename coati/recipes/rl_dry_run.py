"""``--dry_run`` of PPO and GRPO: an episode's responses, one update, a checkpoint saved and loaded,
nothing kept."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from coati.models.critic import Critic
from coati.models.loading import load_causal_lm
from coati.parallel.checkpoint import RunningState, read_checkpoint, save_models
from coati.parallel.estimate import estimate_memory
from coati.recipes.finish import given, place_beside
from coati.utils.distributed import is_rank_0
from coati.utils.logging import get_logger
from coati.utils.memory import describe_memory, in_units, peak_memory_of_ranks

logger = get_logger(__name__)

LOADERS = {"actor": load_causal_lm, "critic": Critic.from_pretrained}
TOLD = (
    "reward",
    "reward_std",
    "approx_kl",
    "response_length",
    "stop_rate",
    "policy_loss",
    "value_loss",
    "ptx_loss",
)


def dry_run(args: Namespace, trainer: Any, windows: Any, supervised: Any = None) -> None:
    """One collect phase and one optimizer step, saved beside ``--save_dir`` under a temporary name
    and loaded again; prints what the run would be. Every rank must call it."""
    logger.info(describe(args, trainer, windows, supervised))
    metrics = trainer.rehearse(windows, supervised)
    with place_beside(args.save_dir) as place:
        models = {
            name: (engine, trainer.model_assets[name]) for name, engine in trainer.models.items()
        }
        folder = save_models(place, models, RunningState(step=1), trainer.buffer.state_dict())
        size = sum(read_checkpoint(folder).files.values())
        if is_rank_0():
            for name in models:
                LOADERS[name](str(Path(folder) / name / "modeling"))
    told = ", ".join(f"{name} {metrics[name]:.4g}" for name in TOLD if name in metrics)
    seconds = sum(metrics[f"seconds_{phase}"] for phase in ("rollout", "scoring", "update"))
    logger.info(
        f"dry run: one episode's responses and one update ({told}; "
        f"{describe_memory(peak_memory_of_ranks())}), a "
        f"checkpoint of {in_units(size)} saved and loaded again. Nothing was kept.\n"
        f"an episode would take about {seconds:.3g} s, the run "
        f"{seconds * args.num_episodes / 3600:.2g} h"
    )


def describe(args: Namespace, trainer: Any, windows: Any, supervised: Any = None) -> str:
    """Prompts, episodes, steps, memory and arguments of the run to come."""
    episodes, settings = trainer.episodes, trainer.maker.settings
    asked = windows.rows_per_step * args.num_episodes
    lines = [
        "dry run: what the run would be",
        f"prompts {len(windows.lengths)}, tokens {int(windows.lengths.sum())} (longest "
        f"{int(windows.lengths.max())})",
        f"episodes {args.num_episodes}, each of {windows.rows_per_step} prompts x "
        f"{settings.num_generations} responses "
        f"of up to {settings.max_new_tokens} tokens; every prompt "
        f"{asked / len(windows.lengths):.2g} times",
        f"optimizer steps {episodes.total_steps} ({episodes.num_update_steps} passes of "
        f"{episodes.steps_per_pass} an episode), each of "
        f"{windows.rows_per_step * settings.num_generations // episodes.steps_per_pass} responses",
        *(
            []
            if supervised is None
            else [f"SFT rows {len(supervised.lengths)}, {supervised.rows_per_step} a step"]
        ),
        *(f"{name}: {estimate_memory(engine)}" for name, engine in trainer.models.items()),
        *given(args),
    ]
    return "\n".join(lines)
