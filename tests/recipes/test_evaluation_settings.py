"""What coati evaluate and coati sample make of settings and texts, without a model."""

import json

from coati.recipes.evaluation import other_settings
from coati.recipes.selected_rows import _json


def test_what_a_baseline_was_made_with_otherwise_is_named():
    before = {
        "model": "a",
        "responses": {"model": {"a": 1}, "temperature": 0.7, "seed": 42, "older": 1},
        "perplexity": {"files": ["x"], "max_length": 2048, "stride": 512},
    }
    now = {
        "model": "b",
        "responses": {"model": {"b": 1}, "temperature": 1.0, "seed": 42},
        "perplexity": {"files": ["y"], "max_length": 2048, "stride": None},
    }
    assert list(other_settings(before, now)) == [
        "responses: temperature 0.7 where it is 1.0 here",
        "perplexity: stride 512 where it is None here",
    ]
    assert not list(other_settings(before, before))
    older = {"perplexity": ["x"]}  # before settings were written down
    assert not list(other_settings(older, now)) and not list(other_settings({}, now))


def test_a_row_with_half_a_character_is_json_of_ascii():
    assert _json({"a": "é"}) == '{"a": "é"}'
    text = _json({"a": "x\ud83d"})
    assert text.encode("utf-8") and json.loads(text) == {"a": "x\ud83d"}
