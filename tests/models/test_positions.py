"""How many positions a model has, by its configuration, and what a longer row meets."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from coati.models.generation.loop import generate
from coati.models.positions import (
    TABLES,
    Positions,
    check_tokens,
    positions_in,
    positions_of,
    within_positions,
)
from coati.utils.logging import forget_warnings
from coati.utils.transformers_compat import transformers_major
from tests.models_table.families import FAMILIES, PINNED
from tests.tiny import tiny_llama

OLD = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
NEW = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
# Families whose positions are a table of 16.
HARD = {
    "biogpt": NEW,
    "bert-generation": NEW,
    "codegen": OLD | {"n_head": 4, "rotary_dim": 4},
    "ctrl": OLD | {"dff": 32},
    "gpt2": OLD,
    "gpt_bigcode": OLD,
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 16,
    },
    "gptj": OLD | {"rotary_dim": 4},
    "mpt": {"d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 16},
    "openai-gpt": OLD,
    "opt": NEW | {"ffn_dim": 32, "word_embed_proj_dim": 32},
}


def tiny(family: str, fields: dict):
    config = AutoConfig.for_model(
        family, vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, **fields
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def run(model, length: int) -> None:
    ids = torch.randint(3, 64, (1, length))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("family", sorted(TABLES))
def test_a_table_ends_where_it_is_said_to(family):
    model = tiny(family, HARD[family])
    assert positions_of(model.config) == Positions(family, 16, hard=True)
    run(model, 16)
    with pytest.raises((IndexError, RuntimeError)):
        run(model, 17)


@pytest.mark.parametrize(
    "family",
    [
        each
        for each in FAMILIES
        if each.config
        and not each.remote
        and each.type not in TABLES
        and (transformers_major() >= 5 or each.type in PINNED)
    ],
    ids=lambda family: family.type,
)
def test_every_other_family_of_the_table_says_a_soft_number_or_none(family):
    config = AutoConfig.for_model(family.type, vocab_size=384, **family.config)
    found = positions_of(config)
    assert (found is None) == (family.type == "bloom")
    assert found is None or not found.hard
    assert found is None or found.count >= family.config.get("max_position_embeddings", 2048)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "bloom"])
def test_others_run_on(family):
    fields = {"bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2}}.get(family, NEW)
    model = tiny(family, fields)
    found = positions_of(model.config)
    assert found == (None if family == "bloom" else Positions(family, 16, hard=False))
    run(model, 40)


def config(**fields) -> SimpleNamespace:
    return SimpleNamespace(**{"model_type": "llama", "max_position_embeddings": 4096} | fields)


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 4096),
        # Vicuna 16k: the positions before scaling stand there
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 8192),
        # Qwen2.5 with YaRN switched on by hand
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        # Llama 3.1: more positions than factor x original
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            131072,
        ),
        # Phi-3 128k: factors by dimension, none for all
        ({"max_position_embeddings": 131072, "rope_scaling": {"type": "longrope"}}, 131072),
        # Gemma 3: the positions after scaling stand there
        (
            {
                "model_type": "gemma3_text",
                "max_position_embeddings": 131072,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0},
                    "sliding_attention": {"rope_type": "default"},
                },
            },
            131072,
        ),
        # transformers 5's name
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, 8192),
        # what is looked at is no limit of positions
        ({"sliding_window": 16}, 4096),
    ],
)
def test_scaled_rotary_embeddings(fields, count):
    found = positions_of(config(**fields))
    assert found is not None and found.count == count and not found.hard


def test_what_has_no_positions():
    assert positions_of(SimpleNamespace(model_type="mamba")) is None
    assert positions_of(config(model_type="bloom", seq_length=2048)) is None
    assert positions_of(config(model_type="falcon", alibi=True)) is None
    assert positions_of(None) is None


def test_of_a_directory_and_of_an_adapter_on_it(tmp_path):
    base = tmp_path / "base"
    tiny("opt", HARD["opt"]).save_pretrained(base)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        f'{{"base_model_name_or_path": "{base}"}}', encoding="utf-8"
    )
    assert positions_in(base) == positions_in(adapter) == Positions("opt", 16, hard=True)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        positions_in(tmp_path / "nothing")


def test_rows_beyond_a_table_are_refused_and_beyond_training_told(capsys):
    hard = Positions("gpt2", 64, hard=True)
    check_tokens(hard, 64, "the longest row", "use --max_length 64")
    check_tokens(None, 10**9, "the longest row", "")
    with pytest.raises(
        ValueError,
        match="the longest row has 65 tokens, this gpt2 model has 64 positions; use --max_length",
    ):
        check_tokens(hard, 65, "the longest row", "use --max_length 64")
    forget_warnings()
    soft = Positions("llama", 512, hard=False)
    check_tokens(soft, 512, "the longest row", "use --max_length 512")
    assert not capsys.readouterr().err
    for _ in range(2):
        check_tokens(soft, 1031, "the longest row", "use --max_length 512")
    said = capsys.readouterr().err
    assert said.count("has 1031 tokens, this llama model 512 positions") == 1
    assert "beyond what its base has seen" in said


def test_what_inference_may_ask_for():
    soft = config(max_position_embeddings=512)
    hard = config(model_type="gpt2", n_positions=64, max_position_embeddings=64)
    assert within_positions(soft, 2048) == 512 and within_positions(soft, 100) == 100
    assert within_positions(soft, 2048, hard_only=True) == 2048
    assert within_positions(hard, 2048, hard_only=True) == 64
    assert within_positions(config(model_type="bloom"), 4096) == 4096
    assert within_positions(soft, None) == 512  # nothing said: what the model has
    assert within_positions(config(model_type="bloom"), None) == 2048  # it sets no limit


def test_generation_goes_as_far_as_scaled_positions(tmp_path):
    """A model of 16 positions, scaled by 2, writes beyond 16 and not beyond 32."""
    scaling = {"rope_type": "linear", "factor": 2.0}
    name = "rope_parameters" if transformers_major() >= 5 else "rope_scaling"
    if transformers_major() >= 5:
        scaling["rope_theta"] = 10000.0
    model = tiny_llama()
    model.config.max_position_embeddings = 16
    setattr(model.config, name, scaling)
    prompt = torch.randint(3, 300, (1, 14))
    keywords = {"stop_sequences": [], "max_new_tokens": 10, "pad_token_id": 2}
    made = generate(model, prompt, torch.ones_like(prompt), **keywords)
    assert made is not None
    with pytest.raises(ValueError, match="14 tokens and 19 new ones exceed the model's 32 pos"):
        generate(model, prompt, torch.ones_like(prompt), **keywords | {"max_new_tokens": 19})
