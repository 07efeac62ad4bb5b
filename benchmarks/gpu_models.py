"""What the items of bench_gpu.py run: shapes, random weights, mock tokens, and the arithmetic of a
step.

No hub, no tokenizer and no data set is needed. ``tiny`` keeps a family and shrinks its sizes, so
that a CPU goes through the same code.
"""

from typing import Any

# Dense bf16 peaks, TFLOP/s, by a part of the device's name (the vendor's data sheets, SXM)
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "B200": 2250.0, "A100": 312.0}
LLAMA3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
LLAMA2_7B = LLAMA3_8B | {
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
QWEN25_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
}
QWEN3_4B = {
    "model_type": "qwen3",
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
QWEN3_06B = QWEN3_4B | {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "intermediate_size": 3072,
}
PARITY = LLAMA3_8B | {  # 140 million parameters
    "hidden_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "intermediate_size": 2816,
    "vocab_size": 32000,
}
_OPT = {
    "model_type": "opt",
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "dropout": 0.0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
OPT_125M = _OPT | {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "ffn_dim": 3072,
    "word_embed_proj_dim": 768,
}
OPT_350M = _OPT | {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "ffn_dim": 4096,
    "word_embed_proj_dim": 512,
    "do_layer_norm_before": False,
}
OPT_13B = _OPT | {  # OPT-1.3B
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "ffn_dim": 8192,
    "word_embed_proj_dim": 2048,
}
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "word_embed_proj_dim": 64,
    "vocab_size": 384,
}
TINY_LENGTH = 64
Shape = dict[str, Any]


class NotHere(Exception):
    """Why an item cannot run on this machine."""


class Pad:
    """In the place of a tokenizer, for a collator and for rewards: a token's text is its number."""

    pad_token_id = 2
    eos_token_id = 2
    padding_side = "right"

    @staticmethod
    def decode(ids: list[int], skip_special_tokens: bool = False, **_: bool) -> str:
        return " ".join(map(str, ids))


class LeftPad(Pad):
    pad_token_id = 1
    padding_side = "left"


def tiny(shape: Shape) -> Shape:
    """``shape`` with sizes of nothing."""
    return shape | {name: size for name, size in TINY.items() if name in shape}


def device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def memory_gib() -> float:
    """Of the GPU; 0 without one."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    return torch.cuda.get_device_properties(0).total_memory / 2**30


def model_of(shape: Shape, dtype: str = "bfloat16", head: bool = True) -> Any:
    """Random weights of seed 0, made on the GPU in ``dtype``: the host never holds them.
    ``head``: with the vocabulary's; else the backbone alone."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from coati.utils.transformers_compat import dtype_keyword

    sizes = {name: value for name, value in shape.items() if name != "model_type"}
    config = AutoConfig.for_model(shape["model_type"], **{"pad_token_id": 2} | sizes)
    kind = AutoModelForCausalLM if head else AutoModel
    with device():
        torch.manual_seed(0)
        keywords = {dtype_keyword(): getattr(torch, dtype), "attn_implementation": "sdpa"}
        return kind.from_config(config, **keywords)


def tokens(count: int, length: int, vocabulary: int) -> Any:
    """(count, length) ids of seed 0, none of them special."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary, (count, length), generator=generator)


def sft_batch(rows: int, length: int, vocabulary: int) -> dict[str, Any]:
    """A micro-batch in which every token is supervised."""
    import torch

    ids = tokens(rows, length, vocabulary)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def preference_batch(pairs: int, length: int, vocabulary: int) -> dict[str, Any]:
    """A micro-batch of pairs with one prompt each; the second half of a row is its response."""
    from coati.dataset import DataCollatorForPreferenceDataset

    half = length // 2
    mask = [False] * half + [True] * (length - half)
    prompts, *responses = tokens(3 * pairs, half, vocabulary).reshape(3, pairs, half).tolist()
    rows = [
        {
            "chosen_input_ids": prompt + chosen,
            "rejected_input_ids": prompt + rejected,
            "chosen_loss_mask": mask,
            "rejected_loss_mask": mask,
        }
        for prompt, chosen, rejected in zip(prompts, *responses, strict=True)
    ]
    return DataCollatorForPreferenceDataset(Pad, length)(rows)


def weights_of(shape: Shape) -> tuple[int, int, int]:
    """Weights of a Llama-like shape that stand in matrix products: of its layers, of the
    vocabulary's head; and queries' width."""
    hidden = shape["hidden_size"]
    heads = shape["num_attention_heads"]
    wide = heads * shape.get("head_dim", hidden // heads)
    kv = wide * shape["num_key_value_heads"] // heads
    layer = 2 * hidden * wide + 2 * hidden * kv + 3 * hidden * shape["intermediate_size"]
    return shape["num_hidden_layers"] * layer, hidden * shape["vocab_size"], wide


def flops(
    shape: Shape, lengths: list[int], supervised: int, rank: int | None = None, extra: int = 0
) -> float:
    """Floating-point operations of forward and backward over rows of ``lengths``, by mathematics:
    what is computed twice (gradient checkpointing) and padding count for nothing.

    A weight costs 6 a token, one that is frozen beside LoRA adapters 4 (no gradient of its own),
    the vocabulary's head at ``supervised`` tokens only. ``rank``: of adapters of every linear
    layer, 6 each; None: all is trained. ``extra``: forward passes of another model of the shape.
    """
    layers, head, wide = weights_of(shape)
    count = sum(lengths)
    each = 6 if rank is None else 4
    forward_attention = 2.0 * shape["num_hidden_layers"] * wide * sum(n * n for n in lengths)
    total = each * (layers * count + head * supervised) + 3 * forward_attention
    total += extra * (2.0 * (layers * count + head * supervised) + forward_attention)
    if rank is not None:
        total += 6.0 * adapter_weights(shape, rank) * count
    return total


def adapter_weights(shape: Shape, rank: int) -> int:
    """Weights of adapters of ``rank`` on the seven linear layers of each block."""
    hidden = shape["hidden_size"]
    inner = shape["intermediate_size"]
    heads = shape["num_attention_heads"]
    wide = heads * shape.get("head_dim", hidden // heads)
    kv = wide * shape["num_key_value_heads"] // heads
    sides = 2 * (hidden + wide) + 2 * (hidden + kv) + 3 * (hidden + inner)
    return shape["num_hidden_layers"] * rank * sides


def peak_tflops(name: str) -> float | None:
    """The dense bf16 peak of a device of that name; None where it is not in the table."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
