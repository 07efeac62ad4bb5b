"""The groups of flags of train_ppo.py and train_grpo.py."""

import argparse

from coati.cli import arguments as shared
from coati.cli.parser import Parser
from coati.cli.rollout_checks import KL_HORIZON, PLACES_OF_KL
from coati.cli.values import add_count, add_number, add_switch, add_text, number
from coati.experience_maker.advantage_registry import REWARD_NORMALIZATIONS
from coati.models.policy_registry import KL_ESTIMATORS
from coati.rewards.registry import REWARDS
from coati.rewards.scorer import DEFAULT_TIMEOUT

ENGINES = ("model", "vllm")
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
        help="prompts: arrow part directories (prepare_dataset.py --type prompt), or raw json, jsonl or parquet files, "
        "which are prepared into a cache first; an answer at the end of a row is left out "
        "(required)",
    )
    group.add_argument(
        "--dataset_weights",
        nargs="+",
        type=number(0, exclusive=True),
        default=[],
        metavar="W",
        help="one number for each path: how often its prompts are drawn, relative to the others; default: every "
        "prompt once before any comes again",
    )
    group.add_argument(
        "--eval_prompt_dataset",
        "--eval_dataset",
        nargs="+",
        default=[],
        metavar="PATH",
        help="prompts to evaluate on: reward, length and KL of answers to what is not trained on",
    )
    add_count(
        group,
        "--eval_interval",
        unit="EPISODES",
        least=0,
        help="episodes between evaluations, 0: only before and after training; default: a tenth of --num_episodes",
    )
    shared.add_template_flag(group)
    add_count(
        group,
        "--max_length",
        default=2048,
        unit="TOKENS",
        least=2,
        help="prompt and response together; prompts longer than --max_length less --max_seq_len are left out, counted",
    )
    add_count(group, "--max_samples", help="the first N rows of --prompt_dataset; default: all")
    group = parser.add_argument_group(
        "SFT beside it (ptx)", "Keeps the model from forgetting how to write."
    )
    group.add_argument(
        "--ptx_dataset",
        "--pretrain_dataset",
        nargs="+",
        default=[],
        metavar="PATH",
        help="conversations as for train_sft.py, prepared or raw",
    )
    add_number(
        group,
        "--ptx_coef",
        default=0.0,
        unit="C",
        most=1,
        help="the loss is (1 - C) x policy + C x SFT; 0: no SFT",
    )
    add_count(
        group,
        "--ptx_batch_size",
        default=4,
        unit="ROWS",
        help="conversations beside each --train_batch_size",
    )
    add_switch(group, "--disable_loss_mask", help="SFT on all tokens, not on the assistant's alone")


def add_rollout_flags(parser: Parser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group(
        "rollout", "An episode collects responses, then trains on them."
    )
    add_count(
        group,
        "--num_episodes",
        default=1,
        help="episodes of the run; --save_interval and others count them",
    )
    add_count(
        group, "--num_collect_steps", default=2, help="batches of prompts answered in an episode"
    )
    add_count(
        group,
        "--experience_batch_size",
        default=16,
        unit="PROMPTS",
        help="prompts in such a batch, per process (with --tp: per group of processes that share weights)",
    )
    add_count(
        group, "--max_seq_len", default=256, unit="TOKENS", help="longest response, in new tokens"
    )
    add_count(
        group,
        "--inference_batch_size",
        unit="ROWS",
        help="responses sampled at once; default: a whole batch",
    )
    add_count(
        group,
        "--logits_forward_batch_size",
        unit="ROWS",
        help="responses in one forward pass for log-probs, values and scores; default: --train_batch_size",
    )
    group.add_argument(
        "--rollout_engine",
        choices=ENGINES,
        default="model",
        help="what samples: the trained model itself, or vLLM (to be installed; needs GPUs)",
    )
    add_count(
        group,
        "--sample_interval",
        default=10,
        unit="EPISODES",
        least=0,
        help="between sample tables; 0: none",
    )
    add_switch(
        group,
        "--offload_inference_models",
        help="keep reward model and reference in host memory while idle",
    )
    return group


def add_sampling_flags(group: argparse._ArgumentGroup) -> None:
    """What comes after the temperature."""
    add_count(
        group,
        "--top_k",
        default=0,
        least=0,
        unit="K",
        help="sample among the K likeliest tokens, 0: all. Log-probs are of the whole distribution: with this, or "
        "--top_p or --repetition_penalty, KL estimates come out wrong",
    )
    add_number(
        group,
        "--top_p",
        default=1.0,
        unit="P",
        exclusive=True,
        most=1,
        help="sample among the likeliest tokens that have this probability together; 1: all",
    )
    add_number(
        group,
        "--repetition_penalty",
        default=1.0,
        unit="R",
        exclusive=True,
        help="above 1: makes tokens that are there already less likely",
    )


def add_reward_flags(parser: Parser, reward_clip: float) -> None:
    group = parser.add_argument_group("reward", "A reward model, functions, or both: their sum.")
    add_text(
        group,
        "--rm_pretrain",
        unit="MODEL",
        help="reward model of train_rm.py; with --rm_checkpoint_path its architecture alone",
    )
    add_text(
        group, "--rm_checkpoint_path", help="directory with weights and head of the reward model"
    )
    add_switch(
        group,
        "--no_neural_reward_model",
        help="functions alone; --rm_pretrain is then the critic's start",
    )
    group.add_argument(
        "--reward_functions",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"{', '.join(REWARDS)}, or path.py:function of your own, which gets all responses of a batch",
    )
    group.add_argument(
        "--reward_weights",
        nargs="+",
        type=_weight,
        default=[],
        metavar="W",
        help="one number for each function, negative ones too; default: 1 each",
    )
    add_number(
        group,
        "--reward_timeout",
        default=DEFAULT_TIMEOUT,
        unit="SECONDS",
        help="that a function may take for a batch; 0: no limit",
    )
    add_number(
        group,
        "--reward_clip",
        default=reward_clip,
        unit="R",
        help="scores are cut to -R .. R; 0: not at all",
    )
    group.add_argument(
        "--reward_normalization",
        choices=REWARD_NORMALIZATIONS,
        default="none",
        help="running: scores are brought to mean 0 and spread 1 of all scores so far",
    )
    add_number(
        group,
        "--missing_eos_penalty",
        default=0.0,
        unit="P",
        help="taken off the score of a response that did not end",
    )


def _weight(text: str) -> float:
    try:
        return number(float("-inf"))(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}") from None


def add_kl_flags(
    parser: Parser, kl_coef: float, places: tuple[str, ...]
) -> argparse._ArgumentGroup:
    about = "Holds the model near --pretrain, the reference; with LoRA that is the same model with its adapters off."
    group = parser.add_argument_group("KL", about)
    add_number(
        group,
        "--kl_coef",
        default=kl_coef,
        unit="C",
        help="weight of the KL; 0: none, and no reference is loaded",
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
        help=table("where it counts", {name: PLACES_OF_KL[name] for name in places}),
    )
    add_number(
        group,
        "--kl_target",
        unit="KL",
        exclusive=True,
        help="--kl_coef is moved so that the KL of a response (sum over its tokens) comes near this; default: fixed",
    )
    add_count(
        group,
        "--kl_horizon",
        default=KL_HORIZON,
        unit="RESPONSES",
        help="after so many, a KL of 1.2 times --kl_target or more has raised --kl_coef by a fifth",
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
        group, "--train_batch_size", default=16, unit="ROWS", help="responses per batch and process"
    )
    add_count(
        group,
        "--buffer_limit",
        default=0,
        unit="ROWS",
        least=0,
        help="newest responses kept, per process; 0: all",
    )
    add_number(
        group,
        "--clip_eps",
        unit="E",
        exclusive=True,
        help="a probability may move by a factor of 1 - E to 1 + E before its gradient stops; default: 0.2",
    )
    add_number(
        group,
        "--clip_eps_low",
        unit="E",
        exclusive=True,
        most=1,
        help="the lower E; default: --clip_eps",
    )
    upper = "" if parser.action_of("--algo") is None else ", and 0.28 for dapo"
    add_number(
        group,
        "--clip_eps_high",
        unit="E",
        exclusive=True,
        help=f"the upper E; default: --clip_eps{upper}",
    )
    add_number(
        group,
        "--skip_threshold",
        default=20.0,
        unit="R",
        exclusive=True,
        help="a batch whose mean probability ratio to the rollout is above R is not learned from",
    )
    return group


def add_critic_flags(parser: Parser) -> None:
    about = "Starts from the reward model, or else from --pretrain with a head of 0."
    group = parser.add_argument_group("critic", about)
    add_text(group, "--critic_pretrain", unit="MODEL", help="start from this model instead")
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
        help="its highest learning rate",
    )
    add_number(
        group,
        "--value_clip",
        default=0.2,
        unit="E",
        exclusive=True,
        help="a value may move so far from the rollout's",
    )
