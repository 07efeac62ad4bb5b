"""The groups of flags of coati ppo and coati grpo."""

import argparse

from coati.cli import arguments as shared
from coati.cli.engine_flags import add_engine_choice
from coati.cli.parser import Parser
from coati.cli.reward_flags import add_slow_reward_flags, names_of_rewards
from coati.cli.rollout_checks import KL_HORIZON, MAX_TURNS, PLACES_OF_KL
from coati.cli.row_flags import add_column_flags, add_learn_flag
from coati.cli.values import add_count, add_number, add_switch, add_text, number
from coati.environments.environment_table import ENVIRONMENTS
from coati.experience_maker.advantage_registry import REWARD_NORMALIZATIONS
from coati.models.policy_registry import KL_ESTIMATORS, ROLLOUT_IS
from coati.rewards.registry import DEFAULT_TIMEOUT

# --algo in older documents.
ALGORITHMS = {
    "reinforce_ppb": "reinforce_pp_baseline",
    "reinforce++": "reinforce_pp",
    "dr.grpo": "dr_grpo",
}


def table(what: str, rows: dict[str, str], sign: str = ":") -> str:
    """A flag's help that says what each of its choices means."""
    return f"{what}. " + "; ".join(f"{name}{sign} {about}" for name, about in rows.items()).replace(
        "%", "%%"
    )


def algorithm(text: str) -> str:
    return ALGORITHMS.get(text.lower(), text.lower())


def add_data_flags(parser: Parser) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompt_dataset",
        "--dataset",
        nargs="+",
        default=[],
        metavar="PATH",
        help="prompts: directories written by coati prepare --type prompt, or raw json, jsonl "
        "or parquet files, which are prepared into a cache first; a final response in a row is "
        "dropped (required)",
    )
    group.add_argument(
        "--dataset_weights",
        nargs="+",
        type=number(0, exclusive=True),
        default=[],
        metavar="W",
        help="sampling weights of the mixture, one for each path; default: every prompt once "
        "before any comes again",
    )
    group.add_argument(
        "--eval_prompt_dataset",
        "--eval_dataset",
        nargs="+",
        default=[],
        metavar="PATH",
        help="held-out prompts: reward, length and KL of the responses are evaluated on them",
    )
    shared.add_eval_ratio_flag(group, "--prompt_dataset", "--eval_prompt_dataset")
    add_count(
        group,
        "--eval_interval",
        unit="EPISODES",
        least=0,
        help="episodes between evaluations, 0: only before and after training; default: a tenth of "
        "--num_episodes",
    )
    add_column_flags(group, "raw prompts: ")
    shared.add_template_flag(group)
    add_count(
        group,
        "--max_length",
        default=2048,
        unit="TOKENS",
        least=2,
        help="prompt and response together; prompts longer than --max_length less --max_seq_len "
        "are left out and counted",
    )
    add_count(group, "--max_samples", help="the first N rows of --prompt_dataset; default: all")
    _add_ptx_flags(parser)


def _add_ptx_flags(parser: Parser) -> None:
    group = parser.add_argument_group(
        "pretraining mix (ptx)", "An SFT loss beside the policy loss, against forgetting."
    )
    group.add_argument(
        "--ptx_dataset",
        "--pretrain_dataset",
        nargs="+",
        default=[],
        metavar="PATH",
        help="conversations as for coati sft, prepared or raw",
    )
    add_learn_flag(group)
    add_number(
        group,
        "--ptx_coef",
        default=0.0,
        unit="C",
        most=1,
        help="weight of the SFT loss: (1 - C) x policy loss + C x SFT loss; 0: none",
    )
    add_count(
        group,
        "--ptx_batch_size",
        default=4,
        unit="ROWS",
        help="conversations per micro-batch of --train_batch_size responses",
    )
    add_switch(
        group, "--disable_loss_mask", help="SFT on every token, not only the assistant's turns"
    )


def add_rollout_flags(parser: Parser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group(
        "rollout", "An episode collects responses, then trains on them."
    )
    add_count(
        group,
        "--num_episodes",
        default=1,
        help="episodes of the run, which --save_interval and others count",
    )
    add_count(group, "--num_collect_steps", default=2, help="prompt batches per episode")
    add_count(
        group,
        "--experience_batch_size",
        default=16,
        unit="PROMPTS",
        help="prompts per batch and process (with --tp: per tensor parallel group)",
    )
    add_count(group, "--max_seq_len", default=256, unit="TOKENS", help="longest response in tokens")
    add_count(
        group,
        "--inference_batch_size",
        unit="ROWS",
        help="responses sampled at once; default: the whole batch",
    )
    add_count(
        group,
        "--logits_forward_batch_size",
        unit="ROWS",
        help="responses per forward pass for log-probs, values and scores; default: "
        "--train_batch_size",
    )
    _add_engine_flags(group)
    _add_environment_flags(group)
    add_count(
        group,
        "--sample_interval",
        default=10,
        unit="EPISODES",
        least=0,
        help="episodes between tables of sample responses; 0: none",
    )
    add_switch(
        group,
        "--offload_inference_models",
        help="keep the reward model and the reference model in host memory while idle",
    )
    return group


def _add_engine_flags(group: argparse._ArgumentGroup) -> None:
    """What samples, and when."""
    add_engine_choice(group)
    add_count(
        group,
        "--rollouts_ahead",
        default=0,
        unit="EPISODES",
        least=0,
        help="episodes whose responses are asked for while another is trained: theirs are of "
        "weights that are N episodes older, see --rollout_is",
    )


def _add_environment_flags(group: argparse._ArgumentGroup) -> None:
    """What responds to the policy."""
    listed = {name: row.about for name, row in ENVIRONMENTS.items()}
    add_text(
        group,
        "--environment",
        unit="NAME",
        help=table(
            "what answers the policy, which then responds again: several turns a sample, tools "
            "among them",
            listed,
        )
        + "; or path.py:Class of your own. Its rewards are added to the others. Takes raw prompts",
    )
    add_text(
        group,
        "--environment_args",
        unit="JSON",
        help='what the environment is made with, a JSON object: \'{"folder": "docs"}\' for search',
    )
    add_count(
        group,
        "--max_turns",
        help="with --environment: responses of a sample, all turns of which share --max_seq_len "
        f"tokens; default: {MAX_TURNS}",
    )


def add_sampling_flags(group: argparse._ArgumentGroup) -> None:
    """What comes after the temperature."""
    add_count(
        group,
        "--top_k",
        default=0,
        least=0,
        unit="K",
        help="top-k sampling, 0: off. Log-probs are of the full distribution: with this, --top_p "
        "or --repetition_penalty, KL estimates are biased",
    )
    add_number(
        group,
        "--top_p",
        default=1.0,
        unit="P",
        exclusive=True,
        most=1,
        help="nucleus sampling: the smallest set of tokens with cumulative probability P; 1: off",
    )
    add_number(
        group,
        "--repetition_penalty",
        default=1.0,
        unit="R",
        exclusive=True,
        help="penalty of tokens that already occurred (CTRL); 1: none",
    )


def add_reward_flags(parser: Parser, reward_clip: float) -> None:
    group = parser.add_argument_group(
        "reward", "A reward model, reward functions, or the sum of both."
    )
    add_text(
        group,
        "--rm_pretrain",
        unit="MODEL",
        help="reward model of coati rm; with --rm_checkpoint_path: its architecture only",
    )
    add_text(
        group,
        "--rm_checkpoint_path",
        help="directory with the weights and head of the reward model",
    )
    add_switch(
        group,
        "--no_neural_reward_model",
        help="reward functions only; --rm_pretrain then initializes the critic",
    )
    group.add_argument(
        "--reward_functions",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"{names_of_rewards()}, which is given all responses of a batch",
    )
    group.add_argument(
        "--reward_weights",
        nargs="+",
        type=_weight,
        default=[],
        metavar="W",
        help="weight of each reward function, possibly negative; default: 1 each",
    )
    _add_score_flags(group, reward_clip)
    add_slow_reward_flags(parser)


def _add_score_flags(group: argparse._ArgumentGroup, reward_clip: float) -> None:
    """What is made of scores."""
    add_number(
        group,
        "--reward_timeout",
        default=DEFAULT_TIMEOUT,
        unit="SECONDS",
        help="time limit of a reward function for a batch, of a function of one response that is "
        "async for each, and of a request with all its retries; 0: none",
    )
    add_number(
        group,
        "--reward_clip",
        default=reward_clip,
        unit="R",
        help="clip scores to -R .. R; 0: no clipping",
    )
    group.add_argument(
        "--reward_normalization",
        choices=REWARD_NORMALIZATIONS,
        default="none",
        help="running: normalize scores by the running mean and deviation",
    )
    add_number(
        group,
        "--missing_eos_penalty",
        default=0.0,
        unit="P",
        help="subtracted from the score of a response without end token",
    )


def _weight(text: str) -> float:
    try:
        return number(float("-inf"))(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}") from None


def add_kl_flags(
    parser: Parser, kl_coef: float, places: tuple[str, ...]
) -> argparse._ArgumentGroup:
    about = (
        "KL penalty to the reference model, --pretrain; with LoRA the policy without its adapters."
    )
    group = parser.add_argument_group("KL", about)
    add_number(
        group,
        "--kl_coef",
        default=kl_coef,
        unit="C",
        help="weight of the KL penalty; 0: none, and no reference model is loaded",
    )
    default = "k1" if len(places) == 1 else None
    spoken = "" if default else "; default: k3 in the loss, k1 in the reward"
    group.add_argument(
        "--kl_estimator",
        choices=tuple(KL_ESTIMATORS),
        default=default,
        help=table("x is log-prob - reference log-prob", KL_ESTIMATORS, " =") + spoken,
    )
    group.add_argument(
        "--kl_in",
        choices=places,
        default=places[0],
        help=table("where the penalty applies", {name: PLACES_OF_KL[name] for name in places}),
    )
    add_number(
        group,
        "--kl_target",
        unit="KL",
        exclusive=True,
        help="adapt --kl_coef toward this KL per response (summed over tokens); default: fixed",
    )
    add_count(
        group,
        "--kl_horizon",
        default=KL_HORIZON,
        unit="RESPONSES",
        help="horizon of the adaptive controller: responses after which a KL of 1.2 x --kl_target "
        "or more has raised --kl_coef by a fifth",
    )
    return group


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
    add_number(
        group,
        "--clip_eps",
        unit="E",
        exclusive=True,
        help="PPO clip range epsilon; default: 0.2",
    )
    add_number(
        group,
        "--clip_eps_low",
        unit="E",
        exclusive=True,
        most=1,
        help="lower clip range (1 - E); default: --clip_eps",
    )
    upper = "" if parser.action_of("--algo") is None else ", and 0.28 for dapo"
    add_number(
        group,
        "--clip_eps_high",
        unit="E",
        exclusive=True,
        help=f"upper clip range (1 + E); default: --clip_eps{upper}",
    )
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
