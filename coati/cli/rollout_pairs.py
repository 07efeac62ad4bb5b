"""The flags of coati online-dpo."""

from argparse import Namespace
from collections.abc import Sequence

from coati.cli import rollout_flags as flags
from coati.cli.checks import checked, requested_options
from coati.cli.online_settings import (
    AdvantageSettings,
    KLPenalty,
    OnlineDPOSettings,
    RewardSettings,
    UpdateSettings,
)
from coati.cli.parser import OlderFlags, Parser
from coati.cli.preference_checks import check_dpo
from coati.cli.preferences import ROWS_PER_PAIR, add_pair_loss_flags, add_reference_flags
from coati.cli.reward_flags import add_reward_flags
from coati.cli.rollout_checks import KL_HORIZON, check_online
from coati.cli.rollouts import add_shared_flags, online_groups, online_parser
from coati.cli.settings import filled, settings_of
from coati.cli.values import add_count, add_number
from coati.experience_buffer.batch_sizes import optimizer_steps_per_pass

# What the flags of PPO and GRPO say that there are none of here: KL is in the loss, by its beta.
NO_KL = KLPenalty(
    kl_coef=0.0, kl_estimator="k1", kl_in="loss", kl_target=None, kl_horizon=KL_HORIZON
)
NO_SURROGATE = {
    **{"policy_loss": "ppo", "loss_agg_mode": None, "clip_eps_low": None, "clip_eps_high": None},
    **{"dual_clip": None, "cispo_cap": None, "sapo_tau": None, "entropy_coef": 0.0},
    **{"skip_threshold": 20.0, "buffer_limit": 0},
}
NO_CORRECTION = {"rollout_is": "none", "rollout_is_cap": None, "rollout_is_mask": None}
NO_SHAPE = {"reward_clip": 0.0, "reward_normalization": "none"}


def online_dpo_parser() -> Parser:
    """The parser of ``coati online-dpo``."""
    parser = online_parser(
        "coati online-dpo",
        "Online DPO: pairs of the policy's own responses, told apart by a judge, a reward model or "
        "reward functions, and DPO on them.",
    )
    add_pair_loss_flags(parser, betas=True)
    add_reference_flags(parser, switch=True, precompute=False)
    flags.add_data_flags(parser)
    group = flags.add_rollout_flags(parser)
    add_count(
        group,
        "--num_generations",
        default=2,
        help="responses per prompt, of which the best and the worst make a pair",
    )
    parser.action_of("--rollouts_ahead").help = (
        "episodes whose pairs are asked for while another is trained: theirs are of weights that "
        "are N episodes older"
    )
    group = parser.add_argument_group("sampling")
    add_number(
        group,
        "--temperature",
        default=1.0,
        unit="T",
        exclusive=True,
        help="sampling temperature; the loss is of temperature 1",
    )
    flags.add_sampling_flags(group)
    add_reward_flags(parser, reward_clip=None)
    group = parser.add_argument_group(
        "update",
        "num_collect_steps x experience_batch_size, one pair for each prompt, must be a whole "
        "multiple of train_batch_size x accumulation_steps.",
    )
    add_count(group, "--num_update_steps", default=1, help="passes over the pairs of an episode")
    add_count(
        group,
        "--train_batch_size",
        default=8,
        unit="PAIRS",
        help="pairs per micro-batch and process",
    )
    return add_shared_flags(parser, lr=5e-7, accumulation_steps=2)


def parse_online_dpo(
    argv: Sequence[str] | None = None,
    older: OlderFlags | None = None,
    prog: str | None = None,
) -> OnlineDPOSettings:
    """The checked flags of ``coati online-dpo``; as :func:`~coati.cli.rollouts.parse_grpo`."""
    args = checked(
        online_dpo_parser().named(prog),
        argv,
        check_online_dpo,
        check_dpo,
        _settle_beta,
        older=older,
    )
    given = vars(args)
    return settings_of(
        OnlineDPOSettings,
        args,
        parallel=requested_options(args, args.train_batch_size, ROWS_PER_PAIR),
        kl=NO_KL,
        update=filled(UpdateSettings, given, **NO_SURROGATE, **NO_CORRECTION),
        advantage=AdvantageSettings(),
        reward=filled(RewardSettings, given, **NO_SHAPE),
        **online_groups(args),
    )


def check_online_dpo(args: Namespace) -> None:
    """What online DPO shares with PPO and GRPO, and what is another there."""
    if args.environment is not None:
        raise ValueError(
            f"--environment {args.environment}: DPO compares two responses to one prompt, and an "
            "environment goes on otherwise after each; take coati grpo, or leave it out"
        )
    if args.num_generations < 2:
        raise ValueError(
            f"--num_generations {args.num_generations}: a pair takes two responses to a prompt or "
            "more; 2 is usual"
        )
    check_online(args, _check_pairs_of_an_episode)


def _check_pairs_of_an_episode(args: Namespace) -> None:
    """The buffer equation in pairs, and the batch sizes of inference."""
    optimizer_steps_per_pass(
        args.num_collect_steps,
        args.experience_batch_size,
        args.train_batch_size,
        args.accumulation_steps,
        what="pairs",
    )
    sampled = args.experience_batch_size * args.num_generations
    args.inference_batch_size = args.inference_batch_size or sampled
    args.logits_forward_batch_size = (
        args.logits_forward_batch_size or ROWS_PER_PAIR * args.train_batch_size
    )


def _settle_beta(args: Namespace) -> None:
    """One value, where the loss's own default is taken."""
    if isinstance(args.beta, float):
        args.beta = [args.beta]
    if args.beta is not None and len(args.beta) > args.num_episodes:
        raise ValueError(
            f"--beta has {len(args.beta)} values for --num_episodes {args.num_episodes}: each is "
            "of one episode or more"
        )
