"""Flags of earlier releases that every training script takes: one line says what each became."""

import argparse
from argparse import Namespace
from typing import Any

from coati.cli.parser import Parser
from coati.utils.logging import get_logger

logger = get_logger(__name__)

# --strategy of the first generation -> --plugin
STRATEGIES = {
    "naive": "ddp",
    "ddp": "ddp",
    "colossalai_gemini": "gemini",
    "colossalai_zero2": "zero2",
    "colossalai_zero2_cpu": "zero2_cpu",
}

# Older or misspelled -> today's. A name stands here only if its meaning is unchanged.
RENAMED = {
    "--accimulation_steps": "--accumulation_steps",
    "--max_datasets_size": "--max_samples",
    "--tokenizer": "--tokenizer_dir",
    "--tokenizer_path": "--tokenizer_dir",
    "--pretrained": "--pretrain",
    "--num_epochs": "--max_epochs",
    "--tensorboard_dir": "--log_dir",
    "--use_grad_checkpoint": "--grad_checkpoint",
    "--loss_func": "--loss_fn",
    "--rm_path": "--rm_checkpoint_path",
    "--prompt_path": "--prompt_dataset",
}

# No longer needed -> why.
DROPPED = {
    "--model": "the architecture is read from --pretrain",
    "--model_type": "the architecture is read from --pretrain",
    "--need_optim_ckpt": "every checkpoint holds the optimizer's state",
}
# The same, of scripts with a reward model.
DROPPED_OF_ROLLOUTS = {
    "--rm_model": "the architecture is read from --rm_pretrain",
    "--critic_model": "the architecture is read from --critic_pretrain",
    "--max_tokens_thinking": "--max_seq_len is the room for a response, its thoughts included",
}
# What programs that answer were given to read a GPTQ file -> what takes its place.
GPTQ = {
    "--gptq_checkpoint": "a directory that quantize.py --method gptq wrote is a model by itself: "
    "give it in place of the model, without --quant",
    "--gptq_group_size": "the directory says it itself; quantize.py --group_size decides it",
}


class _Renamed(argparse.Action):
    """Stores under the new flag's name and says so."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values)
        logger.warning_once(f"{option_string} is now {RENAMED[option_string]}")


class _Dropped(argparse.Action):
    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        why = (DROPPED | DROPPED_OF_ROLLOUTS)[option_string]
        logger.warning_once(f"{option_string} {values} has no effect: {why}")


class _Refused(argparse.Action):
    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        parser.error(f"{option_string}: {GPTQ[option_string]}")


class _Strategy(argparse.Action):
    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        namespace.plugin = STRATEGIES[values]
        logger.warning_once(f"--strategy {values} is now --plugin {namespace.plugin}")


class OlderFlags:
    """As :class:`coati.cli.parser.OlderFlags`: what all training scripts take."""

    def add(self, parser: Parser) -> None:
        """Accept them beside ``parser``'s own, without offering them in its help."""
        hidden: dict[str, Any] = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
        parser.add_argument(
            "--strategy", action=_Strategy, choices=tuple(STRATEGIES), dest="plugin", **hidden
        )
        has_rollouts = parser.action_of("--rm_pretrain") is not None
        for old in DROPPED | DROPPED_OF_ROLLOUTS if has_rollouts else DROPPED:
            parser.add_argument(old, action=_Dropped, dest=f"dropped{old}", **hidden)
        for old, new in RENAMED.items():
            now = parser.action_of(new)
            if now is None:
                continue
            extra = {"nargs": now.nargs, "const": now.const} if now.nargs else {}
            extra |= {"dest": now.dest, "type": now.type, "choices": now.choices}
            parser.add_argument(old, action=_Renamed, **extra, **hidden)

    def apply(self, args: Namespace) -> None:
        """Nothing is left to do: each flag has acted when it was read."""


class GPTQFlags:
    """Answers the flags of GPTQ files with what takes their place."""

    def add(self, parser: Parser) -> None:
        for old in GPTQ:
            parser.add_argument(
                old, action=_Refused, help=argparse.SUPPRESS, default=argparse.SUPPRESS
            )

    def apply(self, args: Namespace) -> None:
        """Nothing is left to do: a flag that is given ends the program."""


SHARED = OlderFlags()
QUANTIZED = GPTQFlags()
