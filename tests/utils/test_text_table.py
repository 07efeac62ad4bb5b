"""Columns of text: widths in places of a terminal, whatever the text holds."""

from hypothesis import given
from hypothesis import strategies as st

from coati.utils.text_table import NARROWEST, WIDEST, places, table, terminal_width, wrap


def test_wide_letters_take_two_places_and_combining_ones_none():
    assert places("ab") == 2 and places("数学") == 4 and places("e\u0301") == 1
    assert table(["n", "t"], [["1.5", "数"]], [5, 4], [True, False]).splitlines()[2] == "  1.5 | 数"
    assert table(["t", "n"], [["数", "1"]], [4, 2], [False, True]).splitlines()[2] == "数   |  1"


def test_wrapping_by_hand():
    assert wrap("one two\n\n three", 7) == ["one two", "three"]
    assert wrap("abcdefgh", 3) == ["abc", "def", "gh"]
    assert wrap("数学数", 4) == ["数学", "数"]
    assert wrap(" \n", 9) == ["(empty)"]
    assert wrap("a b c d e f g h", 5, most=2) == ["a b c", "d ..."]


def test_nothing_that_moves_the_cursor_comes_through():
    assert wrap("a\x1b[2Jb\x07\r\x00", 20) == ["a\u00b7[2Jb\u00b7 \u00b7"]


@given(st.text(), st.integers(5, 40), st.integers(1, 6))
def test_no_line_is_wider_than_asked_for(text, width, most):
    lines = wrap(text, width, most)
    assert 1 <= len(lines) <= most or lines == wrap("", width)
    assert all(places(line) <= width and line.isprintable() for line in lines)


def test_a_table_by_hand():
    assert table(["text", "n"], [["a b", "1"], ["", "22"]], [3, 3], [False, True]).splitlines() == [
        "tex |   n",
        "t   |",
        "----+----",
        "a b |   1",
        "    |  22",
    ]


def test_widths_stay_readable():
    assert (
        terminal_width(5) == NARROWEST
        and terminal_width(10_000) == WIDEST
        and terminal_width(80) == 80
    )
