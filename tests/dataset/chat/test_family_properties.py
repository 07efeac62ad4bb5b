"""Whatever is said, thought, called and answered: the text is the template's own, every turn of the
assistant is learned once, from where generation begins to where it stops, and nothing else is."""

from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coati.dataset.chat.conversation import Conversation
from tests.dataset.chat.family_templates import TOKENS, WEATHER, answer, family, result, user
from tests.dataset.chat.test_family_rounds import WITHOUT_SCHEMAS, WITHOUT_TOOLS, own_text
from tests.dataset.chat.test_template_properties import FRAGMENTS

FEW = settings(
    derandomize=True,
    max_examples=8,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
# Tags in a content are part of what templates read there: they have tests of their own.
PIECES = [one for one in FRAGMENTS if "think>" not in one] + ["<|end|>", "<|call|>", "[TOOL_CALLS]"]
TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=3).map("".join)
SAID = TEXT.filter(str.strip)
THOUGHT = st.none() | SAID
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
CALL = st.builds(
    lambda arguments, thought, found: [
        answer(
            "",
            thought,
            tool_calls=[
                {"type": "function", "function": {"name": "weather", "arguments": arguments}}
            ],
        ),
        result(found),
    ],
    st.dictionaries(SAID, VALUES, max_size=2),
    THOUGHT,
    TEXT,
)
RESPONSE = st.builds(lambda text, thought: [answer(text, thought)], SAID, THOUGHT)
QUESTION = SAID.map(lambda text: [user(text)])


def rounds(calls: bool):
    steps = st.lists(CALL, max_size=2) if calls else st.just([])
    one = st.builds(
        lambda asked, called, said: [*asked, *(m for pair in called for m in pair), *said],
        QUESTION,
        steps,
        RESPONSE,
    )
    return st.lists(one, min_size=1, max_size=3).map(lambda found: [m for r in found for m in r])


@cache
def conversation(name: str) -> Conversation:
    return family(name)


@pytest.mark.parametrize("name", TOKENS)
@FEW
@given(data=st.data())
def test_rounds_with_thoughts_and_calls(name, data):
    template = conversation(name)
    tools = None if name in (*WITHOUT_SCHEMAS, *WITHOUT_TOOLS) else [WEATHER]
    messages = data.draw(rounds(calls=name not in WITHOUT_TOOLS))
    assert template.render(messages, tools=tools) == own_text(template, messages, tools)
    rows = template.encode_turns(messages, tools=tools)
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [(row, span) for row in rows for span in row.spans]
    assert len(spans) == len(turns)
    bos = template.tokenizer.bos_token or ""
    for row in rows:
        text = template.encoder.decode(row.input_ids)
        assert text.removeprefix(bos) == row.text.removeprefix(bos)
        ends = [end for _, end in row.spans]
        assert ends == sorted(ends) and sum(row.loss_mask) == sum(e - s for s, e in row.spans)
    for (row, (start, end)), k in zip(spans, turns, strict=True):
        prompt = template.encode_prompt(messages[:k], tools=tools).input_ids
        thinks = "reasoning_content" in messages[k]
        if template.abilities.empty and not thinks:
            # behind the empty thought that the template writes, or the prompt opens
            assert start >= len(prompt) - 3
        elif not template.starts_at_content or name == "nemotron_3":
            assert row.input_ids[:start] == prompt
        assert any(row.input_ids[end - len(stop) : end] == stop for stop in template.stop_ids)
        said = template.encoder.decode(row.input_ids[start:end])
        assert messages[k]["content"].strip() in said
        if thinks and template.abilities.thoughts != "none" and _writes(template, messages[k]):
            assert messages[k]["reasoning_content"].strip() in said


def _writes(template: Conversation, message: dict) -> bool:
    """Whether a thought is not a text that the template drops beside a call."""
    as_text = template.abilities.forms.thought == "text"
    return not (as_text and "tool_calls" in message) or template.abilities.speaks_and_calls
