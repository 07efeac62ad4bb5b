"""The flags of ``coati chat``."""

from collections.abc import Sequence

from coati.cli.checks import checked
from coati.cli.decoding_flags import add_decoding_flags
from coati.cli.model_flags import (
    add_beta_gen_flag,
    add_own_template_flag,
    add_quant_flag,
    add_template_args_flag,
    add_tokenizer_flag,
    add_trust_flag,
)
from coati.cli.parser import OlderFlags, Parser
from coati.cli.program_settings import ChatSettings
from coati.cli.settings import filled
from coati.cli.values import add_count, add_number, add_text

CONSOLES = ("rich", "simple", "dummy")


def inference_parser() -> Parser:
    """The parser of ``coati chat``."""
    parser = Parser(
        prog="coati chat",
        usage="%(prog)s --model_path MODEL [flags]",
        description="Chat with a model in the terminal, or respond to the lines of a pipe. `clear` "
        "starts a new dialogue, `exit` quits.",
    )
    add_text(
        parser,
        "--model_path",
        "--model",
        unit="MODEL",
        help="Hugging Face directory or hub name, LoRA adapter, or training checkpoint (required)",
    )
    add_tokenizer_flag(parser)
    add_own_template_flag(parser)
    add_template_args_flag(parser)
    add_count(
        parser,
        "--model_max_length",
        default=2048,
        least=2,
        help="maximum tokens of dialogue and response together",
    )
    add_count(parser, "--max_new_tokens", default=512, help="maximum tokens per response")
    parser.add_argument(
        "--io",
        choices=CONSOLES,
        help="console; rich: in color; dummy: prints only the responses; default: rich in a "
        "terminal, dummy where the responses go to a file or pipe",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="respond to this and exit; may be repeated, each a separate dialogue",
    )
    add_trust_flag(parser)
    add_quant_flag(parser)
    add_beta_gen_flag(parser)
    _add_dialogue_flags(parser)
    add_sampling_flags(parser)
    return parser


def _add_dialogue_flags(parser: Parser) -> None:
    group = parser.add_argument_group("dialogue")
    add_text(group, "--system_message", unit="TEXT", help="replaces the template's own; '': none")
    add_text(
        group,
        "--prompt_file",
        unit="FILE",
        help="respond to each line of a text file (-: standard input) or each row of a data file, "
        "and exit",
    )
    add_text(
        group,
        "--tools",
        unit="FILE",
        help="functions that the model may call: a JSON list of OpenAI's schemas; rows of "
        "--prompt_file bring their own",
    )
    add_text(
        group,
        "--transcript",
        unit="FILE",
        help="append every dialogue to this file as a JSON line",
    )


def add_sampling_flags(parser: Parser, seed: bool = True) -> None:
    """The sampling flags; ``seed``: whether ``--seed`` is among them."""
    group = parser.add_argument_group("sampling")
    add_number(
        group,
        "--temperature",
        default=0.7,
        unit="T",
        help="0: greedy decoding",
    )
    add_decoding_flags(group)
    if seed:
        add_count(
            group,
            "--seed",
            least=0,
            help="random seed, for reproducible responses; default: different ones each time",
        )


def parse_inference(
    argv: Sequence[str] | None = None,
    older: OlderFlags | None = None,
    prog: str | None = None,
) -> ChatSettings:
    """The checked flags. Exits with code 2 and one line naming a wrong flag."""
    parser = inference_parser().named(prog)
    args = checked(parser, argv, older=older)
    if args.model_path is None:
        parser.error(
            "--model_path is required: a model directory, a LoRA adapter or a training checkpoint"
        )
    if args.max_new_tokens >= args.model_max_length:
        parser.error(
            f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt in "
            f"--model_max_length {args.model_max_length}"
        )
    if args.prompt and args.prompt_file:
        parser.error("--prompt and --prompt_file both give the prompts; use only one of them")
    return filled(ChatSettings, vars(args))
