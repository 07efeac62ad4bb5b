"""What a template writes for a thought, a text and calls of tools is read back as just that, whole
and in pieces of any size; what is no call stays text."""

import json
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coati.dataset.chat.call_marks import common_beginning
from coati.dataset.chat.response_format import response_format
from coati.dataset.chat.response_parts import CALL, Reply
from tests.dataset.chat.call_templates import ALL, WITHOUT_TOOLS, conversation_of

FAST = settings(
    derandomize=True,
    max_examples=25,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
QUESTION = {"role": "user", "content": "What is it like?"}
TYPES = {"text": "string", "count": "integer", "any": None, "list": "array", "flag": "boolean"}
PROPERTIES = {name: {"type": kind} if kind else {} for name, kind in TYPES.items()}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "A function.",
            "parameters": {"type": "object", "properties": PROPERTIES, "required": []},
        },
    }
    for name in ("get_weather", "search-web", "f")
]
NAMES = [tool["function"]["name"] for tool in TOOLS]
FRAGMENTS = [
    *("a", " ", "\n", '"', "'", "\\", "{", "}", "[", "]", "(", ")", ",", ":", "=", "é", "中", "🙂"),
    *("<", ">", "/", "</parameter>", "<tool_call>", "true", "5", "null", "```", "</arg", "\\n"),
]
# Templates that drop a text beside calls, or write it as a thought, or drop the calls.
NO_TEXT_BESIDE_CALLS = (
    *("llama3_1", "mistral_v0_3", "gpt_oss", "command_r7b", "deepseek_r1"),
    "llama4_pythonic",  # behind a text nothing tells that a call is one
)
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)
said = texts.map(str.strip).filter(lambda text: text and text[0] not in "<{[`")
thoughts = said.map("I think: {}".format) | st.just("")
numbers = st.integers(-(10**9), 10**9)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["k", "key_2", "other"]), inner, max_size=2),
    ),
    max_leaves=4,
)
OF_TYPE = {
    "text": texts,
    "count": numbers,
    "any": st.one_of(numbers, st.booleans(), st.lists(numbers, max_size=3)),
    "list": st.lists(values, max_size=3),
    "flag": st.booleans(),
}
arguments = st.fixed_dictionaries({}, optional=OF_TYPE)
calls = st.lists(st.tuples(st.sampled_from(NAMES), arguments), min_size=1, max_size=3)


@cache
def format_of(name):
    return response_format(conversation_of(name))


def written(name, thought, content, made):
    """What a model is given and what it writes, as the template does."""
    conversation = conversation_of(name)
    message = {"role": "assistant", "content": content}
    if thought:
        message["reasoning_content"] = thought
    if made:
        message["tool_calls"] = [
            {
                "type": "function",
                "id": f"call{number:05d}",
                "function": {"name": called, "arguments": given},
            }
            for number, (called, given) in enumerate(made)
        ]
    prompt = conversation.render([QUESTION], True, tools=TOOLS)
    text = conversation.render([QUESTION, message], tools=TOOLS)
    end = conversation.abilities.call_end if made else conversation.end_of_assistant
    if not text.startswith(prompt):  # a prompt that opens a thought, and a response without one
        prompt = common_beginning(prompt, text)
    text = text[len(prompt) :]
    place = text.rfind(end)
    return prompt, visible(name, text if place < 0 else text[:place])


def visible(name, text):
    """``text`` without the control tokens that are no text to a reader."""
    shown = format_of(name).shown_of_calls
    for token, control in conversation_of(name).encoder.controls.items():
        if token not in shown:
            text = text.replace(control, "")
    return text


def single(name):
    """Whether the template writes one call alone."""
    return name in ("llama3_1", "gpt_oss")


def in_pieces(reader, text, sizes):
    reply = Reply()
    place = 0
    for size in sizes:
        reply.add(reader.push(text[place : place + size]))
        place += size
    reply.add(reader.push(text[place:], final=True))
    reply.marks = reader.marks
    return reply


def read_back(name, data, thought, content, made):
    if single(name):
        made = made[:1]
    if made and name in NO_TEXT_BESIDE_CALLS:
        content = ""
    if made and name == "command_r7b":  # the text beside calls is its thought
        thought = ""
    prompt, text = written(name, thought, content, made)
    if thought not in text:  # the template drops it
        thought = ""
    whole = format_of(name).read(text, prompt, TOOLS)
    assert [(call.name, call.arguments) for call in whole.calls] == made, text
    assert (whole.thought, whole.content.strip()) == (thought, content), text
    sizes = data.draw(st.lists(st.integers(1, 7), max_size=40))
    pieces = in_pieces(format_of(name).reader(prompt, TOOLS), text, sizes)
    assert (pieces.thought, pieces.content) == (whole.thought, whole.content)
    assert [call[:2] for call in pieces.calls] == [call[:2] for call in whole.calls]


@pytest.mark.parametrize("name", ALL)
@given(data=st.data(), made=calls)
@FAST
def test_calls_are_read_back(name, data, made):
    read_back(name, data, "", "", made)


@pytest.mark.parametrize("name", ALL)
@given(data=st.data(), thought=thoughts, content=said, made=calls)
@FAST
def test_thoughts_and_texts_beside_calls_are_read_back(name, data, thought, content, made):
    read_back(name, data, thought, content, made)


@pytest.mark.parametrize("name", [*ALL, *WITHOUT_TOOLS])
@given(data=st.data(), thought=thoughts, content=said)
@FAST
def test_texts_without_calls_are_read_back(name, data, thought, content):
    read_back(name, data, thought, content, [])


def marks_of(name):
    """What is written around calls and thoughts, and pieces of it."""
    found = format_of(name)
    whole = [*found.tags, "get_weather", '{"text": "x"}', "f", "functions.", ":0", "```json\n"]
    if found.calls is not None:
        whole += [found.calls.begins, found.calls.middle, *found.calls.marks.split("\n")]
        whole += [written(name, "", "", [("get_weather", {"text": "x"})])[1]]
    if found.channels:
        whole += ["<|channel|>analysis", "<|channel|>final", "<|message|>", "<|end|>", "<|start|>"]
    return [*whole, *(mark[: len(mark) // 2] for mark in whole), "to=functions.f"]


@pytest.mark.parametrize("name", [*ALL, *WITHOUT_TOOLS])
@given(data=st.data())
@settings(FAST, max_examples=40)
def test_whatever_is_written_is_read_alike_in_pieces_and_never_fails(name, data):
    text = "".join(data.draw(st.lists(st.sampled_from([*marks_of(name), *FRAGMENTS]), max_size=12)))
    prompt = data.draw(st.sampled_from(["", "<|start|>assistant", format_of(name).tags[0]]))
    whole = format_of(name).read(text, prompt, TOOLS)
    sizes = data.draw(st.lists(st.integers(1, 9), max_size=60))
    pieces = in_pieces(format_of(name).reader(prompt, TOOLS), text, sizes)
    assert pieces == whole, text
    if not whole.calls and not whole.thought and not format_of(name).channels:
        opening, closing = format_of(name).tags
        if opening not in prompt + text and closing not in text:
            assert whole.content == text  # nothing is lost
    json.dumps(whole.message())


def reply_of(name, text, tools=TOOLS, prompt=""):
    return format_of(name).read(text, prompt, tools)


GOOD = '<tool_call>\n{"name": "f", "arguments": {"text": "x"}}\n</tool_call>'


@pytest.mark.parametrize(
    "broken",
    [
        '<tool_call>\n{"name": "f", "arguments": {"text": "x"}',
        '<tool_call>\n{"name": "f", "arguments": {"text": x}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"n": NaN}}\n</tool_call>',
        "<tool_call>" + "[" * 100_000,
        "<tool_call>" + "[" * 100_000 + "]" * 100_000,
        "<tool_call>",
        "<tool_call>\n",
        "a <tool_call> is a tag",
        "<tool_ca",
        "[1, 2]",
        "",
    ],
)
def test_what_cannot_be_read_is_content(broken):
    reply = reply_of("qwen2_5", broken)
    assert (reply.content, reply.calls) == (broken, [])
    pieces = in_pieces(format_of("qwen2_5").reader("", TOOLS), broken, [1] * 60)
    assert (pieces.content, pieces.calls) == (broken, [])
    both = reply_of("qwen2_5", f"{broken}\n{GOOD}")
    assert (both.content, [call.name for call in both.calls]) == (broken.rstrip(), ["f"])


def test_a_broken_call_between_good_ones_is_content():
    broken = '<tool_call>\n{"name": "f", "arguments": }\n</tool_call>'
    reply = reply_of("qwen2_5", f"{GOOD}\n{broken}\n{GOOD}")
    assert [call.arguments for call in reply.calls] == [{"text": "x"}] * 2
    assert reply.content == broken


def test_without_tools_calls_are_content():
    assert reply_of("qwen2_5", GOOD, tools=()).content == GOOD
    channel = "<|channel|>commentary to=functions.f<|message|>{}"
    assert reply_of("gpt_oss", channel, (), "<|start|>assistant").content == "{}"


def test_white_space_between_marks_may_differ():
    for text in (
        '<tool_call>{"name":"f","arguments":{"text":"x"}}</tool_call>',
        '\n\n<tool_call>\n\n {"name": "f", "arguments": {"text": "x"}}',
        '<tool_call>{"name": "f", "parameters": {"text": "x"}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{\\"text\\": \\"x\\"}"}</tool_call>',
    ):
        reply = reply_of("qwen2_5", text)
        assert [tuple(call[:2]) for call in reply.calls] == [("f", {"text": "x"})], text
        assert reply.content == ""


def test_a_call_that_is_cut_off_is_content():
    whole = (
        "<tool_call>\n<function=f>\n<parameter=text>\nx\n</parameter>\n</function>\n</tool_call>"
    )
    for size in range(len(whole)):
        reply = reply_of("qwen3_coder", whole[:size])
        if reply.calls:  # all but the last tag is there
            assert "</function>" in whole[:size]
            assert reply.calls[0].arguments == {"text": "x"}
        else:
            assert reply.content == whole[:size]


def test_the_schema_says_what_a_written_value_is():
    def call(name, value):
        text = f"<tool_call>\n<function=f>\n<parameter={name}>\n{value}\n</parameter>\n</function>"
        return reply_of("qwen3_coder", text).calls[0].arguments[name]

    assert call("text", "5") == "5" and call("count", "5") == 5
    assert call("text", "true") == "true" and call("flag", "true") is True
    assert call("flag", "True") is True and call("list", "[1, 'a']") == [1, "a"]
    assert call("unknown", "5") == 5 and call("unknown", "five") == "five"
    assert call("count", "many") == "many"


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ({"type": ["string", "null"]}, "5", "5"),
        ({"type": ["string", "null"]}, "null", None),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "true", "true"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "5", 5),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "5", 5),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, "2"]}, "1", 1),
        ({"type": 5, "anyOf": "x", "oneOf": 7}, "1", 1),
        (None, "1", 1),
    ],
)
def test_types_that_are_unions(schema, value, expected):
    text = f"<tool_call>\n<function=f>\n<parameter=p>\n{value}\n</parameter>\n</function>"
    function = {"name": "f", "parameters": {"type": "object", "properties": {"p": schema}}}
    reply = format_of("qwen3_coder").read(text, "", [{"type": "function", "function": function}])
    assert reply.calls[0].arguments == {"p": expected}


def test_bare_calls_are_those_of_known_functions():
    text = '{"name": "John", "parameters": {"age": 5}}'
    assert (reply_of("llama3_1", text).content, reply_of("llama3_1", text).calls) == (text, [])
    tagged = '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "f", "parameters": {"n": 1}}'
    assert [call.arguments for call in reply_of("llama3_1", tagged).calls] == [{}, {"n": 1}]
    prose = "[f(x) is written so]"
    assert (reply_of("llama4_pythonic", prose).content) == prose
    python = "[f(text='it\\'s', flag=true, list=[None, -1.5]), search-web(from=\"a, b\")]"
    assert [tuple(call[:2]) for call in reply_of("llama4_pythonic", python).calls] == [
        ("f", {"text": "it's", "flag": True, "list": [None, -1.5]}),
        ("search-web", {"from": "a, b"}),
    ]


def test_thoughts_of_prompts_that_open_them():
    reply = reply_of("deepseek_r1", "so\n</think>\n\nYes", prompt="...<think>\n")
    assert (reply.thought, reply.content) == ("so", "Yes")
    reply = reply_of("deepseek_r1", "<think>\nso</think>Yes", prompt="...<think>\n")
    assert (reply.thought, reply.content) == ("so", "Yes")
    reply = reply_of("deepseek_r1", "so it goes", prompt="...<think>\n")
    assert (reply.thought, reply.content) == ("so it goes", "")
    reply = reply_of("qwen3", "<think>\n\n</think>\n\nYes")
    assert (reply.thought, reply.content) == ("", "Yes")
    reply = reply_of("qwen3", "The tag <think> opens </think> closes")
    assert (reply.thought, reply.content) == ("", "The tag <think> opens </think> closes")


def test_harmony_as_models_write_it():
    text = (
        "<|channel|>analysis<|message|>Look.<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I look it up.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
        '{"text": "x"}'
    )
    reply = reply_of("gpt_oss", text, prompt="<|start|>assistant")
    assert (reply.thought, reply.content) == ("Look.", "I look it up.")
    assert [tuple(call[:2]) for call in reply.calls] == [("f", {"text": "x"})]
    broken = reply_of("gpt_oss", text[:-1], prompt="<|start|>assistant")
    header = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
    assert broken.calls == [] and broken.content == f'I look it up.{header}{{"text": "x"'
    final = reply_of("gpt_oss", "Hello.", prompt="<|start|>assistant<|channel|>final<|message|>")
    assert final.content == "Hello."
    assert reply_of("gpt_oss", "Hello.", prompt="<|start|>assistant").content == "Hello."


@pytest.mark.parametrize("name", ALL)
def test_a_response_can_be_begun_with_a_call(name):
    """What forces a call is the beginning of what the template writes for it."""
    prompt, text = written(name, "", "", [("get_weather", {"text": "x"})])
    conversation = conversation_of(name)
    given = conversation.render([QUESTION], True, tools=TOOLS)
    if prompt == given:
        assert text.startswith(visible(name, format_of(name).forced("get_weather")))
        assert text.startswith(visible(name, format_of(name).forced()))
    forced = visible(name, format_of(name).forced("get_weather"))
    reader = format_of(name).reader(given, TOOLS)
    rest = text[text.index("get_weather") :]
    rest = rest[len(forced) - forced.index("get_weather") :]
    reply = Reply().add(reader.push(forced)).add(reader.push(rest, final=True))
    assert [tuple(call[:2]) for call in reply.calls] == [("get_weather", {"text": "x"})]
    assert reply.content == ""


def test_the_end_of_the_first_call_is_known():
    for size in (1, 7, 1000):
        reader = format_of("qwen2_5").reader("", TOOLS)
        text = f"Hm. {GOOD}\n{GOOD}"
        for place in range(0, len(text), size):
            parts = reader.push(text[place : place + size])
            if any(part.kind == CALL for part in parts):
                break
        assert text[: reader.first_call_end].endswith("}}")


def test_arguments_are_json():
    reply = reply_of("qwen2_5", '<tool_call>{"name": "f", "arguments": {"text": "\\ud800"}}')
    assert json.loads(json.dumps(reply.message()))["tool_calls"][0]["function"]["name"] == "f"
