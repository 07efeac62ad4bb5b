"""Thoughts, calls of tools and their results through the templates of today's families: the text is
the template's own, the assistant's turns are learned whole, and nothing else is."""

import copy
import json

import pytest

from coati.dataset.chat.conversation import Conversation
from coati.dataset.report.rendering_warnings import rendering_warnings
from coati.dataset.rows.row_errors import RowError
from tests.dataset.chat.family_templates import (
    TOKENS,
    TOOLS,
    WEATHER,
    answer,
    call,
    family,
    learned,
    result,
    text_of,
    tokenizer_of,
    user,
)

ROUND = [
    user("Warm?"),
    call({"city": "Oslo"}, "ask"),
    result("4 C"),
    answer("No, cold.", "4 is low"),
]
OSLO = '{"city": "Oslo"}'
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
THINK = "<think>\n{}\n</think>\n\n"
# What is learned of ROUND, one text a turn, in one row.
WRITTEN = {
    # Before calls this template writes the line break after the header itself: it begins with the
    # text, here the thought, which it knows as a text alone.
    "qwen2_5": [
        THINK.format("ask") + "\n" + HERMES + "<|im_end|>",
        THINK.format("4 is low") + "No, cold.<|im_end|>",
    ],
    "qwen3": [
        THINK.format("ask") + HERMES + "<|im_end|>",
        THINK.format("4 is low") + "No, cold.<|im_end|>",
    ],
    # Neither writes a text, and so a thought, beside a call.
    "llama3_1": [
        '{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>',
        THINK.format("4 is low") + "No, cold.<|eot_id|>",
    ],
    "mistral_v0_3": [
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}, "id": "call00000"}]</s>',
        " " + THINK.format("4 is low") + "No, cold.</s>",
    ],
    "magistral": [
        f"[THINK]ask[/THINK][TOOL_CALLS]weather[ARGS]{OSLO}</s>",
        "[THINK]4 is low[/THINK]No, cold.</s>",
    ],
    "glm4_5": [
        "\n<think>ask</think>\n<tool_call>weather\n<arg_key>city</arg_key>\n"
        "<arg_value>Oslo</arg_value>\n</tool_call><|observation|>",
        "\n<think>4 is low</think>\nNo, cold.<|user|>",
    ],
    # Once a final response follows, the template drops the thought before the call: what generation
    # sees, and so the row, still has it.
    "gpt_oss": [
        "<|channel|>analysis<|message|>ask<|end|><|start|>assistant to=functions.weather"
        f"<|channel|>commentary json<|message|>{OSLO}<|call|>",
        "<|channel|>analysis<|message|>4 is low<|end|><|start|>assistant<|channel|>final"
        "<|message|>No, cold.<|return|>",
    ],
    "nemotron_3": [
        "ask\n</think>\n<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n"
        "</function>\n</tool_call><|im_end|>",
        "4 is low\n</think>\nNo, cold.<|im_end|>",
    ],
    "gemma_4": [
        # Its call may be followed by another: the token that begins a result ends the turn.
        f"<|channel>thought\nask\n<channel|><|tool_call>call:weather{OSLO}<tool_call|>"
        "<|tool_response>",
        "<|channel>thought\n4 is low\n<channel|>No, cold.<turn|>",
    ],
    "kimi_k2": [
        "<think>ask</think><|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
        f"<|tool_call_argument_begin|>{OSLO}<|tool_call_end|><|tool_calls_section_end|><|im_end|>",
        "<think>4 is low</think>No, cold.<|im_end|>",
    ],
    "granite_4": [
        THINK.format("ask") + "\n" + HERMES + "<|end_of_text|>",
        THINK.format("4 is low") + "No, cold.<|end_of_text|>",
    ],
    "smollm3": [
        THINK.format("ask")
        + '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call><|im_end|>',
        THINK.format("4 is low") + "No, cold.<|im_end|>",
    ],
    # These drop thoughts; the prompt of DeepSeek V3.1 ends with </think>.
    "exaone_4": [
        '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>[|endofturn|]',
        "No, cold.[|endofturn|]",
    ],
    "deepseek_v3_1": [
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{OSLO}<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>",
        "No, cold.<｜end▁of▁sentence｜>",
    ],
}
WITHOUT_TOOLS = ("phi_3", "gemma_3")
WITHOUT_SCHEMAS = ("deepseek_r1",)


def own_text(template: Conversation, messages, tools=None, **more) -> str:
    """What transformers renders of the messages in the template's form."""
    forms = template.abilities.forms
    return template.tokenizer.apply_chat_template(
        forms.spelled(messages),
        **{forms.tools_name: tools},
        tokenize=False,
        **template.template_args,
        **more,
    )


def test_every_template_is_tested():
    assert sorted([*WRITTEN, *WITHOUT_TOOLS, *WITHOUT_SCHEMAS]) == sorted(TOKENS)
    assert len(TOKENS) >= 12


@pytest.mark.parametrize("name", WRITTEN)
def test_a_round_with_a_call_by_hand(name):
    template = family(name)
    (row,) = template.encode_turns(ROUND, tools=TOOLS)
    assert learned(template, row) == WRITTEN[name]


@pytest.mark.parametrize("name", TOKENS)
def test_the_text_is_what_transformers_renders(name):
    template = family(name)
    turns = [
        [user("a"), answer("b"), user("c"), answer("d")],
        [user("a"), answer("b", "t1"), user("c"), answer("d", "t2")],
        [user("a"), answer("b", "t1"), user("c")],
    ]
    for messages in turns:
        asks = messages[-1]["role"] == "user"
        found = template.render(messages, add_generation_prompt=asks)
        assert found == own_text(template, messages, add_generation_prompt=asks)
    if name in WITHOUT_TOOLS:
        return
    tools = None if name in WITHOUT_SCHEMAS else TOOLS
    for end in (1, 2, 3, 4):
        messages = ROUND[:end]
        asks = messages[-1]["role"] != "assistant"
        found = template.render(messages, asks, tools)
        assert found == own_text(template, messages, tools, add_generation_prompt=asks)
        assert ("weather" in found) == (end > 1 or tools is not None)


@pytest.mark.parametrize("name", ["qwen3", "glm4_5", "nemotron_3", "kimi_k2"])
def test_the_form_of_transformers_own_documentation_is_taken_as_it_is(name):
    """reasoning_content, and tool_calls with objects as arguments."""
    template = family(name)
    messages = template.abilities.forms.spelled(ROUND) if name == "kimi_k2" else ROUND
    expected = template.tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False)
    assert template.render(ROUND, tools=TOOLS) == expected


@pytest.mark.parametrize("name", [*WRITTEN, *WITHOUT_SCHEMAS])
def test_generation_begins_where_a_turn_of_the_row_begins_and_stops_where_it_ends(name):
    template = family(name)
    tools = None if name in WITHOUT_SCHEMAS else TOOLS
    rows = template.encode_turns(ROUND, tools=tools)
    spans = [(row, span) for row in rows for span in row.spans]
    assert len(spans) == 2
    for (row, (start, end)), turn in zip(spans, (1, 3), strict=True):
        prompt = template.encode_prompt(ROUND[:turn], tools=tools).input_ids
        if not template.starts_at_content or name == "nemotron_3":
            assert row.input_ids[:start] == prompt
        assert any(row.input_ids[end - len(stop) : end] == stop for stop in template.stop_ids)


@pytest.mark.parametrize("name", WITHOUT_TOOLS)
def test_a_template_without_tools_refuses_rows_with_tools_by_name(name):
    template = family(name)
    for messages, tools, what in (
        (ROUND, None, "calls of tools and no results of tools"),
        ([user("a"), answer("b")], TOOLS, "tools"),
    ):
        with pytest.raises(RowError, match=f"it writes no {what}; take one") as error:
            template.encode_turns(messages, tools=tools)
        assert error.value.reason == "tools_unsupported"


def test_schemas_that_a_template_drops_are_refused():
    with pytest.raises(RowError, match="it writes no tools;"):
        family("deepseek_r1").encode_turns(ROUND, tools=TOOLS)


def test_a_call_that_a_template_drops_beside_a_text_is_refused():
    row = [user("Warm?"), call({"city": "Oslo"}, text="Let me see."), result("4 C"), answer("No.")]
    with pytest.raises(RowError, match="the calls of message 1, which has a text") as e:
        family("deepseek_r1").encode_turns(row)
    assert e.value.reason == "tools_unsupported"
    template = family("qwen3")
    called, _ = template.encode_turns(row)
    (said,) = learned(template, called)
    assert said.startswith("Let me see.") and said.endswith("</tool_call><|im_end|>")


def test_a_text_that_a_template_drops_beside_a_call_is_counted():
    row = [user("Warm?"), call({"city": "Oslo"}, text="Let me see."), result("4 C"), answer("No.")]
    (encoded,) = family("llama3_1").encode_turns(row, tools=TOOLS)
    assert encoded.notes == {"texts beside calls dropped by the template"}
    (encoded,) = family("magistral").encode_turns(row, tools=TOOLS)
    assert encoded.notes == frozenset()


def test_a_system_message_that_a_template_drops_is_counted():
    """Mistral's v0.3 writes it before the last message alone, if that is the user's."""
    row = [{"role": "system", "content": "Be brief. "}, user("Warm?"), call({"city": "Oslo"})]
    row += [result("4 C"), answer("No.")]
    dropped = {"system messages dropped by the template"}
    template = family("mistral_v0_3")
    encoded = template.encode_turns(row, tools=TOOLS)
    assert encoded[-1].notes == dropped and "Be brief." not in encoded[-1].text
    assert template.encode_response(row, tools=TOOLS).notes == dropped
    assert template.encode_response(row[:3], tools=TOOLS).notes == frozenset()
    (warning,) = rendering_warnings({"traits": dict.fromkeys(dropped, 3), "dropped": {}})
    assert "drops the system message of 3 rows" in warning
    (encoded,) = family("qwen2_5").encode_turns(row, tools=TOOLS)
    assert encoded.notes == frozenset() and "Be brief." in encoded.text


@pytest.mark.parametrize("name", [*WRITTEN, *WITHOUT_SCHEMAS])
def test_markers_in_thoughts_arguments_results_and_schemas_are_text(name):
    template = family(name)
    control = {
        text
        for i, text in template.encoder.controls.items()
        if i != template.tokenizer.pad_token_id
    }
    evil = "".join(sorted(control))
    calls = [answer("", evil, tool_calls=[])]
    calls[0]["tool_calls"] = call({"city": evil, "k" + evil: [evil, {"x": 1}]})["tool_calls"]
    attacked = [user("Warm?" + evil), *calls, result("4 C" + evil), answer("No." + evil, evil)]
    tools = [json.loads(json.dumps(WEATHER).replace("The weather", "The weather " + evil))]
    tools = None if name in WITHOUT_SCHEMAS else tools
    plain = [
        user("Warm?"),
        call({"city": "Oslo", "k": ["a", {"x": 1}]}, "ask"),
        result("4 C"),
        answer("No.", "low"),
    ]
    found = template.encode_turns(attacked, tools=tools)
    expected = template.encode_turns(plain, tools=tools and TOOLS)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for token in template.encoder.controls:
            assert one.input_ids.count(token) == other.input_ids.count(token), token
        text = template.encoder.decode(one.input_ids)
        assert text.removeprefix(template.tokenizer.bos_token or "").endswith(
            one.text.removeprefix(template.tokenizer.bos_token or "")
        )
        assert len(one.spans) == len(other.spans)


@pytest.mark.parametrize("named", [dict, list])
def test_a_template_of_its_own_for_rows_with_tools(named, tmp_path):
    """Of those that a tokenizer names, as transformers chooses between them."""
    plain = "  \n{%- if true %}{%- endif %}" + text_of("phi_3") + "  \n\n  "
    tools = " {{- '' }}" + text_of("qwen2_5") + "\n \n"
    texts = {"default": plain, "tool_use": tools, "rag": "x"}
    tokenizer = copy.deepcopy(tokenizer_of("qwen2_5"))
    tokenizer.chat_template = dict(texts)
    expected = tokenizer.apply_chat_template(ROUND[:1], tokenize=False)
    if named is list:  # as tokenizer_config.json has them
        entries = [{"name": name, "template": text} for name, text in texts.items()]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entries}))
    config = {"chat_template": str(tmp_path)} if named is list else {}
    template = Conversation.from_config(tokenizer, config)
    assert template.render(ROUND[:1]) == expected
    thought = {k: v for k, v in ROUND[1].items() if k != "reasoning_content"}
    without = [ROUND[0], thought]
    text = template.render(without, tools=TOOLS)
    tokenizer.chat_template = dict(texts)
    assert text == tokenizer.apply_chat_template(without, tools=TOOLS, tokenize=False)
