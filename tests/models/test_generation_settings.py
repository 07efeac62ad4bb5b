"""Generation settings are mended so that transformers saves them, and not otherwise."""

import json

import pytest
from transformers import GenerationConfig

from coati.models.generation_settings import complaint_about, mended, with_end_tokens
from coati.models.loading import load_causal_lm
from coati.models.reward_model import RewardModel
from tests.tiny import tiny_llama

# generation_config.json, config.json, what is said (None: nothing), what is saved of it
CASES = {
    "temperature alone": (
        {"temperature": 0.9, "top_p": 0.6},
        {},
        "do_sample -> true, which temperature 0.9, top_p 0.6 need",
        {"do_sample": True, "temperature": 0.9, "top_p": 0.6},
    ),
    "top_k": ({"top_k": 20}, {}, "do_sample -> true", {"top_k": 20, "do_sample": True}),
    "typical_p": ({"typical_p": 0.5}, {}, "do_sample -> true", {"typical_p": 0.5}),
    "greedy in so many words": (
        {"do_sample": False, "temperature": 0.9},
        {},
        "temperature 0.9 -> none",
        {"temperature": None},
    ),
    "a temperature of 0": (
        {"do_sample": True, "temperature": 0.0, "top_k": 1},
        {},
        "do_sample true -> false",
        {"temperature": None, "top_k": None},
    ),
    "beams without beams": (
        {"early_stopping": True, "length_penalty": 2.0},
        {},
        "length_penalty 2.0 -> none",
        {"early_stopping": None, "length_penalty": None},
    ),
    "beams": (
        {"num_beams": 4, "early_stopping": True, "length_penalty": 2.0},
        {},
        None,
        {"num_beams": 4, "early_stopping": True, "length_penalty": 2.0},
    ),
    "padding": ({"pad_token_id": -1}, {"pad_token_id": -1}, "pad_token_id -1 -> none", {}),
    "padding beyond": ({}, {"pad_token_id": 384}, "pad_token_id 384 -> none", {}),
    "in config.json": (
        None,
        {"temperature": 0.7},
        "do_sample -> true, which temperature 0.7 needs",
        {"temperature": 0.7, "do_sample": True},
    ),
    "not even loadable": (
        {"num_return_sequences": 3, "repetition_penalty": 1.1},
        {},
        "num_return_sequences 3 -> none",
        {"repetition_penalty": 1.1, "num_return_sequences": None},
    ),
    "scores without their place": (
        {"output_scores": True},
        {},
        "output_scores True -> none",
        {"output_scores": None},
    ),
    "unknown cache": ({"cache_implementation": "no"}, {}, "cache_implementation no -> none", {}),
    "nothing wrong": (
        {"do_sample": True, "temperature": 0.6, "eos_token_id": [5, 2]},
        {},
        None,
        {"eos_token_id": [5, 2]},
    ),
}


@pytest.fixture
def said(monkeypatch):
    from coati.models import generation_settings as module

    lines: list[str] = []
    monkeypatch.setattr(module.logger, "warning_once", lines.append)
    return lines


@pytest.mark.parametrize("name", CASES)
def test_a_base_is_saved_again_after_loading(tmp_path, said, name):
    settings, config, told, wanted = CASES[name]
    tiny_llama().save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "generation_config.json"
    file.unlink()
    if settings is not None:
        file.write_text(json.dumps(settings))
    held = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(held | config))
    model = load_causal_lm(tmp_path / "base")
    assert len(said) == (told is not None)
    assert told is None or (told in said[0] and str(tmp_path / "base") in said[0])
    model.generation_config.save_pretrained(tmp_path / "saved")  # its check is strict
    model.config.save_pretrained(tmp_path / "saved")
    found = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {key: found.get(key) for key in wanted} == wanted
    assert "temperature" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    model.save_pretrained(tmp_path / "export")
    # The last row is a token, not padding: its gradient counts.
    assert model.get_input_embeddings().padding_idx in (None, 2)
    said.clear()
    load_causal_lm(tmp_path / "export")
    assert not said  # what was mended stays so


def test_a_reward_model_on_such_a_base_is_saved_too(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.7}))
    model = RewardModel.from_pretrained(tmp_path / "base", new_head=True)
    model.config.save_pretrained(tmp_path / "saved")
    assert "temperature" not in json.loads((tmp_path / "saved" / "config.json").read_text())


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("{", "not readable as JSON"),
        ("[1]", "expected a JSON object, found a list"),
        ('{"temperature": "0.7"}', "temperature is '0.7', expected a number"),
        ('{"top_k": true}', "top_k is True, expected a number"),
        ('{"do_sample": "yes"}', "do_sample is 'yes', expected true or false"),
        ('{"eos_token_id": ["</s>"]}', "expected a token id or a list of them"),
        ('{"pad_token_id": 1.5}', "pad_token_id is 1.5, expected a token id"),
        ('{"early_stopping": "yes"}', 'expected true, false or "never"'),
    ],
)
def test_a_damaged_file_is_named_with_its_key(tmp_path, text, wanted):
    tiny_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(text)
    with pytest.raises(ValueError) as error:
        load_causal_lm(tmp_path / "base")
    assert wanted in str(error.value) and "generation_config.json" in str(error.value)


def test_settings_that_pass_are_the_same_object_and_lists_of_ends_stay():
    settings = GenerationConfig(do_sample=True, temperature=0.5, eos_token_id=[7, 3])
    assert mended(settings) == (settings, []) and mended(settings)[0] is settings
    wrong = GenerationConfig(eos_token_id=[7, 3])
    wrong.temperature = 0.5
    assert complaint_about(wrong)
    right, changes = mended(wrong)
    assert changes and right.eos_token_id == [7, 3] and wrong.do_sample is not True
    assert complaint_about(right) is None


@pytest.mark.parametrize(
    "held, more, wanted",
    [
        ([7, 3], [3], [7, 3]),
        ([7, 3], [5], [7, 3, 5]),
        (7, [7], 7),
        (7, [5, 5], [7, 5]),
        (None, [5], 5),
        (None, [], None),
        ([7], [7], [7]),
    ],
)
def test_end_tokens_are_added_behind_those_there_are(held, more, wanted):
    settings = GenerationConfig(eos_token_id=held)
    assert with_end_tokens(settings, more).eos_token_id == wanted
    assert settings.eos_token_id == held
