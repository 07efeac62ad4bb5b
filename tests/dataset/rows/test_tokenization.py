"""Prompts, preferences, judged answers and plain texts as token ids: by hand, with every template,
and left alone."""

import copy

import pytest

from coati.dataset import Conversation, tokenize_kto, tokenize_prompt, tokenize_rlhf, tokenize_sft
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.rows.formats import read_row
from coati.dataset.rows.row_errors import RowError
from tests.dataset.chat.test_masks import WRITTEN, family
from tests.dataset.makers import (
    FAMILIES,
    LLAMA,
    byte_level,
    chatml_tokenizer,
    messages,
    sentencepiece_like,
)

CONTEXT = messages("hi", "hello", "how are you?")
PAIR = {
    "context": CONTEXT,
    "chosen": messages("", "fine")[1:],
    "rejected": messages("", "go away", "why?", "ask")[1:],
}
JUDGED = {"prompt": CONTEXT, "completion": {"role": "assistant", "content": "fine"}, "label": True}
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m.role[0] + ']' + m.content + (eos_token if "
    "m.role != 'user' else '') }}{% endfor %}{% if add_generation_prompt %}{{ '[a]' }}{% endif %}"
)


@pytest.fixture(scope="module")
def plain() -> Conversation:
    """One token per byte; a conversation reads <s>[u]question[a]answer</s>."""
    return Conversation.from_config(byte_level(names=LLAMA), {"chat_template": PLAIN})


def rows(type: str, row, conversation: Conversation, max_length: int = 4096) -> list[dict]:
    made = DATA_TYPES[type].tokenize(read_row(type, row), conversation, max_length)
    assert all(list(columns) == list(DATA_TYPES[type].columns) for columns, _ in made)
    return [columns for columns, _ in made]


def shown(conversation, ids, mask) -> str:
    """The text, with what the mask marks in brackets."""
    text = ""
    inside = False
    for token, marked in zip(ids, mask, strict=True):
        if bool(marked) != inside:
            text, inside = text + ("<<" if marked else ">>"), bool(marked)
        text += conversation.encoder.decode([token])
    return text + (">>" if inside else "")


def test_a_prompt_by_hand(plain):
    (row,) = rows("prompt", {"messages": CONTEXT, "gt_answer": "fine", "category": "chat"}, plain)
    assert row["inputs_decode"] == "<s>[u]hi[a]hello</s>[u]how are you?[a]"
    assert (
        row["input_ids"].count(plain.tokenizer.bos_token_id) == 1
        and row["seq_length"] == len(row["input_ids"]) == 33
    )
    assert (row["gt_answer"], row["seq_category"]) == ("fine", "chat")
    with pytest.raises(RowError, match="33 tokens are needed, max_length is 32"):
        rows("prompt", {"messages": CONTEXT}, plain, 32)
    assert rows("prompt", {"messages": CONTEXT}, plain, 33)


def test_a_preference_by_hand(plain):
    """The last answer of each side alone is marked, its end token included."""
    (row,) = rows("preference", {**PAIR, "margin": 0.5}, plain)
    start = "<s>[u]hi[a]hello</s>[u]how are you?[a]"
    assert shown(plain, row["chosen_input_ids"], row["chosen_loss_mask"]) == start + "<<fine</s>>>"
    rejected = shown(plain, row["rejected_input_ids"], row["rejected_loss_mask"])
    assert rejected == start + "go away</s>[u]why?[a]<<ask</s>>>"
    assert row["chosen_label_decode"] == ["fine</s>"] and row["rejected_label_decode"] == [
        "ask</s>"
    ]
    assert (
        row["seq_length"] == len(row["rejected_input_ids"]) > len(row["chosen_input_ids"])
        and row["margin"] == 0.5
    )
    longest = row["seq_length"]
    with pytest.raises(
        RowError, match=f"rejected: {longest} tokens are needed, max_length is {longest - 1}"
    ):
        rows("preference", PAIR, plain, longest - 1)
    assert rows("preference", PAIR, plain, longest)[0]["margin"] is None


def test_a_judged_answer_by_hand(plain):
    (row,) = rows("kto", JUDGED, plain)
    decode = plain.encoder.decode
    assert (
        decode(row["prompt"]) == "<s>[u]hi[a]hello</s>[u]how are you?[a]"
        and decode(row["completion"]) == "fine</s>"
    )
    assert row["completion_decode"] == "fine</s>" and row["input_id_decode"].endswith("[a]fine</s>")
    assert (
        row["label"] is True and row["seq_length"] == len(row["prompt"] + row["completion"]) == 38
    )
    with pytest.raises(RowError, match="38 tokens are needed, max_length is 37"):
        rows("kto", JUDGED, plain, 37)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_template_marks_the_last_answer_and_its_end(name):
    conversation = family(name)
    decode = conversation.encoder.decode
    written = WRITTEN.get(name, lambda text: text)
    (prompt,) = rows("prompt", {"messages": CONTEXT}, conversation)
    (pair,) = rows("preference", PAIR, conversation)
    (judged,) = rows("kto", JUDGED, conversation)
    answer = written("fine") + conversation.end_of_assistant
    assert pair["chosen_label_decode"] == [answer] and judged["completion_decode"] == answer
    assert pair["rejected_label_decode"] == [written("ask") + conversation.end_of_assistant]
    # What is trained after is what generation is given.
    assert judged["prompt"] == prompt["input_ids"] and pair["chosen_loss_mask"].index(True) == len(
        prompt["input_ids"]
    )
    assert pair["chosen_input_ids"] == judged["prompt"] + judged["completion"]
    assert decode(pair["chosen_input_ids"]).endswith(answer)
    bos = conversation.tokenizer.bos_token_id
    for ids in (
        prompt["input_ids"],
        pair["chosen_input_ids"],
        pair["rejected_input_ids"],
        judged["prompt"],
    ):
        assert bos is None or (ids[0] == bos and ids[1] != bos)


def test_no_token_joins_prompt_and_answer():
    """ "]b" is a token, but whoever asks the model sends "[a]" and has the answer begin with
    "b"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "]b"])}, [("]", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    conversation = Conversation.from_config(
        PreTrainedTokenizerFast(tokenizer_object=core, **LLAMA), {"chat_template": PLAIN}
    )
    (row,) = rows("kto", {"prompt": "q", "completion": "bad", "label": False}, conversation)
    decode = conversation.encoder.decode
    assert decode(row["prompt"]) == "<s>[u]q[a]" and decode(row["completion"]) == "bad</s>"
    (whole,) = rows("sft", {"messages": messages("q", "bad")}, conversation)
    assert row["prompt"] + row["completion"] == whole["input_ids"]


REWRITING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n"
    "' }}{{ m.content if loop.last or m.role == 'user' else m.content.split('</think>')[-1] }}{{ "
    "'<|im_end|>\n"
    "' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
    "' }}{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns():
    """Old thoughts go from the context, the last answer's stay and are trained."""
    conversation = Conversation.from_config(chatml_tokenizer(REWRITING), {})
    assert conversation.rewrites
    context = messages("1+1?", "<think>\nadd\n</think>\n\n2", "2+2?")
    pair = {
        "context": context,
        "chosen": messages("", "<think>\nt\n</think>\n\n4")[1:],
        "rejected": messages("", "5")[1:],
    }
    (row,) = rows("preference", pair, conversation)
    assert row["chosen_label_decode"] == ["<think>\nt\n</think>\n\n4<|im_end|>"] and row[
        "rejected_label_decode"
    ] == ["5<|im_end|>"]
    (prompt,) = rows("prompt", {"messages": context}, conversation)
    assert (
        "add" not in prompt["inputs_decode"]
        and row["chosen_input_ids"][: prompt["seq_length"]] == prompt["input_ids"]
    )
    (judged,) = rows(
        "kto",
        {"prompt": context, "completion": "<think>\nt\n</think>\n\n4", "label": True},
        conversation,
    )
    assert (
        judged["prompt"] == prompt["input_ids"]
        and judged["completion_decode"] == row["chosen_label_decode"][0]
    )


@pytest.mark.parametrize("kind", ["first", "always", "legacy"])
def test_word_start_marks(kind):
    conversation = Conversation.from_config(sentencepiece_like(kind), {"chat_template": PLAIN})
    (row,) = rows("kto", JUDGED, conversation)
    (whole,) = rows("sft", {"messages": [*CONTEXT, JUDGED["completion"]]}, conversation)
    assert row["prompt"] + row["completion"] == whole["input_ids"]
    assert whole["labels_decode"][-1] == row["completion_decode"]
    assert row["completion"][-1] == conversation.tokenizer.eos_token_id


def test_plain_text_by_hand(plain):
    bos = plain.tokenizer.bos_token_id
    eos = plain.tokenizer.eos_token_id
    (row,) = rows("sft", {"source": "ab", "Target": "c"}, plain)
    text = plain.tokenizer.encode("ab\nc", add_special_tokens=False)
    assert row["input_ids"] == [bos, *text, eos] and row["labels"] == [-100, *text, eos]
    assert (
        row["inputs_decode"] == "<s>ab\nc</s>"
        and row["labels_decode"] == ["ab\nc</s>"]
        and row["seq_length"] == 6
    )
    made = DATA_TYPES["sft"].tokenize(read_row("sft", {"source": "", "Target": "abc"}), plain, 3)
    assert made[0][0]["labels"] == [-100, *text[:2]] and made[0][1] is True


def test_a_marker_in_a_plain_text_is_no_control_token(plain):
    (row,) = rows("sft", {"source": "", "Target": "a</s>b"}, plain)
    eos = plain.tokenizer.eos_token_id
    assert (
        row["input_ids"].count(eos) == 1 and row["input_ids"][-1] == eos and row["seq_length"] == 8
    )


def test_plain_text_needs_an_end_token():
    template = PLAIN.replace("eos_token", "'~'")
    conversation = Conversation.from_config(
        byte_level(names={"bos_token": "<s>"}), {"chat_template": template}
    )
    with pytest.raises(ValueError, match="no eos token"):
        rows("sft", {"source": "", "Target": "a"}, conversation)


PUBLIC = {
    "sft": (tokenize_sft, {"messages": [{"from": "system", "content": "s"}, *messages("q", "a")]}),
    "prompt": (
        tokenize_prompt,
        {"messages": [{"from": "system", "content": "s"}, *messages("q", "a")]},
    ),
    "preference": (tokenize_rlhf, PAIR),
    "kto": (tokenize_kto, JUDGED),
}


@pytest.mark.parametrize("type", PUBLIC)
def test_the_public_functions_leave_the_row_alone_and_give_none_for_unusable_ones(type, plain):
    tokenize, row = PUBLIC[type]
    before = copy.deepcopy(row)
    found = tokenize(row, plain.tokenizer, plain, max_length=200)
    assert (
        row == before
        and found == rows(type, row, plain)[-1]
        and list(found) == list(DATA_TYPES[type].columns)
    )
    assert tokenize(row, plain.tokenizer, plain, max_length=5) == dict.fromkeys(
        DATA_TYPES[type].columns
    )
    assert tokenize({}, plain.tokenizer, plain) == dict.fromkeys(DATA_TYPES[type].columns)
    with pytest.raises(ValueError, match="another tokenizer"):
        tokenize(row, chatml_tokenizer(), plain)
