"""The flag that somebody meant who wrote a name that there is not: by spelling, and by meaning."""

import difflib
import json
from collections.abc import Iterable
from pathlib import Path

SCHEMAS = Path(__file__).parent / "schemas"  # what flags each verb has

# What people write, without dashes and underscores -> flags that mean it; of a command, those that
# it has, the likelier first.
MEANINGS = {
    "accumulate": "accumulation_steps",
    "adapter": "lora_rank model_path",
    "alpha": "lora_alpha",
    "attention": "use_flash_attn",
    "auth": "token_file",
    "basemodel": "pretrain model_path start_path model",
    "batch": "batch_size train_batch_size max_batch",
    "bits": "quant method",
    "blocksize": "max_length model_max_length",
    "bs": "batch_size train_batch_size",
    "chattemplate": "conversation_template_config",
    "checkpoint": "checkpoint_path model_path save_interval",
    "clip": "grad_clip clip_eps",
    "context": "model_max_length max_length",
    "contextlength": "model_max_length max_length",
    "continue": "checkpoint_path",
    "critic": "critic_pretrain",
    "ctx": "model_max_length max_length",
    "data": "dataset prompt_dataset data_input_dirs dataset_path input",
    "dataoutputdir": "data_arrow_output_dir",
    "dataset": "dataset prompt_dataset data_input_dirs dataset_path input",
    "days": "older_than",
    "debug": "dry_run",
    "decay": "weight_decay",
    "delete": "clear",
    "devices": "nproc gpus",
    "dtype": "dtype mixed_precision",
    "epoch": "max_epochs num_episodes",
    "eval": "eval_dataset eval_prompt_dataset",
    "evaldata": "eval_dataset eval_prompt_dataset eval_input_dirs",
    "evaldataset": "eval_dataset eval_prompt_dataset eval_input_dirs",
    "evaluate": "eval_interval",
    "export": "output_dir",
    "files": "dataset prompt_dataset data_input_dirs dataset_path input",
    "flashattention": "use_flash_attn",
    "fsdp": "plugin",
    "gpu": "nproc gpus",
    "group": "num_generations",
    "groupsize": "num_generations group_size",
    "host": "http_host hostfile",
    "input": "input data_input_dirs dataset prompt_dataset dataset_path",
    "ip": "http_host",
    "key": "token_file",
    "kl": "kl_coef beta",
    "learn": "lr",
    "length": "max_length model_max_length",
    "log": "log_interval log_dir",
    "logger": "use_wandb log_dir",
    "lora": "lora_rank",
    "machines": "hostfile",
    "memory": "memory",
    "model": "pretrain model_path model",
    "newtokens": "max_new_tokens max_seq_len new_tokens",
    "nodes": "hostfile",
    "offload": "zero_cpu_offload offload_inference_models",
    "out": "save_dir output_dir output save_path data_arrow_output_dir",
    "output": "save_dir output_dir output save_path data_arrow_output_dir",
    "outputpath": "save_dir output_dir output save_path data_arrow_output_dir",
    "parallel": "plugin",
    "peft": "lora_rank",
    "pipeline": "pp",
    "policy": "pretrain",
    "precision": "mixed_precision dtype",
    "processes": "nproc num_proc",
    "prompts": "prompt_dataset prompt_file prompt input",
    "quantization": "quant method",
    "quantize": "quant method",
    "rank": "lora_rank",
    "ref": "disable_reference_model ref_tp",
    "reference": "disable_reference_model ref_tp",
    "remote": "trust_remote_code",
    "responselength": "max_seq_len max_new_tokens",
    "resume": "checkpoint_path",
    "reward": "rm_pretrain reward_functions",
    "rollouts": "num_generations experience_batch_size",
    "rows": "max_samples calibration_rows",
    "samples": "max_samples num_generations",
    "save": "save_interval save_dir",
    "savedir": "save_dir output_dir output save_path data_arrow_output_dir",
    "scheduler": "lr_scheduler warmup_steps",
    "seqlen": "max_length model_max_length",
    "sequence": "max_length model_max_length",
    "size": "batch_size train_batch_size",
    "steps": "max_steps num_episodes",
    "strategy": "plugin",
    "system": "system_message",
    "temp": "temperature initial_temperature",
    "template": "conversation_template_config",
    "tensorboard": "log_dir",
    "tensorparallel": "tp",
    "test": "eval_dataset dry_run",
    "threads": "num_proc",
    "tokenizer": "tokenizer_dir tokenizer_path",
    "tokens": "max_new_tokens max_seq_len max_length",
    "tracker": "use_wandb log_dir",
    "validation": "eval_dataset eval_prompt_dataset",
    "value": "critic_pretrain",
    "vram": "memory",
    "wandb": "use_wandb",
    "warmup": "warmup_steps",
    "workers": "num_proc nproc",
    "zero": "plugin zero_stage",
}
# Words that say nothing of what a flag is about.
FILLERS = {
    "",
    "the",
    "n",
    "num",
    "number",
    "of",
    "max",
    "use",
    "per",
    "device",
    "train",
    "training",
}
FILLERS |= {"dir", "path", "file", "name", "no", "total", "folder", "directory", "my", "with"}
CLOSE = 0.8  # so alike that it is a slip of the pen
ALIKE = 0.55


def nearest_flag(name: str, flags: Iterable[str], aliases: Iterable[tuple[str, str]]) -> str | None:
    """The one of ``flags`` that ``name`` most likely means; all of them without dashes before.

    ``aliases``: (other name, the flag that it is). A name that has a meaning by itself comes first,
    then one that is a flag but for a letter or two, then the meaning of its words, and last what is
    spelled alike at all.
    """
    own = {_plain(flag): flag for flag in flags}
    spelled = {_plain(other): flag for other, flag in aliases} | own
    plain = _plain(name)
    if found := surely_meant(name, own.values(), spelled.items()):
        return found
    words = [word for word in name.lower().replace("-", "_").split("_") if word not in FILLERS]
    for said in ("".join(words), *reversed(words)):
        if found := _meant(said, set(own.values())):
            return found
    return _alike(plain, spelled, ALIKE)


def surely_meant(name: str, flags: Iterable[str], aliases: Iterable[tuple[str, str]]) -> str | None:
    """As :func:`nearest_flag`, of the meaning of the whole name and of slips of the pen alone."""
    own = {_plain(flag): flag for flag in flags}
    spelled = {_plain(other): flag for other, flag in aliases} | own
    plain = _plain(name)
    return _meant(plain, set(own.values())) or _alike(plain, spelled, CLOSE)


def verbs_with(name: str) -> list[str]:
    """The verbs that have a flag of exactly this name, without dashes before."""
    key = name.replace("-", "_")
    found = []
    for schema in sorted(SCHEMAS.glob("*.json")):
        if key in json.loads(schema.read_text(encoding="utf-8"))["properties"]:
            found.append(schema.stem)
    return found


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _alike(plain: str, spelled: dict[str, str], least: float) -> str | None:
    near = difflib.get_close_matches(plain, spelled, n=1, cutoff=least)
    return spelled[near[0]] if near else None


def _meant(word: str, flags: set[str]) -> str | None:
    for said in (word, word.removesuffix("s"), f"{word}s"):
        for flag in MEANINGS.get(said, "").split():
            if flag in flags:
                return flag
    return None
