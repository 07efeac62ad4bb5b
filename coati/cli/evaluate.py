"""The flags of ``coati evaluate``."""

import importlib.util
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from coati.cli.checks import checked
from coati.cli.parser import Parser
from coati.cli.prepare import add_documents_flag
from coati.cli.program_settings import EvaluateSettings
from coati.cli.response_flags import add_judge_flags, add_response_flags, check_judge, check_room
from coati.cli.reward_flags import add_slow_reward_flags
from coati.cli.sampler_flags import add_sampler_flags, check_sampler
from coati.cli.settings import filled
from coati.cli.values import add_count, add_switch, add_text, number, whole_number

# What does nothing without one of the three parts of an evaluation.
OF_PROMPTS = (*("max_prompts", "pass_at", "right_from", "rm_path", "reward_functions", "beta_gen"),)
OF_TEXTS = ("documents", "stride")
OF_TASKS = ("lm_eval_path", "lm_eval_limit", "few_shot", "lm_eval_chat")


def evaluate_parser() -> Parser:
    """The parser of ``coati evaluate``."""
    parser = Parser(
        prog="coati evaluate",
        usage="%(prog)s --model_path MODEL --output_dir DIR [--input FILE ...] [--perplexity FILE "
        "...] [--lm_eval TASK ...] [flags]",
        description="Measures a model, with intervals: pass@k, majority votes and scores on "
        "prompts, perplexity of texts, tasks of lm-eval; and compares it with a baseline.",
    )
    add_sampler_flags(parser, "model, LoRA adapter or checkpoint (required, but for --api_url)")
    add_text(
        parser,
        "--output_dir",
        help="directory for results.json, results.md, results.svg and the responses; responses "
        "that are in it already are not drawn again (required)",
    )
    add_text(
        parser,
        "--baseline",
        help="--output_dir of another coati evaluate, to compare with row by row",
    )
    _add_prompt_flags(parser)
    _add_perplexity_flags(parser)
    _add_task_flags(parser)
    add_judge_flags(parser)
    add_slow_reward_flags(parser)
    add_response_flags(
        parser,
        "random seed; with the prompt and the number of a response it decides it",
        None,
        "0 for one response to a prompt, 1 for several",
    )
    return parser


def _add_prompt_flags(parser: Parser) -> None:
    group = parser.add_argument_group("prompts", "Responses, and how often they are right.")
    group.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files or folders of prompts, in any row format, with a gt_answer or a judge",
    )
    add_count(group, "--max_prompts", help="sample this many prompts, with --seed; default: all")
    add_count(group, "--num_samples", default=1, help="responses to each prompt")
    group.add_argument(
        "--pass_at",
        nargs="+",
        type=whole_number(1),
        default=[],
        metavar="K",
        help="the chance that of K responses one is right; default: 1 and --num_samples",
    )
    group.add_argument(
        "--right_from",
        type=number(float("-inf")),
        metavar="SCORE",
        help="a response is right whose score by the judge is at least this; default: one that "
        "states the gt_answer is",
    )


def _add_perplexity_flags(parser: Parser) -> None:
    group = parser.add_argument_group("perplexity", "Of texts, or of responses in conversations.")
    group.add_argument(
        "--perplexity",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files or folders of texts (every token counts) or conversations (what SFT learns)",
    )
    add_documents_flag(group)
    add_count(
        group,
        "--stride",
        unit="TOKENS",
        help="of rows longer than --max_length: how far each window is moved on; smaller gives "
        "each token more context; default: half of --max_length",
    )


def _add_task_flags(parser: Parser) -> None:
    group = parser.add_argument_group("tasks of lm-eval", "By the package lm-eval, an extra.")
    group.add_argument(
        "--lm_eval", nargs="+", default=[], metavar="TASK", help="tasks, groups or tags"
    )
    add_text(group, "--lm_eval_path", help="folder of YAML files with tasks of your own")
    add_count(group, "--lm_eval_limit", help="only the first documents of each task")
    add_count(
        group,
        "--few_shot",
        least=0,
        help="examples before each question; default: as the task says",
    )
    add_switch(group, "--lm_eval_chat", help="ask in the model's chat template, not as plain text")


def parse_evaluate(argv: Sequence[str] | None = None, prog: str | None = None) -> EvaluateSettings:
    """The checked flags. Exits with code 2 and one line naming a wrong flag."""
    args = checked(
        evaluate_parser().named(prog),
        argv,
        _check_parts,
        check_sampler,
        check_room,
        check_judge,
        _check_samples,
    )
    return filled(EvaluateSettings, vars(args))


def _check_parts(args: Namespace) -> None:
    if not (args.input or args.perplexity or args.lm_eval):
        raise ValueError(
            "nothing to evaluate: give --input (prompts), --perplexity (texts) or --lm_eval (tasks)"
        )
    if args.output_dir is None:
        raise ValueError("--output_dir is required: the directory for the results")
    for part, flags in (("input", OF_PROMPTS), ("perplexity", OF_TEXTS), ("lm_eval", OF_TASKS)):
        for flag in flags:
            value = getattr(args, flag)
            given = not (value is None or value is False or value == [])
            if given and not getattr(args, part):
                raise ValueError(f"--{flag} does nothing without --{part}")
    if args.api_url or args.rollout_url or args.rollout_engine != "model":
        for part in ("perplexity", "lm_eval"):
            if getattr(args, part):
                raise ValueError(
                    f"--{part} needs the model in this process: leave --api_url, --rollout_url and "
                    "--rollout_engine out"
                )
    if args.stride is not None and args.stride >= args.max_length:
        raise ValueError(
            f"--stride {args.stride} leaves no context in windows of --max_length "
            f"{args.max_length}; give less"
        )
    if args.baseline is not None and not Path(args.baseline).exists():
        raise ValueError(f"--baseline {args.baseline}: there is no such directory")
    if args.lm_eval and importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "--lm_eval needs lm-evaluation-harness, which is not installed: pip install lm-eval "
            "(or pip install coati[eval])"
        )


def _check_samples(args: Namespace) -> None:
    if not args.input and args.num_samples > 1:
        raise ValueError("--num_samples does nothing without --input")
    if args.temperature is None:
        args.temperature = 0.0 if args.num_samples == 1 else 1.0
    if args.num_samples > 1 and args.temperature == 0:
        raise ValueError(
            f"--num_samples {args.num_samples} with --temperature 0: greedy responses are all the "
            "same; raise the temperature, or ask for one"
        )
    beyond = [k for k in args.pass_at if k > args.num_samples]
    if beyond:
        raise ValueError(
            f"--pass_at {beyond[0]} needs as many responses; --num_samples is {args.num_samples}"
        )
    args.pass_at = sorted({*(args.pass_at or (1, args.num_samples))})
    judged = args.rm_path or args.reward_functions
    if args.right_from is not None and not judged:
        raise ValueError(
            "--right_from is a score: give --rm_path, --reward_functions or both, or leave it out"
        )
