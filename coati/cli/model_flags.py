"""Flags of the commands that read a trained model: its tokenizer, template, code, quantization."""

import argparse

from coati.cli.values import add_switch, add_text
from coati.models.quantization_registry import QUANTS


def add_tokenizer_flag(parser: argparse._ActionsContainer) -> None:
    add_text(
        parser, "--tokenizer_path", help="tokenizer directory or hub name; default: --model_path"
    )


def add_own_template_flag(parser: argparse._ActionsContainer) -> None:
    """The template of a model that has its own."""
    add_text(
        parser,
        "--conversation_template_config",
        unit="FILE",
        help="template JSON, or the name of one that comes with coati; default: "
        "conversation_template.json beside the weights, else the tokenizer's own template",
    )


def add_trust_flag(parser: argparse._ActionsContainer) -> None:
    add_switch(
        parser,
        "--trust_remote_code",
        help="run Python files that come with the model or tokenizer",
    )


def add_quant_flag(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--quant", choices=tuple(QUANTS), help="quantize the weights on loading, with bitsandbytes"
    )
