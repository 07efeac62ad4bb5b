"""The flags of ``coati ilql``."""

from argparse import Namespace
from collections.abc import Sequence

from coati.cli import arguments as shared
from coati.cli.checks import check_offline, checked, requested_options
from coati.cli.parser import OlderFlags, Parser
from coati.cli.settings import ILQLSettings, settings_of
from coati.cli.values import add_count, add_number
from coati.parallel.plugins import PLUGINS


def ilql_parser() -> Parser:
    """The parser of ``coati ilql``; the defaults are those of the paper's own programs."""
    parser = Parser(
        prog="coati ilql",
        usage="%(prog)s --pretrain MODEL --dataset PATH [PATH ...] [flags]",
        description="Implicit language Q-learning (ILQL): offline reinforcement learning from "
        "conversations with scores, labels or preferences.",
    )
    shared.add_model_flags(parser)
    shared.add_data_flags(parser)
    _add_loss_flags(parser)
    shared.add_parallel_flags(parser)
    shared.add_optimization_flags(parser)
    shared.add_embedding_lr_flag(parser)
    shared.add_epoch_flags(parser)
    shared.add_lora_flags(parser)
    shared.add_output_flags(parser)
    shared.add_logging_flags(parser)
    parser.set_defaults(max_length=2048, lr=5e-5)
    return parser


def _add_loss_flags(parser: Parser) -> None:
    group = parser.add_argument_group("values")
    add_number(
        group,
        "--tau",
        default=0.7,
        unit="T",
        exclusive=True,
        most=0.9999,
        help="expectile of the values of states; above 0.5: those of the better actions",
    )
    add_number(
        group, "--gamma", default=0.99, unit="G", most=1, help="discount of a reward, per token"
    )
    add_number(
        group,
        "--cql_coef",
        default=0.1,
        unit="C",
        help="weight of the conservative loss, which keeps low the values of what no row does",
    )
    add_number(
        group,
        "--awac_coef",
        default=1.0,
        unit="C",
        help="weight of the policy's loss; 0: only the heads are learned from",
    )
    add_number(
        group,
        "--awac_beta",
        default=0.0,
        unit="B",
        help="the policy's loss of an action weighs exp(B x advantage); 0: behavior cloning",
    )
    add_number(
        group,
        "--target_alpha",
        default=0.001,
        unit="A",
        exclusive=True,
        most=1,
        help="share of the Q heads in their targets at each update of these",
    )
    add_count(
        group,
        "--target_interval",
        default=5,
        unit="STEPS",
        help="optimizer steps between updates of the targets",
    )


def parse_ilql(
    argv: Sequence[str] | None = None,
    older: OlderFlags | None = None,
    prog: str | None = None,
) -> ILQLSettings:
    """The checked flags of ``coati ilql``; as :func:`coati.cli.arguments.parse_sft`."""
    args = checked(ilql_parser().named(prog), argv, check_offline, check_ilql, older=older)
    return settings_of(ILQLSettings, args, parallel=requested_options(args))


def check_ilql(args: Namespace) -> None:
    """The heads and their targets are whole on every process."""
    for flag in ("tp", "pp", "sp"):
        if getattr(args, flag) > 1:
            raise ValueError(
                f"--{flag} {getattr(args, flag)}: ILQL's heads cannot be split over processes; use "
                "--plugin zero2, zero2_cpu or ddp"
            )
    if args.enable_sequence_parallelism:
        raise ValueError(
            "--enable_sequence_parallelism: ILQL's values follow one another in whole rows; drop "
            "it, or lower --max_length"
        )
    if args.plugin is not None and not PLUGINS[args.plugin].whole_weights:
        whole = [name for name, row in PLUGINS.items() if row.whole_weights]
        raise ValueError(
            f"--plugin {args.plugin}: the targets of ILQL's heads are averages of whole weights, "
            f"which it does not keep; use --plugin {' or '.join(whole)}"
        )
