"""The tensor-parallel and pipeline plans of a model family. Imports neither torch nor ColossalAI.

transformers 5 keeps them in the configuration (``base_model_tp_plan``, ``base_model_pp_plan``).
:data:`TP_PLANS` and :data:`PP_PLANS` have those of families for which it keeps none, or an
incomplete one; :data:`MORE` adds to its own.
"""

import re
from typing import Any

from coati.utils.transformers_compat import text_config

Plan = dict[str, str]
HEAD_NORM = "replicated_with_grad_allreduce"  # every process sees its own heads only


def _attention(block: str, out: str = "o_proj", names: str = "q_proj k_proj v_proj") -> Plan:
    return {f"{block}.{name}": "colwise" for name in names.split()} | {f"{block}.{out}": "rowwise"}


def _mlp(block: str, names: str = "gate_proj up_proj", down: str = "down_proj") -> Plan:
    return {f"{block}.{name}": "colwise" for name in names.split()} | {f"{block}.{down}": "rowwise"}


def _experts(block: str) -> Plan:
    """Experts as two parameters, (experts, 2 x width, hidden) and (experts, hidden, width)."""
    return {
        f"{block}.gate_up_proj": "packed_colwise",
        f"{block}.down_proj": "rowwise",
        block: "moe_tp_experts",
    }


_SELF = "layers.*.self_attn"
_MLA = {
    f"{_SELF}.q_proj": "colwise",
    f"{_SELF}.q_b_proj": "colwise",
    f"{_SELF}.kv_a_proj_with_mqa": "mla_kv_a_proj",
    f"{_SELF}.kv_b_proj": "colwise",
    f"{_SELF}.o_proj": "rowwise",
}
# {model_type: {module or parameter from the base model on, "*" for an index: style}}. State-space
# and convolution layers stay whole.
TP_PLANS: dict[str, Plan] = {
    "gpt2": {
        "h.*.attn.c_attn": "fused_colwise",
        "h.*.attn.c_proj": "rowwise",
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    },
    "gptj": _attention("h.*.attn", "out_proj") | _mlp("h.*.mlp", "fc_in", "fc_out"),
    "opt": _attention("decoder.layers.*.self_attn", "out_proj")
    | _mlp("decoder.layers.*", "fc1", "fc2"),
    "bloom": _attention("h.*.self_attention", "dense", "query_key_value")
    | _mlp("h.*.mlp", "dense_h_to_4h", "dense_4h_to_h"),
    "falcon": _attention("h.*.self_attention", "dense", "query_key_value")
    | _mlp("h.*.mlp", "dense_h_to_4h", "dense_4h_to_h"),
    "hunyuan_v1_dense": _attention(_SELF)
    | _mlp("layers.*.mlp")
    | {f"{_SELF}.query_layernorm": HEAD_NORM, f"{_SELF}.key_layernorm": HEAD_NORM},
    "hunyuan_v1_moe": _attention(_SELF)
    | _mlp("layers.*.mlp.shared_mlp")
    | _experts("layers.*.mlp.experts")
    | {f"{_SELF}.query_layernorm": HEAD_NORM, f"{_SELF}.key_layernorm": HEAD_NORM},
    "stablelm": _attention(_SELF) | _mlp("layers.*.mlp"),
    "gpt_oss": _attention(_SELF)
    | {
        f"{_SELF}.sinks": "colwise",
        # gate and up are interleaved, so contiguous halves hold whole pairs
        "layers.*.mlp.experts.gate_up_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj_bias": "rowwise",
        "layers.*.mlp.experts.down_proj": "colwise",
        "layers.*.mlp.experts.down_proj_bias": "moe_output_bias",
        "layers.*.mlp.experts": "moe_tp_experts",
    },
    "lfm2": _attention(_SELF, "out_proj")
    | _mlp("layers.*.feed_forward", "w1 w3", "w2")
    | {f"{_SELF}.q_layernorm": HEAD_NORM, f"{_SELF}.k_layernorm": HEAD_NORM},
    "lfm2_moe": _attention(_SELF, "out_proj")
    | _mlp("layers.*.feed_forward", "w1 w3", "w2")
    | _experts("layers.*.feed_forward.experts")
    | {f"{_SELF}.q_layernorm": HEAD_NORM, f"{_SELF}.k_layernorm": HEAD_NORM},
    "granitemoehybrid": _attention(_SELF) | _experts("layers.*.block_sparse_moe.experts"),
    "bamba": _attention(_SELF) | _mlp("layers.*.feed_forward"),
    "falcon_h1": _attention(_SELF) | _mlp("layers.*.feed_forward"),
    "nemotron_h": _attention("layers.*.mixer") | _mlp("layers.*.mixer", "up_proj"),
}
# Added to transformers' own plan of a family.
MORE: dict[str, Plan] = {
    "qwen2_moe": _experts("layers.*.mlp.experts") | _mlp("layers.*.mlp.shared_expert"),
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    # Norms of each head that some checkpoints of the family have (use_qk_norm, qk_layernorm).
    "glm4_moe": {f"{_SELF}.q_norm": HEAD_NORM, f"{_SELF}.k_norm": HEAD_NORM},
    "phi": {f"{_SELF}.q_layernorm": HEAD_NORM, f"{_SELF}.k_layernorm": HEAD_NORM},
    # (heads, head width): each head has weights of its own
    "cohere": {f"{_SELF}.q_norm.weight": "colwise", f"{_SELF}.k_norm.weight": "colwise"},
    # xIELU's two slopes see the columns of each process
    "apertus": {"layers.*.mlp.act_fn": HEAD_NORM},
}
# {model_type: names of the children that run one after another, as ``base_model_pp_plan`` has them}
PP_PLANS: dict[str, tuple[str, ...]] = {
    "gpt2": ("wte", "drop", "h", "ln_f"),
    "gptj": ("wte", "drop", "h", "ln_f"),
    "bloom": ("word_embeddings", "word_embeddings_layernorm", "h", "ln_f"),
    "falcon": ("word_embeddings", "h", "ln_f"),
    "opt": ("embed_tokens", "layers", "final_layer_norm"),
    **dict.fromkeys(
        ("hunyuan_v1_dense", "hunyuan_v1_moe", "stablelm", "olmoe", "llama4_text"),
        ("embed_tokens", "layers", "norm"),
    ),
    "lfm2": ("embed_tokens", "layers", "embedding_norm"),
    "lfm2_moe": ("embed_tokens", "layers", "embedding_norm"),
    "granitemoehybrid": ("embed_tokens", "layers", "norm"),
    "bamba": ("embed_tokens", "layers", "final_layernorm"),
    "falcon_h1": ("embed_tokens", "layers", "final_layernorm"),
    "nemotron_h": ("embeddings", "layers", "norm_f"),
}
# Families whose layers return a tuple, of which the base model takes the first.
TUPLE_LAYERS = frozenset({"gptj", "bloom", "falcon", "bamba", "falcon_h1"})
# Children that add what they are given positions for to the states; on later stages it is there.
POSITION_EMBEDDINGS = ("wpe", "embed_positions")
# {model_type: {module: attributes that count its heads or columns and are divided by --tp}}
COUNTS: dict[str, dict[str, tuple[str, ...]]] = {
    "gpt2": {"h.*.attn": ("split_size",)},
    "gptj": {"h.*.attn": ("num_attention_heads",)},
    "opt": {"decoder.layers.*.self_attn": ("num_heads",)},
    "bloom": {"h.*.self_attention": ("num_heads",)},
    "falcon": {"h.*.self_attention": ("num_heads", "num_kv_heads")},
    "stablelm": {"layers.*.self_attn": ("num_heads", "num_key_value_heads", "hidden_size")},
}


def tp_plan(config: Any) -> Plan:
    """{module or parameter from the base model on, "*" for an index: style}; empty without one."""
    text = text_config(config)
    own = getattr(text, "base_model_tp_plan", None) or TP_PLANS.get(text.model_type) or {}
    return dict(own) | MORE.get(text.model_type, {})


def pp_plan(config: Any) -> tuple[str, ...]:
    """Names of the base model's children in the order in which they run; empty without a plan."""
    text = text_config(config)
    return tuple(getattr(text, "base_model_pp_plan", None) or PP_PLANS.get(text.model_type) or ())


class Styles:
    """Looks up by the name of a module or parameter what a plan says of it."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._patterns = [
            (re.compile(re.escape(name).replace(r"\*", r"\d+")), style)
            for name, style in plan.items()
        ]

    def of(self, name: str) -> Any:
        """The style of ``name``, or None."""
        return next((s for pattern, s in self._patterns if pattern.fullmatch(name)), None)
