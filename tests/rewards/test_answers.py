r"""Final answers: found where they stand, equal where a mathematician would say so."""

import time

import pytest

from coati.rewards.answers import (
    answer_inside,
    boxed,
    final_answer,
    normalize,
    same_answer,
    whole_number,
)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}.", "42"),
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {x^{2}+1}", "x^{2}+1"),
        (r"\fbox{7}", "7"),
        (r"\boxed{3} and \boxed{\frac{1}{2", "3"),  # the last one is cut off
        ("no box", None),
        (r"\boxed", None),
        (r"\boxed 5", None),
    ],
)
def test_the_last_whole_box(text, content):
    assert boxed(text) == content


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("4 + 3 = 7", "7"),
        ("There were 5 apples, 2 were eaten: #### 3", "3"),
        ("The answer is 12. I checked it 3 times.", "12"),
        ("Answer: x = y + 1", "y + 1"),
        ("Answer: x = 5", "5"),
        ("The answer is 5 (since 6 - 1 = 5).", "5"),
        ("The answer is the sum 3+4=7", "7"),
        (r"The answer is \frac{1}{2}.", r"\frac{1}{2}"),
        (r"The answer is $\frac{1}{2}$.", r"\frac{1}{2}"),
        (r"the answer is \(2\sqrt{3}\), as asked", r"2\sqrt{3}"),
        (r"answer is 2\sqrt{3}", r"2\sqrt{3}"),
        ("The answer is (3, 4).", "(3, 4)"),
        ("The answer is x^2+1. I am sure.", "x^2+1"),
        ("The answer is $1,234 in all", "1,234"),
        ("**Answer:** 42 apples", "42"),
        ("The answer is -7.", "-7"),
        ("The answer is 3.5 km - more or less", "3.5"),
        ("Answer: 50%", "50"),
        ("The answer is **42** apples.", "42"),
        ("The answer is 5 - that is all", "5"),
        ("The answer is $5/hour", "5"),
        ("The answer is n/2", "n/2"),
        ("The answer is 5 - x", "5 - x"),
        ("the final answer is Monday.", "Monday"),
        (r"The answer is 5, or better \boxed{6}", "6"),
        ("it cost 1,234.50 in all", "1,234.50"),
        ("-2", "-2"),
        ("2/3 of it", "2/3"),
        ("I do not know", None),
        ("", None),
    ],
)
def test_where_a_response_ends(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", 7),
        (" -7 ", -7),
        ("1,234", 1234),
        ("$1,234,567", 1234567),
        ("3.0", 3),
        ("6/3", 2),
        (r"\boxed{8}", 8),
        ("12 dollars", 12),
        ("50%", 50),
        ("3.5", None),
        ("seven", None),
        ("", None),
        (None, None),
        ("1/0", None),
    ],
)
def test_whole_numbers(text, number):
    assert whole_number(text) == number


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        ("x^2+1", "x^2+1"),
        ("5", "5"),
        ("It is 5 apples", "5"),
        ("about 1,200 km", "1,200"),
        ("(3, 4)", "(3, 4)"),
        (r"so \boxed{7}", "7"),
        ("the answer is 3", "3"),
        ("Monday", "Monday"),
    ],
)
def test_an_answer_between_tags(solution, answer):
    assert answer_inside(solution) == answer


def test_a_list_may_look_like_thousands():
    assert same_answer("100, 200", "100,200") and same_answer("100200", "100,200")
    assert not same_answer("100, 200", "100200")


EQUAL = [
    ("(1, 200)", "(1,200)"),
    (r"\$5", "5"),
    ("42", "42.0"),
    ("1/2", r"\frac{1}{2}"),
    ("0.5", r"\frac12"),
    (r"\dfrac{3}{4}", r"\tfrac34"),
    (r"1\frac{1}{2}", "3/2"),
    (r"-1\frac{1}{2}", "-1.5"),
    (r"\frac{-1}{2}", "-0.5"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    ("1,000,000", "1000000"),
    ("$5", "5"),
    (r"5\%", "5"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", r"90 degrees"),
    (r"\text{Monday}", "monday"),
    (r"12\text{ cm}", "12"),
    (r"12 cm^2", "12"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
    ("(1, 2)", "(1.0,2)"),
    (r"\{3, 1\}", r"\{1,3\}"),
    ("x = 5", "5"),
    (r"\sqrt2", r"\sqrt{2}"),
    (r"2\sqrt{3}", r"2 \sqrt 3"),
    (r"\boxed{7}", "7"),
    (".5", "0.5"),
    ("a/b", r"\frac{a}{b}"),
    ("−3", "-3"),
    ("7.", "7"),
]
DIFFERENT = [
    ("1/3", "0.333"),
    ("42", "43"),
    ("-1", "1"),
    ("(1, 2)", "(2, 1)"),
    ("(1, 2)", "[1, 2]"),
    ("(1, 2)", "(1, 2, 3)"),
    (r"\{1, 1\}", r"\{1, 2\}"),
    ("1,2", "12"),
    (r"\sqrt{2}", r"\sqrt{3}"),
    ("", ""),
    ("1/0", "2/0"),
    ("1", ""),
    ("x", "y"),
    ("12", "1 2 3"),
    ("50", "0.5"),
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal_answers(one, other):
    assert same_answer(one, other) and same_answer(other, one), (normalize(one), normalize(other))


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_answers(one, other):
    assert not same_answer(one, other) and not same_answer(other, one), (
        normalize(one),
        normalize(other),
    )


def test_every_answer_equals_itself_and_normalizing_twice_is_once():
    for answer in {answer for pair in EQUAL for answer in pair}:
        assert same_answer(answer, answer)
        assert normalize(normalize(answer)) == normalize(answer)


@pytest.mark.parametrize(
    "text",
    ["9" * 5000, "(" * 2000, r"\boxed{" * 500, "1," * 3000, r"\frac{" * 800, "answer is " * 500],
)
def test_degenerate_texts_take_no_time(text):
    start = time.process_time()
    same_answer(text, "1")
    final_answer(text)
    whole_number(text)
    assert time.process_time() - start < 2
