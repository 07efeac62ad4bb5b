"""The groups of flags of coati ppo, grpo and online-dpo, up to the KL penalty; rewards are in
reward_flags.py, the update in update_flags.py."""

import argparse

from coati.cli import arguments as shared
from coati.cli.engine_flags import add_engine_choice
from coati.cli.parser import Parser
from coati.cli.rollout_checks import KL_HORIZON, MAX_TURNS, PLACES_OF_KL
from coati.cli.row_flags import add_column_flags, add_learn_flag
from coati.cli.values import (
    add_count,
    add_number,
    add_switch,
    add_text,
    number,
    table,
    whole_number,
)
from coati.environments.environment_table import ENVIRONMENTS
from coati.models.policy_registry import KL_ESTIMATORS

# --algo in older documents, and in other libraries.
ALGORITHMS = {
    "reinforce_ppb": "reinforce_pp_baseline",
    "reinforce++": "reinforce_pp",
    "reinforce++_baseline": "reinforce_pp_baseline",
    "reinforce_plus_plus": "reinforce_pp",
    "reinforce_plus_plus_baseline": "reinforce_pp_baseline",
    "dr.grpo": "dr_grpo",
    "group": "grpo",
    "group_norm": "grpo",
}


def algorithm(text: str) -> str:
    """The group method that ``text`` names. Raises ArgumentTypeError for the one with a critic."""
    name = text.lower().replace("-", "_")
    if name == "gae":
        raise argparse.ArgumentTypeError("gae has a critic: use coati ppo")
    return ALGORITHMS.get(name, name)


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
    _add_pass_at_flags(group)
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


def _add_pass_at_flags(group: argparse._ArgumentGroup) -> None:
    """pass@k of evaluations."""
    group.add_argument(
        "--eval_pass_at",
        nargs="+",
        type=whole_number(1),
        default=[],
        metavar="K",
        help="evaluations estimate pass@k too, each with a 95%% interval: the chance that one of k "
        "responses is right (arXiv 2107.03374)",
    )
    add_count(
        group,
        "--eval_generations",
        help="with --eval_pass_at: responses to each evaluation prompt; default: the largest K",
    )
    group.add_argument(
        "--eval_right",
        type=number(float("-inf")),
        metavar="REWARD",
        help="with --eval_pass_at: a response of this reward or more is right; default: what "
        "gsm8k, math_competition and python_tests give to a right one",
    )


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
        help="responses sampled at once, of which one that has ended gives its place to the next; "
        "default: the whole batch",
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
