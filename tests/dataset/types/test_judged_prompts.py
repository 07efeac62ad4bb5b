"""Prompts with judged responses, and with where they come from, as a run asks for them."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from coati.dataset.chat.conversation import setup_conversation_template
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.rows.formats import read_row
from coati.dataset.rows.row_errors import RowError
from coati.experience_maker.rollouts.judged_groups import judged_groups
from tests.tiny import CHATML, tiny_tokenizer

JUDGED = {"prompt": "say", "responses": ["a", "b b", {"text": "c"}], "scores": [3, 1, 2]}
TEMPLATE = {
    "chat_template": CHATML,
    "system_message": "",
    "stop_ids": [[2]],
    "end_of_assistant": "<|im_end|>",
}


def prepared(
    row: dict[str, Any], template: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    conversation = setup_conversation_template(tiny_tokenizer(), TEMPLATE | (template or {}))
    conversation.options = replace(conversation.options, **options)
    prompt = DATA_TYPES["prompt"]
    found = read_row("prompt", row)
    prompt.finish(found)
    [(columns, _)] = prompt.tokenize(found, conversation, 100)
    return columns | {"unused": found.unused}


def test_judged_responses_stand_beside_the_prompt():
    columns = prepared(JUDGED, for_groups=3)
    held = json.loads(columns["dialogue"])
    texts = [tiny_tokenizer().decode(ids) for ids in held["ids"]]
    assert texts == ["a<|im_end|>", "b b<|im_end|>", "c<|im_end|>"]
    assert held["scores"] == [3.0, 1.0, 2.0] and not columns["unused"]
    assert "dialogue" not in prepared(JUDGED)
    assert prepared(JUDGED)["unused"]  # nobody reads them then


def test_of_a_judged_response_everything_is_read_or_named():
    """Thoughts and calls are written by the template; what nothing reads is named."""
    calls = [{"function": {"name": "add", "arguments": {"a": 1}}}]
    thought = {"role": "assistant", "content": "c", "reasoning_content": "why", "odd": "x"}
    called = {"role": "assistant", "content": "", "tool_calls": calls}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    row = {"prompt": "say", "responses": [[thought], called], "scores": [1, 0], "tools": tools}
    template = {
        "chat_template": "{% for t in tools or [] %}{{ t.function.name }}\n{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "<think>{{ m.reasoning_content or '' }}</think>{% endif %}{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    }
    columns = prepared(row, template, for_groups=2)
    texts = [tiny_tokenizer().decode(ids) for ids in json.loads(columns["dialogue"])["ids"]]
    assert texts[0] == "<think>why</think>c<|im_end|>"
    assert texts[1].startswith("<think></think>{") and '"add"' in texts[1] and '"a": 1' in texts[1]
    assert columns["unused"] == {"responses[][].odd": False}
    prompt = columns["input_ids"]
    # Of no thought at all the empty one stands before every response, where nothing learns it.
    columns = prepared(JUDGED, template, for_groups=3)
    texts = [tiny_tokenizer().decode(ids) for ids in json.loads(columns["dialogue"])["ids"]]
    assert texts == ["a<|im_end|>", "b b<|im_end|>", "c<|im_end|>"]
    assert columns["inputs_decode"].endswith("assistant\n<think></think>")
    assert tiny_tokenizer().decode(prompt).endswith("assistant\n")


def test_they_come_back_as_if_they_were_sampled():
    columns = prepared(JUDGED, for_groups=2)
    ids = torch.tensor([columns["input_ids"]])
    found = judged_groups({"input_ids": ids, "dialogue": [columns["dialogue"]]}, 2, [[2]], 10)
    held = json.loads(columns["dialogue"])["ids"]
    assert found.responses() == held and found.stopped.tolist() == [True, True]
    assert found.sequences[:, : ids.shape[1]].tolist() == ids.tolist() * 2
    assert found.of_environment["reward"].tolist() == [3.0, 1.0]
    assert found.logprobs is None and found.version is None
    cut = judged_groups({"input_ids": ids, "dialogue": [columns["dialogue"]]}, 2, [[2]], 2)
    assert cut.lengths.tolist() == [2, 2] and cut.stopped.tolist() == [True, False]


@pytest.mark.parametrize(
    "changes, source",
    [
        ({"source": "math"}, "math"),
        ({"data_source": "math"}, "math"),
        ({"category": "math"}, "math"),
        ({"source": "math", "category": "law"}, "math"),
    ],
)
def test_where_a_row_comes_from(changes, source):
    known = json.dumps(["math"])
    columns = prepared({"prompt": "say", **changes}, for_sources=known)
    assert columns["seq_category"] == source and not columns["unused"]
    assert prepared({"prompt": "say", **changes})["seq_category"] == changes.get("category")


@pytest.mark.parametrize(
    "row, options, reason, said",
    [
        (
            JUDGED,
            {"for_groups": 4},
            "bad_scores",
            "3 responses with scores, --num_generations is 4",
        ),
        ({"prompt": "say", "source": "law"}, {}, "no_reward_for_source", "source 'law'"),
        ({"prompt": "say"}, {}, "no_reward_for_source", "no source"),
    ],
)
def test_rows_that_cannot_be_used(row, options, reason, said):
    options = options or {"for_sources": json.dumps(["math"])}
    with pytest.raises(RowError) as error:
        prepared(row, **options)
    assert error.value.reason == reason and said in error.value.detail


def test_with_rewards_for_all_others_every_source_will_do():
    known = json.dumps(["*", "math"])
    assert prepared({"prompt": "say"}, for_sources=known)["seq_category"] is None
    assert prepared({"prompt": "say", "source": "law"}, for_sources=known)["seq_category"] == "law"


def test_responses_of_no_tokens_are_still_ids():
    held = json.dumps({"ids": [[], []], "scores": [1.0, 0.0]})
    prompt = torch.tensor([[3, 4]])
    found = judged_groups({"input_ids": prompt, "dialogue": [held]}, 2, [[2]], 10)
    assert found.sequences.dtype == torch.long and found.sequences.tolist() == [[3, 4], [3, 4]]
