"""Rows as public data sets and the documentation of other trainers have them, and what is right."""

import json

import pytest

from coati.dataset.rows.column_names import Layout, parse_columns
from coati.dataset.rows.formats import read_row
from coati.dataset.rows.row_errors import MALFORMED, RowError
from tests.dataset.rows.test_format_files import talk


def answer(content: str, **more) -> list[dict]:
    return [{"role": "assistant", "content": content, **more}]


@pytest.mark.parametrize(
    ("row", "asked", "response"),
    [
        (
            {
                "instruction": "Who is taller?",
                "context": "Ann is 180 cm, Bo 170 cm.",
                "response": "Ann.",
            },
            talk("Who is taller?\n\nAnn is 180 cm, Bo 170 cm."),
            "Ann.",
        ),
        (
            {"question": "Which is red?", "choices": ["sky", "blood"], "answer": 1},
            talk("Which is red?\n\nA. sky\nB. blood"),
            "B",
        ),
        (
            {"system_prompt": "Answer in French.", "question": "1+2?", "response": "trois"},
            talk("1+2?", system="Answer in French."),
            "trois",
        ),
    ],
)
def test_what_belongs_to_a_question_is_in_the_prompt(row, asked, response):
    found = read_row("prompt", row)
    assert found.messages == asked and not any(found.unused.values())
    assert read_row("sft", row).messages == asked + answer(response)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"question": "3*4?", "answer": "12"}, talk("3*4?", "12")),
        (
            {"system": "Be kind.", "query": "3*4?", "response": "12", "history": [["1+1?", "2"]]},
            talk("1+1?", "2", "3*4?", "12", system="Be kind."),
        ),
        ({"prompt": "3*4?", "response": "12"}, talk("3*4?", "12")),
        ({"input": "Add 1 and 2.", "output": "3"}, talk("Add 1 and 2.", "3")),
        ({"conversation": [{"human": "1+2?", "assistant": "3"}]}, talk("1+2?", "3")),
    ],
)
def test_one_round_each(row, messages):
    found = read_row("sft", row)
    assert (found.messages, found.unused) == (messages, {})


@pytest.mark.parametrize(
    "row",
    [
        {"question": "3*4?", "answer": "It is <<3*4=12>>12.\n#### 12"},
        {"problem": "3*4?", "solution": "12"},
        {"problem": "3*4?", "solution": r"It is $\boxed{12}$.", "level": 1},
        {"prompt": "3*4?", "ground_truth": "12"},
        {"prompt": [{"role": "user", "content": "3*4?"}], "reward_model": {"ground_truth": "12"}},
        {"prompt": "3*4?", "reward_model": '{"ground_truth": "12", "style": "rule"}'},
        {"problem": "3*4?", "solution": "Long.", "answer": "12"},
        {"question": "3*4?", "expected_answer": 12},
        {"question": "3*4?", "answers": {"text": ["12", "twelve"], "answer_start": [0, 3]}},
        {"messages": [{"role": "user", "content": "3*4?"}], "answer": "12"},
    ],
)
def test_ground_truths_are_found(row):
    found = read_row("prompt", row)
    assert (found.messages, found.gt_answer, found.unanswered) == (talk("3*4?"), "12", False)
    assert not any(found.unused.values())


@pytest.mark.parametrize(
    ("solution", "truth"),
    [
        (r"First $\boxed{1}$, then $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\fbox{x + {y}} holds", "x + {y}"),
        (r"never closed \boxed{1", r"never closed \boxed{1"),
        ("#### -1,234.5", "-1234.5"),
        ("a\n#### (1, 2)\n", "(1, 2)"),
        ("Paris", "Paris"),
    ],
)
def test_what_a_solution_ends_with(solution, truth):
    assert read_row("prompt", {"problem": "?", "solution": solution}).gt_answer == truth


def test_thoughts_reach_the_row_in_one_form():
    """Of a text the message also has what stood around the thought."""
    expected = talk("3*4?") + answer("12", reasoning_content="Three fours are twelve.")
    for said in (
        {"content": "12", "reasoning_content": "Three fours are twelve."},
        {"content": "12", "thinking": "Three fours are twelve."},
        {"content": "<think>\nThree fours are twelve.\n</think>\n\n12"},
        {"content": "<think>Three fours are twelve.</think>12"},
        {"content": "Three fours are twelve.\n</think>\n\n12"},  # R1 behind an opened thought
        {
            "content": "<think>\nThree fours are twelve.\n</think>\n12",
            "reasoning": "Three fours are twelve.",
        },
        {
            "content": [
                {"type": "reasoning", "value": "Three fours are twelve."},
                {"type": "text", "value": "12"},
            ]
        },
    ):
        row = {"messages": [*talk("3*4?"), {"role": "assistant", **said}]}
        found = read_row("sft", row)
        before, behind = found.messages[-1].pop("thought_marks", ["", ""])
        assert (found.messages, found.unused) == (expected, {})
        if "</think>" in said["content"]:
            assert before + "Three fours are twelve." + behind + "12" == said["content"]


@pytest.mark.parametrize(
    "content",
    ["<think>\n\n</think>\n\n12", "<think></think>12", "\n<think> </think>\n12"],
)
def test_an_empty_thought_is_none_but_its_text_is_known(content):
    found = read_row("sft", {"messages": [*talk("3*4?"), *answer(content)]})
    marks = found.messages[-1].pop("thought_marks")
    assert found.messages == talk("3*4?", "12") and "".join(marks) + "12" == content


def test_a_thought_in_a_field_and_as_blank_text():
    """The text has no place for the thought."""
    said = answer("<think>\n</think>\n12", reasoning_content="Three fours are twelve.")
    found = read_row("sft", {"messages": [*talk("3*4?"), *said]})
    expected = answer("12", reasoning_content="Three fours are twelve.")
    assert found.messages == talk("3*4?") + expected


@pytest.mark.parametrize("marks", [["<think>"], ["<think>", None], "<think>", {"a": 1}])
def test_marks_that_are_none_are_an_unread_field(marks):
    said = answer("12", reasoning_content="x", thought_marks=marks)
    found = read_row("sft", {"messages": [*talk("3*4?"), *said]})
    assert found.messages == talk("3*4?") + answer("12", reasoning_content="x")
    assert any("thought_marks" in name for name in found.unused)


@pytest.mark.parametrize(
    "content",
    ["The tag </think> ends a thought.", "Write <think> first.", "a <think>\nb\n</think>\n c"],
)
def test_tags_that_are_spoken_of_stay_text(content):
    row = {"messages": talk("?", content)}
    assert read_row("sft", row).messages == row["messages"]


def test_thoughts_and_calls_in_the_text_of_a_dialogue():
    said = '<think>\nx\n</think>\n\n4<tool_call>{"name": "f", "zzz": 1}</tool_call>'
    row = {
        "chosen": f"\n\nHuman: 2+2?\n\nAssistant: {said}",
        "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5",
    }
    found = read_row("preference", row)
    [response] = found.chosen
    assert (response["content"], response["reasoning_content"]) == ("4", "x")
    assert len(response["tool_calls"]) == 1 and list(found.unused) == ["chosen.content.zzz"]


def test_two_thoughts_are_refused():
    said = {"content": "<think>\na\n</think>\n\n12", "reasoning_content": "b"}
    with pytest.raises(RowError) as error:
        read_row("sft", {"messages": [*talk("?"), {"role": "assistant", **said}]})
    assert error.value.reason == "two_thoughts"


@pytest.mark.parametrize("key", ["weight", "train", "loss", "loss_weight"])
@pytest.mark.parametrize(
    ("value", "weight"),
    [(0, 0.0), (1, 1.0), (False, 0.0), (True, 1.0), (0.25, 0.25), ("false", 0.0), ("0.5", 0.5)],
)
def test_weights_of_turns(key, value, weight):
    found = read_row("sft", {"messages": [*talk("Name a bird."), *answer("Owl.", **{key: value})]})
    assert found.messages[1] == answer("Owl.", weight=weight)[0] and found.unused == {}
    assert type(found.messages[1]["weight"]) is float


@pytest.mark.parametrize(
    "more",
    [
        {"weight": 1.5},
        {"weight": "much"},
        {"weight": float("nan")},
        {"weight": 0, "train": True},
        {"train_detail": [{"begin_offset": 0, "end_offset": 4, "train": True}]},
        {"train_detail": [{"begin_offset": 2, "end_offset": 1, "train": True}]},
        {"train_detail": {"begin_offset": 0}},
    ],
)
def test_weights_that_cannot_be(more):
    with pytest.raises(RowError) as error:
        read_row("sft", {"messages": [*talk("Name a bird."), *answer("Owl.", **more)]})
    assert error.value.reason == "bad_weight"


def test_spans_count_from_the_answer_behind_a_thought():
    detail = {"begin_offset": 12, "end_offset": 14, "train": False}
    content = "<think>x\n</think>\n\nOwl."
    start = len(content) - 4
    detail = {"begin_offset": start, "end_offset": start + 2, "train": False}
    row = {"messages": [*talk("?"), *answer(content, train_detail=[detail])]}
    assert read_row("sft", row).messages[1]["spans"] == [[0, 3, 0.0]]
    detail["begin_offset"] = 3
    with pytest.raises(RowError, match="train_detail weighs a thought"):
        read_row("sft", row)


def test_parts_under_value():
    parts = [{"type": "text", "value": "Apple"}, {"type": "text", "text": "."}]
    found = read_row("sft", {"messages": [*talk("Name a fruit."), *answer(parts)]})
    assert found.messages == talk("Name a fruit.", "Apple.")


JUDGED = {"messages": talk("2+2?", "5")}


@pytest.mark.parametrize(
    ("label", "meant"),
    [(True, True), (False, False), (1, True), (0, False), (1.0, True), (-1, False), ("True", True)]
    + [("0", False), ("good", True), ("rejected", False), (" yes ", True)],
)
def test_labels_in_numbers_and_words(label, meant):
    for key in ("label", "kto_tag"):
        found = read_row("kto", {**JUDGED, key: label})
        assert (found.messages, found.completion, found.label) == (talk("2+2?"), "5", meant)
        with pytest.raises(RowError, match="a response judged bad must not be learned"):
            read_row("sft", {**JUDGED, key: label})
    assert read_row("kto", {"prompt": "2+2?", "completion": "5", "label": label}).label is meant


def test_a_label_that_means_neither():
    for row in ({**JUDGED, "label": "maybe"}, {"prompt": "q", "response": "a", "label": 2}):
        with pytest.raises(RowError) as error:
            read_row("kto", row)
        assert error.value.reason == "bad_label"


@pytest.mark.parametrize("type", ["sft", "text"])
def test_plain_texts(type):
    assert read_row(type, {"text": "Hills are old."}).text == "Hills are old."
    found = read_row(
        type, {"text": "Hills are old."}, layout=Layout(parse_columns(["target=text"]))
    )
    assert found.text == "Hills are old."


CALL = {"name": "f", "arguments": {"a": 1}}


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "assistant", "content": "I look.", "tool_calls": [{"function": CALL}]}],
        [{"role": "assistant", "content": "I look.", "function_call": CALL}],
        [
            *answer("I look."),
            {"role": "tool_call", "content": '{"name": "f", "arguments": {"a": 1}}'},
        ],
        [
            {
                "role": "assistant",
                "content": f"I look.\n<tool_call>\n{json.dumps(CALL)}\n</tool_call>",
            }
        ],
        [
            {
                "role": "assistant",
                "content": "I look.",
                "tool_calls": '[{"name": "f", "arguments": "{\\"a\\": 1}"}]',
            }
        ],
    ],
)
def test_a_call_beside_text_is_a_call(turns):
    row = {"messages": [*talk("?"), *turns, {"role": "tool", "content": "1"}, *answer("One.")]}
    found = read_row("sft", row)
    call = {"type": "function", "function": CALL}
    assert found.messages[1] == answer("I look.", tool_calls=[call])[0]
    assert [one["role"] for one in found.messages] == ["user", "assistant", "tool", "assistant"]


def test_several_calls_in_turns_of_their_own():
    calls = [{"role": "function_call", "content": f'{{"name": "f{k}"}}'} for k in range(2)]
    results = [{"role": "observation", "content": str(k)} for k in range(2)]
    found = read_row("sft", {"messages": [*talk("?"), *calls, *results, *answer("Both.")]})
    assert [call["function"]["name"] for call in found.messages[1]["tool_calls"]] == ["f0", "f1"]
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (
            [*talk("?"), *answer("", tool_calls=[CALL]), *talk("?")],
            "message 2 is from user, expected tool, the",
        ),
        (
            [*talk("?", "a"), {"role": "tool", "content": "x"}],
            "message 2 is from tool, expected user: no call",
        ),
        (
            [*talk("?"), *answer("", tool_calls=[{"arguments": {"a": 1}}])],
            "calls a function without a name",
        ),
        (
            [*talk("?"), *answer("", tool_calls=[{"name": "f", "arguments": "[1]"}])],
            "expected a JSON object",
        ),
        ([*talk("?"), {"role": "function_call", "content": "f(1)"}], "expected JSON of a call"),
        ([{"role": "user", "content": [{"type": "tool_use", "name": "f"}]}], "only a response may"),
    ],
)
def test_calls_that_cannot_be(messages, said):
    with pytest.raises(RowError, match=said):
        read_row("sft", {"messages": messages})


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ("no JSON", "tools holds 'no JSON', expected JSON"),
        (7, "holds int"),
        (["f"], "holds 'f'|None"),
    ]
    + [([{"parameters": {}}], "a function without a name")],
)
def test_tools_that_cannot_be(tools, said):
    row = {"messages": talk("?", "a"), "tools": tools}
    with pytest.raises(RowError, match=said) as error:
        read_row("sft", row)
    assert error.value.reason == "bad_tools"
    assert read_row("sft", row, layout=Layout({"tools": ""})).tools is None


def test_calls_and_thoughts_in_pairs_prompts_and_judged_rows():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]}
    said = {"type": "function", "function": CALL}
    pair = {"prompt": talk("?"), "chosen": [call], "rejected": "<think>\nx\n</think>\n\nNo."}
    found = read_row("preference", {**pair, "tools": [{"name": "f"}]})
    assert found.chosen == answer("", tool_calls=[said])
    marks = ["<think>\n", "\n</think>\n\n"]
    assert found.rejected == answer("No.", reasoning_content="x", thought_marks=marks)
    assert found.tools == [{"type": "function", "function": {"name": "f"}}]
    found = read_row("kto", {"messages": [*talk("?"), call], "label": False})
    assert (found.completion, found.response) == ("", answer("", tool_calls=[said])[0])
    round = [*talk("?"), call, {"role": "tool", "content": "1"}]
    found = read_row("prompt", {"messages": [*round, *answer("One.")]})
    assert [one["role"] for one in found.messages] == ["user", "assistant", "tool"]
    both = {"chosen": [*round, *answer("One.")], "rejected": [*round, *answer("Two.")]}
    found = read_row("preference", both)
    assert [one["role"] for one in found.messages] == ["user", "assistant", "tool"]
    assert (found.chosen, found.rejected) == (answer("One."), answer("Two."))


@pytest.mark.parametrize(
    "choices",
    [{"text": ["a", "b"], "label": 1}, {"text": ["a", "b"], "label": ["A"]}, [["a"]], {"A": ["a"]}],
)
def test_choices_that_cannot_be(choices):
    with pytest.raises(RowError) as error:
        read_row("prompt", {"question": "?", "choices": choices})
    assert error.value.reason == "bad_scores"


@pytest.mark.parametrize(
    ("reason", "row"),
    [
        ("no_preference", {"prompt": "?", "responses": ["a", "b"], "scores": [1, 1]}),
        ("bad_scores", {"prompt": "?", "responses": ["a", "b"], "scores": [1]}),
        ("bad_scores", {"prompt": "?", "responses": ["a", "b"], "scores": ["good", "bad"]}),
        ("no_preference", {"prompt": "?", "responses": ["a", "b"], "scores": ["N/A", 1]}),
        (
            "bad_scores",
            {"prompt": "?", "response_0": "a", "response_1": "b", "better_response_id": 2},
        ),
        ("bad_scores", {"history": "?", "human_ref_A": "a", "human_ref_B": "b", "labels": 7}),
        (
            "no_preference",
            {"prompt": "?", "response_1": "a", "response_2": "b", "preference_strength": 0},
        ),
    ],
)
def test_scores_that_tell_nothing(reason, row):
    with pytest.raises(RowError) as error:
        read_row("preference", row)
    # Rows without a preference are no fault of the file.
    assert error.value.reason == reason and (reason in MALFORMED) == (reason == "bad_scores")
    if reason == "no_preference":
        assert read_row("prompt", row).messages == talk("?")


def test_rounds_beside_a_text_of_the_other_name():
    rounds = [{"human": "1+2?", "assistant": "3"}]
    found = read_row("sft", {"conversations": rounds, "conversation": "a title"})
    assert found.messages == talk("1+2?", "3") and found.unused == {"conversation": False}
