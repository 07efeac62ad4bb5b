"""Tools in the templates of config/conversation_template/: those that write them do as their makers
document, written out by hand; the others name the way that works."""

import json

import pytest

from coati.dataset.chat.conversation import setup_conversation_template
from coati.dataset.chat.response_format import response_format
from coati.dataset.rows.row_errors import RowError
from tests.dataset.chat.family_templates import WEATHER, answer, call, result, text_of, user
from tests.dataset.makers import CHATML, FAMILIES, TEMPLATES, byte_level, family_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
SCHEMA = json.dumps(WEATHER)
HERMES = (
    "<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call one or more functions to assist with "
    "the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:"
    f"\n<tools>\n{SCHEMA}\n</tools>\n\nFor each function call, return a json object with function "
    "name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\nWarm?<|im_end|>\n<|im_start|>assistant\n<think>\nask\n</think>\n\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\n<tool_response>\n4 C\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n"
)
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
# The prompt after a round with a call.
WRITTEN = {
    "Qwen_Qwen2.5-3B": HERMES,
    "Qwen_Qwen3-8B": HERMES,
    # No text, and so no thought, beside a call.
    "meta-llama_Llama-3.1-8B-Instruct": (
        f"<|begin_of_text|>{HEADER.format('system')}Environment: ipython\n\nBe brief.<|eot_id|>"
        f"{HEADER.format('user')}Given the following functions, please respond with a JSON for a "
        "function call with its proper arguments that best answers the given prompt.\n\nRespond in "
        'the format {"name": function name, "parameters": dictionary of argument name and its '
        "value}.Do not use variables.\n\n" + json.dumps(WEATHER, indent=4) + "\n\nWarm?<|eot_id|>"
        f"{HEADER.format('assistant')}"
        '{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>'
        f'{HEADER.format("ipython")}"4 C"<|eot_id|>{HEADER.format("assistant")}'
    ),
    "mistralai_Mistral-Small-3.2-24B-Instruct-2506": (
        f"<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][AVAILABLE_TOOLS][{SCHEMA}][/AVAILABLE_TOOLS]"
        "[INST]Warm?[/INST]<think>\nask\n</think>\n\n[TOOL_CALLS]weather[CALL_ID]call00000[ARGS]"
        '{"city": "Oslo"}</s>[TOOL_RESULTS]call00000[TOOL_CONTENT]4 C[/TOOL_RESULTS]'
    ),
    "zai-org_GLM-4.5-Air": (
        "[gMASK]<sop><|system|>\n# Tools\n\nYou may call one or more functions to assist with the "
        "user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:"
        f"\n<tools>\n{SCHEMA}\n</tools>\n\nFor each function call, output the function name and "
        "arguments within the following XML format:\n<tool_call>{function-name}\n"
        "<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>\n"
        "<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call>"
        "<|system|>\nBe brief.<|user|>\nWarm?<|assistant|>\n<think>\nask\n</think>\n\n"
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>"
        "<|observation|>\n<tool_response>\n4 C\n</tool_response><|assistant|>\n"
    ),
}
OTHERS = sorted(set(FAMILIES) - set(WRITTEN))


def shipped(name, tokenizer=None):
    return setup_conversation_template(
        tokenizer or family_tokenizer(name), TEMPLATES / f"{name}.json"
    )


@pytest.mark.parametrize("name", WRITTEN)
def test_the_prompt_after_a_call_is_the_familys(name):
    row = [SYSTEM, user("Warm?"), call({"city": "Oslo"}, "ask"), result("4 C")]
    template = shipped(name)
    assert template.abilities.lacking == ""
    assert template.encode_prompt(row, tools=[WEATHER]).text == WRITTEN[name]


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("said", ["", "Let me see."])
def test_what_is_learned_is_what_generation_reads_back(name, calls, said):
    """Calls alone or beside a text, one or several: from where the prompt ends to a stop."""
    template = shipped(name)
    made = [call({"city": city, "days": [1, None]})["tool_calls"][0] for city in ("Oslo", "Rome")]
    results = [result("4 C"), result("19 C")][:calls]
    row = [SYSTEM, user("Warm?"), answer(said, tool_calls=made[:calls]), *results, answer("No.")]
    if name.startswith("meta-llama") and calls > 1:
        with pytest.raises(RowError, match="it writes one call a turn"):
            template.encode_turns(row, tools=[WEATHER])
        return
    (encoded,) = template.encode_turns(row, tools=[WEATHER])
    prompt = template.encode_prompt(row[:2], tools=[WEATHER])
    start, end = encoded.spans[0]
    assert encoded.input_ids[:start] == prompt.input_ids
    ids = encoded.input_ids[start:end]
    (stop,) = [stop for stop in template.stop_ids if ids[-len(stop) :] == stop]
    assert not any(ids[k : k + len(stop)] == stop for k in range(len(ids) - len(stop)))
    text = template.encoder.decode(ids[: -len(stop)])
    read = response_format(template).read(text, prompt.text, [WEATHER])
    assert [(one.name, one.arguments) for one in read.calls] == [
        (one["function"]["name"], one["function"]["arguments"]) for one in made[:calls]
    ]
    dropped = name.startswith("meta-llama") and said != ""
    assert read.content == ("" if dropped else said)
    assert bool(encoded.notes) == dropped


def test_tools_stand_before_the_last_question_of_mistral():
    """So a dialogue becomes one row per question, each as generation sees it."""
    template = shipped("mistralai_Mistral-Small-3.2-24B-Instruct-2506")
    row = [user("a"), answer("b"), user("c"), answer("d")]
    first, second = template.encode_turns(row, tools=[WEATHER])
    tools = f"[AVAILABLE_TOOLS][{SCHEMA}][/AVAILABLE_TOOLS]"
    assert first.text == f"<s>{tools}[INST]a[/INST]b</s>"
    assert second.text == f"<s>[INST]a[/INST]b</s>{tools}[INST]c[/INST]d</s>"
    (plain,) = template.encode_turns(row)
    assert plain.text == "<s>[INST]a[/INST]b</s>[INST]c[/INST]d</s>"


@pytest.mark.parametrize("name", OTHERS)
def test_a_template_without_tools_names_the_tokenizers_own_where_that_has_them(name):
    """And following that works."""
    row = [user("Warm?"), call({"city": "Oslo"}), result("4 C"), answer("No.")]
    specials, names = FAMILIES[name]
    own = text_of("qwen3")
    tokenizer = byte_level([*specials, *CHATML], names, own)
    with pytest.raises(RowError, match="own does: leave --conversation_template_config out"):
        shipped(name, tokenizer).encode_turns(row, tools=[WEATHER])
    tokenizer.chat_template = own
    encoded, *_ = setup_conversation_template(tokenizer, None).encode_turns(row, tools=[WEATHER])
    assert '{"name": "weather", "arguments": {"city": "Oslo"}}' in encoded.text
    with pytest.raises(RowError, match=r"take one that does \(--conversation_template_config\)"):
        shipped(name).encode_turns(row, tools=[WEATHER])
