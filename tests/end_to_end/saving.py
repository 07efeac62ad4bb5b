"""What the worker of test_saving.py does: runs of the scripts, one after the other in a process,
and what they left."""

import errno
import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.end_to_end.inputs import write_family, write_model
from tests.end_to_end.worker import Run, train_each
from tests.tiny import tiny_tokenizer

# Published generation settings (generation_config.json of the model's page; config.json where
# "config" says so). Token ids are moved into the tiny vocabulary: 2 ends a turn, 0 ends a text.
PUBLISHED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Llama 2 chat, first": (
        "llama",
        {"max_length": 4096, "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6},
        {},
    ),
    "Llama 2 chat": (
        "llama",
        {"do_sample": True, "max_length": 4096, "pad_token_id": 0, "temperature": 0.6}
        | {"top_p": 0.9},
        {},
    ),
    "LLaMA, early conversion": ("llama", {}, {"pad_token_id": -1, "temperature": 0.7}),
    "Llama 3.1": (
        "llama",
        {"do_sample": True, "eos_token_id": [0, 5, 2], "temperature": 0.6, "top_p": 0.9},
        {},
    ),
    "vicuna 1.5": (
        "llama",
        {"_from_model_config": True, "max_length": 4096, "pad_token_id": 0}
        | {"temperature": 0.9, "top_p": 0.6},
        {},
    ),
    "Qwen2.5": (
        "qwen2",
        {"pad_token_id": 0, "do_sample": True, "eos_token_id": [2, 0]}
        | {"repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
        {},
    ),
    "DeepSeek R1 distill": (
        "qwen2",
        {"_from_model_config": True, "do_sample": True, "temperature": 0.6, "top_p": 0.95},
        {},
    ),
    "Qwen3": (
        "qwen3",
        {"pad_token_id": 0, "do_sample": True, "eos_token_id": [2, 0]}
        | {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
        {},
    ),
    "Mistral v0.3": ("mistral", {"_from_model_config": True, "eos_token_id": 2}, {}),
    "Gemma 2": (
        "gemma2",
        {"_from_model_config": True, "cache_implementation": "hybrid", "eos_token_id": [0, 2]}
        | {"pad_token_id": 0},
        {},
    ),
    "Gemma 3": (
        "gemma3_text",
        {"cache_implementation": "hybrid", "do_sample": True, "eos_token_id": [0, 2]}
        | {"pad_token_id": 0, "top_k": 64, "top_p": 0.95},
        {"sliding_window": 64},
    ),
    "Phi-3": (
        "phi3",
        {"_from_model_config": True, "eos_token_id": [0, 3, 2], "pad_token_id": 0},
        {},
    ),
    "SmolLM2": ("llama", {"_from_model_config": True, "eos_token_id": 2, "pad_token_id": 2}, {}),
    "OLMo 2": ("olmo2", {"_from_model_config": True, "eos_token_id": 0, "pad_token_id": 3}, {}),
    "GPT-2": ("gpt2", {"_from_model_config": True, "bos_token_id": 2, "eos_token_id": 2}, {}),
    "gpt-oss": (
        "gpt_oss",
        {"do_sample": True, "eos_token_id": [2, 0, 4], "pad_token_id": 0},
        {},
    ),
    "Falcon": ("falcon", {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 0}, {}),
    "Yi": (
        "llama",
        {"eos_token_id": 2, "pad_token_id": 0, "do_sample": True, "max_length": 4096}
        | {"temperature": 0.6, "top_p": 0.8},
        {},
    ),
}
STEP = ("--batch_size", "2", "--accumulation_steps", "1", "--max_length", "96", "--lr", "1e-2")
ONE = (*STEP, "--max_steps", "1")


def rows_of(response: str) -> str:
    turns = (
        (
            {"role": "user", "content": f"q{i}"},
            {"role": "assistant", "content": f"{response} {i % 3}"},
        )
        for i in range(8)
    )
    return "".join(json.dumps({"messages": list(pair)}) + "\n" for pair in turns)


ROWS = rows_of("<think>hm</think>yes")
PAIRS = "".join(
    json.dumps({"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": "no"}) + "\n" for i in range(8)
)


def sft(folder: Path, model: str, name: str, *words: str, steps: tuple[str, ...] = ONE) -> Run:
    return Run(
        ["--pretrain", model, "--dataset", str(folder / "rows.jsonl"), "--save_dir"]
        + [str(folder / name), *steps, *words]
    )


def pairs(folder: Path, model: str, name: str, script: str, *words: str) -> Run:
    named = ["--pretrain", model, "--dataset", str(folder / "pairs.jsonl"), "--save_dir"]
    return Run([*named, str(folder / name), *STEP, *words], script=script)


def families(place: str) -> dict[str, dict[str, Any]]:
    """Train one step from each of PUBLISHED that the installed transformers has, and export it:
    exit code, messages, and the generation settings that are saved and exported."""
    from transformers import CONFIG_MAPPING

    from coati.inference.export.model_dir import export

    folder = Path(place)
    (folder / "rows.jsonl").write_text(rows_of("<think>\nhm\n</think>\n\nyes"), encoding="utf-8")
    found: dict[str, dict[str, Any]] = {}
    for number, (name, (family, settings, config)) in enumerate(PUBLISHED.items()):
        if family not in CONFIG_MAPPING:
            continue
        model = folder / f"base-{number}"
        write_family(model, family)
        (model / "generation_config.json").unlink(missing_ok=True)
        if settings:
            (model / "generation_config.json").write_text(json.dumps(settings))
        held = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(held | config))
        run = sft(folder, str(model), f"out-{number}")
        (ended,) = train_each({"": run}).values()
        saved = folder / f"out-{number}" / "modeling"
        found[name] = {"code": ended.code, "err": ended.err}
        if not ended.code:
            export(saved, folder / f"export-{number}", lambda *_: "", max_new_tokens=4)
            found[name] |= {
                key: json.loads((where / "generation_config.json").read_text())
                for key, where in (("saved", saved), ("exported", folder / f"export-{number}"))
            }
    return found


def stages(place: str) -> dict[str, Any]:
    """Added tokens, chained adapters and a reward model: trained, resumed, read by others."""
    folder = Path(place)
    (folder / "rows.jsonl").write_text(ROWS, encoding="utf-8")
    (folder / "pairs.jsonl").write_text(PAIRS, encoding="utf-8")
    base = write_model(folder / "base", vocab_size=len(tiny_tokenizer()))
    new = ("--add_tokens", "<think>", "</think>")
    two = (*STEP, "--max_steps", "2", "--save_interval", "1")
    auto = ("--checkpoint_path", "auto")
    lora = ("--lora_rank", "4", "--max_steps", "2", "--save_interval", "1")
    runs = {
        "grown": sft(folder, base, "grown", *new, steps=two),
        "grown lora": sft(folder, base, "grown_lora", *new, "--lora_rank", "4", steps=two),
        "c1": sft(folder, base, "c1", "--lora_rank", "4"),
        "c2": pairs(folder, str(folder / "c1" / "modeling"), "c2", "train_dpo.py", *lora),
        "grown dpo": pairs(folder, base, "grown_dpo", "train_dpo.py", *new, *lora),
        "rm": pairs(folder, base, "rm", "train_rm.py", "--max_steps", "1"),
        "no ppo": Run(["--pretrain", base, "--prompt_dataset", base, *new], script="train_grpo.py"),
    }
    ended = train_each(runs)
    # The last step again, from the checkpoint before it.
    for name in ("grown", "grown_lora", "c2", "grown_dpo"):
        for path in [folder / name / "modeling", *sorted((folder / name).glob("epoch-*_step-2"))]:
            path.rename(folder / f"{name}-{path.name}-first")
    again = {
        name: Run([*runs[name].words, *auto], script=runs[name].script)
        for name in ("grown", "grown lora", "c2", "grown dpo")
    }
    ended |= {f"{name}, resumed": one for name, one in train_each(again).items()}
    return {name: (one.code, one.err) for name, one in ended.items()}


def failing(place: str) -> dict[str, Any]:
    """Runs whose saving fails: before training, at the end, for want of space."""
    from transformers import PreTrainedTokenizerBase

    folder = Path(place)
    (folder / "rows.jsonl").write_text(ROWS, encoding="utf-8")
    base = write_model(folder / "base")
    found: dict[str, Any] = {}
    original = PreTrainedTokenizerBase.save_pretrained
    calls: list[int] = []

    def broken(self, *args, **kwargs):
        calls.append(1)
        if len(calls) >= after:
            raise TypeError("Object of type Undefined is not JSON serializable")
        return original(self, *args, **kwargs)

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    for name, first, words in (
        ("at the start", 1, ()),
        ("at the end", 2, ()),
        ("a dry run", 1, ("--dry_run",)),
        ("an adapter's", 2, ("--lora_rank", "4")),
    ):
        calls.clear()
        after = first
        key = name.replace(" ", "_")
        with patch.object(PreTrainedTokenizerBase, "save_pretrained", broken):
            (ended,) = train_each({"": sft(folder, base, key, *words)}).values()
        found[name] = ended.code, ended.err
    with patch("coati.parallel.weights.save_shard", lambda tensors, path: full(path)):
        (ended,) = train_each({"": sft(folder, base, "full")}).values()
    found["no space"] = ended.code, ended.err
    # Beside the final directory there is no place either.
    (folder / "elsewhere").mkdir()
    with (
        patch("coati.parallel.weights.save_shard", lambda tensors, path: full(path)),
        patch("coati.parallel.save_rescue._unused", full),
        patch("tempfile.tempdir", str(folder / "elsewhere")),
    ):
        (ended,) = train_each({"": sft(folder, base, "taken")}).values()
    found["no place beside"] = ended.code, ended.err
    (folder / "file").write_text("")
    (ended,) = train_each({"": sft(folder, base, "file/out")}).values()
    found["a file in the way"] = ended.code, ended.err
    return found


def tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)
