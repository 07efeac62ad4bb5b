"""The flags of an update of PPO and GRPO: its passes, the policy's loss, the correction for
responses of older weights, and the critic."""

import argparse
from argparse import Namespace

from coati.cli.parser import Parser
from coati.cli.values import add_count, add_number, add_text, number, table
from coati.experience_maker.advantage_registry import GROUP_METHODS
from coati.models.policy_registry import (
    CISPO_CAP,
    LOSS_AGG_MODES,
    POLICY_LOSSES,
    ROLLOUT_IS,
    SAPO_TAU,
)

CLIP = 0.2


def add_update_flags(parser: Parser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group(
        "update",
        "num_collect_steps x experience_batch_size (x num_generations) must be "
        "a whole multiple of train_batch_size x accumulation_steps.",
    )
    add_count(
        group, "--num_update_steps", default=5, help="passes over the responses of an episode"
    )
    add_count(
        group,
        "--train_batch_size",
        default=16,
        unit="ROWS",
        help="responses per micro-batch and process",
    )
    add_count(
        group,
        "--buffer_limit",
        default=0,
        unit="ROWS",
        least=0,
        help="newest responses kept in the buffer, per process; 0: all",
    )
    _add_loss_flags(parser, group)
    add_number(
        group,
        "--skip_threshold",
        default=20.0,
        unit="R",
        exclusive=True,
        help="skip the update when the mean importance ratio exceeds R",
    )
    _add_correction_flags(group)
    return group


def _add_loss_flags(parser: Parser, group: argparse._ArgumentGroup) -> None:
    """The policy's loss."""
    group.add_argument(
        "--policy_loss",
        choices=tuple(POLICY_LOSSES),
        default="ppo",
        help=table(
            "surrogate loss of the policy", {name: row.about for name, row in POLICY_LOSSES.items()}
        ),
    )
    of_algo = "" if parser.action_of("--algo") is None else ", or that of --algo"
    group.add_argument(
        "--loss_agg_mode",
        choices=tuple(LOSS_AGG_MODES),
        help=table("what the policy loss is a mean of", LOSS_AGG_MODES)
        + f"; default: that of --policy_loss{of_algo or ', or token-mean'}",
    )
    add_number(
        group,
        "--clip_eps",
        unit="E",
        exclusive=True,
        help="clip range epsilon of the ratio; default: 0.2, of gspo see the next two",
    )
    add_number(
        group,
        "--clip_eps_low",
        unit="E",
        exclusive=True,
        most=1,
        help="lower clip range (1 - E); default: --clip_eps, and 3e-4 for gspo",
    )
    upper = "" if parser.action_of("--algo") is None else ", 0.28 for dapo"
    add_number(
        group,
        "--clip_eps_high",
        unit="E",
        exclusive=True,
        help=f"upper clip range (1 + E); default: --clip_eps, 4e-4 for gspo{upper}",
    )
    _add_own_flags(group)


def _add_own_flags(group: argparse._ArgumentGroup) -> None:
    """Of one loss each, and the bonus of all."""
    add_number(
        group,
        "--dual_clip",
        unit="C",
        exclusive=True,
        help="ppo: bound of the ratio where the advantage is negative, above 1; 3 is usual; "
        "default: none (arXiv 1912.09729)",
    )
    add_number(
        group,
        "--cispo_cap",
        unit="R",
        exclusive=True,
        help=f"cispo: largest weight; default: {CISPO_CAP:g}",
    )
    group.add_argument(
        "--sapo_tau",
        nargs=2,
        type=number(0, exclusive=True),
        metavar=("POSITIVE", "NEGATIVE"),
        help="sapo: temperature of the gate for tokens of positive and of negative advantage; "
        f"default: {SAPO_TAU[0]:g} {SAPO_TAU[1]:g}",
    )
    add_number(
        group,
        "--entropy_coef",
        default=0.0,
        unit="C",
        help="entropy bonus: C x the entropy of the policy at each token, over the whole "
        "vocabulary, is taken off the loss; 0: none",
    )


def _add_correction_flags(group: argparse._ArgumentGroup) -> None:
    """For responses of older weights."""
    group.add_argument(
        "--rollout_is",
        choices=tuple(ROLLOUT_IS),
        default="token",
        help=table(
            "truncated importance weight of the policy loss, for responses of older weights than "
            "the update begins with (--rollouts_ahead)",
            ROLLOUT_IS,
        ),
    )
    add_number(
        group,
        "--rollout_is_cap",
        unit="W",
        help="largest importance weight, at least 1; default: 2 with token, 3 with sequence",
    )
    group.add_argument(
        "--rollout_is_mask",
        nargs=2,
        type=number(0),
        metavar=("LOW", "HIGH"),
        help="leave tokens (with sequence: responses) out of the policy loss whose ratio is below "
        "LOW or above HIGH; default: none",
    )


def add_critic_flags(parser: Parser) -> None:
    about = "Initialized from the reward model, else from --pretrain with a zero head."
    group = parser.add_argument_group("critic", about)
    add_text(group, "--critic_pretrain", unit="MODEL", help="initialize from this model instead")
    add_text(
        group,
        "--critic_checkpoint_path",
        help="weights of a trained critic (the critic directory of a run)",
    )
    add_number(
        group,
        "--critic_lr",
        default=9e-6,
        unit="RATE",
        exclusive=True,
        help="peak learning rate of the critic",
    )
    add_number(
        group,
        "--value_clip",
        default=0.2,
        unit="E",
        exclusive=True,
        help="PPO value-function clip range",
    )


def check_policy_loss(args: Namespace) -> None:
    """Resolves the clip ranges of a loss that has them. Raises ValueError for options of another
    loss, and a dual clip that is none."""
    row = POLICY_LOSSES[args.policy_loss]
    options = {name for each in POLICY_LOSSES.values() for name in each.takes}
    for name in sorted(options - set(row.takes)):
        if getattr(args, name) is not None:
            of = " and ".join(n for n, each in POLICY_LOSSES.items() if name in each.takes)
            raise ValueError(
                f"--{name} does nothing with --policy_loss {args.policy_loss}, it is of {of}; "
                "leave one of the two out"
            )
    if args.dual_clip is not None and args.dual_clip <= 1:
        raise ValueError(
            f"--dual_clip {args.dual_clip:g} bounds a ratio that is 1 where the policy has not "
            "moved; give more than 1, 3 is usual"
        )
    if "clip_eps" not in row.takes:
        return
    algo = getattr(args, "algo", None)
    above = None if algo is None else GROUP_METHODS[algo].clip_high
    given = args.clip_eps
    args.clip_eps_high = args.clip_eps_high or given or row.clip_high or above or CLIP
    args.clip_eps = given or row.clip_low or CLIP
    args.clip_eps_low = args.clip_eps_low or min(args.clip_eps, 1.0)
    if args.dual_clip is not None and args.dual_clip <= 1 + args.clip_eps_high:
        raise ValueError(
            f"--dual_clip {args.dual_clip:g} lies inside of the clip range, up to "
            f"{1 + args.clip_eps_high:g}; give more, 3 is usual"
        )
