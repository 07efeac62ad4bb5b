"""FLOPs of passes: worked out by hand, and beside those that torch counts in transformers' own
models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from coati.parallel.footprint.model_flops import (
    Adapters,
    Windows,
    active_weights,
    forward_flops,
    training_flops,
)
from coati.parallel.footprint.model_shape import LAYOUTS, Layout, ModelShape, load_shape
from tests.models_table.families import BY_TYPE, known, tiny_model

# 2 layers, width 8; 4 heads of 2 (queries 8 wide), 2 of keys (4 wide); MLP 16 wide; 10 words.
SMALL = ModelShape("llama", 8, 2, 4, 2, 2, 16, 10, False, Layout())
LAYER = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16  # 576
MOE = ModelShape("mixtral", 8, 2, 4, 2, 2, 16, 10, False, Layout(), experts=4, experts_per_token=2)


def test_a_pass_forward_costs_2_a_weight_and_4_a_pair():
    flops = forward_flops(SMALL)
    assert (flops.token, flops.target) == (2 * 2 * LAYER, 2 * 8 * 10)
    # Scores and values, 2 x 8 each, in 2 layers.
    assert (flops.pair, flops.windowed) == (2 * (16 + 16), 0)
    # 5 tokens in rows of 3 and 2, which see 6 + 3; 4 log-probs.
    assert flops.of(5, 4, 9) == 5 * 2304 + 4 * 160 + 9 * 64


def test_training_costs_three_times_as_much():
    forward = forward_flops(SMALL)
    training = training_flops(SMALL)
    assert (training.token, training.target, training.pair) == (
        6 * 2 * LAYER,
        6 * 80,
        3 * forward.pair,
    )


def test_frozen_weights_cost_4_and_adapters_6():
    flops = training_flops(SMALL, adapters=Adapters(4, frozenset({"q_proj", "v_proj"})))
    adapters = 2 * 4 * ((8 + 8) + (8 + 4))
    assert flops.token == 4 * 2 * LAYER + 6 * adapters
    assert flops.target == 4 * 80
    assert flops.pair == training_flops(SMALL).pair  # no weights there


def test_of_experts_those_count_that_a_token_meets():
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8
    assert active_weights(MOE) == attention + 4 * 8 + 2 * 3 * 8 * 16
    assert forward_flops(MOE).token == 2 * 2 * active_weights(MOE)


def test_a_scalar_head_has_no_vocabulary():
    assert forward_flops(SMALL, scalar=True).target == 0
    assert training_flops(SMALL, scalar=True).target == 0


def test_the_heads_of_values_are_trained_and_their_targets_read():
    plain = training_flops(SMALL).target
    q = 16 * (8 + 1) + 10 * (16 + 1)
    v = 16 * (8 + 1) + 16 + 1
    assert training_flops(SMALL, with_values=True).target == plain + 6 * (2 * q + v) + 2 * 2 * q


def test_layers_with_a_window_count_the_pairs_within_it():
    flops = forward_flops(SMALL, windows=Windows(1, 2))
    assert (flops.pair, flops.windowed) == (32, 32)
    # A row of 3 tokens: pairs 6, within two tokens 1 + 2 + 2.
    assert flops.of(3, 0, 6, 5) == 3 * 2304 + 32 * 6 + 32 * 5


@pytest.mark.parametrize(
    "config, found",
    [
        ({"sliding_window": None}, Windows()),
        ({"sliding_window": 8, "use_sliding_window": False}, Windows()),
        ({"sliding_window": 8}, Windows(6, 8)),
        ({"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, (1, 8)),
        ({"sliding_window": 8, "sliding_window_pattern": 6}, Windows(5, 8)),
        ({"sliding_window": 8, "model_type": "gemma2"}, Windows(3, 8)),
        ({"text_config": {"sliding_window": 8, "num_hidden_layers": 2}}, Windows(2, 8)),
    ],
)
def test_which_layers_have_a_window(config, found):
    windows = Windows.of({"num_hidden_layers": 6} | config)
    assert windows == (found if isinstance(found, Windows) else Windows(*found))


def test_six_flops_a_weight_is_what_is_said_of_llama():
    """Llama-3.1-8B at 8192 tokens: 6 N D of its weights without the embedding, and attention."""
    shape = load_shape("meta-llama/Llama-3.1-8B")
    flops = training_flops(shape)
    weights = shape.parameters() - shape.embedding_parameters()
    assert (flops.token + flops.target) / (6 * weights) == pytest.approx(1, abs=1e-4)
    # 12 x layers x width x length / 2 a token, as PaLM's appendix has it for causal attention.
    assert flops.of(0, 0, 8192 / 2) == 12 * 32 * 4096 * 8192 / 2


@pytest.mark.parametrize(
    "family",
    [family for family in LAYOUTS if family in BY_TYPE and known(BY_TYPE[family])],
)
def test_beside_what_torch_counts(family):
    model = tiny_model(BY_TYPE[family])
    config = model.config.to_dict()
    shape = ModelShape.of(config)
    if shape.experts:  # one product a group of tokens, which the counter does not see into
        model.config._experts_implementation = "eager"
    model.config._attn_implementation = "eager"
    ids = torch.arange(6)[None] + 3
    with FlopCounterMode(display=False) as counted:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    # torch counts scores that the mask hides, and all log-probs.
    flops = training_flops(shape)
    own = flops.of(6, 6, 36)
    # Rotary angles are a product, too, a small one without gradient.
    assert own <= counted.get_total_flops() <= own * 1.01
