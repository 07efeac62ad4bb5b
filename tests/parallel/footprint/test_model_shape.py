"""Sizes of models from their configurations."""

import json

import pytest

from coati.parallel.footprint.model_shape import LAYOUTS, ModelShape, built_in, load_shape
from tests.models_table.families import BY_TYPE, known, tiny_model

# What transformers' classes count for the configurations of the hub; of gemma-3-4b-it without its
# vision tower
PARAMETERS = {
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "google/gemma-3-4b-it": 3_880_263_168,
    "openai/gpt-oss-20b": 20_914_757_184,
}


def test_the_built_in_models_have_their_parameters():
    assert {name: load_shape(name).parameters() for name in set(built_in().values())} == PARAMETERS


@pytest.mark.parametrize(
    "family", [family for family in LAYOUTS if family in BY_TYPE and known(BY_TYPE[family])]
)
def test_every_parameter_of_a_family_is_counted(family):
    model = tiny_model(BY_TYPE[family])
    shape = ModelShape.of(model.config.to_dict())
    assert shape.parameters() == sum(p.numel() for p in model.parameters())
    assert sum(shape.parameter_sizes()) == shape.parameters()
    assert shape.embedding_parameters() == model.get_input_embeddings().weight.numel()


LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 10,
}


def test_a_layer_by_hand():
    shape = ModelShape.of(LLAMA)
    # q and o 8 x 8, k and v 8 x 4, three of 8 x 12, two norms of 8
    assert shape.layer_parameters() == 2 * 64 + 2 * 32 + 3 * 96 + 16 == 496
    assert shape.parameters() == 2 * 496 + 8 + 2 * 80  # final norm, embedding and head
    assert ModelShape.of(LLAMA | {"tie_word_embeddings": True}).parameters() == 2 * 496 + 8 + 80
    # r x (in + out) of q, k, v, o, gate, up, down; then of two of them
    whole = 16 + 12 + 12 + 16 + 3 * 20
    assert shape.adapter_parameters(4) == 2 * 4 * whole
    assert shape.adapter_parameters(4, frozenset({"q_proj", "v_proj"})) == 2 * 4 * 28


def test_a_process_of_several_holds_its_part():
    part = ModelShape.of(LLAMA).part_of(tp=2, pp=2)
    assert (part.layers, part.heads, part.kv_heads, part.inner, part.vocabulary) == (1, 2, 1, 6, 5)
    assert part.layer_parameters() == (496 - 16) // 2 + 16  # norms are whole everywhere


def test_a_directory_and_short_names_are_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert load_shape(str(tmp_path)) == ModelShape.of(LLAMA)
    assert load_shape("qwen3-8b") == load_shape("Qwen/Qwen3-8B")
    composite = {"model_type": "gemma3", "text_config": LLAMA, "tie_word_embeddings": True}
    assert ModelShape.of(composite) == ModelShape.of(LLAMA | {"tie_word_embeddings": True})


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"Qwen4: expected a directory with config.json or one of"):
        load_shape("Qwen4")
    with pytest.raises(ValueError, match="no formula for model family 'mamba2'"):
        ModelShape.of({"model_type": "mamba2"})
    with pytest.raises(ValueError, match="configuration of a llama model has no 'vocab_size'"):
        ModelShape.of({name: value for name, value in LLAMA.items() if name != "vocab_size"})
