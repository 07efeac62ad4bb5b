"""From rows of a file to what is learned of them, under templates that take more than a look."""

import json

import pytest

from coati.dataset import load_tokenized_dataset, prepare_dataset, setup_conversation_template
from coati.dataset.chat.row_options import RowOptions
from tests.dataset.chat.family_templates import family
from tests.dataset.chat.test_masks import R1_LIKE
from tests.dataset.chat.test_template_cases import moving
from tests.dataset.chat.test_thoughts import nemotron
from tests.dataset.makers import chatml_tokenizer


@pytest.fixture
def learned(tmp_path):
    """The supervised texts of each row of a file with ``rows``, and the report."""

    def prepared(template, rows, type="sft"):
        source = tmp_path / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        report = prepare_dataset(
            inputs=[source],
            tokenizer=template.tokenizer,
            template=template,
            arrow_dir=tmp_path / "out",
            type=type,
            num_bins=1,
            num_proc=1,
            show=None,
        )
        made = load_tokenized_dataset(str(tmp_path / "out")).to_list()
        return [row["labels_decode"] for row in made] if type == "sft" else made, report

    return prepared


def ask(question: str, answer: str, **more) -> dict:
    turn = {"role": "assistant", "content": answer, **more}
    return {"messages": [{"role": "user", "content": question}, turn]}


SPELLED = [
    ask("3*4?", "<think>\nThree fours are twelve.\n</think>\n\n12"),
    ask("5*2?", "<think>\nFive twos are ten.\n</think>\n\n10"),
]
FIELDS = [
    ask("3*4?", "12", reasoning_content="Three fours are twelve."),
    ask("5*2?", "10", thinking="Five twos are ten."),
]
THOUGHTS = [
    ["Three fours are twelve.\n</think>\n\n12<|im_end|>"],
    ["Five twos are ten.\n</think>\n\n10<|im_end|>"],
]


@pytest.mark.parametrize("rows", [SPELLED, FIELDS], ids=["spelled", "fields"])
def test_thoughts_reach_the_template_however_they_are_spelled(learned, rows):
    found, _ = learned(nemotron(), [*rows, ask("Say hi.", "Hi!")])
    assert found == [*THOUGHTS, ["Hi!<|im_end|>"]]


@pytest.mark.parametrize("rows", [SPELLED, FIELDS], ids=["spelled", "fields"])
@pytest.mark.parametrize("option", ["template", "keep"])
def test_thoughts_that_the_template_strips(learned, rows, option):
    options = RowOptions(thoughts=option)
    template = setup_conversation_template(chatml_tokenizer(R1_LIKE), {}, options=options)
    found, report = learned(template, rows)
    warned = any("drops the thoughts of 2 rows" in text for text in report["warnings"])
    assert found == (THOUGHTS if option == "keep" else [["12<|im_end|>"], ["10<|im_end|>"]])
    assert warned == (option == "template")


def test_a_system_message_before_the_last_question(learned):
    system = {"role": "system", "content": "Be brief."}
    turns = [*ask("1+1?", "2")["messages"], *ask("2+2?", "4")["messages"]]
    rows = [
        {"messages": [system, *ask("3*4?", "12")["messages"]]},
        {"messages": [system, *turns]},
        ask("1+3?", "4"),
    ]
    found, report = learned(moving(), rows)
    assert found == [[" 12<|im_end|>"], [" 2<|im_end|>"], [" 4<|im_end|>"], [" 4<|im_end|>"]]
    assert report["rows_kept"] == 3 and report["rows_written"] == 4


def test_switches_of_turns(learned):
    def talk(names, first, second, key, off, on):
        role, text = names
        people = ("user", "assistant") if role == "role" else ("human", "gpt")
        said = [("Name one.", {}), (first, {key: off}), ("No.", {}), (second, {key: on})]
        return [{role: people[k % 2], text: words, **more} for k, (words, more) in enumerate(said)]

    openai = ("role", "content")
    rows = [
        {"messages": talk(openai, "Stone.", "Apple.", "weight", 0, 1)},
        {"conversations": talk(("from", "value"), "Car.", "Oak.", "train", False, True)},
        {"messages": talk(openai, "Shoe.", "Owl.", "loss", False, True)},
    ]
    found, _ = learned(family("qwen2_5"), rows)
    assert found == [["Apple.<|im_end|>"], ["Oak.<|im_end|>"], ["Owl.<|im_end|>"]]


def test_tools_of_files(learned):
    tool = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    rows = [
        {
            "tools": json.dumps([tool]),
            "messages": [
                {"role": "user", "content": "Warm?"},
                {"role": "assistant", "content": None, "tool_calls": [{"id": "1", **call}]},
                {"role": "tool", "content": "4 C", "tool_call_id": "1"},
                {"role": "assistant", "content": "No."},
            ],
        }
    ]
    found, _ = learned(family("granite_4"), rows)
    written = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert found == [[written + "<|end_of_text|>", "No.<|end_of_text|>"]]


def test_judged_messages_with_thoughts_and_calls(learned):
    rows = [
        {"prompt": "3*4?", "completion": FIELDS[0]["messages"][1], "label": True},
        {"prompt": "5*2?", "completion": {"role": "assistant", "content": "7"}, "label": False},
    ]
    made, _ = learned(family("kimi_k2"), rows, type="kto")
    assert [row["completion_decode"] for row in made] == [
        "<think>Three fours are twelve.</think>12<|im_end|>",
        "7<|im_end|>",
    ]
