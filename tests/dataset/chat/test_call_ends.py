"""Several calls of tools in one turn: what ends the turn is not what ends a call; and calls, texts
and results that a template drops are found, named and refused."""

import pytest

from coati.dataset.chat.conversation import Conversation
from coati.dataset.chat.template_lint import check_template
from coati.dataset.rows.row_errors import RowError
from coati.utils.logging import forget_warnings
from tests.dataset.chat import call_templates
from tests.dataset.chat.family_templates import (
    TOOLS,
    answer,
    call,
    checked,
    family,
    learned,
    result,
    text_of,
    tokenizer_of,
    user,
)
from tests.dataset.makers import CHATML, byte_level

TWO = answer(
    "", tool_calls=[*call({"city": "Oslo"})["tool_calls"], *call({"city": "Rome"})["tool_calls"]]
)
PARALLEL = [user("Warm?"), TWO, result("4 C"), result("19 C"), answer("In Rome.")]
# A result is written for the last call alone.
LAST_RESULT = (
    "{% for m in messages %}{% if m.role != 'tool' or loop.last or messages[loop.index].role != "
    "'tool' %}{{ '<|im_start|>' + m.role + ' ' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + (c.function.arguments | tojson) }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endif %}{% endfor %}"
)
# DeepSeek V3's: nothing ends a turn of one call, and a second one is ended.
OPEN_CALL = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ '<out>' + m.content + '</out>' }}"
    "{% elif m.tool_calls %}{{ '<|im_start|>' + m.role }}{% for c in m.tool_calls %}"
    "{{ '<call>' + c.function.name + (c.function.arguments | tojson) + '</call>' }}"
    "{% if not loop.first %}{{ '<|im_end|>' }}{% endif %}{% endfor %}{% else %}"
    "{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def nothing_said_yet():
    forget_warnings()


def stops_of(template):
    return [template.tokenizer.decode(stop) for stop in template.stop_ids]


def conversation(text, **fields):
    tokenizer = byte_level(CHATML, {"eos_token": "<|im_end|>"})
    return Conversation.from_config(tokenizer, {"chat_template": text, **fields})


def refusal(template, messages, tools=None):
    with pytest.raises(RowError) as error:
        template.encode_turns(messages, tools=tools)
    return error.value.reason, error.value.args[1]


def test_the_mark_behind_each_call_does_not_end_the_turn():
    template = family("gemma_4")
    assert stops_of(template) == ["<turn|>", "<eos>", "<|tool_response>"]
    (row,) = template.encode_turns(PARALLEL, tools=TOOLS)
    calls = "".join(
        f'<|tool_call>call:weather{{"city": "{city}"}}<tool_call|>' for city in ("Oslo", "Rome")
    )
    assert learned(template, row) == [calls + "<|tool_response>", "In Rome.<turn|>"]
    results = "".join(
        f'<|tool_response>response:"{text}"<tool_response|>' for text in ("4 C", "19 C")
    )
    assert f"{calls}{results}In Rome." in row.text


def test_a_stop_between_two_calls_that_a_file_names_is_left_out(capsys):
    tokenizer = tokenizer_of("gemma_4")
    mark = [tokenizer.convert_tokens_to_ids("<tool_call|>")]
    end = [tokenizer.convert_tokens_to_ids("<turn|>")]
    config = {"chat_template": text_of("gemma_4"), "stop_ids": [end, mark]}
    template = Conversation.from_config(tokenizer, config)
    assert stops_of(template) == ["<turn|>", "<|tool_response>"]
    assert f"stop_ids [{mark}] stand between two calls of one turn" in capsys.readouterr().err


@pytest.mark.parametrize("name", call_templates.ALL)
def test_no_stop_stands_before_the_last_call_of_a_turn(name):
    """In whatever template: what is learned of a turn ends at its first stop."""
    template = call_templates.conversation_of(name)
    tools = None if name == "deepseek_r1" else TOOLS
    if not template.abilities.parallel_calls:
        assert refusal(template, PARALLEL, tools) == (
            "tools_unsupported",
            "it writes one call a turn, and message 1 has 2",
        )
        assert name in ("gpt_oss", "llama3_1")
        return
    row = template.encode_turns(PARALLEL, tools=tools)[0]
    ids = row.responses()[0]
    assert "Oslo" in template.encoder.decode(ids) and "Rome" in template.encoder.decode(ids)
    (stop,) = [stop for stop in template.stop_ids if ids[-len(stop) :] == stop][:1]
    for other in template.stop_ids:
        inside = [k for k in range(len(ids) - len(stop)) if ids[k : k + len(other)] == other]
        assert not inside, (template.encoder.decode(ids), other)


def test_calls_of_one_function_beyond_the_first_are_missed():
    """The name is in the text of the first."""
    said = checked("gpt_oss").warnings
    assert any("of several calls in one turn not all are written" in one for one in said)


@pytest.mark.parametrize("learn", ["all_turns", "last_turn"])
def test_calls_beside_a_text_that_names_their_function_are_missed(learn):
    """Wherever they stand: learned, in the context of what is learned, or in a prompt."""
    template = family("deepseek_r1", learn=learn)
    row = [
        user("Warm?"),
        call({"city": "Oslo"}, text="I ask weather."),
        result("4 C"),
        answer("No."),
    ]
    said = "it leaves out the calls of message 1, which has a text beside them"
    assert refusal(template, row) == ("tools_unsupported", said)
    for encode in (template.encode_prompt, template.encode_response):
        with pytest.raises(RowError, match=said):
            encode(row[:3] if encode == template.encode_prompt else row)
    said = checked("deepseek_r1").warnings
    assert any("calls of tools beside a text are not written" in one for one in said)


def test_a_thought_that_would_be_a_text_does_not_cost_the_call():
    """A thought is less than a call; it is counted."""
    text = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.content is none %}{% for c in "
        "m.tool_calls %}{{ '<call>' + c.function.name + (c.function.arguments | tojson) }}"
        "{% endfor %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    )
    template = conversation(text)
    assert template.abilities.forms.calls_alone
    row = [user("Warm?"), call({"city": "Oslo"}, "ask"), result("4 C"), answer("No.", "low")]
    (encoded,) = template.encode_turns(row)
    called, said = learned(template, encoded)
    assert called == '<call>weather{"city": "Oslo"}<|im_end|>'
    assert said == "<think>\nlow\n</think>\n\nNo.<|im_end|>"
    assert encoded.notes == {"thoughts dropped by the template"}


def test_a_text_dropped_beside_a_call_is_counted_where_it_is_not_learned_too():
    row = [user("Warm?"), call({"city": "Oslo"}, text="Let me see."), result("4 C"), answer("No.")]
    (encoded,) = family("llama3_1", learn="last_turn").encode_turns(row, tools=TOOLS)
    assert encoded.notes == {"texts beside calls dropped by the template"}


def test_results_that_are_dropped_are_refused_and_named():
    template = conversation(LAST_RESULT)
    assert template.encode_turns([*PARALLEL[:1], call({"city": "Oslo"}), *PARALLEL[3:]])
    assert refusal(template, PARALLEL) == (
        "tools_unsupported",
        "it leaves out results of the calls of message 1",
    )
    tokenizer = byte_level(CHATML, {"eos_token": "<|im_end|>"})
    said = check_template(tokenizer, {"chat_template": LAST_RESULT}).warnings
    assert any("of the results of several calls not all are written" in one for one in said)


def test_a_call_that_nothing_ends_is_refused_and_named():
    template = conversation(OPEN_CALL)
    row = [user("Warm?"), call({"city": "Oslo"}), result("4 C"), answer("No.")]
    assert refusal(template, row)[0] == "no_end_marker"
    tokenizer = byte_level(CHATML, {"eos_token": "<|im_end|>"})
    said = check_template(tokenizer, {"chat_template": OPEN_CALL}).warnings
    assert any("no control token ends a call," in one for one in said)
