"""Tensors that a layer keeps for its backward pass: by hand, and those that transformers' layers
save."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from coati.models.fused_layers import fuse_layers, original_layers
from coati.models.lora.lora import LoraConfig, apply_lora
from coati.models.padding_free import PaddingFree
from coati.parallel.footprint.layer_activations import (
    LayerRun,
    rounded_weights,
    saved_bytes,
    working_bytes,
)
from coati.parallel.footprint.model_shape import LAYOUTS, ModelShape
from coati.utils.transformers_compat import transformers_major
from tests.models_table.families import BY_TYPE, known, tiny_config

ROWS = 2
LENGTH = 64
RANK = 8
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 128,
}
SHAPE = ModelShape.of(WIDE | {"model_type": "llama", "num_hidden_layers": 1, "head_dim": 40})
PARTS = ("norms", "attention", "mlp")


def by_part(shape: ModelShape = SHAPE, keys: float = LENGTH, **changes) -> tuple[float, ...]:
    saved = saved_bytes(shape, LayerRun(**changes), keys)
    return tuple(saved[part] for part in PARTS)


def test_a_layer_of_llama_by_hand():
    h, inner, q, kv, heads = 256, 640, 320, 80, 8
    # Each norm: its input, the reciprocal root, what it scales; the result is read by q, k and v.
    # Attention: q, k, v, output, log-sum-exp. MLP: its input, gate, silu(gate), up, product.
    fp32 = (2 * (8 * h + 4) + 4 * h, 4 * (2 * q + 2 * kv) + 4 * heads, 4 * h + 16 * inner)
    assert by_part() == fp32
    # In 16 bits the norm still squares in fp32.
    half = (2 * (6 * h + 4) + 2 * h, 2 * (2 * q + 2 * kv) + 4 * heads, 2 * h + 8 * inner)
    assert by_part(weight=2, compute=2) == half
    # Autocast: an fp32 residual stream, and one rounded input for each of q, k, v, gate, up.
    rounded = (2 * (8 * h + 4) + 3 * 2 * h, 2 * (2 * q + 2 * kv) + 4 * heads, 4 * h + 8 * inner)
    assert by_part(weight=4, compute=2) == rounded
    # Rows end to end: keys and values repeated for the queries, and the outputs joined.
    free = by_part(padding_free=True, repeats_keys=True)
    assert free[1] - fp32[1] == 4 * (2 * (q - kv) + q)


def test_scores_count_with_the_square_of_the_length():
    eager = [by_part(keys=keys, attention="eager")[1] for keys in (64, 128)]
    assert eager[1] - eager[0] == 8 * 64 * 4  # a head's probabilities in fp32
    assert by_part(keys=64) == by_part(keys=128)
    half = [by_part(keys=k, attention="eager", weight=2, compute=2)[1] for k in (64, 128)]
    assert half[1] - half[0] == 8 * 64 * (4 + 2)  # and rounded


def test_lora_keeps_what_adapters_read():
    frozen = {"trained": False, "lora_rank": RANK}
    all_layers = by_part(**frozen)
    # No norm's scale has a gradient; each adapter keeps r numbers.
    assert by_part()[0] - all_layers[0] == 2 * 4 * 256 - 3 * RANK * 4
    few = by_part(**frozen, targets=frozenset({"q_proj"}))
    # The MLP's input and its product are read by nothing that is trained.
    assert all_layers[2] - few[2] == 4 * (256 + 640 + 3 * RANK)
    dropped = by_part(**frozen, dropout=True)
    # q, k, v: each its own input, and the factors that dropped it.
    assert dropped[0] - all_layers[0] == 3 * (4 + 4) * 256 - 4 * 256
    assert by_part(**frozen, dropout=True, on_gpu=True)[0] == dropped[0] - 3 * 3 * 256


def test_autocast_keeps_rounded_weights_and_experts_do_not():
    run = LayerRun(weight=4, compute=2)
    assert rounded_weights(SHAPE, run) == 2 * SHAPE.linear_weights()
    assert rounded_weights(SHAPE, LayerRun()) == 0
    mixture = replace(SHAPE, experts=4, experts_per_token=2)
    attention = 256 * (2 * 320 + 2 * 80)
    assert rounded_weights(mixture, run) == 2 * (attention + 4 * 256)


def test_gradients_of_scores_are_the_most_of_long_rows():
    eager = LayerRun(attention="eager")
    assert working_bytes(SHAPE, eager, 16) == working_bytes(SHAPE, LayerRun(), 16)
    more = working_bytes(SHAPE, eager, 4096) - working_bytes(SHAPE, eager, 2048)
    assert more == 3 * 4 * 8 * 2048


# Beside transformers' own layers


def wide_model(family: str, layers: int, attention: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny = tiny_config(BY_TYPE[family]).to_dict()
    changes = WIDE | {"num_hidden_layers": layers, "head_dim": 40}
    if family == "phi3":
        del changes["head_dim"]
    kept = {name: tiny[name] for name in KEPT if tiny.get(name) is not None}
    if "layer_types" in kept:
        kept["layer_types"] = [kept["layer_types"][-1]] * layers
    config = AutoConfig.for_model(family, **(kept | changes), pad_token_id=0)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


KEPT = (
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "layer_types",
    "attn_logit_softcapping",
    "query_pre_attn_scalar",
    "tie_word_embeddings",
)


def kept_by_backward(model, run: LayerRun) -> int:
    """Bytes of the tensors that autograd saves in the backbone, parameters left out."""
    ids = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 300
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs = PaddingFree(2**62).unpad(batch).inputs if run.padding_free else batch
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no place is reused
        return tensor

    backbone = (model.get_base_model() if hasattr(model, "peft_config") else model).model
    rounding = torch.autocast("cpu", torch.bfloat16) if run.autocast else nullcontext()
    if run.fused:
        fuse_layers(backbone)
    layers = nullcontext() if run.fused else original_layers()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), rounding, layers:
        backbone(**inputs, use_cache=False)
    return sum(size for size, _ in found.values())


def measured_layer(family: str, run: LayerRun) -> float:
    """Bytes per token that two layers save more than one."""
    dtype = torch.bfloat16 if run.weight == 2 else torch.float32
    totals = []
    for layers in (1, 2):
        model = wide_model(family, layers, run.attention)
        if run.lora_rank:
            model = apply_lora(model, LoraConfig(r=run.lora_rank, linear_lora_dropout=0.0))
        totals.append(kept_by_backward(model.to(dtype).train(), run))
    return (totals[1] - totals[0]) / (ROWS * LENGTH)


RUNS = {
    "fp32": LayerRun(),
    "fused": LayerRun(fused=True),
    "fused LoRA": LayerRun(trained=False, lora_rank=RANK, fused=True),
    "bf16": LayerRun(2, 2),
    "autocast": LayerRun(4, 2),
    "LoRA": LayerRun(trained=False, lora_rank=RANK),
    "LoRA in bf16": LayerRun(2, 2, trained=False, lora_rank=RANK),
}
# gpt-oss under autocast, where ever more of its own operators stay in fp32, and phi3's joined
# layers, whose outputs are kept as a whole by one part of them
ROUGH = {"gpt_oss": 0.12, "phi3": 0.06}


# Experts of transformers 4 are linear layers in a loop, which autocast rounds and LoRA adapts; its
# Gemma takes padded rows alone, and copies its outputs.
OTHERWISE_IN_4 = ("mixtral", "qwen3_moe", "gemma")
FAMILIES = [
    family
    for family in LAYOUTS
    if family in BY_TYPE
    and known(BY_TYPE[family])
    and (transformers_major() >= 5 or family not in OTHERWISE_IN_4)
]


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_formula_is_what_a_layer_saves(family, kind):
    model = wide_model(family, 1, "eager" if LAYOUTS[family].sinks else "sdpa")
    shape = ModelShape.of(model.config.to_dict())
    run = replace(RUNS[kind], attention="eager" if shape.eager else "sdpa")
    if not shape.eager and PaddingFree.of(model):
        run = replace(run, padding_free=True, repeats_keys=True)
    weights = rounded_weights(shape, run) / (ROWS * LENGTH)
    formula = sum(saved_bytes(shape, run, LENGTH).values()) + weights
    assert formula == pytest.approx(measured_layer(family, run), rel=ROUGH.get(family, 0.01))
