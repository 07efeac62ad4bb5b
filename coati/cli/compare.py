"""The flags of ``coati compare``."""

from collections.abc import Sequence

from coati.cli.model_flags import add_template_args_flag
from coati.cli.parser import Parser
from coati.cli.program_settings import CompareSettings
from coati.cli.reward_flags import add_slow_reward_flags, check_slow_rewards, names_of_rewards
from coati.cli.settings import filled
from coati.cli.values import add_count, add_number, add_switch, add_text
from coati.rewards.registry import check_rewards


def compare_parser() -> Parser:
    """The parser of ``coati compare``."""
    parser = Parser(
        prog="coati compare",
        usage="%(prog)s --model_path MODEL [--start_path MODEL] --input FILE [FILE ...] [flags]",
        description="Win rate of a trained model against the one it started from, on the same "
        "prompts.",
    )
    add_text(
        parser,
        "--model_path",
        unit="MODEL",
        help="the trained model, LoRA adapter or checkpoint (required)",
    )
    add_text(
        parser,
        "--start_path",
        unit="MODEL",
        help="model to compare with; default: the base model of a LoRA adapter",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files or folders of prompts, in any row format (required)",
    )
    add_count(parser, "--max_prompts", help="sample this many prompts, with --seed; default: all")
    add_text(
        parser,
        "--output",
        unit="FILE",
        help="file for one JSON object per prompt: both responses, their scores, the result",
    )
    add_count(
        parser,
        "--show",
        default=3,
        least=0,
        help="largest wins and largest losses to print",
    )
    add_text(
        parser,
        "--conversation_template_config",
        unit="FILE",
        help="template JSON for both models, or the name of one that comes with coati; default: "
        "conversation_template.json beside the weights, else the tokenizer's own template",
    )
    add_template_args_flag(parser)
    add_switch(
        parser,
        "--trust_remote_code",
        help="run Python files that come with the models or tokenizers",
    )
    _add_judge_flags(parser)
    add_slow_reward_flags(parser)
    _add_response_flags(parser)
    return parser


def _add_judge_flags(parser: Parser) -> None:
    group = parser.add_argument_group("judge")
    add_text(group, "--rm_path", unit="MODEL", help="reward model: a directory that coati rm wrote")
    group.add_argument(
        "--reward_functions",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"{names_of_rewards()}; added to the score of --rm_path if both are given",
    )
    group.add_argument(
        "--reward_weights",
        nargs="+",
        type=float,
        metavar="W",
        help="one per reward function; default: 1 each",
    )
    add_number(
        group,
        "--reward_timeout",
        default=60.0,
        unit="SECONDS",
        exclusive=True,
        help="time limit of a reward function per batch",
    )
    add_number(
        group, "--tie_margin", default=0.0, unit="M", help="scores at most this far apart are a tie"
    )


def _add_response_flags(parser: Parser) -> None:
    group = parser.add_argument_group("responses")
    add_count(
        group,
        "--max_length",
        default=2048,
        unit="TOKENS",
        least=2,
        help="maximum length of prompt and response together",
    )
    add_count(group, "--max_new_tokens", default=256, unit="TOKENS", help="maximum response length")
    add_count(
        group,
        "--batch_size",
        default=16,
        unit="ROWS",
        help="responses generated or scored at a time",
    )
    add_number(
        group,
        "--temperature",
        default=0.0,
        unit="T",
        help="0: greedy decoding",
    )
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
    add_count(
        group,
        "--seed",
        default=42,
        least=0,
        help="random seed; both models sample with the same random numbers",
    )


def parse_compare(argv: Sequence[str] | None = None, prog: str | None = None) -> CompareSettings:
    """The checked flags. Exits with code 2 and one line naming a wrong flag."""
    parser = compare_parser().named(prog)
    args = parser.parse_args(argv)
    if args.model_path is None:
        parser.error("--model_path is required: the trained model")
    if not args.input:
        parser.error("--input is required: files or folders of prompts")
    if not args.rm_path and not args.reward_functions:
        parser.error(
            "nothing judges the responses: give --rm_path (a reward model), --reward_functions "
            "or both"
        )
    if args.max_new_tokens >= args.max_length:
        parser.error(
            f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt in --max_length "
            f"{args.max_length}"
        )
    try:
        args.reward_functions = check_rewards(args.reward_functions, args.reward_weights)
        check_slow_rewards(args)
    except ValueError as error:
        parser.error(str(error))
    return filled(CompareSettings, vars(args))
