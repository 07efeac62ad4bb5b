"""What becomes of a flag that is not what it was when a checkpoint was written: every flag of the
training commands is in exactly one of three classes. Imports nothing heavy.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

APPLIED = "takes effect from the next step"
SAME = "must be the same"
FREE = "does not change the run's numbers"

# class -> flags. docs/checkpoints.md has the same table.
CLASSES: dict[str, tuple[str, ...]] = {
    APPLIED: (
        # optimizer and schedule
        *("lr", "critic_lr", "head_lr", "embedding_lr", "lora_plus_ratio"),
        *("weight_decay", "adam_beta2", "grad_clip"),
        *("lr_scheduler", "lr_min_ratio", "decay_ratio", "warmup_steps"),
        # length and batches
        *("max_epochs", "max_steps", "num_episodes", "batch_size", "accumulation_steps"),
        "tokens_per_batch",
        *("num_collect_steps", "experience_batch_size", "num_update_steps", "train_batch_size"),
        *("buffer_limit", "num_generations", "ptx_batch_size", "disable_loss_mask"),
        # losses
        *("loss_fn", "center_coef", "loss_type", "loss_weights", "beta", "gamma", "lam"),
        *("label_smoothing", "length_normalization", "sft_coef", "ld_alpha", "wpo", "ptx_coef"),
        *("sft_loss", "neftune_alpha"),
        *("tau", "cql_coef", "awac_coef", "awac_beta", "target_alpha", "target_interval"),
        *("disable_reference_model", "desirable_weight", "undesirable_weight", "auto_weight"),
        *("clip_eps", "clip_eps_low", "clip_eps_high", "skip_threshold", "value_clip"),
        *("policy_loss", "loss_agg_mode", "dual_clip", "cispo_cap", "sapo_tau", "entropy_coef"),
        # distillation
        *("teacher", "teacher_url", "teacher_served_name", "teacher_top_k", "gkd_beta"),
        *("gkd_lambda", "max_new_tokens"),
        # rollouts, rewards, advantages
        *("max_seq_len", "max_turns", "rollout_engine", "rollouts_ahead", "rollout_is"),
        *("rollout_is_cap", "rollout_is_mask", "temperature", "initial_temperature"),
        *("final_temperature", "top_k", "top_p", "repetition_penalty"),
        *("rm_pretrain", "rm_checkpoint_path", "no_neural_reward_model", "reward_functions"),
        *("reward_weights", "reward_timeout", "reward_clip", "reward_normalization"),
        *("judge_url", "judge_model", "judge_prompt", "judge_pattern", "judge_failed"),
        *("test_timeout", "test_memory"),
        *("missing_eos_penalty", "kl_coef", "kl_estimator", "kl_in", "kl_target", "kl_horizon"),
        *("algo", "overlong_buffer_len", "mask_truncated_completions", "no_whiten_advantages"),
        *("reward_at", "dynamic_sampling", "source_rewards"),
        # evaluation
        *("eval_dataset", "eval_prompt_dataset", "eval_batch_size", "eval_interval"),
        *("eval_pass_at", "eval_generations", "eval_right"),
        *("metric_for_best", "early_stopping_patience", "early_stopping_threshold"),
        # the layout: weights are kept, the optimizer's moments start anew
        "optim",
        *("plugin", "plugin_args", "mixed_precision", "nproc", "tp", "pp", "sp", "sp_mode"),
        *("enable_sequence_parallelism", "zero_stage", "zero_cpu_offload", "microbatch_size"),
        *("use_flash_attn", "kernels"),
    ),
    SAME: (
        *("pretrain", "tokenizer_dir", "dataset", "prompt_dataset", "ptx_dataset"),
        *("dataset_weights", "max_samples", "max_length", "packing", "eval_ratio", "seed"),
        *("conversation_template_config", "critic_pretrain", "critic_checkpoint_path"),
        *("template_args", "thoughts", "empty_thoughts", "learn", "add_tokens", "documents"),
        *("columns", "environment", "environment_args", "offline_groups"),
        *("streaming", "shuffle_buffer"),
        *("lora_rank", "lora_alpha", "lora_train_bias", "lora_config", "lora_experts"),
        *("lora_target", "use_dora", "use_rslora", "quantize_base"),
        "shared_base",
    ),
    FREE: (
        *("checkpoint_path", "checkpoint_weights_only", "config", "config_file", "dry_run"),
        *("save_dir", "save_interval", "keep_last_k", "merge_lora_weights"),
        *("log_dir", "log_interval", "use_wandb", "sample_interval"),
        "push_to_hub",
        *("hostfile", "master_addr", "master_port", "trust_remote_code"),
        *("collective_timeout", "no_preflight", "reward_concurrency"),
        *("grad_checkpoint", "offload_activations", "report_to"),
        *("inference_batch_size", "logits_forward_batch_size"),
        *("offload_inference_models", "ref_tp", "precompute_ref"),
        *("stream_workers", "max_bad_ratio", "strict_columns"),
        *("rollout_url", "rollout_sync", "rollout_weights_dir", "rollout_timeout"),
        *("rollout_token_env", "vllm_memory_share", "vllm_sleep"),
        *("rollout_workers", "rollout_worker_cpus", "rollout_worker_gpus", "rollout_python"),
        *("ray_address", "rewards_on_ray"),
    ),
}
CLASS_OF = {flag: name for name, flags in CLASSES.items() for flag in flags}
# Flags that name files or directories: what is in them is compared.
FILES = (
    *("pretrain", "tokenizer_dir", "ptx_dataset"),
    *("conversation_template_config", "lora_config", "lora_target", "plugin_args"),
    *("critic_pretrain", "critic_checkpoint_path", "judge_prompt", "teacher"),
)
# Rows are compared one by one, wherever they lie (recipes/resume.py); ptx rows by their files.
ROWS = ("dataset", "prompt_dataset")
# Learning rates of parameters in a group of their own.
OWN_RATES = {
    "head_lr": "the head's",
    "embedding_lr": "the embeddings'",
    "lora_plus_ratio": "the adapters' B's",
}
# What checkpoints of releases without these flags were made with.
UNSAID: dict[str, Any] = {
    "lr_scheduler": "cosine",
    "lr_min_ratio": 0.1,
    "decay_ratio": 0.2,
    "eval_ratio": None,
    "embedding_lr": None,
    "lora_plus_ratio": None,
    "lora_target": None,
    "use_dora": False,
    "use_rslora": False,
    "quantize_base": None,
    "template_args": None,
    "thoughts": "template",
    "empty_thoughts": "mask",
    "learn": "all_turns",
    "streaming": False,
    "columns": [],
    "rollouts_ahead": 0,
    "wpo": False,
    "environment": None,
    "environment_args": None,
    "max_turns": None,
    "early_stopping_patience": None,
    "early_stopping_threshold": 0.0,
    "optim": "adamw",
    "neftune_alpha": None,
    "sft_loss": "nll",
    "tokens_per_batch": None,
    "policy_loss": "ppo",
    "loss_agg_mode": None,
    "dual_clip": None,
    "cispo_cap": None,
    "sapo_tau": None,
    "entropy_coef": 0.0,
    "dynamic_sampling": 0,
    "source_rewards": [],
    "offline_groups": False,
    "eval_pass_at": [],
    "eval_generations": None,
    "eval_right": None,
}
# Flags whose change makes the best model so far one of another measure: of all commands, and those
# of the loss, where evaluations have one (with rollouts they have rewards).
REWARDS = (
    *("rm_pretrain", "rm_checkpoint_path", "no_neural_reward_model"),
    *("reward_functions", "reward_weights", "source_rewards"),
    *("judge_url", "judge_model", "judge_prompt", "judge_pattern", "judge_failed"),
)
PASS_AT = ("eval_pass_at", "eval_generations", "eval_right")
MEASURE = ("metric_for_best", "eval_dataset", "eval_prompt_dataset", *PASS_AT, *REWARDS)
LOSS_MEASURE = (
    *("center_coef", "loss_type", "loss_weights", "beta", "gamma", "lam", "label_smoothing"),
    *("length_normalization", "sft_coef", "ld_alpha", "wpo", "disable_reference_model"),
    *("desirable_weight", "undesirable_weight", "auto_weight", "disable_loss_mask"),
    "sft_loss",
    *("teacher", "teacher_url", "teacher_served_name", "teacher_top_k", "gkd_beta"),
    *("tau", "cql_coef", "awac_coef", "awac_beta"),
)
SHOWN = 12  # values of a list, in messages
ELSE = "or start anew from its weights: --checkpoint_weights_only with another --save_dir"


@dataclass(frozen=True)
class Change:
    """A flag that differs from the checkpoint's. ``content``: its path is the same, what is there
    is not."""

    flag: str
    before: Any
    now: Any
    content: bool = False

    def __str__(self) -> str:
        if self.content:
            return f"--{self.flag} {_word(self.now)} (its content changed)"
        return f"--{self.flag} {_word(self.before)} -> {_word(self.now)}"


def changes(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    inputs_before: Mapping[str, str],
    inputs_now: Mapping[str, str],
) -> Iterator[Change]:
    """What differs between the flags of a checkpoint and those of this run, except what does not
    change its numbers. ``inputs_*``: digests of what the flags of :data:`FILES` name."""
    stored = {**UNSAID, **before} if before else {}
    for flag, value in now.items():
        if CLASS_OF.get(flag, FREE) == FREE or flag not in stored or flag in ROWS:
            continue
        differs = stored[flag] != value
        if flag in inputs_before and flag in inputs_now:  # wherever it lies
            if inputs_before[flag] != inputs_now[flag]:
                yield Change(flag, stored[flag], value, content=not differs)
        elif differs:
            yield Change(flag, stored[flag], value)


def refusal(change: Change) -> str | None:
    """Why a run cannot go on with ``change``; None if it takes effect."""
    flag = change.flag
    if flag == "ptx_dataset" and not change.before:
        return None  # its rows begin at the first
    if CLASS_OF[flag] == SAME:
        return f"{change}: {SAME} as in the checkpoint; give what it was, {ELSE}"
    # What is trained would be another set of parameters.
    if flag in OWN_RATES and None in (change.before, change.now):
        return (
            f"{change}: {OWN_RATES[flag]} own learning rate may change, not appear or go; give it "
            f"as in the checkpoint, {ELSE}"
        )
    if flag == "center_coef" and 0 in (change.before, change.now):
        return (
            f"{change}: with 0 the head's bias is not trained, otherwise it is; keep it 0 or above "
            f"0 as in the checkpoint, {ELSE}"
        )
    return None


def _word(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        more = f" ... ({len(value)})" if len(value) > SHOWN else ""
        return " ".join(map(_word, value[:SHOWN])) + more or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def markdown() -> str:
    """The table of docs/checkpoints.md."""
    lines = ["| a flag that differs | flags |", "| --- | --- |"]
    for name, flags in CLASSES.items():
        lines.append(f"| {name} | {', '.join(f'`--{flag}`' for flag in flags)} |")
    return "\n".join(lines)
