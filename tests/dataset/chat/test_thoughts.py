"""Thoughts: which a template writes, what --thoughts makes of those that it drops, and the empty
ones that it invents; the supervised text of each, by hand."""

import pytest

from coati.dataset import setup_conversation_template
from coati.dataset.chat.dialogue import ADDED, DROPPED, EMPTY, LEFT_OUT
from coati.dataset.chat.row_options import RowOptions
from coati.dataset.chat.template_lint import check_template
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.source_row import SourceRow
from tests.dataset.chat.family_templates import TOKENS, answer, family, text_of, user
from tests.dataset.chat.test_masks import R1_LIKE
from tests.dataset.makers import CHATML, byte_level, chatml_tokenizer

SUM = [user("3*4?"), answer("12", "Three fours are twelve.")]
TWO = [*SUM, user("5*2?"), answer("10", "Five twos are ten.")]
TIMES = "Three fours are twelve.\n</think>\n\n12"
TENS = "Five twos are ten.\n</think>\n\n10"


def supervised(template, messages, tools=None) -> list[list[str]]:
    rows = template.encode_turns(messages, tools=tools)
    return [[template.encoder.decode(one) for one in row.responses()] for row in rows]


def notes(template, messages) -> frozenset[str]:
    return template.encode_turns(messages)[-1].notes


def strips(**options) -> object:
    """As DeepSeek-R1-Distill and EXAONE-4: thoughts of finished answers are dropped."""
    options = RowOptions(**options)
    return setup_conversation_template(chatml_tokenizer(R1_LIKE), {}, options=options)


def test_a_dropped_thought_is_counted():
    template = strips()
    assert supervised(template, SUM) == [["12<|im_end|>"]]
    assert notes(template, SUM) == {DROPPED}
    assert notes(template, [user("a"), answer("b")]) == frozenset()


def test_a_kept_thought_is_supervised_after_the_prompt_that_opens_it():
    template = strips(thoughts="keep")
    (row,) = template.encode_turns(SUM)
    ((start, _),) = row.spans
    assert row.input_ids[:start] == template.encode_prompt(SUM[:1]).input_ids
    assert template.encoder.decode(row.input_ids[:start]).endswith("assistant\n<think>\n")
    assert supervised(template, SUM) == [[TIMES + "<|im_end|>"]] and row.notes == {ADDED}


def test_kept_thoughts_of_several_answers_are_a_row_each():
    """As generation sees them: earlier thoughts are dropped."""
    template = strips(thoughts="keep")
    assert supervised(template, TWO) == [[TIMES + "<|im_end|>"], [TENS + "<|im_end|>"]]
    rows = template.encode_turns(TWO)
    assert "Three fours" not in rows[1].text and "assistant\n12<|im_end|>" in rows[1].text


def test_the_last_thought_alone():
    template = strips(thoughts="last")
    assert supervised(template, TWO) == [["12<|im_end|>"], [TENS + "<|im_end|>"]]
    assert notes(template, TWO) == {ADDED, LEFT_OUT}
    whole = family("kimi_k2", thoughts="last")
    assert supervised(whole, TWO) == [
        ["12<|im_end|>", "<think>Five twos are ten.</think>10<|im_end|>"]
    ]


def test_no_thoughts():
    for template in (strips(thoughts="drop"), family("kimi_k2", thoughts="drop")):
        assert supervised(template, TWO) == [["12<|im_end|>", "10<|im_end|>"]]
        assert notes(template, TWO) == {LEFT_OUT}


def test_rows_with_dropped_thoughts_are_refused():
    with pytest.raises(RowError, match="that of message 1") as error:
        strips(thoughts="refuse").encode_turns(SUM)
    assert error.value.reason == "thought_dropped"
    plain = [user("a"), answer("b")]
    assert supervised(strips(thoughts="refuse"), plain) == [["b<|im_end|>"]]
    # Each thought is learned in a row of its own.
    assert len(family("qwen3", thoughts="refuse").encode_turns(TWO)) == 2


@pytest.mark.parametrize("name", TOKENS)
def test_no_template_loses_a_kept_thought(name):
    template = family(name, thoughts="keep")
    said = [text for row in supervised(template, TWO) for text in row]
    assert len(said) == 2 and "Three fours are twelve." in said[0]
    assert "Five twos are ten." in said[1]
    for text, closing in zip(said, ("12", "10"), strict=True):
        end = template.end_of_assistant
        assert text.endswith(closing + end) and text.count(end) == 1


@pytest.mark.parametrize("name", TOKENS)
def test_what_is_dropped_is_counted_for_every_template(name):
    drops = {"deepseek_r1", "deepseek_v3_1", "exaone_4"}
    template = family(name)
    found = " ".join(text for row in supervised(template, TWO) for text in row)
    assert ("Three fours are twelve." in found) == (name not in drops)
    assert (DROPPED in notes(template, TWO)) == (name in drops)
    report = check_template(template.tokenizer, {"chat_template": text_of(name)})
    said = "a thought in an answer is not written at all" in " ".join(report.warnings)
    assert said == (name in drops) and report.errors == []


def test_a_prompt_that_is_told_to_think_leads_to_a_kept_thought():
    """DeepSeek V3.1 closes a thought in the prompt, unless it is told to think."""
    template = family("deepseek_v3_1", {"thinking": True}, thoughts="keep")
    (row,) = template.encode_turns(SUM)
    prompt = template.encode_prompt(SUM[:1])
    assert prompt.text.endswith("<｜Assistant｜><think>")
    assert row.text == prompt.text + TIMES + "<｜end▁of▁sentence｜>"


# Nemotron-3-Nano: the generation prompt opens a thought, a plain answer gets an empty one.
NEMOTRON = (
    "{%- for m in messages -%}{%- if m['role'] == 'assistant' -%}{%- set c = m['content'] -%}"
    "{%- if '</think>' not in c -%}{%- set c = '<think></think>' + c -%}{%- endif -%}"
    "{{ '<|im_start|>assistant\n' + c + '<|im_end|>\n' }}\n{%- else -%}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}"
    "{{ '<|im_start|>assistant\n<think>\n' }}{%- endif -%}"
)


def nemotron(**options):
    tokenizer = byte_level(CHATML, {"eos_token": "<|im_end|>"}, NEMOTRON)
    return setup_conversation_template(tokenizer, {}, options=RowOptions(**options))


def test_a_prompt_that_opens_a_thought_and_plain_answers_with_an_empty_one():
    template = nemotron()
    assert supervised(template, SUM) == [[TIMES + "<|im_end|>"]]
    (row,) = template.encode_turns(SUM)
    ((start, _),) = row.spans
    assert row.input_ids[:start] == template.encode_prompt(SUM[:1]).input_ids
    assert supervised(template, [user("Say hi."), answer("Hi!")]) == [["Hi!<|im_end|>"]]
    assert notes(template, [user("Say hi."), answer("Hi!")]) == {EMPTY}
    spelled = [user("3*4?"), answer("<think>\n" + TIMES)]  # as a text of the content
    assert supervised(template, spelled) == [[TIMES + "<|im_end|>"]]
    mixed = [*SUM, user("Say hi."), answer("Hi!")]
    assert supervised(template, mixed) == [[TIMES + "<|im_end|>", "Hi!<|im_end|>"]]


def test_empty_thoughts_are_learned_when_that_is_asked_for():
    plain = [user("Say hi."), answer("Hi!")]
    template = nemotron(empty_thoughts="supervise")
    assert supervised(template, plain) == [["<think></think>Hi!<|im_end|>"]]
    empty = "<think>\n\n</think>\n\n"
    assert supervised(family("qwen3"), plain) == [["Hi!<|im_end|>"]]
    template = family("qwen3", empty_thoughts="supervise")
    assert supervised(template, plain) == [[empty + "Hi!<|im_end|>"]]
    template = family("glm4_5", empty_thoughts="supervise")
    assert supervised(template, plain) == [["\n<think></think>\nHi!<|user|>"]]
    assert supervised(family("glm4_5"), plain) == [["Hi!<|user|>"]]


@pytest.mark.parametrize("name", ["qwen3", "glm4_5", "nemotron_3", "smollm3"])
def test_a_prompt_without_thinking_leads_to_plain_answers(name):
    template = family(name, {"enable_thinking": False})
    plain = [user("Say hi."), answer("Hi!")]
    (row,) = template.encode_turns(plain)
    ((start, _),) = row.spans
    assert row.input_ids[:start] == template.encode_prompt(plain[:1]).input_ids[:start]
    end = "<|user|>" if name == "glm4_5" else "<|im_end|>"
    assert template.encoder.decode(row.input_ids[start:]).strip() == "Hi!" + end


def test_a_thought_that_the_prompt_does_not_lead_to_is_learned_with_its_tag():
    template = family("qwen3", {"enable_thinking": False})
    assert supervised(template, SUM) == [["<think>\n" + TIMES + "<|im_end|>"]]


def test_arguments_of_the_template():
    args = {"date_string": "1 May 2026"}
    template = family("llama3_1", args)
    assert "Today Date: 1 May 2026" in template.encode(SUM).text
    config = template.to_config()
    assert config["template_args"] == args and "template_args" not in family("qwen3").to_config()
    again = setup_conversation_template(template.tokenizer, config)
    assert again.template_args == args and again.encode(SUM).text == template.encode(SUM).text
    other = setup_conversation_template(template.tokenizer, config, template_args={})
    assert "26 Jul 2024" in other.encode(SUM).text


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"enable_thinkng": False}, "reads no 'enable_thinkng'; it reads enable_thinking"),
        ({"messages": []}, "messages is given to every template"),
        ([], "template_args must be an object or null"),
    ],
)
def test_arguments_that_mean_nothing(args, said):
    config = {"chat_template": text_of("qwen3"), "template_args": args}
    with pytest.raises(ValueError, match=said):
        setup_conversation_template(family("qwen3").tokenizer, config)


def pair(chosen, rejected) -> SourceRow:
    return SourceRow(messages=[user("3*4?")], chosen=[chosen], rejected=[rejected])


def test_pairs_that_differ_in_a_dropped_thought_become_equal():
    row = pair(answer("12", "Three fours."), answer("12", "A guess."))
    with pytest.raises(RowError, match="12<|im_end|>") as error:
        DATA_TYPES["preference"].tokenize(row, strips(), 400)
    assert error.value.reason == "same_rendering"
    ((columns, _),) = DATA_TYPES["preference"].tokenize(row, strips(thoughts="keep"), 400)
    assert columns["chosen_label_decode"] == ["Three fours.\n</think>\n\n12<|im_end|>"]
    assert columns["rejected_label_decode"] == ["A guess.\n</think>\n\n12<|im_end|>"]
    assert row.notes == {ADDED}


def test_a_judged_response_with_a_thought():
    row = SourceRow(messages=[user("3*4?")], completion="12", label=True)
    row.response = answer("12", "Three fours are twelve.")
    ((columns, _),) = DATA_TYPES["kto"].tokenize(row, nemotron(), 400)
    assert columns["completion_decode"] == TIMES + "<|im_end|>"
    assert columns["input_id_decode"].endswith("<think>\n" + TIMES + "<|im_end|>")


def test_options_that_do_not_exist():
    for option, said in (
        ({"thoughts": "all"}, "thoughts must be one of template, keep"),
        ({"empty_thoughts": "no"}, "empty_thoughts must be one of mask"),
        ({"learn": "roles:robot"}, "learn: expected all_turns or last_turn"),
        ({"learn": "first"}, "found 'first'"),
    ):
        with pytest.raises(ValueError, match=said):
            RowOptions(**option)
