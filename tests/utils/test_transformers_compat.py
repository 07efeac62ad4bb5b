"""Each difference between transformers 4 and 5 is bridged, and is still there: a test here fails
when the installed release no longer differs from the other set."""

import pytest
import torch

from coati.utils import transformers_compat as compat
from tests.dataset.makers import byte_level
from tests.models_table.families import BY_TYPE, known, tiny_config, tiny_model
from tests.tiny import tiny_llama

FIVE = compat.transformers_major() >= 5


def test_the_version_is_that_of_the_library():
    import transformers

    assert compat.transformers_major() == int(transformers.__version__.split(".")[0])


def test_the_cache_keyword_is_the_one_that_a_forward_names():
    assert compat.cache_keyword({"input_ids", "cache"}) == "cache"
    assert compat.cache_keyword({"input_ids", "past_key_values"}) == "past_key_values"


def test_tokenizer_classes_are_pairs_or_single():
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    assert compat.tokenizer_class_names(("A", None)) == ("A",)
    assert compat.tokenizer_class_names("A") == ("A",) and compat.tokenizer_class_names(None) == ()
    assert any(isinstance(entry, tuple) for entry in TOKENIZER_MAPPING_NAMES.values()) != FIVE


def test_further_special_tokens_are_named_in_both():
    tokenizer = byte_level(("<a>", "<b>"), {"eos_token": "</s>"})
    assert compat.named_special_tokens(tokenizer) == {
        "eos_token": "</s>",
        "additional_special_tokens": "['<a>', '<b>']",
    }
    assert ("additional_special_tokens" in tokenizer.special_tokens_map) != FIVE


def test_the_type_of_the_weights_has_another_name(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, **{compat.dtype_keyword(): torch.bfloat16})
    assert next(loaded.parameters()).dtype == torch.bfloat16
    compat.set_config_dtype(loaded.config, torch.float16)
    assert compat.config_dtype(loaded.config) == torch.float16
    loaded.config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert '"float16"' in text and (f'"{compat.dtype_keyword()}"' in text)


def test_generation_settings_in_a_model_configuration(tmp_path):
    import json

    from transformers import AutoConfig

    tiny_llama().config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.7}))
    config = AutoConfig.from_pretrained(tmp_path)
    # 5 leaves them out as it reads; 4 keeps them, beside the value that means unset.
    found = compat.misplaced_generation_settings(config)
    assert found == ({} if FIVE else {"temperature": (0.7, 1.0)})
    config.top_p = 0.5
    assert compat.misplaced_generation_settings(config)["top_p"] == (0.5, None if FIVE else 1.0)


def test_the_text_part_of_a_plain_configuration_is_itself():
    config = tiny_llama().config
    assert compat.text_config(config) is config
    assert compat.text_config(object) is object


@pytest.mark.parametrize("name", [n for n in ("llama", "llama4_text") if known(BY_TYPE[n])])
def test_the_body_is_found_whatever_the_prefix_says(name):
    model = tiny_model(BY_TYPE[name])
    assert compat.body_name(model) == "model" and compat.body_name(model.model) == ""
    if name == "llama4_text":
        assert model.base_model_prefix != "model"


def test_what_keeps_states():
    assert not compat.keeps_states(tiny_llama().config)
    for name in ("lfm2", "qwen3_5_text", "llama4_text"):
        if known(BY_TYPE[name]):
            assert compat.keeps_states(tiny_config(BY_TYPE[name])) == FIVE


def test_names_that_peft_takes_for_experts():
    assert compat.names_of_experts(tiny_llama()) == ()
    mixture = tiny_model(BY_TYPE["mixtral"])
    assert bool(compat.names_of_experts(mixture)) == FIVE


def test_a_part_of_a_name_is_left_alone_by_quantization():
    import re

    pattern = compat.skip_pattern("layers.1.mlp")
    name = "model.layers.1.mlp.up_proj"
    found = [pattern in name, bool(re.match(pattern, name))]
    assert found == [not FIVE, FIVE]
    assert not re.match(pattern, "model.layers.11.mlp.up_proj")


def test_experts_are_one_parameter_in_memory_and_many_on_disk():
    model = tiny_model(BY_TYPE["mixtral"])
    inside = dict(model.state_dict())
    outside = compat.disk_names(model, inside)
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert name in outside and (name not in inside) == FIVE
    assert compat.disk_names(model, {}) == {}


def test_rows_of_a_pack_are_told_apart_by_positions():
    """Otherwise the mask of block_mask.py is needed."""
    model = tiny_llama().eval()
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with torch.no_grad():
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 3:]
        alone = model(input_ids=ids[:, 3:], use_cache=False).logits[0]
    assert torch.allclose(together, alone, atol=1e-5) == compat.masks_packs_itself()


def test_old_names_of_rotary_settings():
    from transformers import LlamaConfig

    config = LlamaConfig()
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}
    compat.adopt_config(config)
    assert getattr(config, "rope_theta", None) == (None if FIVE else 7.0)
    scaling = {"rope_type": "linear", "factor": 2.0}
    assert FIVE or config.rope_scaling == scaling and not hasattr(config, "rope_parameters")


def test_the_tokenizers_of_5_need_keywords_in_4():
    written = {"backend": "tokenizers", "extra_special_tokens": ["<a>"]}
    wanted = {"extra_special_tokens": {}, "additional_special_tokens": ["<a>"]}
    assert compat.tokenizer_options(written) == (None if FIVE else wanted)
    assert compat.tokenizer_options({"tokenizer_class": "LlamaTokenizer"}) is None
