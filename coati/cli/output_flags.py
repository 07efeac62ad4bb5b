"""The flags of what a run writes: checkpoints, the best model, logs."""

import argparse

from coati.cli.hub_flags import add_hub_flag
from coati.cli.parser import Parser
from coati.cli.values import add_count, add_number, add_switch, add_text
from coati.utils.tracker_table import TRACKERS


def add_output_flags(
    parser: Parser, steps: str = "optimizer steps", final: str = "DIR/modeling"
) -> None:
    """``steps``: what the run counts. ``final``: where the trained model is written."""
    group = parser.add_argument_group("output")
    add_text(
        group,
        "--save_dir",
        "--save_path",
        default="output",
        help=f"output: checkpoints in DIR/epoch-E_step-S, the final model in {final}, "
        "metrics.jsonl and arguments.json beside them",
    )
    add_count(
        group,
        "--save_interval",
        default=1000,
        unit=steps.split()[-1].upper(),
        least=0,
        help=f"{steps} between checkpoints; 0: only on graceful shutdown",
    )
    add_text(
        group,
        "--metric_for_best",
        unit="NAME",
        help="keep the best model by this evaluation metric (loss, accuracy, reward, ...) in "
        "DIR/best",
    )
    add_stopping_flags(group)
    add_count(
        group,
        "--keep_last_k",
        unit="K",
        help="keep the newest K checkpoints only; default: all",
    )
    add_text(
        group, "--config_file", unit="FILE", help="also write the resolved flags to this JSON file"
    )
    add_switch(
        group,
        "--dry_run",
        help="check everything, print rows, steps, tokens, memory and flags, take two steps, save "
        "and reload a checkpoint, and exit",
    )


def add_stopping_flags(group: argparse._ArgumentGroup) -> None:
    add_count(
        group,
        "--early_stopping_patience",
        unit="N",
        help="end the run, and save its model, when --metric_for_best (default: the loss, with "
        "rollouts the reward) has not improved in N evaluations; default: never",
    )
    add_number(
        group,
        "--early_stopping_threshold",
        default=0.0,
        unit="D",
        help="--early_stopping_patience: smaller changes are no improvement",
    )


def add_logging_flags(parser: Parser, steps: str = "optimizer steps") -> None:
    """``steps``: what the run counts."""
    group = parser.add_argument_group("logging")
    about = "; ".join(f"{name}: {what}" for name, what in TRACKERS.items())
    group.add_argument(
        "--report_to",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"trackers beside metrics.jsonl and report.html, or none. {about}",
    )
    add_text(group, "--log_dir", help="log to TensorBoard, in this directory")
    add_switch(group, "--use_wandb", help="--report_to wandb")
    add_hub_flag(group, "the finished model (of PPO and GRPO the policy)")
    add_count(
        group,
        "--log_interval",
        default=1,
        unit=steps.split()[-1].upper(),
        help=f"{steps} between log entries",
    )
