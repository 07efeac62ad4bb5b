"""What the data benchmarks share: a tokenizer of usual size, rows of every type, and the machine in
neutral words."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault(
    "TOKENIZERS_PARALLELISM", "false"
)  # processes are the parallelism, in every way measured

EXAMPLES = ROOT / "examples" / "data"
CORES = len(os.sched_getaffinity(0))


def make_tokenizer(directory: str | None, vocab_size: int = 8000) -> Any:
    """The tokenizer of a model directory; without one a byte-level BPE trained on the sample rows,
    with ChatML."""
    if directory:
        from coati.models.tokenizer import load_tokenizer

        return load_tokenizer(directory)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from tests.tiny import CHATML, SPECIAL

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train([str(EXAMPLES / name) for name in ("sft.jsonl", "preference.jsonl")], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[:2]})
    tokenizer.chat_template = CHATML
    return tokenizer


def machine() -> dict[str, Any]:
    """Cores, memory, kind of processor and versions."""
    import datasets
    import tokenizers

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cores": CORES,
        "memory_gib": round(memory, 1),
        "cpu": names[0] if names else platform.processor() or "unknown",
        "python": platform.python_version(),
        "datasets": datasets.__version__,
        "tokenizers": tokenizers.__version__,
        "load_average_at_start": round(os.getloadavg()[0], 2),
    }


def machine_with_torch() -> dict[str, Any]:
    """:func:`machine`, and what PyTorch computes with; said on a line."""
    import torch

    about = machine() | {"threads": torch.get_num_threads(), "torch": torch.__version__}
    print(f"{about['cpu']}, {about['threads']} threads, PyTorch {about['torch']}", flush=True)
    return about
