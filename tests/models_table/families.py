"""The rows of docs/models.md: each family with a tiny random model in which whatever sets the
family apart matters. Windows are shorter than the rows, soft caps bite, sinks are not zero, tokens
go to several experts."""

from dataclasses import dataclass
from typing import Any

import torch

from coati.utils.transformers_compat import transformers_major

VOCABULARY = 384
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = WIDE | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 16}
OLD = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
WINDOW = 6  # tokens; rows have 16 and 24
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
ROUTED = {
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
INDEXED = {"index_topk": WINDOW, "index_n_heads": 16, "index_head_dim": 16}  # else ties
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


FAMILIES = (
    Family(
        "LLaMA-2, Llama 3.x, Vicuna, Yi, TinyLlama, SmolLM2, R1 distilled to Llama",
        "llama",
        GROUPED,
    ),
    Family("Mistral, Zephyr", "mistral", GROUPED | {"sliding_window": WINDOW}),
    Family("Ministral", "ministral", HEADS | SLIDING),
    Family("Ministral 3", "ministral3", HEADS),
    Family("Mixtral", "mixtral", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("Qwen1.5, Qwen2, Qwen2.5, R1 distilled to Qwen", "qwen2", GROUPED),
    Family(
        "Qwen1.5-MoE, Qwen2-MoE",
        "qwen2_moe",
        GROUPED | EXPERTS | {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    ),
    Family("Qwen3", "qwen3", HEADS),
    Family("Qwen3-MoE", "qwen3_moe", HEADS | EXPERTS),
    Family(
        "Qwen3-Next",
        "qwen3_next",
        HEADS | EXPERTS | LINEAR | {"shared_expert_intermediate_size": 32},
    ),
    Family("Qwen3.5", "qwen3_5_text", HEADS | LINEAR),
    Family(
        "Qwen3.5-MoE",
        "qwen3_5_moe_text",
        HEADS | EXPERTS | LINEAR | {"shared_expert_intermediate_size": 32},
    ),
    Family("Gemma", "gemma", HEADS),
    Family(
        "Gemma 2",
        "gemma2",
        HEADS
        | SLIDING
        | {
            "final_logit_softcapping": 0.5,
            "attn_logit_softcapping": 0.5,
            "query_pre_attn_scalar": 16,
        },
    ),
    Family("Gemma 3", "gemma3_text", HEADS | SLIDING | {"query_pre_attn_scalar": 16}),
    Family(
        "Gemma 3n",
        "gemma3n_text",
        HEADS
        | SLIDING
        | {
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "activation_sparsity_pattern": None,
            "intermediate_size": [128, 128],
        },
    ),
    Family(
        "Gemma 4",
        "gemma4_text",
        HEADS
        | SLIDING
        | {
            "global_head_dim": 16,
            "num_global_key_value_heads": 2,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
        },
    ),
    Family("GPT-2", "gpt2", OLD),
    Family("GPT-J", "gptj", OLD | {"rotary_dim": 8}),
    Family("GPT-NeoX, Pythia", "gpt_neox", WIDE),
    Family(
        "gpt-oss",
        "gpt_oss",
        HEADS
        | SLIDING
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
    ),
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
    Family(
        "Falcon-H1",
        "falcon_h1",
        HEADS
        | {
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
        },
    ),
    Family("Phi-2", "phi", WIDE),
    Family("Phi-3, Phi-3.5, Phi-4", "phi3", GROUPED | {"pad_token_id": 0}),
    Family("GLM-4-9B", "glm", HEADS | {"pad_token_id": 0}),
    Family("GLM-4-0414", "glm4", HEADS | {"pad_token_id": 0}),
    Family("GLM-4.5, GLM-4.6", "glm4_moe", HEADS | ROUTED),
    Family("DeepSeek-V2", "deepseek_v2", WIDE | MLA | ROUTED),
    Family("DeepSeek-V3, R1", "deepseek_v3", WIDE | MLA | ROUTED),
    Family("SmolLM3", "smollm3", GROUPED | {"no_rope_layers": [1, 0], "pad_token_id": 0}),
    Family("OLMo 2", "olmo2", GROUPED | {"pad_token_id": 0}),
    Family("OLMo 3", "olmo3", GROUPED | SLIDING | {"pad_token_id": 0}),
    Family("Granite", "granite", GROUPED),
    Family(
        "Granite 4 hybrid",
        "granitemoehybrid",
        GROUPED
        | {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 64,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_expand": 2,
            "mamba_d_state": 8,
        },
    ),
    Family(
        "Bamba",
        "bamba",
        GROUPED
        | {
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_expand": 2,
            "mamba_d_state": 8,
        },
    ),
    Family(
        "Nemotron-H",
        "nemotron_h",
        HEADS
        | {
            "layers_block_type": ["mamba", "attention", "mlp"],
            "num_hidden_layers": 3,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
        },
    ),
    Family(
        "LFM2",
        "lfm2",
        GROUPED | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    Family(
        "LFM2-MoE",
        "lfm2_moe",
        GROUPED
        | {
            "layer_types": ["conv", "full_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "num_dense_layers": 1,
        },
    ),
    Family(
        "Llama 4",
        "llama4_text",
        HEADS
        | {
            "num_local_experts": 2,
            "intermediate_size_mlp": 128,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 0],
            "layer_types": ["chunked_attention", "full_attention"],
        },
    ),
    Family("ERNIE 4.5", "ernie4_5", HEADS),
    Family(
        "ERNIE 4.5 MoE",
        "ernie4_5_moe",
        GROUPED
        | {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
            "moe_num_shared_experts": 1,
        },
    ),
    Family("EXAONE 4", "exaone4", GROUPED | SLIDING),
    Family("Seed-OSS", "seed_oss", HEADS),
    Family("Command R7B, Command A", "cohere2", GROUPED | SLIDING),
    Family(
        "MiniMax-M2",
        "minimax_m2",
        HEADS
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rotary_dim": 8,
            "intermediate_size": 32,
        },
    ),
    Family("Hunyuan dense", "hunyuan_v1_dense", HEADS),
    Family("Apertus", "apertus", GROUPED),
    Family("Arcee", "arcee", GROUPED),
    # The indexers choose fewer tokens than a row has.
    Family("DeepSeek-V3.2", "deepseek_v32", WIDE | MLA | ROUTED | INDEXED),
    Family("GLM-5", "glm_moe_dsa", WIDE | MLA | ROUTED | INDEXED),
    Family(
        "DeepSeek-V4",
        "deepseek_v4",
        WIDE
        | {
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "q_lora_rank": 16,
            "o_groups": 2,
            "o_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "num_hash_layers": 1,
            "sliding_window": WINDOW,
            "layer_types": [
                "sliding_attention",
                "compressed_sparse_attention",
                "heavily_compressed_attention",
            ],
            "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
            "index_n_heads": 16,
            "index_head_dim": 16,
            "index_topk": 4,
            "hc_mult": 2,
        },
    ),
    Family(
        "Kimi Linear",
        "kimi_linear",
        WIDE
        | MLA
        | {
            "q_lora_rank": None,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    Family(
        "MiniMax-Text-01, M1",
        "minimax",
        HEADS
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 8,
        },
    ),
    Family("StarCoder2", "starcoder2", GROUPED | {"sliding_window": WINDOW}),
    Family("StableLM 2", "stablelm", GROUPED),
    Family("OLMoE", "olmoe", GROUPED | EXPERTS),
    Family("Granite with sliding windows", "granite_swa", GROUPED | SLIDING),
    Family("MiniCPM3", "minicpm3", WIDE | MLA),
    Family("Hunyuan-A13B", "hunyuan_v1_moe", HEADS | {"num_experts": 4, "moe_topk": 2}),
    Family(
        "Jamba",
        "jamba",
        GROUPED
        | {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2}
        | {"attn_layer_offset": 1, "use_mamba_kernels": False},
    ),
    Family("nanochat", "nanochat", HEADS),
    Family("ChatGLM2, ChatGLM3", "chatglm", CHATGLM, remote=True),
    Family("Baichuan2", "baichuan", None, remote=True),
    Family("MiniCPM", "minicpm", None, remote=True),
)
# What the pinned set is tried with.
PINNED = frozenset(
    "llama mistral mixtral qwen2 qwen3 gpt2 gptj gpt_neox opt bloom falcon phi phi3 gemma gemma2 "
    "glm deepseek_v3 chatglm".split()
)
BY_TYPE = {family.type: family for family in FAMILIES}


def known(family: Family) -> bool:
    """Whether the installed transformers has the family (or ColossalAI, for ChatGLM)."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if transformers_major() < 5:
        return family.type in PINNED
    if family.type == "chatglm":  # ColossalAI's copy of its code is for transformers 4
        return False
    return family.config is not None and family.type in CONFIG_MAPPING_NAMES


def tiny_config(family: Family, **changes: Any):
    """The configuration of the family's tiny model."""
    from transformers import AutoConfig

    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    values = {"vocab_size": VOCABULARY} | tokens | family.config
    if transformers_major() < 5:  # whose packs do not keep to a window; recipes refuse them
        values.pop("layer_types", None)
        if values.get("sliding_window") == WINDOW:
            values.pop("sliding_window")
            if family.type != "gemma2":
                values["sliding_window"] = None
    config = AutoConfig.for_model(family.type, **(values | changes))
    if getattr(config, "attn_logit_softcapping", None):
        config._attn_implementation = "eager"  # the only one with a cap
    return config


def tiny_model(family: Family, **changes: Any) -> torch.nn.Module:
    """A random model, the same for every call; every parameter away from 0 and 1, so that none can
    be left out unnoticed."""
    from transformers import AutoModelForCausalLM

    from coati.models.loading import disable_dropout

    torch.manual_seed(0)
    if family.type == "chatglm":
        model = _chatglm(family.config)
    else:
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    for parameter in model.parameters():
        if parameter.dim() < 2:  # norms, biases, sinks: most start at 0 or 1
            parameter.data += 0.1 * torch.randn_like(parameter)
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
