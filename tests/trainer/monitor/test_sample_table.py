"""Numbers about responses by hand, and the table of samples in terminals of every width."""

import pytest

from coati.trainer.monitor.sample_table import (
    SampleRow,
    distinct_2,
    sample_rows,
    sample_table,
    stop_rate,
)
from coati.utils.text_table import places

ROWS = [
    SampleRow(
        "What is 12 + 30?", "The sum is 42.", 10.0, {"gsm8k": 10.0, "math_competition": 9.0}, 3.214
    ),
    SampleRow(
        "数学を説明してください" * 3,
        "はい、\x1b[31m" * 20,
        -1234.5,
        {"gsm8k": 0.0, "length": -0.5},
        -0.04,
    ),
    SampleRow("", "", 0.0),
]


@pytest.mark.parametrize(
    ("responses", "expected"),
    [
        ([[1, 2, 3]], 1.0),  # 12 23
        ([[1, 2, 1, 2, 1]], 0.5),  # 12 21 12 21
        ([[7, 7, 7, 7, 7]], 0.25),
        ([[1, 2], [1, 2], [1, 2], [3, 4]], 0.5),  # alike among themselves
        ([[1, 2], [3]], 1.0),
        (
            [[1, 2], [2, 1]],
            1.0,
        ),  # the order within a bigram counts; none reaches from one response into the next
        ([[5], []], 1.0),  # no bigram, so none repeated
        ([], 1.0),
    ],
)
def test_distinct_2_by_hand(responses, expected):
    assert distinct_2(responses) == expected


def test_stop_rate_by_hand():
    assert stop_rate([True, False, False, True]) == 0.5 and stop_rate([]) == 1.0


@pytest.mark.parametrize("width", [1, 24, 40, 60, 80, 100, 140, 200, 5000])
def test_the_table_fits_every_terminal_and_loses_no_number(width):
    text = sample_table(ROWS, width)
    assert all(places(line) <= max(width, 24) for line in text.splitlines())
    for number in ("10.00", "9.00", "3.21", "-1234", "-0.50", "-0.04"):
        assert number in text
    assert "\x1b" not in text and "(empty)" in text


def test_a_wide_terminal_gets_columns_and_a_narrow_one_blocks():
    wide = sample_table(ROWS, 120).splitlines()
    assert [cell.strip() for cell in wide[0].split("|")] == [
        "prompt",
        "response",
        "reward",
        "gsm8k",
        "math_",
        "length",
        "KL",
    ]
    assert [cell.strip() for cell in wide[1].split("|")][4] == "competition"
    assert [cell.strip() for cell in wide[3].split("|")] == [
        "What is 12 + 30?",
        "The sum is 42.",
        "10.00",
        "10.00",
        "9.00",
        "",
        "3.21",
    ]
    narrow = sample_table(ROWS[:1], 50).splitlines()
    assert narrow[0] == "reward 10.00 gsm8k 10.00 math_competition 9.00 KL"
    assert narrow[2:4] == ["prompt    What is 12 + 30?", "response  The sum is 42."]


def test_numbers_are_short_whatever_they_are():
    shown = sample_table(
        [SampleRow("a", "b", value) for value in (1e9, -123456.0, float("nan"), 0.004)], 80
    )
    assert [line.split("|")[2].strip() for line in shown.splitlines()[2:]] == [
        "1.0e+09",
        "-123456",
        "nan",
        "0.00",
    ]


def test_rows_for_wandb():
    columns, data = sample_rows(ROWS)
    assert columns == ["prompt", "response", "reward", "gsm8k", "math_competition", "length", "KL"]
    assert data[0] == ["What is 12 + 30?", "The sum is 42.", 10.0, 10.0, 9.0, None, 3.214]
    assert data[2] == ["", "", 0.0, None, None, None, None] and len(data) == 3
    assert sample_rows([]) == (["prompt", "response"], [])


def test_what_a_template_puts_around_prompts_is_left_out():
    around = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    questions = ["What is 12 + 3?", "What is 15 + 3?"]
    lines = sample_table(
        [SampleRow(around.format(question), "4", 1.0) for question in questions], 100
    ).splitlines()
    assert [line.split(" | ")[0].strip() for line in lines[2:]] == questions
    plain = sample_table(
        [SampleRow(question, "4", 1.0) for question in questions], 100
    ).splitlines()
    assert plain == lines
    same = " ".join(sample_table([SampleRow(around.format("a"), "4", 1.0)] * 2, 200).split())
    assert "system Be brief" in same  # nothing tells what of it is the question
    group = [SampleRow(around.format(questions[0]), answer, 1.0) for answer in ("4", "5")]
    others = [around.format(question) for question in questions]
    shown = sample_table(group, 100, among=others).splitlines()
    assert [line.split(" | ")[0].strip() for line in shown[2:]] == [questions[0]] * 2
