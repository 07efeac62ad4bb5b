"""Flags of earlier releases that the preference scripts take, above all the first
train_reward_model.py."""

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

from coati.cli.parser import Parser
from coati.cli.values import boolean
from coati.legacy.flags import OlderFlags
from coati.utils.logging import get_logger

logger = get_logger(__name__)

TEST_ROWS = 100


class PreferenceFlags(OlderFlags):
    """What the preference scripts take besides."""

    def add(self, parser: Parser) -> None:
        super().add(parser)
        switch: dict[str, Any] = {"nargs": "?", "const": True, "type": boolean}
        switch["help"] = argparse.SUPPRESS
        parser.add_argument("--test", default=False, dest="_test", **switch)
        parser.add_argument("--subset", dest="_subset", help=argparse.SUPPRESS)
        if parser.action_of("--disable_reference_model") is None:
            parser.add_argument("--disable_reference_model", dest="_no_reference", **switch)
        parser.add_argument("--enable_reference_model", dest="_enable_reference", **switch)

    def apply(self, args: Namespace) -> None:
        """Turn what was given into today's flags, one line each."""
        if args._test and args.max_samples is None:
            args.max_samples = TEST_ROWS
            logger.warning_once(f"--test is now --max_samples {TEST_ROWS}: a run on the first rows")
        if args._subset and args.dataset:
            args.dataset = [
                path if Path(path).exists() else f"{path}:{args._subset}" for path in args.dataset
            ]
            logger.warning_once(
                f"--subset {args._subset} is now part of the name: --dataset "
                f"{' '.join(args.dataset)}"
            )
        if args.save_dir.endswith(".pt"):
            args.save_dir = args.save_dir.removesuffix(".pt")
            logger.warning_once(
                "a model is a directory now, not a .pt file: it is saved in "
                f"{args.save_dir}/modeling"
            )
        if getattr(args, "_no_reference", None):
            logger.warning_once("--disable_reference_model has no effect here")
        if args._enable_reference is not None and "disable_reference_model" in args:
            args.disable_reference_model = not args._enable_reference
            logger.warning_once(
                "--enable_reference_model is the default now; its opposite is "
                "--disable_reference_model"
            )


PREFERENCES = PreferenceFlags()
