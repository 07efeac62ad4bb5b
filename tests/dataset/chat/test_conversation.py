"""Conversation, and template files: what is derived, what is read from older layouts, what is
refused and how."""

import copy
import json
import pickle
import sys
from pathlib import Path

import pytest

from coati.dataset import Conversation, setup_conversation_template
from coati.dataset.chat.template import read_chat_template
from coati.utils.logging import forget_warnings
from tests.dataset.makers import (
    FAMILIES,
    TEMPLATES,
    byte_level,
    chatml_tokenizer,
    family_tokenizer,
    messages,
)
from tests.tiny import CHATML

DATA = Path(__file__).parents[2] / "data"
LLAMA = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(autouse=True)
def nothing_said_yet():
    forget_warnings()


def test_messages_and_prompt():
    conversation = setup_conversation_template(chatml_tokenizer(), {"system_message": "sys"})
    conversation.append_message("human", "hi")
    conversation.append_message("assistant", "ho")
    start = "<|im_start|>system\nsys<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    assert conversation.get_prompt(length=1) == start
    assert (
        conversation.get_prompt(1, add_generation_prompt=True) == start + "<|im_start|>assistant\n"
    )
    assert conversation.save_prompt() == start + "<|im_start|>assistant\nho<|im_end|>\n"
    with pytest.raises(ValueError, match="unknown role 'tool'; known roles: user, human"):
        conversation.append_message("tool", "x")
    conversation.clear()
    assert conversation.messages == []


def test_copies_share_the_template_and_nothing_else():
    conversation = setup_conversation_template(chatml_tokenizer(), {})
    conversation.append_message("user", "hi")
    twin = conversation.copy()
    twin.append_message("assistant", "ho")
    twin.messages[0]["content"] = "changed"
    assert conversation.messages == messages("hi") and twin.to_config() == conversation.to_config()
    again = pickle.loads(pickle.dumps(conversation))
    assert (
        again.encode(messages("a", "b")).input_ids
        == conversation.encode(messages("a", "b")).input_ids
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stored_template_gives_the_same_conversation(name, tmp_path, capsys):
    first = setup_conversation_template(
        family_tokenizer(name), TEMPLATES / f"{name}.json", save_path=tmp_path / "t.json"
    )
    first.save(tmp_path / "whole.json")
    capsys.readouterr()
    second = setup_conversation_template(family_tokenizer(name), tmp_path / "whole.json")
    assert second.to_config() == first.to_config() and second.derived == {}
    assert capsys.readouterr().err == ""
    assert second.encode(messages("a", "b")).input_ids == first.encode(messages("a", "b")).input_ids


def test_rendering_equals_transformers():
    for name in FAMILIES:
        tokenizer = family_tokenizer(name)
        conversation = setup_conversation_template(tokenizer, TEMPLATES / f"{name}.json")
        turns = messages("hi ", " ho", "<b>&amp;", "\n\n")
        system = (
            [{"role": "system", "content": conversation.system_message}]
            if conversation.system_message
            else []
        )
        for generation in (False, True):
            expected = tokenizer.apply_chat_template(
                system + turns[:3], tokenize=False, add_generation_prompt=generation
            )
            assert conversation.render(turns[:3], add_generation_prompt=generation) == expected


def test_nothing_given_is_derived_printed_and_stored(tmp_path, capsys):
    path = tmp_path / "new" / "template.json"
    setup_conversation_template(chatml_tokenizer(), path)
    stored = json.loads(path.read_text())
    assert stored == {
        "chat_template": CHATML,
        "system_message": None,
        "stop_ids": [[2]],
        "end_of_assistant": "<|im_end|>",
    }
    said = capsys.readouterr().err
    assert (
        "end_of_assistant was derived: '<|im_end|>'" in said
        and "stop_ids was derived: [[2]]" in said
    )
    assert str(path) in said


def test_an_existing_file_is_never_changed(tmp_path):
    path = tmp_path / "mine.json"
    beside = tmp_path / "out" / "template.json"
    path.write_text('{"system_message": "Be brief."}')
    conversation = setup_conversation_template(chatml_tokenizer(), path, save_path=beside)
    assert path.read_text() == '{"system_message": "Be brief."}'
    assert json.loads(beside.read_text()) == conversation.to_config()
    assert (
        conversation.system_message == "Be brief." and conversation.end_of_assistant == "<|im_end|>"
    )


def test_an_end_marker_that_is_no_token_is_derived_too():
    tokenizer = byte_level((), {"eos_token": "</s>"}, CHATML)
    conversation = setup_conversation_template(tokenizer, {})
    marker = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    assert conversation.end_of_assistant == "<|im_end|>" and len(marker) == len("<|im_end|>")
    assert conversation.stop_ids == [marker, [tokenizer.eos_token_id]]


def test_the_tokenizer_carries_the_template_afterward():
    tokenizer = family_tokenizer("llama2")
    setup_conversation_template(tokenizer, TEMPLATES / "llama2.json")
    assert "<<SYS>>" in tokenizer.chat_template


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ([[2], [1, 2]], [[2], [1, 2]]),
        ([2], [[2]]),
        ([2, 0], [[2], [0]]),  # control tokens: alternatives, as in Qwen's older files
        (["<|im_end|>"], [[2]]),
        ([], [[2]]),
        (None, [[2]]),
    ],
)
def test_layouts_of_stop_ids(given, read):
    assert setup_conversation_template(chatml_tokenizer(), {"stop_ids": given}).stop_ids == read


def test_flat_stop_ids_that_spell_the_marker_are_one_sequence(capsys):
    """As in chatglm2's older file: the end marker has no token of its own."""
    tokenizer = byte_level((), {"eos_token": "</s>"}, CHATML)
    marker = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    conversation = setup_conversation_template(
        tokenizer, {"stop_ids": marker, "end_of_assistant": "<|im_end|>"}
    )
    assert conversation.stop_ids == [marker]
    assert "read as one sequence" in capsys.readouterr().err


def test_the_layout_with_line_markers_is_read_and_explained(capsys):
    """No generation prompt either: the header before responses is added to prompts."""
    tokenizer = byte_level((), LLAMA)
    markers = json.loads((DATA / "template_line_markers.json").read_text())
    eos = tokenizer.eos_token_id
    conversation = Conversation.from_config(
        tokenizer, markers | {"assistant_line_end": [eos]}, source="old.json"
    )
    said = capsys.readouterr().err
    assert (
        said.count("human_line_start") == 1
        and "old.json: human_line_start" in said
        and "older layout" in said
    )
    assert conversation.end_of_assistant == "</s>" and conversation.stop_ids == [[eos]]
    assert (
        conversation.render(messages("hi"), add_generation_prompt=True)
        == "Human: <s>hi</s>Assistant: <s>"
    )
    encoded = conversation.encode(messages("hi", "ho"))
    assert [conversation.encoder.decode(answer) for answer in encoded.responses()] == ["ho</s>"]


def test_the_layout_with_stop_strings_is_read_and_explained(capsys):
    tokenizer = byte_level(("<|user|>",), LLAMA)
    conversation = setup_conversation_template(tokenizer, DATA / "template_stop_strings.json")
    assert conversation.stop_ids == [
        [tokenizer.eos_token_id],
        [tokenizer.convert_tokens_to_ids("<|user|>")],
    ]
    said = capsys.readouterr().err
    assert "strings" in said and "end_of_assistant was derived: '</s>'" in said


def test_chat_template_may_name_a_file_or_a_model_directory(tmp_path):
    (tmp_path / "chat.jinja").write_text(CHATML)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": CHATML}]
    (tmp_path / "several").mkdir()
    (tmp_path / "several" / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": named})
    )
    for value in (CHATML, "chat.jinja", str(tmp_path / "chat.jinja"), "model", "several"):
        (tmp_path / "config.json").write_text(json.dumps({"chat_template": value}))
        assert (
            setup_conversation_template(
                chatml_tokenizer("none"), tmp_path / "config.json"
            ).chat_template
            == CHATML
        )
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no chat template"):
        read_chat_template("empty", tmp_path)


def refused(config, tokenizer=None, **keywords) -> str:
    with pytest.raises(ValueError) as error:
        Conversation.from_config(
            tokenizer or chatml_tokenizer(), config, source="my.json", **keywords
        )
    return str(error.value)


def test_a_syntax_error_names_the_line():
    message = refused({"chat_template": "{% for m in messages %}\n{{ m.content }}\n{% endfr %}"})
    assert "line 3" in message and "endfr" in message and "chat_template" in message


def test_a_tokenizer_without_template_names_the_field():
    message = refused({}, byte_level())
    assert "my.json" in message and "no chat template" in message and "set chat_template" in message


def test_a_template_without_end_marker_shows_the_text_and_the_field():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    message = refused({"chat_template": template})
    assert "set end_of_assistant" in message and "assistant: Probe answer number two" in message


def test_an_end_marker_the_template_never_writes():
    """The reference's own Qwen2.5-3B file was of this kind."""
    message = refused({"end_of_assistant": "<|endoftext|>"})
    assert (
        "'<|endoftext|>' does not follow every response" in message
        and "'<|im_end|>' would do" in message
    )


@pytest.mark.parametrize("given", ["<|user|>", None])
def test_an_end_marker_only_between_turns(given):
    """As GLM's: the last answer is followed by nothing, and a model stops at the token that begins
    the user's turn."""
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    tokenizer = byte_level(("<|user|>", "<|assistant|>"), LLAMA, template)
    conversation = setup_conversation_template(tokenizer, {"end_of_assistant": given})
    encoded = conversation.encode(messages("a", "b", "c", "d"))
    answers = [conversation.encoder.decode(answer) for answer in encoded.responses()]
    assert answers == ["b<|user|>", "d<|user|>"]
    assert conversation.render(messages("a", "b")) == "<|user|>a<|assistant|>b"
    assert [tokenizer.convert_tokens_to_ids("<|user|>")] in conversation.stop_ids


def test_an_end_marker_that_no_turn_begins_with():
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    assert "does not follow every response" in refused(
        {"chat_template": template, "end_of_assistant": "<|end|>"}
    )


def test_a_doubled_bos_is_refused():
    message = refused(
        {"chat_template": "{{ bos_token }}" + "{{ bos_token }}" + CHATML}, byte_level((), LLAMA)
    )
    assert "two begin-of-sequence tokens" in message and "once" in message


def test_a_bos_is_added_once_and_never_doubled():
    for template in (CHATML, "{{ bos_token }}" + CHATML):
        tokenizer = byte_level(("<|im_start|>", "<|im_end|>"), LLAMA, template)
        ids = setup_conversation_template(tokenizer, {}).encode(messages("a", "b")).input_ids
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_a_template_that_refuses_the_system_message():
    config = json.loads((TEMPLATES / "mistralai_Mixtral-8x7B-Instruct-v0.1.json").read_text())
    message = refused(config | {"system_message": "Be kind."}, byte_level((), LLAMA))
    assert "no system role" in message and "set system_message to null" in message


def test_a_template_that_needs_a_token_the_tokenizer_lacks():
    config = json.loads((TEMPLATES / "llama2.json").read_text())
    assert "bos_token" in refused(config, byte_level((), {"eos_token": "</s>"}))


def test_a_template_that_loses_the_messages():
    assert "should occur once" in refused({"chat_template": "{{ 'hello' }}"})


def test_wrong_fields_are_named():
    assert "did you mean 'end_of_assistant'" in refused({"end_of_asistant": "x"})
    assert "system_message must be a string" in refused({"system_message": 3})
    assert "stop_ids must be a list of token sequences" in refused({"stop_ids": {"a": 1}})
    assert "expected a JSON object" in refused([1])
    assert "template_mode" in refused({}, template_mode="loose")


def test_a_template_file_that_is_not_json(tmp_path):
    (tmp_path / "t.json").write_text('{"chat_template": "x",\n}')
    # Python 3.13 names the comma, earlier ones the brace after it.
    line = 1 if sys.version_info >= (3, 13) else 2
    with pytest.raises(ValueError, match=f"t.json:{line}"):
        setup_conversation_template(chatml_tokenizer(), tmp_path / "t.json")


def test_stop_ids_outside_the_vocabulary_are_left_out_and_said(capsys):
    conversation = setup_conversation_template(chatml_tokenizer(), {"stop_ids": [[151645], [2]]})
    assert conversation.stop_ids == [[2]] and "[[151645]]" in capsys.readouterr().err


def test_stop_ids_that_no_answer_ends_with_get_the_end_marker(capsys):
    conversation = setup_conversation_template(chatml_tokenizer(), {"stop_ids": [[0]]})
    assert conversation.stop_ids == [[2], [0]] and "was added" in capsys.readouterr().err


def test_encoding_changes_no_message():
    conversation = setup_conversation_template(chatml_tokenizer(), {"system_message": "sys"})
    turns = [{"role": "system", "content": "a <|im_end|>"}, *messages("b", "c")]
    before = copy.deepcopy(turns)
    conversation.encode(turns)
    conversation.encode_turns(turns, 100)
    assert turns == before


def test_a_template_that_comes_with_coati_by_the_name_of_its_model():
    named = setup_conversation_template(family_tokenizer("llama2"), "llama2")
    assert (
        named.to_config()
        == setup_conversation_template(
            family_tokenizer("llama2"), TEMPLATES / "llama2.json"
        ).to_config()
    )
    with pytest.raises(ValueError, match="^lama2: no such file.*did you mean .*llama2"):
        setup_conversation_template(family_tokenizer("llama2"), "lama2")
