"""The runs of test_resume_flags.py: groups of flags, each changed alone in a run that goes on from
the checkpoint of its group."""

import math
from dataclasses import dataclass
from typing import Any

# Words after those of the checkpoint, and what the first step then has beside other weights than
# those of a run without the change. "$name" is a place, "$save" the run's own directory.
Flags = dict[str, tuple[tuple[str, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Group:
    """``own``: words of the run that makes the checkpoint, and of those that go on from it."""

    verb: str
    flags: Flags
    own: tuple[str, ...] = ()
    nproc: int = 1


def cosine(step: int, total: int, warmup: int = 0, floor: float = 0.1) -> float:
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / (total - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))


def switches(*names: str) -> Flags:
    return {name: ((f"--{name}",), {}) for name in names}


def given(**values: str) -> Flags:
    """Flags of which a word is enough to say."""
    return {name: ((f"--{name}", value), {}) for name, value in values.items()}


def shown(fact: str, **values: tuple[str, Any]) -> Flags:
    """name=(word, what the text of the ``fact`` then has in it)."""
    return {name: ((f"--{name}", word), {fact: text}) for name, (word, text) in values.items()}


SFT: Flags = {
    "lr": (("--lr", "1e-4"), {"lr": [1e-4 * cosine(3, 12)]}),
    "warmup_steps": (("--warmup_steps", "6"), {"lr": [1e-3 * 4 / 6]}),
    "lr_scheduler": (("--lr_scheduler", "linear"), {"lr": [1e-3 * (1 - 0.9 * 3 / 12)]}),
    "lr_min_ratio": (("--lr_min_ratio", "0.5"), {"lr": [1e-3 * cosine(3, 12, floor=0.5)]}),
    "decay_ratio": (
        ("--lr_scheduler", "wsd", "--decay_ratio", "1"),
        {"lr": [1e-3 * (1 - 0.9 * 3 / 12)]},
    ),
    "max_steps": (("--max_steps", "6"), {"lr": [1e-3 * cosine(3, 6)]}),
    "max_epochs": (("--max_epochs", "1", "--max_steps", "8"), {"lr": [1e-3 * cosine(3, 7)]}),
    "batch_size": (("--batch_size", "1", "--max_steps", "20"), {"rows": 2}),
    "accumulation_steps": (("--accumulation_steps", "1"), {"rows": 2}),
    "tokens_per_batch": (("--tokens_per_batch", "150"), {"options": "tokens_per_batch=150"}),
    "kernels": (("--kernels", "torch"), {"options": "kernels='torch'"}),
    "weight_decay": (("--weight_decay", "7"), {"decay": [7.0]}),
    "adam_beta2": (("--adam_beta2", "0.5"), {"betas": [(0.9, 0.5)]}),
    "grad_clip": (("--grad_clip", "0.25"), {"options": "grad_clip=0.25"}),
    "plugin": (("--plugin", "zero2"), {"options": "plugin='zero2'"}),
    "plugin_args": (("--plugin_args", "$plugin_args"), {"options": "bucket_cap_mb"}),
    "mixed_precision": (("--mixed_precision", "bf16"), {"options": "precision='bf16'"}),
    "eval_dataset": (("--eval_dataset", "$held_out"), {"evaluation": (6, 2)}),
    **switches("disable_loss_mask", "packing", "grad_checkpoint", "trust_remote_code"),
    **given(pretrain="$other", tokenizer_dir="$tokenizer", add_tokens="<think>"),
    **given(dataset="$held_out", dataset_weights="2", conversation_template_config="$template"),
    **given(seed="7", max_length="95", max_samples="20", eval_ratio="0.2", lora_rank="4"),
    **given(save_interval="5", keep_last_k="9", log_interval="3", log_dir="$save/board"),
    **given(config="$config", config_file="$save/flags.json"),
    **given(checkpoint_path="$save/epoch-0_step-3", collective_timeout="77"),
    "save_dir": (("--save_dir", "$save-new", "--checkpoint_path", "$save/epoch-0_step-3"), {}),
    **switches("use_wandb", "no_preflight"),
    **given(embedding_lr="1e-4", thoughts="drop", empty_thoughts="supervise", learn="last_turn"),
    **given(template_args='{"brief": true}'),
    "optim": (("--optim", "lion"), {"betas": [(0.9, 0.99)]}),
    "offload_activations": (("--grad_checkpoint", "--offload_activations"), {}),
    **given(sft_loss="dft", neftune_alpha="5", report_to="tensorboard"),
}
OWN_RATE = ("--embedding_lr", "1e-2")
PRETRAIN: Flags = {
    "embedding_lr": (
        ("--embedding_lr", "1e-4"),
        {"lr": [1e-3 * cosine(3, 12), 1e-4 * cosine(3, 12)]},
    ),
    **given(documents="line", packing="false", columns="text=body"),
    **switches("strict_columns"),
    "dataset_weights": (("--dataset_weights", "1", "2"), {}),
}
PATIENCE = ("--early_stopping_patience", "5")
EVALUATED = (
    *("--eval_dataset", "$held_out", "--eval_interval", "3", "--metric_for_best", "loss"),
    *PATIENCE,
)
SFT_EVALUATED: Flags = {
    "eval_dataset": (("--eval_dataset", "$train"), {"evaluation": (31, 2)}),
    "eval_batch_size": (("--eval_batch_size", "5"), {"evaluation": (6, 5)}),
    **shown(
        "schedule",
        eval_interval=("7", "eval_interval=7"),
        metric_for_best=("perplexity", "metric_for_best='perplexity'"),
        early_stopping_patience=("4", "early_stopping_patience=4"),
        early_stopping_threshold=("0.5", "early_stopping_threshold=0.5"),
    ),
}
LORA = ("--lora_rank", "4", "--lora_config", "$lora")
SFT_LORA: Flags = {
    **given(lora_rank="8", lora_alpha="8", lora_train_bias="all", lora_config="$other_lora"),
    **given(lora_target="attention", quantize_base="int8", lora_plus_ratio="16"),
    **switches("lora_experts", "merge_lora_weights", "use_dora", "use_rslora"),
}
LORA_PLUS = ("--lora_rank", "4", "--lora_plus_ratio", "4", "--quantize_base", "nf4")
SFT_LORA_PLUS: Flags = {
    "lora_plus_ratio": (
        ("--lora_plus_ratio", "16"),
        {"lr": [1e-3 * cosine(3, 12), 16e-3 * cosine(3, 12)]},
    ),
    "optim": (("--optim", "lion"), {"betas": [(0.9, 0.99)] * 2}),
}
LAUNCHED: Flags = given(master_addr="127.0.0.1", master_port="29555", hostfile="$hosts")
SEQUENCE = ("--tp", "2", "--enable_sequence_parallelism")
ZERO = ("--mixed_precision", "bf16", "--zero_stage", "1")
# On two processes; what splits the model needs other flags beside itself.
SPLIT: Flags = {
    "tp": (("--tp", "2"), {"options": "tp=2"}),
    "pp": (("--pp", "2"), {"options": "pp=2"}),
    "sp": (
        ("--enable_sequence_parallelism", "--sp_mode", "all_to_all", "--sp", "2"),
        {"options": "sp=2"},
    ),
    "enable_sequence_parallelism": (SEQUENCE, {"options": "enable_sequence_parallelism=True"}),
    "sp_mode": ((*SEQUENCE, "--sp_mode", "ring"), {"options": "sp_mode='ring'"}),
    "zero_stage": (ZERO, {"options": "zero_stage=1"}),
    "zero_cpu_offload": ((*ZERO, "--zero_cpu_offload"), {"options": "zero_cpu_offload=True"}),
}
PIPELINE: Flags = {
    "microbatch_size": (("--microbatch_size", "2"), {"options": "microbatch_size=2"}),
}
DPO: Flags = {
    **shown(
        "objective",
        beta=("0.37", "beta=0.37"),
        gamma=("0.41", "0.41"),
        loss_type=("hinge_loss", "hinge"),
        label_smoothing=("0.21", "0.21"),
        sft_coef=("0.33", "0.33"),
    ),
    "length_normalization": (("--length_normalization",), {"objective": "averaged=True"}),
    "disable_reference_model": (("--disable_reference_model",), {"reference": False}),
    **switches("precompute_ref", "disable_loss_mask", "wpo"),
    **given(ld_alpha="0.53", embedding_lr="1e-4"),
}
MIXED = ("--loss_type", "sigmoid", "sft")
DPO_MIXED: Flags = {"loss_weights": (("--loss_weights", "0.2", "0.9"), {"objective": "0.9"})}
REFERENCE: Flags = given(ref_tp="1")
RM: Flags = {
    **given(head_lr="1e-2", center_coef="0.1"),  # that do not appear
    "loss_fn": (("--loss_fn", "log_exp"), {"objective": "log_exp"}),
}
HEAD = ("--head_lr", "1e-2", "--center_coef", "0.1")
RM_HEAD: Flags = {
    "head_lr": (("--head_lr", "1e-1"), {"lr": [1e-3 * cosine(3, 8), 1e-1 * cosine(3, 8)]}),
    "center_coef": (("--center_coef", "0.7"), {"objective": "center_coef=0.7"}),
}
ORPO: Flags = shown("objective", lam=("0.37", "lam=0.37"))
KTO: Flags = {
    **shown(
        "objective",
        beta=("0.37", "beta=0.37"),
        desirable_weight=("1.7", "1.7"),
        undesirable_weight=("0.6", "0.6"),
    ),
    **switches("auto_weight"),
}
GKD_TEACHER = ("--teacher", "$other", "--gkd_lambda", "0.6", "--max_new_tokens", "9")
GKD: Flags = {
    "teacher": (("--teacher", "$model"), {}),
    **shown("objective", gkd_beta=("0.37", "beta=0.37"), sft_coef=("0.33", "sft_coef=0.33")),
    **given(gkd_lambda="0.2", max_new_tokens="4", temperature="0.3", inference_batch_size="1"),
}
ILQL: Flags = {
    **shown(
        "objective",
        tau=("0.61", "tau=0.61"),
        gamma=("0.73", "gamma=0.73"),
        cql_coef=("0.37", "cql_coef=0.37"),
        awac_coef=("0.41", "awac_coef=0.41"),
        awac_beta=("0.29", "awac_beta=0.29"),
    ),
    "target_alpha": (("--target_alpha", "0.5"), {"target_alpha": 0.5}),
    "target_interval": (("--target_interval", "1"), {"target_interval": 1}),
}

# An episode has two steps; the checkpoint is of the first of three.
PPO: Flags = {
    "lr": (("--lr", "1e-4"), {"lr": [1e-4 * cosine(2, 6)]}),
    "critic_lr": (("--critic_lr", "1e-4"), {"critic_lr": [1e-4 * cosine(2, 6)]}),
    "num_episodes": (("--num_episodes", "5"), {"lr": [5e-3 * cosine(2, 10)]}),
    "num_update_steps": (("--num_update_steps", "1"), {"lr": [5e-3 * cosine(2, 4)]}),
    "accumulation_steps": (("--accumulation_steps", "1"), {"lr": [5e-3 * cosine(2, 10)]}),
    "train_batch_size": (("--train_batch_size", "1"), {"buffer": (1, 0)}),
    "tokens_per_batch": (("--tokens_per_batch", "40"), {"options": "tokens_per_batch=40"}),
    "num_collect_steps": (("--num_collect_steps", "2"), {"rows": 8, "collected": 8}),
    "experience_batch_size": (("--experience_batch_size", "8"), {"rows": 8, "collected": 8}),
    "buffer_limit": (
        ("--experience_batch_size", "8", "--buffer_limit", "4"),
        {"rows": 8, "buffer": (2, 4)},
    ),
    "weight_decay": (("--weight_decay", "7"), {"decay": [7.0]}),
    "grad_clip": (("--grad_clip", "0.25"), {"options": "grad_clip=0.25"}),
    "kl_coef": (("--kl_coef", "0.3"), {"kl": (0.3, None, 10000)}),
    "kl_target": (("--kl_target", "2"), {"kl": (0.05, 2.0, 10000)}),
    **shown(
        "rollouts",
        gamma=("0.73", "gamma=0.73"),
        lam=("0.61", "lam=0.61"),
        reward_at=("every_token", "reward_at='every_token'"),
        reward_clip=("0.43", "reward_clip=0.43"),
        reward_normalization=("running", "running"),
        missing_eos_penalty=("0.9", "missing_eos_penalty=0.9"),
        kl_estimator=("k3", "kl_estimator='k3'"),
        max_seq_len=("9", "max_new_tokens=9"),
        top_k=("3", "top_k=3"),
        top_p=("0.5", "top_p=0.5"),
        repetition_penalty=("1.7", "repetition_penalty=1.7"),
    ),
    **shown(
        "policy",
        clip_eps=("0.17", "clip_low=0.17"),
        clip_eps_low=("0.13", "clip_low=0.13"),
        clip_eps_high=("0.31", "clip_high=0.31"),
        skip_threshold=("0.5", "skip_threshold=0.5"),
        rollout_is=("sequence", "level='sequence'"),
        rollout_is_cap=("1.7", "cap=1.7"),
        policy_loss=("gspo", "name='gspo'"),
        loss_agg_mode=("seq-mean-token-mean", "mode='seq-mean-token-mean'"),
        dual_clip=("2.9", "dual_clip=2.9"),
        entropy_coef=("0.02", "entropy_coef=0.02"),
    ),
    "cispo_cap": (("--policy_loss", "cispo", "--cispo_cap", "4.5"), {"policy": "cispo_cap=4.5"}),
    "sapo_tau": (
        ("--policy_loss", "sapo", "--sapo_tau", "0.9", "1.2"),
        {"policy": "sapo_tau=(0.9, 1.2)"},
    ),
    "rollout_is_mask": (("--rollout_is_mask", "0.6", "4"), {"policy": "keep=(0.6, 4.0)"}),
    "rollouts_ahead": (("--rollouts_ahead", "2"), {"ahead": 2}),
    "value_clip": (("--value_clip", "0.19"), {"value": "0.19"}),
    "temperature": (("--temperature", "0.7"), {"temperature": 0.7}),
    "rm_pretrain": (("--rm_pretrain", "$other_rm"), {}),
    "rm_checkpoint_path": (("--rm_checkpoint_path", "$other_rm"), {}),
    "reward_functions": (("--reward_functions", "$functions:vowels"), {"functions": 1}),
    "no_neural_reward_model": (
        ("--no_neural_reward_model", "--reward_functions", "$functions:vowels"),
        {"functions": 1},
    ),
    "eval_prompt_dataset": (("--eval_prompt_dataset", "$eval"), {"evaluation": (5, 4)}),
    "ptx_dataset": (("--ptx_dataset", "$ptx", "--ptx_coef", "0.3"), {"ptx": (0.3, 8)}),
    "ptx_coef": (("--ptx_dataset", "$ptx", "--ptx_coef", "0.3"), {"ptx": (0.3, 8)}),
    **switches("no_whiten_advantages", "offload_inference_models"),
    **given(critic_pretrain="$model", critic_checkpoint_path="$rm", prompt_dataset="$eval"),
    **given(dataset_weights="2", max_length="83", max_samples="20", eval_ratio="0.2", seed="7"),
    **given(inference_batch_size="2", logits_forward_batch_size="1", sample_interval="1"),
    **given(conversation_template_config="$other_template", save_interval="5", log_interval="3"),
}
PPO_EVALUATED: Flags = shown(
    "schedule",
    eval_interval=("3", "eval_interval=3"),
    metric_for_best=("response_length", "metric_for_best='response_length'"),
    early_stopping_patience=("4", "early_stopping_patience=4"),
    early_stopping_threshold=("0.5", "early_stopping_threshold=0.5"),
)
EVALUATED_PROMPTS = ("--eval_prompt_dataset", "$eval", "--metric_for_best", "reward", *PATIENCE)
PPO_LORA: Flags = switches("shared_base")
TARGET = ("--kl_target", "2")
PPO_TARGET: Flags = {
    "kl_horizon": (("--kl_horizon", "5000"), {"horizon": 5000}),
    "kl_target": (("--kl_target", "3"), {"target": 3.0}),
}
PTX = ("--ptx_dataset", "$ptx", "--ptx_coef", "0.3")
PPO_PTX: Flags = {
    "ptx_dataset": (("--ptx_dataset", "$other_ptx"), {}),
    "ptx_coef": (("--ptx_coef", "0.6"), {"ptx": (0.6, 8)}),
    "ptx_batch_size": (("--ptx_batch_size", "2"), {"ptx": (0.3, 4)}),
    **switches("disable_loss_mask"),
}
PASS_AT = ("--eval_prompt_dataset", "$eval", "--eval_pass_at", "1", "--eval_right", "1")
GRPO: Flags = {
    "num_generations": (("--num_generations", "8"), {"rollouts": "num_generations=8"}),
    "initial_temperature": (
        ("--initial_temperature", "0.7", "--num_episodes", "12"),
        {"temperature": 0.7},
    ),
    "final_temperature": (("--final_temperature", "0.6"), {"temperature": 0.6}),
    "kl_in": (("--kl_in", "reward"), {"rollouts": "kl_in='reward'"}),
    "algo": (("--algo", "dr_grpo"), {"rollouts": "method='dr_grpo'"}),
    "mask_truncated_completions": (("--mask_truncated_completions",), {}),
    "reward_weights": (("--reward_weights", "-0.5"), {}),
    "reward_timeout": (("--reward_timeout", "7"), {"timeout": 7.0}),
    "reward_concurrency": (("--reward_concurrency", "3"), {}),
    "kl_coef": (("--kl_coef", "0.3"), {"kl": (0.3, None, 10000), "policy": "kl_coef=0.3"}),
    "dynamic_sampling": (("--dynamic_sampling", "2"), {"refills": 2}),
    "source_rewards": (("--source_rewards", "*=length"), {}),
    "eval_pass_at": (PASS_AT, {"pass_at": ((1,), 1)}),
    "eval_right": ((*PASS_AT, "--eval_right", "3"), {"right": ", 3.0)"}),
    "eval_generations": ((*PASS_AT, "--eval_generations", "3"), {"pass_at": ((1,), 3)}),
}
GRPO_RAW: Flags = switches("offline_groups")
ENVIRONMENT = ("--environment", "$echo:Echo", "--prompt_dataset", "$rows", "--max_turns", "3")
ENVIRONMENT += ("--max_seq_len", "60", "--max_length", "144")
GRPO_ENVIRONMENT: Flags = {
    "max_turns": (("--max_turns", "1"), {}),
    **given(environment="$echo:Louder", environment_args='{"scale": 2.0}'),
}
DAPO = ("--algo", "dapo")
GRPO_DAPO: Flags = {
    "overlong_buffer_len": (("--overlong_buffer_len", "5"), {"rollouts": "overlong_buffer_len=5"}),
}

ONLINE_DPO: Flags = {
    **shown(
        "losses",
        beta=("0.37", "beta=0.37"),
        gamma=("0.41", "0.41"),
        loss_type=("hinge_loss", "hinge"),
        label_smoothing=("0.21", "0.21"),
        sft_coef=("0.33", "0.33"),
        ld_alpha=("0.53", "0.53"),
    ),
    "length_normalization": (("--length_normalization",), {"losses": "averaged=True"}),
    "disable_reference_model": (("--disable_reference_model",), {"reference": False}),
    "num_generations": (("--num_generations", "3"), {"rollouts": "num_generations=3"}),
    "train_batch_size": (("--train_batch_size", "1"), {"buffer": (1, 0)}),
    "temperature": (("--temperature", "0.7"), {"temperature": 0.7}),
    "missing_eos_penalty": (
        ("--missing_eos_penalty", "9"),
        {"rollouts": "missing_eos_penalty=9.0"},
    ),
}

GROUPS: dict[str, Group] = {
    "sft": Group("sft", SFT),
    "pretrain": Group("pretrain", PRETRAIN, OWN_RATE),
    "sft evaluated": Group("sft", SFT_EVALUATED, EVALUATED),
    "sft with LoRA": Group("sft", SFT_LORA, LORA),
    "sft with LoRA+": Group("sft", SFT_LORA_PLUS, LORA_PLUS),
    "sft launched": Group("sft", LAUNCHED, ("--nproc", "1")),
    "dpo": Group("dpo", DPO),
    "dpo mixed": Group("dpo", DPO_MIXED, MIXED),
    "rm": Group("rm", RM),
    "rm with a head's rate": Group("rm", RM_HEAD, HEAD),
    "orpo": Group("orpo", ORPO),
    "kto": Group("kto", KTO),
    "gkd": Group("gkd", GKD, GKD_TEACHER),
    "ilql": Group("ilql", ILQL),
    "ppo": Group("ppo", PPO),
    "ppo evaluated": Group("ppo", PPO_EVALUATED, EVALUATED_PROMPTS),
    "ppo with LoRA": Group("ppo", PPO_LORA, ("--lora_rank", "4")),
    "ppo with a target": Group("ppo", PPO_TARGET, TARGET),
    "ppo with ptx": Group("ppo", PPO_PTX, PTX),
    "grpo": Group("grpo", GRPO),
    "grpo of raw rows": Group("grpo", GRPO_RAW, ("--prompt_dataset", "$rows")),
    "grpo as dapo": Group("grpo", GRPO_DAPO, DAPO),
    "grpo with an environment": Group("grpo", GRPO_ENVIRONMENT, ENVIRONMENT),
    "online-dpo": Group("online-dpo", ONLINE_DPO),
    "online-dpo mixed": Group(
        "online-dpo", {"loss_weights": (("--loss_weights", "0.2", "0.9"), {"losses": "0.9"})}, MIXED
    ),
    "split": Group("sft", SPLIT, ("--plugin", "3d"), nproc=2),
    "pipeline": Group("sft", PIPELINE, ("--plugin", "3d", "--pp", "2"), nproc=2),
    "reference": Group("dpo", REFERENCE, ("--plugin", "3d", "--tp", "2"), nproc=2),
    "online-dpo's reference": Group(
        "online-dpo", REFERENCE, ("--plugin", "3d", "--tp", "2"), nproc=2
    ),
    "kto's reference": Group("kto", REFERENCE, ("--plugin", "3d", "--tp", "2"), nproc=2),
}
