"""Estimated and measured peak memory of 31 training configurations on a CPU, each in fresh
processes: what `coati fit` and --dry_run compute, beside what the run took.

Each configuration is a run of the library's own recipe, with random weights and rows of one length:
two optimizer steps, so that the second has the first one's optimizer states (of PPO and GRPO: two
episodes). What is printed:

  estimate   coati/parallel/footprint, from configuration and flags alone
  measured   the highest resident set of the process (VmHWM, set back after the imports and a tiny
             training step) minus the resident set before the run; of several processes the highest.
             malloc gives large blocks back at once (MALLOC_MMAP_THRESHOLD_), so that this is what
             tensors hold at the peak, as torch.cuda.max_memory_allocated is on a GPU
  kept       with --kept: the same with the library's default for CPUs, which keeps what is freed
             (parallel/compat/cpu/malloc.py): faster, and larger by what lies free in between

    python benchmarks/bench_memory.py [--only TEXT] [--kept] [--output FILE]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**17)}
PROMPT = 64  # tokens, of runs with rollouts
ENDS = {"pad_token_id": 2, "eos_token_id": 2, "bos_token_id": 1}
LLAMA = {"model_type": "llama", "tie_word_embeddings": True, "max_position_embeddings": 4096}
MODELS: dict[str, dict[str, Any]] = {
    "36M llama": LLAMA
    | {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "135M llama": LLAMA
    | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "300M llama": LLAMA
    | {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "150M qwen3": {
        "model_type": "qwen3",
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    },
    "60M gemma3": {
        "model_type": "gemma3_text",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "vocab_size": 65536,
        "sliding_window": 1024,
        "query_pre_attn_scalar": 128,
        "max_position_embeddings": 4096,
    },
    "90M gpt-oss": {
        "model_type": "gpt_oss",
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "rope_scaling": None,
    },
}


@dataclass(frozen=True)
class Case:
    """A configuration. ``rows`` of ``length`` tokens in a micro-batch; with rollouts that many
    responses, of ``length`` with their prompts."""

    method: str
    model: str
    rows: int
    length: int
    flags: tuple[str, ...] = ()
    processes: int = 1
    stored: str = "float32"

    @property
    def name(self) -> str:
        """As it is printed."""
        more = " ".join(self.flags).replace("--", "").replace("mixed_precision ", "")
        ranks = f" x{self.processes}" if self.processes > 1 else ""
        return f"{self.method} {self.model} {self.rows}x{self.length} {more}{ranks}".strip()


BF16 = ("--plugin", "zero2", "--mixed_precision", "bf16")
LORA = ("--lora_rank", "16")
NF4 = ("--quantize_base", "nf4")
INT8 = ("--quantize_base", "int8")
DORA = ("--use_dora",)
CKPT = ("--grad_checkpoint",)
GEMINI = ("--plugin", "gemini", "--mixed_precision", "bf16")
AUTOCAST = ("--plugin", "ddp", "--mixed_precision", "bf16")
CASES = (
    Case("sft", "36M llama", 4, 512),
    Case("sft", "36M llama", 8, 512, CKPT),
    Case("sft", "36M llama", 1, 1024, ("--accumulation_steps", "2")),
    Case("sft", "36M llama", 4, 256, AUTOCAST),
    Case("sft", "36M llama", 4, 256, BF16, stored="bfloat16"),
    Case("sft", "36M llama", 2, 512, ("--plugin", "ddp"), processes=2),
    Case("sft", "36M llama", 2, 128, GEMINI, processes=2, stored="bfloat16"),
    Case("sft", "135M llama", 4, 256),
    Case("sft", "135M llama", 4, 256, LORA),
    Case("sft", "135M llama", 4, 256, (*LORA, *NF4)),
    Case("sft", "135M llama", 4, 256, (*LORA, *INT8), stored="bfloat16"),
    Case("sft", "135M llama", 4, 256, (*LORA, *NF4, *DORA)),
    Case("sft", "135M llama", 4, 512, CKPT),
    Case("sft", "135M llama", 2, 256, ("--plugin", "zero2"), processes=2),
    Case("sft", "300M llama", 2, 256),
    Case("sft", "300M llama", 2, 512, (*LORA, *CKPT)),
    Case("sft", "300M llama", 2, 512, (*LORA, *NF4, *CKPT), stored="bfloat16"),
    Case("dpo", "36M llama", 2, 384, (*LORA, *NF4)),
    Case("grpo", "135M llama", 16, 128, (*LORA, *NF4)),
    Case("sft", "150M qwen3", 4, 128),
    Case("sft", "60M gemma3", 2, 512),
    Case("sft", "90M gpt-oss", 2, 384),
    Case("dpo", "36M llama", 2, 384),
    Case("rm", "135M llama", 2, 256, CKPT),
    Case("gkd", "36M llama", 4, 384, ("--gkd_lambda", "0")),
    Case("gkd", "135M llama", 4, 256),
    Case("ilql", "36M llama", 2, 256),
    Case("ilql", "36M llama", 4, 256, CKPT),
    Case("ilql", "36M llama", 4, 256, LORA),
    Case("grpo", "36M llama", 16, 128),
    Case("ppo", "36M llama", 16, 128),
)


# The worker: one configuration in this process


def write_model(folder: Path, case: Case) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.tiny import tiny_tokenizer

    torch.manual_seed(0)
    config = AutoConfig.for_model(**MODELS[case.model], **ENDS)
    model = AutoModelForCausalLM.from_config(config)
    model.to(getattr(torch, case.stored)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def text_of(tokenizer: Any, tokens: int) -> str:
    """A text of ``tokens`` tokens."""
    words = 1
    while len(tokenizer("a" + " a" * words).input_ids) < tokens:
        words += 1
    return "a" + " a" * words


def write_rows(file: Path, case: Case) -> None:
    """Rows of one length, no two of which begin alike: what rows share would be computed once."""
    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    asked = {"role": "user", "content": "00"}
    told = [asked, {"role": "assistant", "content": ""}]
    frame = len(tokenizer.apply_chat_template(told, tokenize=True, return_dict=False))
    answer = text_of(tokenizer, case.length - frame)
    prompt = text_of(tokenizer, PROMPT - frame)
    rows = [json.dumps(_row(case, f"{number:02d}", answer, prompt)) for number in range(64)]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")


def _row(case: Case, asked: str, answer: str, prompt: str) -> dict[str, Any]:
    """Of the type of the method; ``asked`` tells it from others."""
    if case.method in ("dpo", "rm"):
        return {
            "context": [{"from": "human", "content": asked}],
            "chosen": [{"from": "assistant", "content": answer}],
            "rejected": [{"from": "assistant", "content": "b" + answer[1:]}],
        }
    if case.method in ("grpo", "ppo"):
        return {"messages": [{"role": "user", "content": asked + prompt}]}
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"messages": messages} | ({"score": 1} if case.method == "ilql" else {})


def settings_of(case: Case, folder: Path) -> Any:
    """The parsed flags of the run."""
    from coati.cli import arguments, distilling, offline_rl, preferences, rollouts

    parsers = {
        "sft": arguments.parse_sft,
        "dpo": preferences.parse_dpo,
        "rm": preferences.parse_rm,
        "gkd": distilling.parse_gkd,
        "ilql": offline_rl.parse_ilql,
        "grpo": rollouts.parse_grpo,
        "ppo": rollouts.parse_ppo,
    }
    flags = ["--pretrain", folder / "model", "--dataset", folder / "rows.jsonl"]
    run = os.getppid() if "RANK" in os.environ else os.getpid()  # one for all ranks
    flags += ["--save_dir", folder / f"out{run}", *case.flags]
    if case.method in ("grpo", "ppo"):
        flags += ["--max_seq_len", case.length - PROMPT, "--max_length", case.length]
        flags += ["--train_batch_size", case.rows // 2, "--num_collect_steps", 1]
        flags += ["--num_episodes", 2, "--reward_functions", "length", "--sample_interval", 0]
    else:
        flags += ["--batch_size", case.rows, "--max_length", case.length + 8, "--max_steps", 2]
    if case.method == "gkd":
        flags += ["--teacher", folder / "model"]  # of the student's size, in memory of its own
    if "--accumulation_steps" not in case.flags:
        flags += ["--accumulation_steps", 1]
    if case.method == "grpo":
        flags += ["--experience_batch_size", case.rows // 4, "--num_generations", 4]
    elif case.method == "ppo":
        flags += ["--experience_batch_size", case.rows, "--critic_pretrain", folder / "model"]
    return parsers[case.method]([str(flag) for flag in flags])


def resident(name: str) -> int:
    """Bytes: VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def warm_up() -> None:
    """Load what any run loads: kernels, thread pools, transformers' and datasets' modules."""
    import datasets  # noqa: F401
    import torch

    from coati.parallel.boost import prepare_colossalai
    from tests.tiny import tiny_llama

    prepare_colossalai()
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.zeros(1, 8, dtype=torch.long)).logits.sum().backward()
    optimizer.step()


def worker(case: Case, folder: Path) -> None:
    from coati.recipes.command import load

    settings = settings_of(case, folder)
    recipe = load(case.method).function()
    warm_up()
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = resident("VmRSS")
    recipe(settings)
    (folder / f"peak{os.environ.get('RANK', 0)}").write_text(str(resident("VmHWM") - before))


# The parent


def estimate_of(case: Case, folder: Path) -> Any:
    """What the library says before the run."""
    from coati.parallel.footprint.model_shape import load_shape
    from coati.parallel.footprint.training_memory import estimate
    from coati.recipes.defaults import resolved_options
    from coati.recipes.memory_plan import plan_of

    settings = settings_of(case, folder)
    longest = PROMPT if case.method in ("grpo", "ppo") else case.length
    plan = plan_of(
        settings,
        resolved_options(settings),
        processes=case.processes,
        on_gpu=False,
        longest=longest,
    )
    return estimate(load_shape(str(folder / "model")), plan)


def measured(case: Case, folder: Path, environment: dict[str, str]) -> int:
    """Bytes of the peak, in fresh processes."""
    call = [sys.executable]
    if case.processes > 1:
        call += ["-m", "torch.distributed.run", f"--nproc_per_node={case.processes}"]
        call += ["--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    call += [__file__, "--worker", str(CASES.index(case)), "--folder", str(folder)]
    run = subprocess.run(call, env=os.environ | environment, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{case.name}\n{run.stdout}\n{run.stderr}")
    return max(int(file.read_text()) for file in folder.glob("peak*"))


def row_of(case: Case, keep: bool) -> dict[str, Any]:
    """One line of the table, in MiB."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", case)
        write_rows(folder / "rows.jsonl", case)
        guess = estimate_of(case, folder)
        peak = measured(case, folder, GIVE_BACK)
        kept = measured(case, folder, {}) if keep else 0
    return {
        "case": case.name,
        "estimate_mib": round(guess.peak / 2**20),
        "measured_mib": round(peak / 2**20),
        "ratio": round(guess.peak / peak, 3),
        **({"kept_mib": round(kept / 2**20)} if keep else {}),
        "moment": guess.moment,
        "parts_mib": {part: round(size / 2**20) for part, size in guess.parts.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="configurations whose name holds this text")
    parser.add_argument("--kept", action="store_true", help="measure the last column too")
    parser.add_argument("--output", help="write the figures as JSON")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        return worker(CASES[args.worker], args.folder)
    rows = []
    figures = ["estimate_mib", "measured_mib", "ratio"] + ["kept_mib"] * args.kept
    titles = ["configuration", *(name.replace("_mib", " MiB") for name in figures)]
    print(f"| {' | '.join(titles)} |\n| {' | '.join(['---'] * len(titles))} |")
    for case in CASES:
        if args.only in case.name:
            row = row_of(case, args.kept)
            rows.append(row)
            cells = [row["case"], *(str(row[name]) for name in figures)]
            print(f"| {' | '.join(cells)} |", flush=True)
    within = sum(abs(row["ratio"] - 1) <= 0.15 for row in rows)
    print(f"{within} of {len(rows)} within 15%")
    if args.output:
        Path(args.output).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
