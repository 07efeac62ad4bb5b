"""Templates that take more than a look: a system message that moves, an end token after the
dialogue, ends that the next turn writes, the channels of harmony."""

import pytest

from coati.dataset import setup_conversation_template
from coati.dataset.chat.template_lint import check_template
from coati.dataset.rows.row_errors import RowError
from tests.dataset.chat.family_templates import TOKENS, WEATHER, answer, family, text_of, user
from tests.dataset.chat.test_template_properties import sent
from tests.dataset.makers import CHATML, LLAMA, byte_level

SYSTEM = {"role": "system", "content": "Be brief."}
ONE = [user("3*4?"), answer("12")]
TWO = [user("1+1?"), answer("2"), user("2+2?"), answer("4")]
# Mistral-7B-Instruct-v0.3 and Nemo: the system message stands before the last question, and only
# while that has no answer yet.
MOVING = (
    "{%- if messages[0]['role'] == 'system' -%}{%- set sys = messages[0]['content'] -%}"
    "{%- set rest = messages[1:] -%}{%- else -%}{%- set rest = messages -%}{%- endif -%}\n"
    "{%- for m in rest -%}{%- if m['role'] == 'user' -%}{%- if loop.last and sys is defined -%}"
    "{{ '[INST] ' + sys + '\n\n' + m['content'] + '[/INST]' }}{%- else -%}"
    "{{ '[INST] ' + m['content'] + '[/INST]' }}{%- endif -%}\n"
    "{%- else -%}{{ ' ' + m['content'] + '<|im_end|>' }}{%- endif -%}{%- endfor -%}"
)


def moving(**fields):
    tokenizer = byte_level(CHATML, {"eos_token": "<|im_end|>"}, MOVING)
    return setup_conversation_template(tokenizer, fields)


def marked(template, messages) -> list[str]:
    """Each row with its supervised text in double brackets."""
    found = []
    for row in template.encode_turns(messages):
        text = ""
        place = 0
        decode = template.encoder.decode
        for start, end in row.spans:
            text += decode(row.input_ids[place:start]) + f"[[{decode(row.input_ids[start:end])}]]"
            place = end
        found.append(text + decode(row.input_ids[place:]))
    return found


def test_a_system_message_before_the_last_question_alone():
    template = moving()
    assert marked(template, [SYSTEM, *ONE]) == ["[INST] Be brief.\n\n3*4?[/INST][[ 12<|im_end|>]]"]
    assert marked(template, [SYSTEM, *TWO]) == [
        "[INST] Be brief.\n\n1+1?[/INST][[ 2<|im_end|>]]",
        "[INST] 1+1?[/INST] 2<|im_end|>[INST] Be brief.\n\n2+2?[/INST][[ 4<|im_end|>]]",
    ]
    assert marked(template, TWO) == [
        "[INST] 1+1?[/INST][[ 2<|im_end|>]][INST] 2+2?[/INST][[ 4<|im_end|>]]"
    ]


@pytest.mark.parametrize("own", [False, True])
def test_so_it_is_in_a_chat_and_for_the_templates_own_system_message(own):
    template = moving(system_message="Be brief." if own else None)
    turns = TWO if own else [SYSTEM, *TWO]
    rows = template.encode_turns(turns)
    assert len(rows) == 2
    for row, end in zip(rows, (-3, -1), strict=True):
        ((start, _),) = row.spans
        assert row.input_ids[:start] == sent(template, turns[:end])
        assert "Be brief." in row.text
    last = template.encode_response(turns)
    assert last.input_ids == rows[1].input_ids and last.spans == rows[1].spans


def test_what_is_said_of_a_system_message_that_moves():
    tokenizer = byte_level(CHATML, {"eos_token": "<|im_end|>"}, MOVING)
    report = check_template(tokenizer, {})
    said = "a system message stands before the last question, and only until that is responded to"
    assert report.errors == [] and any(said in text for text in report.warnings)
    assert not any("is dropped" in text for text in report.warnings)
    strict = check_template(tokenizer, {"system_message": "S"}, template_mode="refuse")
    assert any("rendered before the last question alone" in text for text in strict.errors)
    with pytest.raises(RowError) as error:
        setup_conversation_template(tokenizer, {}, template_mode="refuse").encode_turns(
            [SYSTEM, *TWO]
        )
    assert error.value.reason == "template_rewrites"


def test_tools_before_the_last_question_alone():
    """Mistral's, too: each answer has them before its own question."""
    turns = [user("a"), answer("b"), user("c"), answer("d")]
    template = family("mistral_v0_3")
    rows = template.encode_turns(turns, tools=[WEATHER])
    assert len(rows) == 2 and len(template.encode_turns(turns)) == 1
    for row, end in zip(rows, (1, 3), strict=True):
        ((start, _),) = row.spans
        assert (
            row.input_ids[:start] == template.encode_prompt(turns[:end], tools=[WEATHER]).input_ids
        )
        assert row.text.count("[AVAILABLE_TOOLS]") == 1


# Phi-3: answers end with a control token, and a finished dialogue gets one more token.
AFTER = (
    "{{ '<s>' }}{%- for m in messages -%}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- else -%}"
    "{{ '<jupyter_start>' }}{%- endif -%}"
)


def test_an_end_token_after_the_dialogue_is_remarkable_and_no_error():
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    tokenizer = byte_level((*CHATML, "<jupyter_start>"), names, AFTER)
    report = check_template(tokenizer, {})
    assert report.errors == []
    assert any(
        "one more token, '<jupyter_start>', after the end of its" in w for w in report.warnings
    )
    template = setup_conversation_template(tokenizer, {})
    start = "<s><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    (row,) = marked(template, [user("a"), answer("b")])
    assert row == start + "[[b<|im_end|>]]\n<jupyter_start>"


def test_an_end_token_behind_ordinary_text_is_an_error_still():
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' + eos_token }}{% endfor %}"
    )
    report = check_template(byte_level((), LLAMA, template), {"end_of_assistant": "\n"})
    assert any("outside the mask" in text for text in report.errors)


@pytest.mark.parametrize("name", TOKENS)
def test_templates_of_todays_families_have_no_errors(name):
    template = family(name)
    report = check_template(template.tokenizer, {"chat_template": text_of(name)})
    assert report.errors == [] and "[[" in report.shown
    tools = "tools, their calls and their results are written"
    assert (tools in report.notes) == (name not in ("phi_3", "gemma_3", "deepseek_r1"))


@pytest.mark.parametrize("name", TOKENS)
def test_a_stored_template_is_complete(name):
    first = family(name)
    again = setup_conversation_template(first.tokenizer, first.to_config())
    assert again.to_config() == first.to_config() and again.derived == {}
    turns = [user("a"), answer("b"), user("c"), answer("d")]
    found = [[row.input_ids for row in one.encode_turns(turns)] for one in (first, again)]
    assert found[0] == found[1]


def test_glm_by_hand():
    """The token that begins the next turn ends a response: a model stops at it."""
    template = family("glm4_5")
    stops = [[template.tokenizer.convert_tokens_to_ids(t)] for t in ("<|user|>", "<|observation|>")]
    assert all(stop in template.stop_ids for stop in stops)
    assert marked(template, TWO) == [
        "[gMASK]<sop><|user|>\n1+1?<|assistant|>\n<think></think>\n[[2<|user|>]]",
        "[gMASK]<sop><|user|>\n1+1?<|assistant|>\n<think></think>\n2<|user|>\n2+2?<|assistant|>\n"
        "<think></think>\n[[4<|user|>]]",
    ]


def test_harmony_by_hand():
    """Every channel of the assistant is learned; an earlier final ends with <|end|>, the last one
    with <|return|>."""
    template = family("gpt_oss")
    stops = [[template.tokenizer.convert_tokens_to_ids(t)] for t in ("<|return|>", "<|call|>")]
    assert template.stop_ids == stops
    system = template.render([user("x")]).partition("<|start|>user")[0]
    thinking = [user("1+1?"), answer("2", "one and one"), user("2+2?"), answer("4", "two and two")]
    bos = "<|startoftext|>"
    assert marked(template, thinking) == [
        f"{bos}{system}<|start|>user<|message|>1+1?<|end|><|start|>assistant"
        "[[<|channel|>analysis<|message|>one and one<|end|><|start|>assistant<|channel|>final"
        "<|message|>2<|return|>]]",
        f"{bos}{system}<|start|>user<|message|>1+1?<|end|><|start|>assistant<|channel|>final"
        "<|message|>2<|end|><|start|>user<|message|>2+2?<|end|><|start|>assistant"
        "[[<|channel|>analysis<|message|>two and two<|end|><|start|>assistant<|channel|>final"
        "<|message|>4<|return|>]]",
    ]


def test_a_chat_goes_on_with_every_template():
    """What a session sends is the beginning of the row that trains its answer."""
    for name in TOKENS:
        template = family(name)
        rows = template.encode_turns(TWO)
        prompts = [sent(template, TWO[:1]), sent(template, TWO[:3])]
        for prompt, row in zip(prompts, rows if len(rows) == 2 else rows * 2, strict=True):
            if not template.starts_at_content:
                assert row.input_ids[: len(prompt)] == prompt, name
