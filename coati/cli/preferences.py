"""The flags of train_rm.py, train_dpo.py, train_orpo.py and train_kto.py."""

from argparse import Namespace, _ArgumentGroup
from collections.abc import Callable, Sequence

from coati.cli import arguments as shared
from coati.cli import legacy, legacy_preferences
from coati.cli.checks import check_sft
from coati.cli.parser import Parser
from coati.cli.preference_checks import check_dpo, check_kto, check_pairs, check_rm
from coati.cli.values import add_count, add_number, add_switch, number
from coati.models.loss_registry import LOSS_TYPES, REWARD_LOSSES, SFT, full_name


def rm_parser() -> Parser:
    """The parser of ``train_rm.py``."""
    parser = _parser(
        "train_rm.py",
        "Reward model: Bradley-Terry ranking loss on pairs of responses.",
    )
    group = parser.add_argument_group("reward model")
    group.add_argument(
        "--loss_fn",
        choices=REWARD_LOSSES,
        default="log_sig",
        help="-log sigmoid(chosen - rejected - margin), or log(1 + exp(rejected - chosen + margin)): the same number",
    )
    add_number(
        group,
        "--center_coef",
        default=0.0,
        unit="C",
        help="adds C x (chosen + rejected)^2: scores around 0",
    )
    add_number(
        group,
        "--head_lr",
        unit="RATE",
        exclusive=True,
        help="learning rate of the new head; default: --lr (1e-3 lets it learn as fast as it should)",
    )
    return _finished(parser, rows_each=2)


def dpo_parser() -> Parser:
    """The parser of ``train_dpo.py``."""
    parser = _parser(
        "train_dpo.py", "Direct preference optimization and its family, on pairs of responses."
    )
    group = parser.add_argument_group("preference")
    _add_loss_flags(group)
    add_number(
        group,
        "--label_smoothing",
        default=0.0,
        unit="E",
        most=0.4999,
        help="share of pairs taken to be labeled the wrong way round: conservative DPO with dpo_loss, "
        "robust, exo_pair",
    )
    add_switch(group, "--length_normalization", help="average log-probs per token instead of sums")
    add_number(
        group,
        "--sft_coef",
        default=0.0,
        unit="A",
        help="adds A x the chosen response's mean negative log-prob",
    )
    add_number(
        group,
        "--ld_alpha",
        unit="A",
        most=1,
        help="weight of the longer response's tokens beyond the shorter one's length (LD-DPO); default: 1",
    )
    _add_reference_flags(parser, switch=True, precompute=True)
    return _finished(parser, rows_each=2, accumulation_steps=1, microbatch_size=2)


def _add_loss_flags(group: _ArgumentGroup) -> None:
    group.add_argument(
        "--loss_type",
        nargs="+",
        type=full_name,
        choices=(*LOSS_TYPES, SFT),
        default="dpo_loss",
        help="the loss over pairs, or several to add up, among them sft (the chosen response's mean "
        "negative log-prob); TRL's sigmoid, ipo and hinge are read too",
    )
    group.add_argument(
        "--loss_weights",
        nargs="+",
        type=number(0, exclusive=True),
        metavar="W",
        help="one weight for each name of --loss_type (MPO: sigmoid bco_pair sft with 0.8 0.2 1); "
        "default: 1 each",
    )
    simpo = LOSS_TYPES["simpo_loss"]
    add_number(
        group,
        "--beta",
        unit="B",
        exclusive=True,
        help=f"weight of the log-ratios of a pair; default: {LOSS_TYPES['dpo_loss'].beta}, and "
        f"{simpo.beta} for simpo_loss",
    )
    add_number(
        group,
        "--gamma",
        unit="G",
        help="target margin (dpo_loss, sigmoid_norm, simpo_loss); default: 0, and "
        f"{simpo.gamma} for simpo_loss",
    )


def orpo_parser() -> Parser:
    """The parser of ``train_orpo.py``."""
    parser = _parser(
        "train_orpo.py",
        "Odds-ratio preference optimization: SFT and preference in one, no reference.",
    )
    group = parser.add_argument_group("preference")
    add_number(
        group,
        "--lam",
        default=0.1,
        unit="L",
        help="weight of the odds ratio beside the chosen answer's loss",
    )
    return _finished(parser, rows_each=2, microbatch_size=2)


def kto_parser() -> Parser:
    """The parser of ``train_kto.py``."""
    parser = _parser(
        "train_kto.py", "Kahneman-Tversky optimization, on single answers judged good or bad."
    )
    group = parser.add_argument_group("preference")
    add_number(
        group,
        "--beta",
        default=0.1,
        unit="B",
        exclusive=True,
        help="weight of a row's gain over the reference",
    )
    for side, what in (("desirable", "good"), ("undesirable", "bad")):
        add_number(
            group,
            f"--{side}_weight",
            default=1.0,
            unit="W",
            exclusive=True,
            help=f"weight of {what} answers",
        )
    add_switch(
        group,
        "--auto_weight",
        help="set --desirable_weight so that good and bad answers weigh alike in all; their ratio should be 1 to 4/3",
    )
    _add_reference_flags(parser, switch=False, precompute=False)
    return _finished(parser, rows_each=1)


def _parser(program: str, description: str) -> Parser:
    parser = Parser(
        prog=program,
        usage="%(prog)s --pretrain MODEL --dataset PATH [PATH ...] [flags]",
        description=description,
    )
    shared.add_model_flags(parser)
    shared.add_data_flags(parser)
    return parser


def _add_reference_flags(parser: Parser, switch: bool, precompute: bool) -> None:
    group = parser.add_argument_group(
        "reference model", "With LoRA it is the same model with its adapters off."
    )
    if switch:
        add_switch(
            group, "--disable_reference_model", help="train without one: its log-probs count as 0"
        )
    add_count(
        group, "--ref_tp", help="plugin 3d: processes that share each of its weights; default: --tp"
    )
    if precompute:
        add_switch(
            group,
            "--precompute_ref",
            help="compute its log-probs once, keep them beside the data, and never load it again",
        )


def _finished(parser: Parser, rows_each: int, **defaults: object) -> Parser:
    shared.add_parallel_flags(parser)
    shared.add_optimization_flags(parser)
    shared.add_epoch_flags(parser)
    shared.add_lora_flags(parser)
    shared.add_output_flags(parser)
    shared.add_logging_flags(parser)
    legacy.add_flags(parser)
    legacy_preferences.add_flags(parser)
    parser.set_defaults(**{"max_length": 2048, "_rows_each": rows_each} | defaults)
    return parser


def parse_rm(argv: Sequence[str] | None = None) -> Namespace:
    """The checked flags of ``train_rm.py``; as :func:`coati.cli.arguments.parse_sft`."""
    return _parse(rm_parser(), argv, check_rm)


def parse_dpo(argv: Sequence[str] | None = None) -> Namespace:
    """The checked flags of ``train_dpo.py``; ``beta`` and ``gamma`` are those of the loss where not
    given."""
    return _parse(dpo_parser(), argv, check_pairs, check_dpo)


def parse_orpo(argv: Sequence[str] | None = None) -> Namespace:
    """The checked flags of ``train_orpo.py``."""
    return _parse(orpo_parser(), argv, check_pairs)


def parse_kto(argv: Sequence[str] | None = None) -> Namespace:
    """The checked flags of ``train_kto.py``."""
    return _parse(kto_parser(), argv, check_kto)


def _parse(
    parser: Parser, argv: Sequence[str] | None, *checks: Callable[[Namespace], None]
) -> Namespace:
    args = parser.parse_args(argv)
    try:
        legacy_preferences.apply_legacy_flags(args)
        for check in (check_sft, *checks):
            check(args)
    except ValueError as error:
        parser.error(str(error))
    return args
