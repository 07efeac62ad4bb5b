"""Thoughts that rows have as <think> text before the answer: for every template the text is what
transformers renders for the messages as the file has them, and the mask is exact."""

from functools import cache
from typing import Any

import pytest

from coati.dataset import setup_conversation_template
from coati.dataset.chat.conversation import Conversation
from coati.dataset.chat.dialogue import EMPTY, LEFT_OUT
from coati.dataset.chat.row_options import RowOptions
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.rows.formats import read_row
from coati.dataset.rows.messages import message_list
from tests.dataset.chat import call_templates, family_templates
from tests.dataset.chat.family_templates import family
from tests.dataset.makers import CHATML, TEMPLATES, byte_level, chatml_tokenizer, family_tokenizer
from tests.dataset.makers import FAMILIES as SHIPPED

NAMES = [*family_templates.TOKENS, *call_templates.TOKENS, *SHIPPED]
DROPPING = {"deepseek_r1", "deepseek_v3_1", "exaone_4"}
# Their thoughts have other tags, or a channel, which such a text becomes.
OTHER_TAGS = {"magistral", "gemma_4", "command_r7b", "gpt_oss", "openai_gpt-oss-20b"}
# The generation prompt opens the thought.
OPENING = {"nemotron_3", "minimax_m2"}
TAGLESS = "hm\n</think>\n\nyes"
BLANK = ("<think>\n\n</think>\n\nyes", "<think></think>yes", "\n<think> </think>\nyes")
SPELLINGS = (
    "<think>hm</think>yes",
    "<think>\nhm\n</think>\n\nyes",
    "<think>\nhm\n</think>\nyes",
    "<think> hm\n\nhm </think>  yes",
    "\n<think>\n\nhm\n\n</think>\n\n\nyes",
    "<think>think</think>yes</think>",
    "<think>\nhm <|im_end|>\n</think>\n\nyes",  # a marker that somebody typed
    TAGLESS,
)


@cache
def template_of(name: str) -> Conversation:
    if name in family_templates.TOKENS:
        return family(name)
    if name in call_templates.TOKENS:
        return call_templates.conversation_of(name)
    return setup_conversation_template(family_tokenizer(name), TEMPLATES / f"{name}.json")


def talk(*said: str) -> list[dict[str, Any]]:
    turns = (
        ({"role": "user", "content": f"q{k}"}, {"role": "assistant", "content": text})
        for k, text in enumerate(said)
    )
    return [turn for pair in turns for turn in pair]


def rendered(template: Conversation, messages: list[dict[str, Any]], prompt: bool = False) -> str:
    """By transformers, the token included with which the next turn ends a response."""
    text = template.tokenizer.apply_chat_template(
        template.with_system(messages),
        tokenize=False,
        chat_template=template.chat_template,
        add_generation_prompt=prompt,
        **template.template_args,
    )
    return text if prompt else text + template.added_end(False)


def rows_of(template: Conversation, said: str):
    messages = talk(said, said + "!")
    rows = template.encode_turns(message_list(messages, "messages"))
    return zip(rows, [messages] if len(rows) == 1 else [messages[:2], messages], strict=True)


@pytest.mark.parametrize("said", [*SPELLINGS, *BLANK])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in DROPPING | OTHER_TAGS])
def test_the_text_is_that_of_transformers(name, said):
    template = template_of(name)
    for row, messages in rows_of(template, said):
        if name in OPENING and said == TAGLESS:
            opened = template.abilities.opened
            messages = [
                {**one, "content": opened + one["content"]} if one["role"] == "assistant" else one
                for one in messages
            ]
        assert row.text == rendered(template, messages)


@pytest.mark.parametrize("said", [*SPELLINGS, *BLANK])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in DROPPING | OTHER_TAGS])
def test_the_mask_goes_from_the_prompt_to_the_end(name, said):
    """Where the text begins with the prompt; a blank thought may be masked, a tag that the prompt
    does not lead to is learned."""
    template = template_of(name)
    for row, messages in rows_of(template, said):
        start = row.spans[-1][0]
        learned = template.encoder.decode(row.input_ids[slice(*row.spans[-1])])
        assert learned.endswith(template.end_of_assistant)
        end = template.end_of_assistant
        assert learned.count(end) == 1 + said.count(end)
        if said in BLANK:
            continue
        text = template.encoder.decode(row.input_ids)
        prompt = template.encoder.decode(template.encode_prompt(row_messages(messages)).input_ids)
        if text.startswith(prompt):
            assert template.encoder.decode(row.input_ids[:start]) == prompt
        else:
            assert learned.startswith("<think>")


def row_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return message_list(messages[:-1], "messages")


@pytest.mark.parametrize("name", sorted(OTHER_TAGS))
def test_other_tags_and_channels_get_the_thought_as_they_want_it(name):
    template = template_of(name)
    field = {"reasoning_content": "hm"}
    plain = talk("yes", "yes!")
    expected = [{**one, **field} if one["role"] == "assistant" else one for one in plain]
    texts = [row.text for row in template.encode_turns(expected)]
    assert "hm" in texts[-1] and "<think>" not in texts[-1]
    for said in ("<think>hm</think>yes", "<think>\nhm\n</think>\n\nyes"):
        assert [row.text for row, _ in rows_of(template, said)] == texts
    texts = [row.text for row in template.encode_turns(plain)]
    assert [row.text for row, _ in rows_of(template, BLANK[0])] == texts


@pytest.mark.parametrize("name", sorted(DROPPING))
def test_what_is_dropped_leaves_the_answer_alone(name):
    template = template_of(name)
    texts = [row.text for row in template.encode_turns(talk("yes", "yes!"))]
    for said in (*SPELLINGS[:5], BLANK[0]):
        found = [row.text for row, _ in rows_of(template, said)]
        assert [text.replace("  yes", "yes") for text in found] == texts


SAID = "<think>hm </think>\nyes"


def responses(template: Conversation, messages) -> list[str]:
    rows = template.encode_turns(message_list(messages, "messages"))
    return [template.encoder.decode(one) for row in rows for one in row.responses()]


def plain(**options: str) -> Conversation:
    return setup_conversation_template(chatml_tokenizer(), {}, options=RowOptions(**options))


@pytest.mark.parametrize("option", ["template", "keep", "refuse"])
def test_a_template_that_knows_no_thoughts_has_all_of_them_as_they_stand(option):
    expected = [f"{said}<|im_end|>" for said in (SAID, BLANK[0])]
    assert responses(plain(thoughts=option), talk(SAID, BLANK[0])) == expected


def test_options_leave_thoughts_out_and_their_marks():
    assert responses(plain(thoughts="drop"), talk(SAID, BLANK[0])) == ["yes<|im_end|>"] * 2
    last = responses(plain(thoughts="last"), talk(SAID, SAID))
    assert last == ["yes<|im_end|>", f"{SAID}<|im_end|>"]
    (row,) = plain(thoughts="drop").encode_turns(message_list(talk(SAID), "messages"))
    assert row.notes == {LEFT_OUT}
    (row,) = plain(thoughts="drop").encode_turns(message_list(talk(BLANK[0]), "messages"))
    assert row.notes == frozenset()


def test_a_kept_thought_is_written_once():
    found = responses(family("deepseek_r1", thoughts="keep"), talk(SAID))
    assert found == ["hm \n</think>\n\nyes<｜end▁of▁sentence｜>"]


@pytest.mark.parametrize("option", ["mask", "supervise"])
def test_a_blank_thought_where_the_template_writes_such(option):
    """It is the template's own, or stands in its place."""
    learns = option == "supervise"
    template = family("nemotron_3", empty_thoughts=option)
    for said in BLANK:
        (row,) = template.encode_turns(message_list(talk(said), "messages"))
        (found,) = (template.encoder.decode(one) for one in row.responses())
        lead = said.removesuffix("yes")
        assert found in ("yes<|im_end|>", lead.lstrip("\n") + "yes<|im_end|>", f"{said}<|im_end|>")
        assert ("<think>" in found) == learns and row.notes == {EMPTY}
    template = family("nemotron_3", {"enable_thinking": False}, empty_thoughts=option)
    (row,) = template.encode_turns(message_list(talk(BLANK[0]), "messages"))
    assert row.text == rendered(template, talk(BLANK[0]))


def test_a_part_of_the_text_with_a_weight_of_its_own():
    first = SAID.index("yes")
    detail = [{"begin_offset": first, "end_offset": first + 1, "train": 0.5}]
    messages = talk(SAID)
    messages[1]["train_detail"] = detail
    template = plain()
    (row,) = template.encode_turns(message_list(messages, "messages"))
    halves = [i for i, weight in zip(row.input_ids, row.weights, strict=True) if weight == 0.5]
    assert template.encoder.decode(halves) == "ye"


def test_tags_that_are_control_tokens_are_these_and_typed_markers_are_text():
    tokens = (*CHATML, "<think>", "</think>")
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    template += "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer = byte_level(tokens, {"eos_token": "<|im_end|>"}, template)
    conversation = setup_conversation_template(tokenizer, {})
    said = "<think>hm <|im_end|> <think></think>yes</think>"
    (row,) = conversation.encode_turns(message_list(talk(said), "messages"))
    ((start, end),) = row.spans
    ids = row.input_ids[start:end]
    opening, closing, marker = map(
        tokenizer.convert_tokens_to_ids, ("<think>", "</think>", "<|im_end|>")
    )
    assert [ids.count(one) for one in (opening, closing, marker)] == [1, 1, 1]
    assert ids[0] == opening and ids[-1] == marker
    assert conversation.encoder.decode(ids) == f"{said}<|im_end|>"


def test_pairs_and_judged_rows_have_the_text_too():
    template = plain()
    row = read_row("preference", {"prompt": "q0", "chosen": SAID, "rejected": BLANK[1]})
    ((columns, _),) = DATA_TYPES["preference"].tokenize(row, template, 400)
    assert columns["chosen_label_decode"] == [f"{SAID}<|im_end|>"]
    assert columns["rejected_label_decode"] == [f"{BLANK[1]}<|im_end|>"]
    row = read_row("kto", {"prompt": "q0", "completion": SAID, "label": True})
    ((columns, _),) = DATA_TYPES["kto"].tokenize(row, template, 400)
    assert columns["completion_decode"] == f"{SAID}<|im_end|>"


def test_so_has_the_history_of_a_prompt():
    template = plain()
    row = read_row("prompt", {"messages": [*talk(SAID), {"role": "user", "content": "q1"}]})
    encoded = template.encode_prompt(row.messages)
    asked = [*talk(SAID), {"role": "user", "content": "q1"}]
    assert encoded.text == rendered(template, asked, prompt=True)


@pytest.mark.parametrize("said", ["yes", "<think> is a tag", "a\n<b>\nc"])
def test_plain_rows_stay_what_they_were(said):
    assert message_list(talk(said), "messages") == talk(said)
