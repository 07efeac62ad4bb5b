"""The flags of the optimizer and its schedule, which all training verbs share."""

import argparse

from coati.cli.parser import Parser
from coati.cli.values import add_count, add_number
from coati.parallel.lr_schedule import DECAY, DEFAULT, FLOOR, SCHEDULES
from coati.parallel.optimizer import OptimizerSettings
from coati.parallel.optimizer_table import DEFAULT as ADAMW
from coati.parallel.optimizer_table import OPTIMIZERS


def add_optimization_flags(parser: Parser) -> None:
    group = parser.add_argument_group("optimization")
    add_number(group, "--lr", default=5e-6, unit="RATE", exclusive=True, help="peak learning rate")
    add_count(
        group,
        "--warmup_steps",
        unit="STEPS",
        least=0,
        help="optimizer steps of linear warmup, before the shape of --lr_scheduler; default: "
        "2.5%% of all",
    )
    _add_schedule_flags(group)
    about = "; ".join(f"{name}: {row.about}" for name, row in OPTIMIZERS.items())
    group.add_argument(
        "--optim", type=_optimizer, choices=tuple(OPTIMIZERS), default=ADAMW, help=about
    )
    add_number(group, "--weight_decay", default=0.1, unit="RATE", help="decoupled weight decay")
    add_number(
        group,
        "--adam_beta2",
        default=OptimizerSettings.adam_beta2,
        unit="B",
        exclusive=True,
        most=0.99999,
        help="Adam's decay rate of the second moment",
    )
    add_number(
        group,
        "--grad_clip",
        default=1.0,
        unit="NORM",
        help="clip gradients to this norm; 0: no clipping",
    )
    add_count(group, "--accumulation_steps", default=8, help="micro-batches per optimizer step")
    add_count(
        group,
        "--tokens_per_batch",
        unit="TOKENS",
        help="cut the rows of an optimizer step into micro-batches of so many tokens instead (rows "
        "x the longest where the model needs padding); how many rows a step has stays as it is; "
        "default: by rows",
    )
    add_count(group, "--seed", default=42, least=0, help="random seed")


# Hugging Face's names
_NAMES = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), ADAMW),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "adamw8bit"),
    "paged_adamw_8bit": "paged_adamw8bit",
    "lion_32bit": "lion",
}


def _optimizer(text: str) -> str:
    return _NAMES.get(text, text)


def _add_schedule_flags(group: argparse._ArgumentGroup) -> None:
    shapes = "; ".join(f"{name}: {about}" for name, about in SCHEDULES.items())
    group.add_argument(
        "--lr_scheduler",
        choices=tuple(SCHEDULES),
        default=DEFAULT,
        help=f"learning rate after the warmup. {shapes}",
    )
    add_number(
        group,
        "--lr_min_ratio",
        default=FLOOR,
        unit="R",
        most=1,
        help="share of --lr that a decaying schedule ends with",
    )
    add_number(
        group,
        "--decay_ratio",
        default=DECAY,
        unit="R",
        exclusive=True,
        most=1,
        help="--lr_scheduler wsd: share of all steps over which the rate decays, at the end",
    )


def add_embedding_lr_flag(parser: Parser) -> None:
    add_number(
        parser.add_argument_group("embeddings"),
        "--embedding_lr",
        unit="RATE",
        exclusive=True,
        help="peak learning rate of embedding and vocabulary head, which continued pre-training "
        "may want lower than --lr (a fifth), new tokens higher; default: --lr",
    )
