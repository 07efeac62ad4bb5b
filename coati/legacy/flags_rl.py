"""Flags of earlier releases that the scripts with rollouts take, above all the first
train_prompts.py."""

import argparse
from argparse import Namespace
from pathlib import Path

from coati.cli.parser import Parser
from coati.cli.values import whole_number
from coati.legacy.flags import OlderFlags
from coati.utils.logging import get_logger

logger = get_logger(__name__)

# Older -> what it is turned into.
TURNED = {
    "--max_epochs": "`--num_update_steps`",
    "--update_timesteps": "`--num_collect_steps`",
    "--max_timesteps": "`--num_episodes`: that many times the number divided by "
    "`--update_timesteps`",
    "--max_input_len": "`--max_length`, which counts prompt and response: their sum",
}
TIMESTEPS = 10  # of each kind, where only the other one was given
PTX_COEF = 0.9


class RolloutFlags(OlderFlags):
    """What train_ppo.py and train_grpo.py take besides."""

    def add(self, parser: Parser) -> None:
        super().add(parser)
        for flag in TURNED:
            parser.add_argument(
                flag, type=whole_number(1), dest=f"_{flag[2:]}", help=argparse.SUPPRESS
            )

    def apply(self, args: Namespace) -> None:
        """Turn what was given into today's flags, one line each."""
        if args._max_epochs:
            args.num_update_steps = args._max_epochs
            logger.warning_once(
                f"--max_epochs is now --num_update_steps {args._max_epochs}: passes over what an "
                "episode collected"
            )
        if args._max_timesteps or args._update_timesteps:
            _settle_timesteps(args)
        if args._max_input_len:
            args.max_length = args._max_input_len + args.max_seq_len
            logger.warning_once(
                f"--max_input_len {args._max_input_len} is now --max_length {args.max_length}, "
                "which counts prompt and response"
            )
        for flag in ("rm_checkpoint_path", "critic_checkpoint_path"):
            _settle_weights(args, flag)


class PromptsFlags(RolloutFlags):
    """What only train_prompts.py had: its prompts without a flag, and SFT beside PPO as soon as
    there were data."""

    def add(self, parser: Parser) -> None:
        super().add(parser)
        parser.prog = "train_prompts.py"
        parser.add_argument("_prompts", nargs="?", help=argparse.SUPPRESS)
        parser.set_defaults(ptx_coef=None)

    def apply(self, args: Namespace) -> None:
        super().apply(args)
        _settle_prompts(args)


def _settle_timesteps(args: Namespace) -> None:
    """An episode was ``max_timesteps`` collect steps with a training phase after every
    ``update_timesteps``."""
    total = args._max_timesteps or TIMESTEPS
    between = args._update_timesteps or TIMESTEPS
    args.num_collect_steps = between
    args.num_episodes = max(args.num_episodes * total // between, 1)
    logger.warning_once(
        f"--max_timesteps {total} and --update_timesteps {between} are now --num_collect_steps "
        f"{between} --num_episodes {args.num_episodes}: an episode collects once and trains once"
    )


def _settle_weights(args: Namespace, flag: str) -> None:
    path = getattr(args, flag, None)
    if path is None or not path.endswith(".pt"):
        return
    if Path(path).is_file():
        raise ValueError(
            f"--{flag} {path} is a file of the first generation, whose weights belong to no "
            "configuration; train the "
            "model with train_rm.py, which writes a directory"
        )
    setattr(args, flag, path.removesuffix(".pt"))
    logger.warning_once(
        f"a model is a directory now, not a .pt file: --{flag} is read as "
        f"{path.removesuffix('.pt')}"
    )


def _settle_prompts(args: Namespace) -> None:
    if args._prompts and not args.prompt_dataset:
        args.prompt_dataset = [args._prompts]
        logger.warning_once(f"{args._prompts} is read as --prompt_dataset {args._prompts}")
    if args.ptx_coef is None:
        args.ptx_coef = PTX_COEF if args.ptx_dataset else 0.0
        if args.ptx_dataset:
            logger.warning_once(
                f"--ptx_coef is {PTX_COEF} with --ptx_dataset, as train_prompts.py had it; "
                "train_ppo.py has 0"
            )


ROLLOUTS = RolloutFlags()
PROMPTS = PromptsFlags()
