"""What the SFT benchmarks run: one model, one set of rows, one way of counting work. Imported by
all workers of `make bench-peers`, so nothing beyond the standard library is imported here at the
top."""

import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "bench"
TEMPLATE = "HuggingFaceTB_SmolLM2-135M-Instruct.json"
BATCH_SIZE = 8
LEARNING_RATE = 3e-4
MAX_NORM = 1.0
BETAS = (0.9, 0.95)
MODEL = {  # 28.3 million parameters, of which the tied vocabulary 18.9 million
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 1024,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def wait_for_turn() -> None:
    """Returns when a line comes in, and ends this worker when nobody can send one any more."""
    if not sys.stdin.readline():
        sys.exit("the benchmark has ended")


def prepare(
    tokenizer_dir: str | None = None, folder: Path = CACHE, shape: dict | None = None
) -> Path:
    """``folder`` with ``model/`` (random weights of ``shape``, by default MODEL; seed 0),
    ``arrow/`` and ``rows.jsonl``: the conversations of examples/data/sft.jsonl as token ids of
    SmolLM2's tokenizer, in the file's order, with -100 outside the answers."""
    if (folder / "rows.jsonl").exists():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from coati.dataset import load_tokenized_dataset, prepare_dataset, setup_conversation_template
    from coati.models import load_tokenizer

    if tokenizer_dir is None:
        sys.path.insert(0, str(ROOT / "examples" / "demo"))
        import smollm2

        tokenizer_dir = str(smollm2.prepare())
    tokenizer = load_tokenizer(tokenizer_dir)
    template = setup_conversation_template(
        tokenizer, str(ROOT / "config" / "conversation_template" / TEMPLATE)
    )
    prepare_dataset(
        inputs=[ROOT / "examples" / "data" / "sft.jsonl"],
        tokenizer=tokenizer,
        template=template,
        arrow_dir=folder / "arrow",
        max_length=512,
        num_bins=1,
        show=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(shape or MODEL)))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = load_tokenized_dataset(str(folder / "arrow"))
    lines = [json.dumps({"input_ids": row["input_ids"], "labels": row["labels"]}) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def block_weights(model: dict) -> int:
    """Numbers in the linear layers of all transformer blocks: queries and output, keys and values,
    and the three of the MLP."""
    hidden = model["hidden_size"]
    kv = hidden * model["num_key_value_heads"] // model["num_attention_heads"]
    one = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * model["intermediate_size"]
    return model["num_hidden_layers"] * one


def flops(lengths: list[int], supervised: int, model: dict | None = None) -> float:
    """Floating-point operations that one forward and backward pass needs, by mathematics, not by
    implementation.

    Padding counts for nothing, nor does anything computed twice. A weight of a matrix product costs
    6 per token it is applied to (2 forward, 4 backward): the layers' weights at every token, the
    vocabulary's at supervised tokens only. Attention over n tokens: 2 products (scores, values) x 2
    x hidden x n^2 / 2 (the causal half) forward, and twice that backward, per layer. Norms,
    activations and the softmax are left out, as is the optimizer.
    """
    model = model or MODEL
    hidden = model["hidden_size"]
    vocabulary = hidden * model["vocab_size"]
    attention = 6 * model["num_hidden_layers"] * hidden * sum(n * n for n in lengths)
    return 6.0 * block_weights(model) * sum(lengths) + 6.0 * vocabulary * supervised + attention


class MatmulRate:
    """This machine's fp32 matrix rate, in flop/s: 2048 x 2048 x 2048 with all threads of this
    process."""

    def __init__(self, size: int = 2048):
        import torch

        self.size = size
        self.product = torch.empty(size, size)
        self.left = torch.randn(size, size)
        self.right = torch.randn(size, size)
        self.measure()  # touches the memory

    def measure(self) -> float:
        import torch

        started = time.perf_counter()
        torch.mm(self.left, self.right, out=self.product)
        return 2 * self.size**3 / (time.perf_counter() - started)
