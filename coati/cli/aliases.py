"""Flags under the names that other libraries give them.

A name is taken where its meaning is the same, and refused with the difference where it is not. The
help does not show them; docs/migrate.md does. Hugging Face's trainers, TRL and LLaMA-Factory are
meant, and where nothing else has the name, OpenRLHF and vLLM.
"""

import argparse
import copy
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from coati.cli.values import FALSE, TRUE
from coati.utils.logging import get_logger

logger = get_logger(__name__)

# Name elsewhere -> the flag; of several, the first that a command has.
SAME = {
    "adapter_name_or_path": "model_path",
    "buffer_size": "shuffle_buffer",
    "center_rewards_coefficient": "center_coef",
    "cliprange": "clip_eps",
    "cliprange_value": "value_clip",
    "critic_model_name_or_path": "critic_pretrain",
    "cutoff_len": "max_length",
    "data_path": "dataset",
    "dataset_name": "dataset",
    "dataset_num_proc": "num_proc",
    "dataset_path": "dataset",
    "dpo_label_smoothing": "label_smoothing",
    "epsilon": "clip_eps",
    "epsilon_high": "clip_eps_high",
    "export_dir": "output_dir",
    "gradient_accumulation_steps": "accumulation_steps",
    "gradient_checkpointing": "grad_checkpoint",
    "host": "http_host",
    "hub_model_id": "push_to_hub",
    "neftune_noise_alpha": "neftune_alpha",
    "init_kl_coef": "kl_coef",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    "learning_rate": "lr",
    "lmbda": "gkd_lambda",
    "logging_dir": "log_dir",
    "logging_steps": "log_interval",
    "lora_r": "lora_rank",
    "loraplus_lr_ratio": "lora_plus_ratio",
    "max_completion_length": "max_seq_len max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_grad_norm": "grad_clip",
    "max_model_len": "model_max_length",
    "max_seq_length": "max_length",
    "max_tokens": "max_new_tokens",
    "metric_for_best_model": "metric_for_best",
    "model": "model_path pretrain",
    "model_name_or_path": "pretrain model_path",
    "nproc_per_node": "nproc",
    "num_iterations": "num_update_steps",
    "num_ppo_epochs": "num_update_steps",
    "num_train_epochs": "max_epochs",
    "output_dir": "save_dir",
    "per_device_eval_batch_size": "eval_batch_size batch_size",
    "per_device_train_batch_size": "batch_size",
    "per_gpu_eval_batch_size": "eval_batch_size batch_size",
    "per_gpu_train_batch_size": "batch_size",
    "pipeline_parallel_size": "pp",
    "port": "http_port",
    "ppo_epochs": "num_update_steps",
    "precompute_ref_log_probs": "precompute_ref",
    "pref_beta": "beta",
    "pref_ftx": "sft_coef",
    "preprocessing_num_workers": "num_proc",
    "response_length": "max_seq_len",
    "resume_from_checkpoint": "checkpoint_path",
    "reward_funcs": "reward_functions",
    "reward_model": "rm_pretrain",
    "reward_model_name_or_path": "rm_pretrain",
    "reward_model_path": "rm_pretrain",
    "save_steps": "save_interval",
    "save_total_limit": "keep_last_k",
    "sft_alpha": "sft_coef",
    "sft_model_path": "pretrain",
    "system_prompt": "system_message",
    "teacher_model": "teacher",
    "teacher_model_name_or_path": "teacher",
    "teacher_model_server_url": "teacher_url",
    "tensor_parallel_size": "tp",
    "tokenizer_name": "tokenizer_dir tokenizer_path",
    "tokenizer_name_or_path": "tokenizer_dir tokenizer_path",
    "train_file": "dataset",
    "train_on_prompt": "disable_loss_mask",
    "embedding_learning_rate": "embedding_lr",
    "eval_steps": "eval_interval",
    "use_weighting": "wpo",
    "val_size": "eval_ratio",
    "validation_file": "eval_dataset",
}
# Likewise, of one command: the flag that only it has, and what it means by a name.
SAME_OF = {
    "algo": {"beta": "kl_coef"},  # grpo, where TRL's beta weighs the KL in the loss
    "critic_lr": {},  # ppo, whose --lam is another
    "lam": {"beta": "lam", "pref_beta": "lam"},  # orpo, where they weigh the odds-ratio loss
    "gkd_beta": {"beta": "gkd_beta"},  # gkd
    "documents": {  # pretrain: Hugging Face's run_clm, MedicalGPT's stage 1
        "block_size": "max_length",
        "train_file_dir": "dataset",
        "validation_file_dir": "eval_dataset",
    },
}


@dataclass(frozen=True)
class Mapped:
    """A name whose values become other flags.

    ``flag``: only commands that have it take the name. ``values``: value -> flags by ``dest``;
    "true" and "false" make it a switch. ``otherwise``: what is said of any other value.
    """

    flag: str
    values: Mapping[str, Mapping[str, Any]]
    otherwise: str = ""


def _switch(flag: str, on: Mapping[str, Any], off: Mapping[str, Any] | None = None) -> Mapped:
    return Mapped(flag, {"true": on, "false": off or {}})


_FLASH = {"use_flash_attn": True}
_LIGER = _switch("kernels", {"kernels": "liger"}, {"kernels": "torch"})
_EVALUATED: dict[str, dict[str, Any]] = {"steps": {}, "epoch": {}, "no": {"_unevaluated": True}}
_NEVER = "without --eval_dataset nothing is evaluated; --eval_interval 0 does so at both ends"
MAPPED = {
    "assistant_only_loss": _switch(
        "disable_loss_mask", {"disable_loss_mask": False}, {"disable_loss_mask": True}
    ),
    "attn_implementation": Mapped(
        "use_flash_attn",
        {"flash_attention_2": _FLASH, "sdpa": {"use_flash_attn": False}},
        "--use_flash_attn chooses between flash-attn and PyTorch's fused attention",
    ),
    "bf16": _switch("mixed_precision", {"mixed_precision": "bf16"}),
    "completion_only_loss": _switch(
        "disable_loss_mask", {"disable_loss_mask": False}, {"disable_loss_mask": True}
    ),
    "disable_gradient_checkpointing": _switch(
        "grad_checkpoint", {"grad_checkpoint": False}, {"grad_checkpoint": True}
    ),
    "enable_liger_kernel": _LIGER,
    "eval_strategy": Mapped("eval_interval", _EVALUATED, _NEVER),
    "evaluation_strategy": Mapped("eval_interval", _EVALUATED, _NEVER),
    "finetuning_type": Mapped(
        "lora_config",
        {"lora": {"_peft": 8}, "full": {"_peft": 0}},
        "all weights are trained, or LoRA adapters",
    ),
    "fp16": _switch("mixed_precision", {"mixed_precision": "fp16"}),
    "load_in_4bit": _switch("quant", {"quant": "4bit"}),
    "load_in_8bit": _switch("quant", {"quant": "8bit"}),
    "logging_strategy": Mapped("log_interval", {"steps": {}}, "--log_interval counts steps"),
    "lr_scheduler_type": Mapped(
        "lr_scheduler",
        {
            "constant": {"lr_scheduler": "constant"},
            "constant_with_warmup": {"lr_scheduler": "constant"},
            "cosine": {"lr_scheduler": "cosine"},
            "cosine_with_min_lr": {"lr_scheduler": "cosine"},
            "linear": {"lr_scheduler": "linear"},
            "warmup_stable_decay": {"lr_scheduler": "wsd"},
            "wsd": {"lr_scheduler": "wsd"},
        },
        "--lr_scheduler lists the schedules",
    ),
    "save_strategy": Mapped(
        "save_interval", {"steps": {}, "no": {"save_interval": 0}}, "--save_interval counts steps"
    ),
    "use_liger_kernel": _LIGER,
    "use_peft": _switch("lora_config", {"_peft": 16}, {"_peft": 0}),
    "use_vllm": _switch("rollout_engine", {"rollout_engine": "vllm"}, {"rollout_engine": "model"}),
}

# Likewise, of trainers, where what is quantized is the base below adapters.
MAPPED_IN_TRAINING = {
    "load_in_4bit": _switch("quantize_base", {"quantize_base": "nf4"}),
    "load_in_8bit": _switch("quantize_base", {"quantize_base": "int8"}),
    "quantization_bit": Mapped(
        "quantize_base",
        {"4": {"quantize_base": "nf4"}, "8": {"quantize_base": "int8"}},
        "--quantize_base names how the base is stored",
    ),
}

# Name elsewhere -> a flag that the command must have, and how the meaning differs.
DIFFERENT = {
    "adam_beta1": ("adam_beta2", "it is 0.9 always; --adam_beta2 is the other one"),
    "adapter_name_or_path": ("lora_config", "--pretrain takes a model or an adapter"),
    "api_key": ("token_file", "a token stands in a file, where ps does not show it: --token_file"),
    "chat_template_path": (
        "conversation_template_config",
        "a template file says its end tokens too: --conversation_template_config FILE.json "
        "(docs/data.md)",
    ),
    "dataloader_num_workers": (
        "dataset",
        "rows are tokenized before training, and then need no workers to load; coati prepare "
        "--num_proc N tokenizes with N, and --stream_workers N with --streaming",
    ),
    "dataset_config": ("dataset", "a subset is part of the name: --dataset NAME:SUBSET"),
    "dataset_config_name": ("dataset", "a subset is part of the name: --dataset NAME:SUBSET"),
    "dataset_dir": ("dataset", "--dataset takes paths: the folder's dataset_info.json:NAME too"),
    "dataset_test_split": ("eval_dataset", "a test split is found by itself, or --eval_dataset"),
    "dataset_train_split": ("dataset", "the train split is taken where there is one"),
    "ddp_find_unused_parameters": (
        "plugin_args",
        'find_unused_parameters of --plugin_args: a file with {"find_unused_parameters": true}',
    ),
    "deepspeed": (
        "plugin",
        "ColossalAI's plugins take its place: --plugin zero2 is ZeRO-2, --plugin gemini ZeRO-3 "
        "(docs/plugins.md)",
    ),
    "fsdp": ("plugin", "--plugin gemini shards weights, --plugin zero2 all but them"),
    "greater_is_better": ("metric_for_best", "it follows from the metric's name"),
    "group_by_length": ("packing", "--packing fills batches without padding instead"),
    "load_best_model_at_end": (
        "metric_for_best",
        "--metric_for_best NAME keeps the best model in DIR/best; modeling is the last one",
    ),
    "lora_dropout": ("lora_config", "linear_lora_dropout of the file of --lora_config"),
    "lora_target_modules": (
        "lora_config",
        "--lora_target names all-linear, attention or a file of names",
    ),
    "max_prompt_length": (
        "max_length",
        "--max_length counts prompt and response together; longer rows are left out",
    ),
    "num_processes": (
        "nproc",
        "it counts the processes of all hosts; --nproc counts those of each",
    ),
    "overwrite_output_dir": (
        "save_dir",
        "a --save_dir that holds a run is never overwritten; choose another or remove it",
    ),
    "ref_model": ("lora_config", "the reference is --pretrain"),
    "remove_unused_columns": ("dataset", "columns that are not read are left out by themselves"),
    "run_name": ("use_wandb", "set the environment variable WANDB_NAME"),
    "stage": (
        "lora_config",
        "the command says it: coati pretrain, sft, rm, dpo, kto, orpo, gkd, ilql, ppo, grpo or "
        "online-dpo",
    ),
    "tf32": (
        "mixed_precision",
        "it is a switch of PyTorch's: set the environment variable NVIDIA_TF32_OVERRIDE=1",
    ),
    "torch_dtype": (
        "mixed_precision",
        "the weights have the type that --plugin and --mixed_precision need",
    ),
    "warmup_ratio": (
        "warmup_steps",
        "it is a share of all steps; --warmup_steps counts them",
    ),
}
# The same for ppo and grpo, whose lengths are counted in episodes.
ROLLOUTS = "num_episodes"
IN_ROLLOUTS = {
    "cutoff_len": "--max_length is prompt and response together, --max_seq_len the response alone",
    "eval_steps": "it counts optimizer steps; --eval_interval counts episodes",
    "eval_strategy": "--eval_interval counts episodes",
    "evaluation_strategy": "--eval_interval counts episodes",
    "loss_type": "--policy_loss chooses the loss, --loss_agg_mode what it is a mean of, --algo of "
    "coati grpo the advantages",
    "logging_steps": "it counts optimizer steps; --log_interval counts episodes",
    "max_prompt_length": "a prompt may have --max_length less --max_seq_len tokens",
    "max_seq_length": "--max_length is prompt and response together, --max_seq_len the response "
    "alone",
    "max_steps": "it counts optimizer steps; --num_episodes counts rounds of collecting and "
    "updating",
    "num_train_epochs": "it counts passes over the prompts; --num_episodes counts rounds of "
    "collecting and updating, each on --num_collect_steps x --experience_batch_size prompts",
    "per_device_eval_batch_size": "evaluation takes --experience_batch_size prompts at a time",
    "per_device_train_batch_size": "it also says how much is collected; here "
    "--train_batch_size is the micro-batch of a process, --experience_batch_size x "
    "--num_collect_steps the prompts of an episode",
    "save_steps": "it counts optimizer steps; --save_interval counts episodes",
    "scale_rewards": "--algo of coati grpo chooses how rewards become advantages",
}
_ALIASES: WeakSet[Action] = WeakSet()


class Refused(Action):
    """A name that means something else here; ``difference`` says what."""

    difference: str

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        parser.error(f"{option_string}: {self.difference}")


class MappedAction(Action):
    """A name of :data:`MAPPED`: its value, "true" or a text, sets other flags."""

    row: Mapped

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        for dest, value in self.row.values[values].items():
            setattr(namespace, dest, value)
        if not self.row.values[values] and self.row.flag == "mixed_precision":
            namespace._not = [*getattr(namespace, "_not", []), str(option_string)]


class _Temperature(Action):
    """One temperature for all of a GRPO run."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        namespace.initial_temperature = values
        namespace.final_temperature = values


def names() -> list[str]:
    """All names of other libraries, taken or refused."""
    found = [*SAME, *MAPPED, *MAPPED_IN_TRAINING, *DIFFERENT, *IN_ROLLOUTS, "temperature"]
    return sorted({*found, *(name for row in SAME_OF.values() for name in row)})


def add_aliases(parser: ArgumentParser) -> None:
    """Let ``parser`` take the names that it has no flag for. Once is enough, twice does no harm."""
    for name in names():
        if f"--{name}" not in parser._option_string_actions:
            action = _alias(parser, name)
            if action is not None:
                _ALIASES.add(parser._add_action(action))


def is_alias(action: Action) -> bool:
    """Whether ``action`` was added by :func:`add_aliases`."""
    return action in _ALIASES


def _flag(parser: ArgumentParser, name: str) -> Action | None:
    action = parser._option_string_actions.get(f"--{name}")
    return None if action is None or action.help == argparse.SUPPRESS else action


def _alias(parser: ArgumentParser, name: str) -> Action | None:
    """What ``--name`` is for ``parser``; None where it says nothing."""
    if _flag(parser, ROLLOUTS) and name in IN_ROLLOUTS:
        return _refused(name, IN_ROLLOUTS[name])
    if (found := _same(parser, name)) is not None:
        return found
    for row in (MAPPED_IN_TRAINING.get(name), MAPPED.get(name)):
        if row is not None and _flag(parser, row.flag):
            return _mapped(name, row)
    first = _flag(parser, "initial_temperature")
    if name == "temperature" and first is not None:
        return _Temperature([f"--{name}"], "_temperature", type=first.type, **_hidden())
    flag, difference = DIFFERENT.get(name, ("", ""))
    return _refused(name, difference) if _flag(parser, flag) else None


def _same(parser: ArgumentParser, name: str) -> Action | None:
    special = next((row for flag, row in SAME_OF.items() if _flag(parser, flag)), {})
    flags = special.get(name) or SAME.get(name, "")
    known = next((action for flag in flags.split() if (action := _flag(parser, flag))), None)
    if known is None:
        return None
    action = copy.copy(known)
    action.option_strings = [f"--{name}"]
    action.help = argparse.SUPPRESS
    action.default = argparse.SUPPRESS
    if name == "resume_from_checkpoint":
        action.nargs = "?"
        action.const = "auto"
        action.type = _checkpoint
    if name == "metric_for_best_model":
        action.type = _metric
    return action


def _checkpoint(text: str) -> str | None:
    lower = text.lower()
    return "auto" if lower in TRUE else None if lower in FALSE else text


def _metric(text: str) -> str:
    return text.removeprefix("eval_")


def _mapped(name: str, row: Mapped) -> MappedAction:
    def read(text: str) -> str:
        lower = text.lower()
        value = lower
        if "true" in row.values:
            value = "true" if lower in TRUE else "false" if lower in FALSE else lower
        if value not in row.values:
            remedy = f"; {row.otherwise}" if row.otherwise else ""
            raise argparse.ArgumentTypeError(
                f"expected {_either(row.values)}, found {text!r}{remedy}"
            )
        return value

    nargs = "?" if "true" in row.values else None
    action = MappedAction([f"--{name}"], f"_{name}", nargs, "true", type=read, **_hidden())
    action.row = row
    return action


def _either(values: Mapping[str, Any]) -> str:
    *others, last = values
    return f"{', '.join(others)} or {last}" if others else last


def _refused(name: str, difference: str) -> Refused:
    action = Refused([f"--{name}"], f"_{name}", "*", **_hidden())
    action.difference = difference
    return action


def _hidden() -> dict[str, Any]:
    return {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}


def sets(action: Action, value: str | None) -> tuple[str, ...]:
    """The flags, by ``dest``, that ``action`` sets when it is given ``value`` (None: none)."""
    if isinstance(action, MappedAction):
        return tuple(action.row.values[action.type(value) if value else "true"])  # type: ignore
    if isinstance(action, _Temperature):
        return ("initial_temperature", "final_temperature")
    return (action.dest,)


def settle(args: Namespace) -> None:
    """What several of these names decide together. Raises ValueError naming them."""
    taken = vars(args)
    off = taken.pop("_not", [])
    if off and args.mixed_precision is None:
        if len({*off}) < 2:
            raise ValueError(
                f"{off[0]} false does not say which precision it is instead; --mixed_precision "
                "names it (bf16, fp16, fp32)"
            )
        args.mixed_precision = "fp32"
    rows = ("eval_dataset", "eval_ratio", "eval_prompt_dataset")
    if taken.pop("_unevaluated", False) and (named := next(filter(taken.get, rows), None)):
        raise ValueError(f"the evaluation strategy is no, and --{named} is given; {_NEVER}")
    rank = taken.pop("_peft", None)
    if rank == 0 and args.lora_rank:
        raise ValueError(
            f"all weights are to be trained, and LoRA of --lora_rank {args.lora_rank}; leave one "
            "of the two out"
        )
    if rank and args.lora_rank is None and args.lora_config is None:
        logger.warning_once(f"--lora_rank is {rank}, as where the name of the flag comes from")
        args.lora_rank = rank
