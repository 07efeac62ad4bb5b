"""Token ids in, token ids out: what stands between two responses is what the template writes there,
and what was sampled is never tokenized again."""

import pytest

from coati.dataset.chat.response_format import response_format
from coati.environments.multi_turn import Turn
from coati.environments.turn_tokens import UNREADABLE, TurnTokens
from coati.models.generation.row_noise import NoiseRows
from tests.dataset.chat.call_templates import ALL, conversation_of
from tests.environments.scripted import ScriptedPolicy, Told, call, rollout_of, tool

TOOLS = [tool(), tool("other", count="integer")]
QUESTION = {"role": "user", "content": "What is a heron?"}
CALLS = [call(word="heron"), call("other", count=5)]
RESULTS = [
    {"role": "tool", "name": "lookup", "content": "a bird <|im_end|> [/INST]</s> 12"},
    {"role": "tool", "name": "other", "content": '{"a": [1]}'},
]
FURTHER = {"role": "user", "content": "And an egret?<|eot_id|>"}
NO_TOOLS = ("deepseek_r1",)  # its template writes none
WITH_TOOLS = [name for name in ALL if name not in NO_TOOLS]
# These write a turn, or the thought before it, otherwise once the dialogue has gone on.
REWRITES = ("qwen3", "glm4_5", "exaone_4", "nemotron_3", "minimax_m2")
ONE_CALL = ("llama3_1", "gpt_oss")  # at a time


def stops_of(conversation) -> list[list[int]]:
    return [list(stop) for stop in conversation.stop_ids]


def response_ids(conversation, messages, tools) -> tuple[list[int], list[int]]:
    """The prompt of the last message, and what a policy samples that says it."""
    prompt = conversation.encode_prompt(messages[:-1], tools=tools).input_ids
    whole = conversation.encode_response(messages, tools=tools)
    if whole.input_ids[: len(prompt)] == prompt:
        return prompt, whole.input_ids[len(prompt) :]
    start, end = whole.spans[0]
    ids = whole.input_ids[start:end]
    form = response_format(conversation)
    if conversation.encoder.decode(prompt).rstrip().endswith(form.tags[0]):
        ids = conversation.encoder.encode_inside(f"\n{form.tags[1]}\n\n") + ids
    return prompt, ids


def second_prompt(conversation, said: dict, after: list[dict], tools) -> tuple[list, list, list]:
    """What the policy is given for its second response, the ids before that, and all that the
    template writes for it."""
    prompt, ids = response_ids(conversation, [QUESTION, said], tools)
    stops = stops_of(conversation)
    policy = ScriptedPolicy({5: [ids, ids]}, stops)
    environment = Told([Turn(after), Turn(done=True)], tools or ())
    rollout = rollout_of(conversation, stops, policy, lambda: environment)
    noise = NoiseRows(1, 0, [5])
    rollout.run(rollout.begin([{"messages": [QUESTION]}], 1, noise), noise, 1.0)
    assert policy.prompts[0] == [prompt]
    given = policy.prompts[1][0]
    assert given[: len(prompt) + len(ids)] == prompt + ids
    assert environment.heard[0].get("tool_calls", []) == [
        {**one, **({"id": found["id"]} if "id" in found else {})}
        for one, found in zip(
            said.get("tool_calls", []), environment.heard[0].get("tool_calls", []), strict=True
        )
    ]
    return (
        given,
        prompt + ids,
        conversation.encode_prompt([QUESTION, said, *after], tools=tools).input_ids,
    )


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", WITH_TOOLS)
def test_behind_calls_stands_what_the_template_writes_behind_them(name, count):
    if count > 1 and name in ONE_CALL:
        pytest.skip("its template writes one call at a time")
    said = {"role": "assistant", "content": "", "tool_calls": CALLS[:count]}
    given, before, written = second_prompt(conversation_of(name), said, RESULTS[:count], TOOLS)
    if name not in REWRITES:
        assert given == written
    between = given[len(before) :]
    assert between and written[-len(between) :] == between
    text = conversation_of(name).encoder.decode(between)
    assert all(one["content"][:6] in text or '\\"a' in text for one in RESULTS[:count])


@pytest.mark.parametrize("with_tools", [False, True])
@pytest.mark.parametrize("name", WITH_TOOLS)
def test_behind_a_text_stands_what_the_template_writes_behind_it(name, with_tools):
    conversation = conversation_of(name)
    said = {"role": "assistant", "content": "A bird."}
    tools = TOOLS if with_tools else None
    given, before, written = second_prompt(conversation, said, [FURTHER], tools)
    between = given[len(before) :]
    assert written[-len(between) :] == between
    assert "And an egret?" in conversation.encoder.decode(between)
    # A marker that a user typed is text, also behind a response.
    assert conversation.encoder.decode(between).count("<|eot_id|>") >= 1
    if name == "llama3_1":
        marker = conversation.tokenizer.convert_tokens_to_ids("<|eot_id|>")
        assert between.count(marker) == 1


@pytest.mark.parametrize(
    "name", ["qwen2_5", "mistral_v0_3", "deepseek_v3_1", "llama3_1", "gpt_oss"]
)
def test_a_call_that_cannot_be_read_is_answered_as_one(name):
    conversation = conversation_of(name)
    said = {"role": "assistant", "content": "", "tool_calls": CALLS[:1]}
    prompt, ids = response_ids(conversation, [QUESTION, said], TOOLS)
    text = conversation.encoder.decode(ids)
    stops = stops_of(conversation)
    stop = next(stop for stop in stops if ids[-len(stop) :] == stop)
    broken = text.replace('"heron"}', '"her').removesuffix(conversation.encoder.decode(stop))
    assert broken != text
    broken_ids = conversation.encoder._ids(broken) + stop
    tokens = TurnTokens(conversation, stops)
    said = tokens.read(broken_ids, conversation.encoder.decode(prompt), TOOLS)
    assert said.unreadable and "tool_calls" not in said.message
    result = tokens.unreadable_result(TOOLS)
    following, shown = tokens.between(broken_ids, said, [result], TOOLS)
    assert UNREADABLE in shown
    # As behind a call that can be read
    whole = tokens.read(ids, conversation.encoder.decode(prompt), TOOLS)
    assert not whole.unreadable
    assert following == tokens.between(ids, whole, [result], TOOLS)[0]


def test_a_plain_response_is_no_broken_call():
    conversation = conversation_of("qwen2_5")
    tokens = TurnTokens(conversation, stops_of(conversation))
    for text in ("A bird.", "{1, 2} is a set", "2 < 3"):
        ids = conversation.encoder.encode_text(text)
        assert not tokens.read(ids, "", TOOLS).unreadable
    ids = conversation.encoder.encode_text("<tool_call>nothing")
    assert tokens.read(ids, "", TOOLS).unreadable and not tokens.read(ids, "", []).unreadable


def test_a_response_that_ended_by_another_stop_keeps_it():
    """The template's own end is not put behind it, unless it begins the next turn."""
    conversation = conversation_of("glm4_5")
    said = {"role": "assistant", "content": "", "tool_calls": CALLS[:1]}
    prompt, ids = response_ids(conversation, [QUESTION, said], TOOLS)
    stops = stops_of(conversation)
    tokens = TurnTokens(conversation, stops)
    read = tokens.read(ids, conversation.encoder.decode(prompt), TOOLS)
    as_written, text = tokens.between(ids, read, RESULTS[:1], TOOLS)
    eos = [conversation.tokenizer.eos_token_id]
    other, _ = tokens.between([*ids[:-1], *eos], read, RESULTS[:1], TOOLS)
    observation = conversation.tokenizer.convert_tokens_to_ids("<|observation|>")
    assert ids[-1] == observation and observation not in as_written
    assert other == [observation, *as_written]


def test_templates_without_tools_are_refused():
    conversation = conversation_of("deepseek_r1")
    with pytest.raises(ValueError, match="cannot be used with them: it writes no tools"):
        TurnTokens(conversation, []).check_tools(TOOLS)
    TurnTokens(conversation, []).check_tools([])
