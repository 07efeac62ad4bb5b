"""Flags of older documents that the preference scripts took, the reward model's first generation
above all."""

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

from coati.cli.parser import Parser
from coati.cli.values import boolean
from coati.utils.logging import get_logger

logger = get_logger(__name__)

TEST_ROWS = 100


def add_flags(parser: Parser) -> None:
    """Accept them without offering them in the help; :func:`apply_legacy_flags` says what became of them."""
    hidden: dict[str, Any] = {"help": argparse.SUPPRESS}
    parser.add_argument(
        "--test", nargs="?", const=True, type=boolean, default=False, dest="_test", **hidden
    )
    parser.add_argument("--subset", default=None, dest="_subset", **hidden)
    if parser.action_of("--disable_reference_model") is None:
        parser.add_argument(
            "--disable_reference_model",
            nargs="?",
            const=True,
            type=boolean,
            default=None,
            dest="_no_reference",
            **hidden,
        )
    enabled = {
        "nargs": "?",
        "const": True,
        "type": boolean,
        "default": None,
        "dest": "_enable_reference",
    }
    parser.add_argument("--enable_reference_model", **enabled, **hidden)


def apply_legacy_flags(args: Namespace) -> None:
    """Turn the older flags into today's, one line each."""
    if args._test and args.max_samples is None:
        args.max_samples = TEST_ROWS
        logger.warning_once(f"--test is now --max_samples {TEST_ROWS}: a run on the first rows")
    if args._subset and args.dataset:
        args.dataset = [
            path if Path(path).exists() else f"{path}:{args._subset}" for path in args.dataset
        ]
        logger.warning_once(
            f"--subset {args._subset} is now part of the name: --dataset {' '.join(args.dataset)}"
        )
    if args.save_dir.endswith(".pt"):
        args.save_dir = args.save_dir.removesuffix(".pt")
        logger.warning_once(
            f"a model is a directory now, not a .pt file: it is saved in {args.save_dir}/modeling"
        )
    if getattr(args, "_no_reference", None):
        logger.warning_once("--disable_reference_model has no effect here")
    if args._enable_reference is not None and "disable_reference_model" in args:
        args.disable_reference_model = not args._enable_reference
        logger.warning_once(
            "--enable_reference_model is the default now; its opposite is --disable_reference_model"
        )
