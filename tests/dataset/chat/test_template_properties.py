"""Whatever is said, whatever the template: answers and their end markers are trained, nothing else;
a prompt is the beginning of the row that trains its answer; truncation keeps the first rounds."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from coati.dataset import setup_conversation_template
from coati.dataset.chat.conversation import Conversation
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.source_row import SourceRow
from coati.inference.chat import ChatSession
from coati.utils.constants import IGNORE_INDEX
from tests.dataset.chat.test_masks import QWEN3_LIKE, WRITTEN
from tests.dataset.makers import CHATML as MARKERS
from tests.dataset.makers import (
    FAMILIES,
    TEMPLATES,
    WIDE,
    byte_level,
    chatml_tokenizer,
    family_tokenizer,
    messages,
    sentencepiece_like,
)
from tests.tiny import CHATML

FAST = settings(
    derandomize=True,
    max_examples=12,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
OWN = "the tokenizer's own"
NAMES = [*FAMILIES, OWN]

# What a message may hold that could be taken for something else.
FRAGMENTS = [
    "",
    " ",
    "\n",
    "\n\n",
    "\t \n",
    "user",
    "assistant",
    "system",
    "Human:",
    "Assistant: ",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<|im_start|>",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "</s>",
    "<s>",
    "<|user|>\n",
    "<|endoftext|>",
    "<think>",
    "</think>",
    "{{ messages }}",
    "{% raw %}",
    "###",
    "\u200b",
    "\u202e",
    "e\u0301",
    "\u4f60\u597d",
    "\U0001f469\u200d\U0001f467",
    "\U000f0000",
    "\U000f00001\U000f0000",
    "\U0010fffd",
    "\x00",
    "\r\n",
    "\ufb01",
    "\u0130",
    "a" * 30,
]
CONTENT = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=8), max_size=4).map("".join)
DIALOGUE = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4).map(
    lambda rounds: messages(*(text for pair in rounds for text in pair))
)


@cache
def conversation(name: str, merges: bool = False) -> Conversation:
    """The template of a file with a tokenizer of its family, or a tokenizer's own; ``merges``: one
    whose tokens reach over the borders between header, answer and marker wherever they can."""
    wide = WIDE if merges else ()
    if name == OWN:
        return setup_conversation_template(
            byte_level(MARKERS, {"eos_token": "<|im_end|>"}, CHATML, wide)
        )
    return setup_conversation_template(family_tokenizer(name, wide), TEMPLATES / f"{name}.json")


def answers_of(turns: list[dict]) -> list[str]:
    return [turn["content"] for turn in turns if turn["role"] == "assistant"]


def sent(template: Conversation, turns: list[dict]) -> list[int]:
    """The ids that a chat sends to the model when the last of ``turns`` has been typed."""
    model = SimpleNamespace(config=SimpleNamespace(), parameters=lambda: iter([torch.zeros(1)]))
    session = ChatSession(model, template.tokenizer, template, max_length=10**9)
    session.messages = turns[:-1]
    return session._make_room(turns[-1])[0]


@pytest.mark.parametrize("merges", [False, True], ids=["bytes", "merges"])
@pytest.mark.parametrize("name", NAMES)
@FAST
@given(turns=DIALOGUE)
def test_the_supervised_text_is_the_answers_and_their_end_markers(name, merges, turns):
    template = conversation(name, merges)
    encoded = template.encode(turns)
    written = WRITTEN.get(name, lambda text: text)
    expected = [written(answer) + template.end_of_assistant for answer in answers_of(turns)]
    assert [template.encoder.decode(answer) for answer in encoded.responses()] == expected
    assert template.encoder.decode(encoded.input_ids).endswith(encoded.text)
    for answer in encoded.responses():
        assert any(answer[-len(stop) :] == stop for stop in template.stop_ids)
    ((row, truncated),) = DATA_TYPES["sft"].tokenize(SourceRow(messages=turns), template, 10**6)
    assert not truncated and row["labels_decode"] == expected
    supervised = [token for token in row["labels"] if token != IGNORE_INDEX]
    assert supervised == [token for answer in encoded.responses() for token in answer]
    assert all(
        label in (IGNORE_INDEX, token)
        for label, token in zip(row["labels"], row["input_ids"], strict=True)
    )


@pytest.mark.parametrize("merges", [False, True], ids=["bytes", "merges"])
@pytest.mark.parametrize("name", NAMES)
@FAST
@given(turns=DIALOGUE)
@example(turns=messages("hi", "\n\nhello", "a", " b", "", "\n"))
def test_a_prompt_is_the_beginning_of_the_row_that_trains_its_answer(name, merges, turns):
    template = conversation(name, merges)
    encoded = template.encode(turns)
    for number, (start, _) in enumerate(encoded.spans):
        assert encoded.input_ids[:start] == sent(template, turns[: 2 * number + 1])


@pytest.mark.parametrize("kind", ["first", "always", "legacy"])
@pytest.mark.parametrize(
    "name", ["colossal-llama2", "llama2", "tiny-llama", "mistralai_Mixtral-8x7B-Instruct-v0.1"]
)
@FAST
@given(turns=DIALOGUE)
@example(turns=messages("hi", "  \n x", "a", " b", "", " "))
def test_so_it_is_with_word_start_marks(kind, name, turns):
    template = marking(kind, name)
    encoded = template.encode(turns)
    for number, (start, end) in enumerate(encoded.spans):
        assert encoded.input_ids[:start] == sent(template, turns[: 2 * number + 1])
        assert encoded.input_ids[end - 1] == template.tokenizer.eos_token_id
        answer = template.encoder.decode(encoded.input_ids[start:end]).removesuffix("</s>")
        assert answer.split() == answers_of(turns)[number].split()


@cache
def marking(kind: str, name: str) -> Conversation:
    return setup_conversation_template(sentencepiece_like(kind), TEMPLATES / f"{name}.json")


@pytest.mark.parametrize("name", NAMES)
@FAST
@given(turns=DIALOGUE)
def test_a_preferred_answer_follows_its_prompt(name, turns):
    """The rows of preferences, where only the last answer is trained."""
    template = conversation(name, merges=True)
    one = template.encode_response(turns)
    ((start, end),) = one.spans
    assert one.input_ids[:start] == sent(template, turns[:-1]) and end == len(one.input_ids)
    last = template.encode(turns).spans[-1]
    assert one.spans == [last]


@FAST
@given(turns=DIALOGUE)
@example(turns=messages("hi", "  two", "", " ", "b", "\n\n"))
def test_control_tokens_that_take_in_white_space_leave_the_answer_its_own(turns):
    """As Phi-3's do: the token of the header takes in the line break after it, and would an
    answer's blanks."""
    template = swallowing()
    encoded = template.encode(turns)
    for number, (start, end) in enumerate(encoded.spans):
        assert encoded.input_ids[:start] == sent(template, turns[: 2 * number + 1])
        assert (
            template.encoder.decode(encoded.input_ids[start:end])
            == answers_of(turns)[number] + "<|im_end|>"
        )


SWALLOWING = (
    "{% for m in messages %}{{ ('<|answer|>' if m.role == 'assistant' else m.role) + '\n"
    "' + m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|answer|>\n"
    "' }}{% endif %}"
)


@cache
def swallowing() -> Conversation:
    from tokenizers import AddedToken

    tokenizer = byte_level((), {"eos_token": "<|im_end|>"}, SWALLOWING)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|answer|>", rstrip=True, special=True)]}
    )
    return setup_conversation_template(tokenizer, {})


@FAST
@given(turns=DIALOGUE)
def test_a_template_that_rewrites_gives_each_answer_the_prompt_of_a_chat(turns):
    template = rewriting()
    rows = template.encode_turns(turns)
    assert len(rows) == len(turns) // 2
    for number, row in enumerate(rows):
        ((start, end),) = row.spans
        prompt = sent(template, turns[: 2 * number + 1])
        assert row.input_ids[: len(prompt)] == prompt and row.input_ids[end - 1] == 2
        between = template.encoder.decode(row.input_ids[len(prompt) : start])
        # the empty thought of a plain answer, which is not learned
        thinks = "</think>" in turns[2 * number + 1]["content"]
        assert between == ("" if thinks else "<think>\n\n</think>\n\n")


@cache
def rewriting() -> Conversation:
    return setup_conversation_template(chatml_tokenizer(QWEN3_LIKE), {})


@pytest.mark.parametrize("name", NAMES)
@FAST
@given(turns=DIALOGUE, share=st.floats(0, 1.1))
def test_truncation_keeps_the_first_rounds_that_fit_whole(name, turns, share):
    template = conversation(name)
    whole = template.encode(turns)
    limit = int(share * len(whole.input_ids))
    kept = (
        [span for span in whole.spans if span[1] <= limit]
        if limit < len(whole.input_ids)
        else whole.spans
    )
    try:
        cut = template.encode(turns, max_length=limit)
    except RowError as error:
        assert error.reason == "too_long" and not kept
        return
    assert cut.spans == kept == whole.spans[: len(kept)]
    assert len(cut.input_ids) <= limit and cut.truncated == (len(kept) < len(whole.spans))
    assert cut.input_ids == whole.input_ids[: len(cut.input_ids)]
    assert not cut.truncated or len(cut.input_ids) == kept[-1][1]
