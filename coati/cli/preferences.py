"""The flags of coati rm, coati dpo, coati orpo and coati kto."""

from argparse import Namespace, _ArgumentGroup
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from coati.cli import arguments as shared
from coati.cli.checks import check_offline, checked, requested_options
from coati.cli.lora_flags import add_lora_flags
from coati.cli.parser import OlderFlags, Parser
from coati.cli.preference_checks import check_dpo, check_kto, check_pairs, check_rm
from coati.cli.settings import (
    DPOSettings,
    KTOSettings,
    ORPOSettings,
    RMSettings,
    SLSettings,
    settings_of,
)
from coati.cli.streaming_flags import add_streaming_flags
from coati.cli.values import add_count, add_number, add_switch, number
from coati.models.loss_registry import LOSS_TYPES, REWARD_LOSSES, SFT, full_name

Settings = TypeVar("Settings", bound=SLSettings)
ROWS_PER_PAIR = 2  # of the batch that the model reads


def rm_parser() -> Parser:
    """The parser of ``coati rm``."""
    parser = _parser(
        "coati rm",
        "Reward model: Bradley-Terry ranking loss on preference pairs.",
    )
    group = parser.add_argument_group("reward model")
    group.add_argument(
        "--loss_fn",
        choices=REWARD_LOSSES,
        default="log_sig",
        help="-log sigmoid(chosen - rejected - margin), or log(1 + exp(rejected - chosen + "
        "margin)): the same number",
    )
    add_number(
        group,
        "--center_coef",
        default=0.0,
        unit="C",
        help="center scores around 0: adds C x (chosen + rejected)^2 to the loss",
    )
    add_number(
        group,
        "--head_lr",
        unit="RATE",
        exclusive=True,
        help="peak learning rate of the new head (1e-3 suits most models); default: --lr",
    )
    return _add_shared_flags(parser)


def dpo_parser() -> Parser:
    """The parser of ``coati dpo``."""
    parser = _parser(
        "coati dpo", "Direct preference optimization (DPO) and its family, on preference pairs."
    )
    group = add_pair_loss_flags(parser)
    add_switch(
        group,
        "--wpo",
        help="weigh each pair by how probable the policy finds its responses (WPO), for pairs that "
        "other models wrote",
    )
    add_reference_flags(parser, switch=True, precompute=True)
    return _add_shared_flags(parser, accumulation_steps=1, microbatch_size=2)


def add_pair_loss_flags(parser: Parser, betas: bool = False) -> _ArgumentGroup:
    """The losses over pairs and their options. ``betas``: beta takes several values."""
    group = parser.add_argument_group("preference")
    _add_loss_flags(group, betas)
    add_number(
        group,
        "--label_smoothing",
        default=0.0,
        unit="E",
        most=0.4999,
        help="assumed share of flipped labels: conservative DPO with dpo_loss, robust, exo_pair",
    )
    add_switch(group, "--length_normalization", help="average log-probs over tokens")
    add_number(
        group,
        "--sft_coef",
        default=0.0,
        unit="A",
        help="adds A x the SFT loss of the chosen response (RPO)",
    )
    add_number(
        group,
        "--ld_alpha",
        unit="A",
        most=1,
        help="LD-DPO: weight of the tokens beyond the shorter response's length; default: 1",
    )
    return group


def _add_loss_flags(group: _ArgumentGroup, betas: bool) -> None:
    group.add_argument(
        "--loss_type",
        nargs="+",
        type=full_name,
        choices=(*LOSS_TYPES, SFT),
        default="dpo_loss",
        help="pairwise loss, or several that are added up, among them sft (the SFT loss of the "
        "chosen response); TRL's sigmoid, ipo and hinge are read too",
    )
    group.add_argument(
        "--loss_weights",
        nargs="+",
        type=number(0, exclusive=True),
        metavar="W",
        help="weights of the losses of --loss_type (MPO: sigmoid bco_pair sft with 0.8 0.2 1); "
        "default: 1 each",
    )
    simpo = LOSS_TYPES["simpo_loss"]
    usual = f"default: {LOSS_TYPES['dpo_loss'].beta}, and {simpo.beta} for simpo_loss"
    if betas:
        group.add_argument(
            "--beta",
            nargs="+",
            type=number(0, exclusive=True),
            metavar="B",
            help="temperature beta of the loss, or several, each for an equal part of the "
            f"episodes; {usual}",
        )
    else:
        about = f"temperature beta of the loss; {usual}"
        add_number(group, "--beta", unit="B", exclusive=True, help=about)
    add_number(
        group,
        "--gamma",
        unit="G",
        help="target margin (dpo_loss, sigmoid_norm, simpo_loss); default: 0, and "
        f"{simpo.gamma} for simpo_loss",
    )


def orpo_parser() -> Parser:
    """The parser of ``coati orpo``."""
    parser = _parser(
        "coati orpo",
        "Odds-ratio preference optimization (ORPO): SFT and preferences in one stage, without a "
        "reference model.",
    )
    group = parser.add_argument_group("preference")
    add_number(
        group,
        "--lam",
        default=0.1,
        unit="L",
        help="weight of the odds-ratio loss beside the SFT loss of the chosen response",
    )
    return _add_shared_flags(parser, microbatch_size=2)


def kto_parser() -> Parser:
    """The parser of ``coati kto``."""
    parser = _parser(
        "coati kto",
        "Kahneman-Tversky optimization (KTO), on single responses labeled desirable or not.",
    )
    group = parser.add_argument_group("preference")
    add_number(
        group,
        "--beta",
        default=0.1,
        unit="B",
        exclusive=True,
        help="temperature beta of the loss",
    )
    for side in ("desirable", "undesirable"):
        add_number(
            group,
            f"--{side}_weight",
            default=1.0,
            unit="W",
            exclusive=True,
            help=f"weight of {side} responses",
        )
    add_switch(
        group,
        "--auto_weight",
        help="set --desirable_weight so that desirable and undesirable responses have equal total "
        "weight (their ratio should be 1 to 4/3)",
    )
    add_reference_flags(parser, switch=False, precompute=False)
    return _add_shared_flags(parser)


def _parser(program: str, description: str) -> Parser:
    parser = Parser(
        prog=program,
        usage="%(prog)s --pretrain MODEL --dataset PATH [PATH ...] [flags]",
        description=description,
    )
    shared.add_model_flags(parser)
    shared.add_data_flags(parser)
    add_streaming_flags(parser)
    return parser


def add_reference_flags(parser: Parser, switch: bool, precompute: bool) -> None:
    """``switch``: it can be left out. ``precompute``: its log-probs can be kept."""
    group = parser.add_argument_group(
        "reference model", "With LoRA it is the policy with its adapters off."
    )
    if switch:
        add_switch(
            group,
            "--disable_reference_model",
            help="train without a reference model: its log-probs are 0",
        )
    add_count(
        group,
        "--ref_tp",
        help="--plugin 3d: tensor parallel size of the reference model; default: --tp",
    )
    if precompute:
        add_switch(
            group,
            "--precompute_ref",
            help="compute reference log-probs once, cached beside the data; the reference model is "
            "then not loaded",
        )


def _add_shared_flags(parser: Parser, **defaults: object) -> Parser:
    shared.add_parallel_flags(parser)
    shared.add_optimization_flags(parser)
    shared.add_embedding_lr_flag(parser)
    shared.add_epoch_flags(parser)
    add_lora_flags(parser)
    shared.add_output_flags(parser)
    shared.add_logging_flags(parser)
    parser.set_defaults(**{"max_length": 2048} | defaults)
    return parser


def parse_rm(
    argv: Sequence[str] | None = None,
    older: OlderFlags | None = None,
    prog: str | None = None,
) -> RMSettings:
    """The checked flags of ``coati rm``; as :func:`coati.cli.arguments.parse_sft`."""
    return _parse(RMSettings, rm_parser().named(prog), argv, older, ROWS_PER_PAIR, check_rm)


def parse_dpo(
    argv: Sequence[str] | None = None,
    older: OlderFlags | None = None,
    prog: str | None = None,
) -> DPOSettings:
    """The checked flags of ``coati dpo``; ``beta`` and ``gamma`` are those of the loss where not
    given."""
    return _parse(
        DPOSettings, dpo_parser().named(prog), argv, older, ROWS_PER_PAIR, check_pairs, check_dpo
    )


def parse_orpo(
    argv: Sequence[str] | None = None,
    older: OlderFlags | None = None,
    prog: str | None = None,
) -> ORPOSettings:
    """The checked flags of ``coati orpo``."""
    return _parse(ORPOSettings, orpo_parser().named(prog), argv, older, ROWS_PER_PAIR, check_pairs)


def parse_kto(
    argv: Sequence[str] | None = None,
    older: OlderFlags | None = None,
    prog: str | None = None,
) -> KTOSettings:
    """The checked flags of ``coati kto``."""
    return _parse(KTOSettings, kto_parser().named(prog), argv, older, 1, check_kto)


def _parse(
    kind: type[Settings],
    parser: Parser,
    argv: Sequence[str] | None,
    older: OlderFlags | None,
    rows_per_sample: int,
    *checks: Callable[[Namespace], None],
) -> Settings:
    shared_check = partial(check_offline, rows_per_sample=rows_per_sample)
    args = checked(parser, argv, shared_check, *checks, older=older)
    return settings_of(
        kind, args, parallel=requested_options(args, rows_per_sample=rows_per_sample)
    )
