"""What transformers 5 saved means the same under transformers 4.

tests/data/saved_by_transformers_5.tar.gz: for three families a random model of 16 dimensions whose
rotary base, scaling and windows are no defaults, its tokenizer, and the logits of the last of 24
tokens (``expected.pt``), all written by transformers 5.20.2 with ``save_pretrained`` and eager
attention.
"""

import json
import tarfile
from pathlib import Path

import pytest
import torch

from coati.models.loading import load_causal_lm, load_config, load_configuration
from coati.models.tokenizer import load_tokenizer
from coati.utils.transformers_compat import adopt_config, transformers_major
from tests.tiny import tiny_tokenizer

SAVED = Path(__file__).parents[1] / "data" / "saved_by_transformers_5.tar.gz"
FIVE = transformers_major() >= 5


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    with tarfile.open(SAVED) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_the_logits_are_the_same(saved, family):
    expected = torch.load(saved / family / "expected.pt", weights_only=True)
    model = load_causal_lm(saved / family, attn_implementation="eager").eval()
    with torch.no_grad():
        found = model(input_ids=expected["ids"]).logits[0, -1]
    assert torch.allclose(found, expected["logits"], atol=1e-5, rtol=1e-4)


def test_plain_transformers_4_takes_its_defaults(saved):
    """Otherwise nothing needs to be adopted."""
    from transformers import AutoModelForCausalLM

    expected = torch.load(saved / "llama" / "expected.pt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(saved / "llama", attn_implementation="eager")
    with torch.no_grad():
        found = model.eval()(input_ids=expected["ids"]).logits[0, -1]
    assert torch.allclose(found, expected["logits"], atol=1e-5, rtol=1e-4) == FIVE


def test_the_tokenizer_is_the_same(saved):
    text = "<|im_start|>user\nhello there<|im_end|>"
    found = load_tokenizer(saved / "llama")
    original = tiny_tokenizer()
    assert found(text).input_ids == original(text).input_ids
    assert found.chat_template == original.chat_template
    assert found.all_special_tokens == original.all_special_tokens


def changed(saved: Path, folder: Path, **values) -> Path:
    """The Gemma 3 of ``saved`` with other ``values`` in its configuration."""
    folder.mkdir()
    config = json.loads((saved / "gemma3_text" / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").symlink_to(saved / "gemma3_text" / "model.safetensors")
    return folder


if not FIVE:

    @pytest.mark.parametrize(
        "values, said",
        [
            (
                {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
                "layer_types",
            ),
            ({"rope_parameters": {"linear_attention": {"rope_theta": 1.0}}}, "rope_parameters"),
        ],
    )
    def test_what_4_cannot_do_is_refused(saved, tmp_path, values, said):
        place = changed(saved, tmp_path / "model", **values)
        with pytest.raises(ValueError, match=f"{place}.*{said}.*use the default set"):
            load_config(place)


def of_family(name: str, folder: Path, **values):
    """A tiny model of transformers 4's own making, whose configuration is rewritten as transformers
    5 would write it, with ``values``."""
    from tests.models_table.families import BY_TYPE, tiny_model

    tiny_model(BY_TYPE[name]).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for old in ("rope_theta", "rope_scaling"):
        config.pop(old, None)
    (folder / "config.json").write_text(json.dumps(config | values))
    return load_config(folder)


LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}

if not FIVE:

    def test_windows_of_all_layers_or_none(tmp_path):
        windows = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
        full = of_family("qwen2", tmp_path / "a", **windows, layer_types=["full_attention"] * 2)
        assert full.sliding_window is None and not full.use_sliding_window
        mixed = ["full_attention", "sliding_attention"]
        with pytest.raises(ValueError, match="sliding windows in some layers"):
            of_family("qwen2", tmp_path / "b", **windows, layer_types=mixed)

    def test_what_is_saved_again_can_be_read(tmp_path):
        rope = {"rope_type": "longrope", "rope_theta": 7.0, "original_max_position_embeddings": 64}
        config = of_family("phi3", tmp_path / "a", rope_parameters=rope | LONGROPE)
        assert config.original_max_position_embeddings == 64 and config.rope_theta == 7.0
        config.save_pretrained(tmp_path / "b")
        assert load_configuration(tmp_path / "b").rope_scaling["long_factor"] == [2.0] * 8

    def test_yarn_whose_factor_4_would_replace_is_refused(tmp_path):
        rope = {"rope_type": "yarn", "rope_theta": 7.0, "original_max_position_embeddings": 64}
        with pytest.raises(ValueError, match="yarn factor 4.0"):
            of_family("llama", tmp_path / "a", rope_parameters=rope | {"factor": 4.0})
        found = of_family("llama", tmp_path / "b", rope_parameters=rope | {"factor": 2.0})
        assert found.rope_scaling["factor"] == 2.0

    def test_code_of_the_checkpoints_own_reads_its_configuration_itself(tmp_path):
        config = of_family("llama", tmp_path / "a")
        kind = type("Own", (type(config),), {"__module__": "transformers_modules.own"})
        own = kind(rope_parameters={"rope_theta": 7.0})
        adopt_config(own)
        assert own.rope_parameters == {"rope_theta": 7.0}
