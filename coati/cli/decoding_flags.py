"""Flags of what is sampled from a distribution."""

import argparse

from coati.cli.values import add_count, add_number


def add_decoding_flags(group: argparse._ArgumentGroup) -> None:
    """What narrows the distribution of the next token; nothing does by default."""
    add_count(
        group,
        "--top_k",
        default=0,
        least=0,
        unit="K",
        help="sample from the K most likely tokens; 0: off",
    )
    add_number(
        group,
        "--top_p",
        default=1.0,
        unit="P",
        exclusive=True,
        most=1,
        help="nucleus sampling: the smallest set of tokens with this total probability",
    )
    add_number(
        group,
        "--repetition_penalty",
        default=1.0,
        unit="R",
        exclusive=True,
        help="above 1: tokens that already occurred become less likely",
    )
