"""Flags of the commands that read a trained model: its tokenizer, template, code, quantization."""

import argparse

from coati.cli.row_flags import json_object
from coati.cli.values import add_number, add_switch, add_text
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


def add_template_args_flag(parser: argparse._ActionsContainer) -> None:
    """Arguments of the template for this run."""
    parser.add_argument(
        "--template_args",
        type=json_object,
        metavar="JSON",
        help="further variables of the chat template, such as '{\"enable_thinking\": false}'; they "
        "go before those of the same name that the model keeps",
    )


def add_trust_flag(parser: argparse._ActionsContainer) -> None:
    add_switch(
        parser,
        "--trust_remote_code",
        help="run Python files that come with the model or tokenizer",
    )


def add_beta_gen_flag(parser: argparse._ActionsContainer) -> None:
    """How a model of coati ilql decodes."""
    add_number(
        parser,
        "--beta_gen",
        unit="B",
        help="a model of coati ilql: weight of its values beside the log-probs in decoding; 0: by "
        "log-probs alone; default: 1",
    )


def add_quant_flag(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--quant", choices=tuple(QUANTS), help="quantize the weights on loading, with bitsandbytes"
    )
