"""The flags of coati gkd, and what can be found wrong with them before torch is imported."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from coati.cli import arguments as shared
from coati.cli.checks import check_offline, checked, requested_options
from coati.cli.parser import OlderFlags, Parser
from coati.cli.settings import SLSettings, settings_of
from coati.cli.streaming_flags import add_streaming_flags
from coati.cli.values import add_count, add_number, add_text

TOP_K = 20
NEW_TOKENS = 128


@dataclass(frozen=True)
class TeacherSettings:
    """What is distilled from: a model, or a server that gives ``teacher_top_k`` ids at a token."""

    teacher: str | None
    teacher_url: str | None
    teacher_served_name: str | None
    teacher_top_k: int | None


@dataclass(frozen=True)
class GKDLoss:
    """The divergence, and the weight of the rows' own tokens beside it."""

    gkd_beta: float
    sft_coef: float


@dataclass(frozen=True)
class OwnResponses:
    """The share of rows that the student answers itself, and how it does."""

    gkd_lambda: float
    temperature: float
    max_new_tokens: int
    inference_batch_size: int | None


@dataclass(frozen=True, kw_only=True)
class GKDSettings(SLSettings):
    """``coati gkd``."""

    teaching: TeacherSettings
    loss: GKDLoss
    sampling: OwnResponses


def gkd_parser() -> Parser:
    """The parser of ``coati gkd``."""
    parser = Parser(
        prog="coati gkd",
        usage="%(prog)s --pretrain MODEL --teacher MODEL --dataset PATH [PATH ...] [flags]",
        description="Generalized knowledge distillation (GKD): a student learns a teacher's "
        "distribution at each token, of the rows' responses and of its own.",
    )
    shared.add_model_flags(parser)
    _add_teacher_flags(parser)
    _add_loss_flags(parser)
    shared.add_data_flags(parser, learn=True)
    add_streaming_flags(parser)
    shared.add_packing_flag(parser)
    shared.add_parallel_flags(parser)
    shared.add_optimization_flags(parser)
    shared.add_embedding_lr_flag(parser)
    shared.add_epoch_flags(parser)
    shared.add_lora_flags(parser)
    shared.add_output_flags(parser)
    shared.add_logging_flags(parser)
    return parser


def _add_teacher_flags(parser: Parser) -> None:
    group = parser.add_argument_group(
        "teacher", "A model in this process, in --mixed_precision, or a server."
    )
    add_text(
        group,
        "--teacher",
        unit="MODEL",
        help="teacher of the student's tokenizer: directory, run directory, adapter or hub name",
    )
    add_text(
        group,
        "--teacher_url",
        unit="URL",
        help="instead: a server whose /v1/completions gives prompt_logprobs (vLLM, coati "
        "rollout-server); its token is read from COATI_TEACHER_TOKEN",
    )
    add_text(
        group,
        "--teacher_served_name",
        unit="NAME",
        help="name of the model at --teacher_url; default: the one that it serves",
    )
    add_count(
        group,
        "--teacher_top_k",
        unit="K",
        help="ids that --teacher_url lists at each token; all others are compared as one; "
        f"default: {TOP_K}",
    )


def _add_loss_flags(parser: Parser) -> None:
    group = parser.add_argument_group("distillation")
    add_number(
        group,
        "--gkd_beta",
        default=0.5,
        unit="B",
        most=1,
        help="divergence: 0: forward KL (teacher || student), which covers; 1: reverse KL "
        "(student || teacher), which seeks; between: generalized Jensen-Shannon",
    )
    add_number(
        group,
        "--gkd_lambda",
        default=0.5,
        unit="L",
        most=1,
        help="share of rows that the student answers itself (on-policy), chosen by --seed row by "
        "row; of the others the row's own response is learned",
    )
    add_number(
        group,
        "--sft_coef",
        default=0.0,
        unit="A",
        help="adds A x the SFT loss of the rows' own responses",
    )
    add_number(
        group,
        "--temperature",
        default=0.9,
        unit="T",
        help="of the student's responses alone; 0 is greedy. The divergence is at temperature 1",
    )
    add_count(
        group,
        "--max_new_tokens",
        unit="TOKENS",
        help=f"longest response of the student, within --max_length; default: {NEW_TOKENS}",
    )
    add_count(
        group,
        "--inference_batch_size",
        unit="ROWS",
        help="responses sampled at once; default: all of an optimizer step",
    )


def parse_gkd(
    argv: Sequence[str] | None = None,
    older: OlderFlags | None = None,
    prog: str | None = None,
) -> GKDSettings:
    """The checked flags of ``coati gkd``; as :func:`coati.cli.arguments.parse_sft`."""
    args = checked(gkd_parser().named(prog), argv, check_offline, check_gkd, older=older)
    return settings_of(GKDSettings, args, parallel=requested_options(args))


def check_gkd(args: Namespace) -> None:
    """Check teacher, plugin and rows; settles ``teacher_top_k`` and ``max_new_tokens``."""
    _check_teacher(args)
    if args.pp > 1:
        raise ValueError(
            f"--pp {args.pp}: the teacher's states of a batch stay on the ranks that have its "
            "rows, which a pipeline does not give; use --tp, or --plugin zero2 or gemini"
        )
    if args.enable_sequence_parallelism or args.sp > 1:
        raise ValueError(
            "--enable_sequence_parallelism, --sp: student and teacher are compared on whole rows; "
            "use --tp, or --plugin zero2 or gemini"
        )
    if args.gkd_lambda:
        _check_own_responses(args)
        return
    for flag in ("max_new_tokens", "inference_batch_size"):
        if getattr(args, flag) is not None:
            raise ValueError(
                f"--{flag} does nothing with --gkd_lambda 0: the student answers no row"
            )
    args.max_new_tokens = NEW_TOKENS


def _check_teacher(args: Namespace) -> None:
    if args.teacher and args.teacher_url:
        raise ValueError("--teacher and --teacher_url both name a teacher; give one")
    if not (args.teacher or args.teacher_url):
        raise ValueError(
            "--teacher is missing: the model to distill from, a directory or hub name "
            "(or --teacher_url: a server that gives its log-probs)"
        )
    if args.teacher:
        for flag in ("teacher_served_name", "teacher_top_k"):
            if getattr(args, flag) is not None:
                raise ValueError(f"--{flag} belongs to --teacher_url, not to --teacher")
        return
    parts = urlsplit(args.teacher_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"--teacher_url {args.teacher_url}: expected a URL like http://host:8000/v1"
        )
    args.teacher_top_k = args.teacher_top_k or TOP_K
    if args.packing:
        raise ValueError(
            "--packing: a server reads one row at a time; drop it, or load the teacher here "
            "(--teacher)"
        )
    if args.tp > 1:
        raise ValueError(
            f"--tp {args.tp}: the processes that split the student would each ask --teacher_url, "
            "and may be answered differently; use --plugin zero2, or --teacher"
        )


def _check_own_responses(args: Namespace) -> None:
    share = f"--gkd_lambda {args.gkd_lambda:g}"
    for flag, why in {
        "packing": "a response of the student would change how rows share a pack",
        "disable_loss_mask": "it hides where the prompt of a row ends",
    }.items():
        if getattr(args, flag):
            raise ValueError(
                f"--{flag}: {why}; drop it, or answer no row (--gkd_lambda 0, found {share})"
            )
    if args.max_new_tokens is None:
        args.max_new_tokens = min(NEW_TOKENS, args.max_length - 1)
    if args.max_new_tokens >= args.max_length:
        raise ValueError(
            f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt in --max_length "
            f"{args.max_length}; lower it, or raise --max_length"
        )
