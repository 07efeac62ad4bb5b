"""Writes docs/models.md: what each model family does under each plugin, tried with tiny random
models.

``python -m tests.models_table`` runs every cell (two processes each, ten minutes in all) and writes
the page. A cell says that a family trains only after two steps whose losses and gradient norms
equal those of one process. With names of families (``python -m tests.models_table gpt2 opt``) only
these are tried anew.
"""

import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from coati.parallel.families import NOT_CHAT, SPLITS, check_family
from coati.parallel.objective import Objective
from coati.parallel.plugin_checks import check_options
from coati.parallel.plugins import ParallelOptions
from tests.distributed.spawn import run

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
TRAINS = "yes"
REFUSED = "no"
ROWS = 8
VOCABULARY = 384
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = WIDE | {"num_key_value_heads": 2, "max_position_embeddings": 128}
OLD = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
EXPERTS = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 128,
}
CHATGLM = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "kv_channels": 16,
    "num_attention_heads": 4,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "seq_length": 128,
    "padded_vocab_size": VOCABULARY,
    "original_rope": True,
    "add_qkv_bias": True,
    "rmsnorm": True,
    "use_cache": False,
}


@dataclass(frozen=True)
class Family:
    """A row: ``type`` is transformers' model_type, ``config`` makes a tiny model (None: none can be
    made here)."""

    names: str
    type: str
    config: dict[str, Any] | None
    remote: bool = False


@dataclass(frozen=True)
class Column:
    title: str
    options: dict[str, Any] = field(default_factory=dict)
    lora: bool = False


FAMILIES = (
    Family("LLaMA-2, Colossal-LLaMA-2, Vicuna, Yi, Yi-1.5, TinyLlama, SmolLM2", "llama", GROUPED),
    Family("Mistral, Zephyr", "mistral", GROUPED | {"sliding_window": None}),
    Family(
        "Mixtral",
        "mixtral",
        GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    Family("Qwen1.5, Qwen2, Qwen2.5, R1 distilled to Qwen", "qwen2", GROUPED),
    Family("Qwen3", "qwen3", GROUPED | {"head_dim": 16}),
    Family("GPT-2", "gpt2", OLD),
    Family("GPT-J", "gptj", OLD | {"rotary_dim": 8}),
    Family("GPT-NeoX, Pythia", "gpt_neox", WIDE | {"max_position_embeddings": 128}),
    Family(
        "OPT",
        "opt",
        {
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 64,
            "max_position_embeddings": 128,
            "pad_token_id": 1,
        },
    ),
    Family("BLOOM", "bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    Family(
        "Falcon",
        "falcon",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
        },
    ),
    Family("Phi-2", "phi", WIDE | {"max_position_embeddings": 128}),
    Family("Phi-3", "phi3", GROUPED | {"pad_token_id": 0}),
    Family("Gemma", "gemma", GROUPED | {"head_dim": 16}),
    Family("Gemma 2", "gemma2", GROUPED | {"head_dim": 16}),
    Family("GLM-4", "glm", GROUPED | {"head_dim": 16, "pad_token_id": 0}),
    Family("DeepSeek-V3", "deepseek_v3", WIDE | EXPERTS),
    Family("ChatGLM2, ChatGLM3", "chatglm", CHATGLM, remote=True),
    Family("Baichuan2", "baichuan", None, remote=True),
    Family("MiniCPM", "minicpm", None, remote=True),
    Family("DeepSeek-V2", "deepseek_v2", None, remote=True),
)

_SEQUENCE = {"plugin": "3d", "enable_sequence_parallelism": True}
COLUMNS = (
    Column("ddp", {"plugin": "ddp"}),
    Column("zero2", {"plugin": "zero2"}),
    Column("zero2 with LoRA", {"plugin": "zero2"}, lora=True),
    Column("zero2_cpu", {"plugin": "zero2_cpu"}),
    Column("gemini", {"plugin": "gemini", "precision": "bf16"}),
    Column("gemini_auto", {"plugin": "gemini_auto", "precision": "bf16"}),
    Column("gemini --tp 2", {"plugin": "gemini", "precision": "bf16", "tp": 2}),
    Column("3d", {"plugin": "3d"}),
    Column("3d --tp 2", {"plugin": "3d", "tp": 2}),
    Column("3d --pp 2", {"plugin": "3d", "pp": 2, "microbatch_size": 2}),
    Column("3d split_gather", _SEQUENCE | {"tp": 2, "sp_mode": "split_gather"}),
    Column("3d ring", _SEQUENCE | {"tp": 2, "sp_mode": "ring"}),
    Column("3d all_to_all", _SEQUENCE | {"sp": 2, "sp_mode": "all_to_all"}),
)


def refusal(family: str, column: Column) -> str | None:
    """What the library says instead of training ``family`` under ``column``, or None."""
    config = type("Config", (), {"model_type": family})()
    options = ParallelOptions(batch_size=ROWS, **column.options)
    try:
        check_options(world_size=2, **vars(options))
        check_family(config, options)
    except ValueError as error:
        return str(error)
    return None


def tiny_model(family: Family) -> torch.nn.Module:
    """A random model of two layers, the same for every call."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from coati.models.loading import disable_dropout

    torch.manual_seed(0)
    if family.type == "chatglm":
        model = _chatglm(family.config)
    else:
        config = AutoConfig.for_model(family.type, vocab_size=VOCABULARY, **family.config)
        model = AutoModelForCausalLM.from_config(config)
    disable_dropout(model)
    return model


def _chatglm(config: dict) -> torch.nn.Module:
    # The model's own code is not in transformers; ColossalAI brings a copy, which must look as if
    # it came from the hub.
    from coati.parallel.compat.import_colossalai import import_colossalai

    import_colossalai()
    from colossalai.shardformer.modeling.chatglm2_6b import configuration_chatglm, modeling_chatglm

    cls = modeling_chatglm.ChatGLMForConditionalGeneration
    cls.__module__ = "transformers_modules.chatglm2.modeling_chatglm"
    return cls(configuration_chatglm.ChatGLMConfig(**config), empty_init=False)


class _CrossEntropy(Objective):
    def loss(self, logps, batch):
        return -logps.sum(), {}


def _batch(step: int, pad: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    length = (16, 24)[step]
    tokens = torch.randint(3, VOCABULARY, (ROWS, length), generator=generator)
    lengths = torch.randint(5, length + 1, (ROWS,), generator=generator)
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    labels = tokens.masked_fill(~mask, -100)
    labels[:, :3] = -100
    return {
        "input_ids": tokens.masked_fill(~mask, pad),
        "attention_mask": mask.long(),
        "labels": labels,
    }


def train(family: Family, column: Column) -> list[tuple[float, float]]:
    """In a worker: loss and gradient norm of two steps."""
    from coati.parallel.boost import boost
    from coati.parallel.launch import launch

    launch(seed=0, timeout_s=60)
    model = tiny_model(family)
    if column.lora:
        from coati.models.lora.lora import LoraConfig, apply_lora

        model = apply_lora(model, LoraConfig(r=4, linear_lora_dropout=0.0))
    options = ParallelOptions(grad_clip=0.5, batch_size=ROWS, lora=column.lora, **column.options)
    engine = boost(model, options, lr=5e-3, total_steps=4, warmup_steps=0)
    share = engine.mesh.dp_rank
    count = engine.mesh.dp_size
    steps = []
    for step in range(2):
        whole = _batch(step, pad=getattr(model.config, "pad_token_id", None) or 0)
        done = engine.train_step(
            [{key: value.chunk(count)[share] for key, value in whole.items()}], _CrossEntropy()
        )
        steps.append((done.loss, done.grad_norm))
    return steps


def try_cell(family: Family, column: Column) -> str:
    """TRAINS, or REFUSED with the library's words; raises AssertionError if it trains otherwise
    than one process."""
    said = refusal(family.type, column)
    if said:
        return f"{REFUSED}: {said}"
    alone = _alone(family.type, column.lora)
    tolerance = 1e-5 if column.options.get("precision", "fp32") == "fp32" else 2e-2
    for steps in run(2, "tests.models_table:train", family, column):
        torch.testing.assert_close(steps, alone, rtol=tolerance, atol=0.0)
    return TRAINS


@cache
def _alone(family: str, lora: bool) -> list[tuple[float, float]]:
    row = next(row for row in FAMILIES if row.type == family)
    return run(1, "tests.models_table:train", row, Column("ddp", {"plugin": "ddp"}, lora))[0]


def cells(family: Family, column: Column) -> str:
    """What the page says in one cell, as far as it is known without training."""
    if refusal(family.type, column):
        return REFUSED
    return TRAINS if family.config is not None else "not tried"


def page() -> str:
    """docs/models.md."""
    header = ["model", "model_type", *(column.title for column in COLUMNS)]
    lines = [INTRODUCTION, _line(header), _line(["---"] * len(header))]
    for family in FAMILIES:
        names = family.names + (" (`--trust_remote_code`)" if family.remote else "")
        lines.append(
            _line([names, f"`{family.type}`", *(cells(family, column) for column in COLUMNS)])
        )
    lines += ["", "## Why not", ""]
    lines += _reasons()
    others = ", ".join(f"{name} ({what})" for name, what in sorted(NOT_CHAT.items()))
    lines += ["", "## Not chat models", "", f"{NOT_CHAT_TEXT} {others}."]
    return "\n".join(lines) + "\n"


def _reasons() -> list[str]:
    """One line per refusal of a family that can be split, one for all that cannot."""
    whole = [f"`{family.type}`" for family in FAMILIES if family.type not in SPLITS]
    said = {
        refusal(family.type, column)
        for family in FAMILIES
        if family.type in SPLITS
        for column in COLUMNS
    } - {None}
    return [
        f"- {', '.join(whole)}: ColossalAI 0.5.0 has no working policy to split them, so plugin "
        "3d and `--tp` are out.",
        *(f"- {reason}" for reason in sorted(said)),
    ]


def _line(entries: list[str]) -> str:
    return f"| {' | '.join(entries)} |"


INTRODUCTION = """# Supported models

Written by `python -m tests.models_table`, which tries every cell with a tiny random model on two
processes. "yes": two training steps, with padding and clipping, had the losses and gradient norms
of a single process (to 1e-5 in fp32, to 2e-2 in bf16, which Gemini needs). "no": the library
refuses the combination by name; the messages are below. "not tried": the model's code is not part
of transformers, so nothing could be tried here; these plugins treat every model alike. The last
three columns are the modes of sequence parallelism.
"""
NOT_CHAT_TEXT = (
    "ColossalAI can split some models that do not continue a text. They are refused by every "
    "plugin:"
)


def main(wanted: list[str]) -> None:
    failed = False
    for family in FAMILIES:
        tried = family.config is not None and (not wanted or family.type in wanted)
        for column in COLUMNS if tried else ():
            try:
                print(f"{family.type:12} {column.title:18} {try_cell(family, column)}", flush=True)
            except AssertionError as error:
                failed = True
                print(
                    f"{family.type:12} {column.title:18} FAILED: {str(error)[-1500:]}", flush=True
                )
    if failed:
        sys.exit("docs/models.md was not written: the cells above do not do what the library says")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
