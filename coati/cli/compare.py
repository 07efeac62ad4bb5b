"""The flags of ``coati compare``."""

from collections.abc import Sequence

from coati.cli.model_flags import add_beta_gen_flag, add_template_args_flag
from coati.cli.parser import Parser
from coati.cli.program_settings import CompareSettings
from coati.cli.response_flags import add_judge_flags, add_response_flags, check_judge, check_room
from coati.cli.reward_flags import add_slow_reward_flags
from coati.cli.settings import filled
from coati.cli.values import add_count, add_number, add_switch, add_text

TIE = "scores at most this far apart are a tie"
SEED = "random seed; both models sample with the same random numbers"


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
    add_beta_gen_flag(parser)
    group = add_judge_flags(parser)
    add_number(group, "--tie_margin", default=0.0, unit="M", help=TIE)
    add_slow_reward_flags(parser)
    add_response_flags(parser, SEED, 0.0)
    return parser


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
    try:
        check_room(args)
        check_judge(args)
    except ValueError as error:
        parser.error(str(error))
    return filled(CompareSettings, vars(args))
