"""The flags of ``coati sample``."""

from argparse import Namespace
from collections.abc import Sequence

from coati.cli.checks import checked
from coati.cli.parser import Parser
from coati.cli.program_settings import SampleSettings
from coati.cli.response_flags import add_judge_flags, add_response_flags, check_judge, check_room
from coati.cli.reward_flags import add_slow_reward_flags
from coati.cli.sampler_flags import add_sampler_flags, check_sampler
from coati.cli.settings import filled
from coati.cli.values import add_count, add_number, add_switch, add_text, number

WRITTEN = ("best", "rejection", "pairs", "groups")  # --write


def sample_parser() -> Parser:
    """The parser of ``coati sample``."""
    parser = Parser(
        prog="coati sample",
        usage="%(prog)s --model_path MODEL --input FILE [FILE ...] --output_dir DIR [flags]",
        description="Draws several responses to each prompt, scores them, and writes the best, "
        "those above a threshold or pairs of them as rows to train on.",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files or folders of prompts, in any row format (required)",
    )
    add_sampler_flags(
        parser, "model, LoRA adapter or checkpoint to sample from (required, but for --api_url)"
    )
    add_count(parser, "--max_prompts", help="sample this many prompts, with --seed; default: all")
    add_count(parser, "--num_samples", default=8, help="responses to each prompt")
    add_text(
        parser,
        "--output_dir",
        help="directory for responses.jsonl, scores.jsonl and the files of --write; what is in it "
        "already is not drawn again (required)",
    )
    _add_selection_flags(parser)
    add_judge_flags(parser)
    add_slow_reward_flags(parser)
    add_response_flags(
        parser, "random seed; with the prompt and the number of a response it decides it", 1.0
    )
    return parser


def _add_selection_flags(parser: Parser) -> None:
    group = parser.add_argument_group("rows to train on")
    group.add_argument(
        "--write",
        nargs="+",
        choices=WRITTEN,
        default=[],
        metavar="KIND",
        help="best: the best response to each prompt, for coati sft; rejection: those from "
        "--threshold on, for coati sft; pairs: the best against the worst, for coati dpo and rm; "
        "groups: all, with their scores; default: best where there is a judge",
    )
    group.add_argument(
        "--threshold",
        type=number(float("-inf")),
        metavar="SCORE",
        help="rejection: the least score of a response",
    )
    add_count(
        group, "--keep", help="rejection: at most so many of a prompt, the best; default: all"
    )
    add_number(
        group, "--margin", default=0.0, unit="M", help="pairs: scores are at least so far apart"
    )
    add_switch(
        group,
        "--keep_truncated",
        help="learn responses that ended at --max_new_tokens, too",
    )


def parse_sample(argv: Sequence[str] | None = None, prog: str | None = None) -> SampleSettings:
    """The checked flags. Exits with code 2 and one line naming a wrong flag."""
    args = checked(
        sample_parser().named(prog),
        argv,
        _check_inputs,
        check_sampler,
        check_room,
        check_judge,
        _check_selection,
    )
    return filled(SampleSettings, vars(args))


def _check_inputs(args: Namespace) -> None:
    if not args.input:
        raise ValueError("--input is required: files or folders of prompts")
    if args.output_dir is None:
        raise ValueError("--output_dir is required: the directory for responses and rows")
    if args.num_samples > 1 and args.temperature == 0:
        raise ValueError(
            f"--num_samples {args.num_samples} with --temperature 0: greedy responses are all the "
            "same; raise the temperature, or ask for one"
        )


def _check_selection(args: Namespace) -> None:
    judged = args.rm_path or args.reward_functions
    if args.write and not judged:
        raise ValueError(
            f"--write {' '.join(args.write)}: nothing judges the responses; give --rm_path, "
            "--reward_functions or both"
        )
    if judged and not args.write:
        args.write = [WRITTEN[0]]
    wanted = {"threshold": "rejection", "keep": "rejection"}
    for flag, kind in wanted.items():
        if getattr(args, flag) is not None and kind not in args.write:
            raise ValueError(f"--{flag} does nothing without --write {kind}")
    if args.margin and "pairs" not in args.write:
        raise ValueError("--margin does nothing without --write pairs")
    if args.keep_truncated and not {*args.write} - {"groups"}:
        raise ValueError("--keep_truncated does nothing without --write best, rejection or pairs")
    if "rejection" in args.write and args.threshold is None:
        raise ValueError("--threshold is required with --write rejection: the least score")
    if args.num_samples < 2 and {*args.write} & {"pairs", "groups"}:
        raise ValueError(f"--write {' '.join(args.write)} needs --num_samples of at least 2")
