"""The table of sample answers and what it is made of."""

from coati.models.generation.response_table import format_samples, left_pad, without_stop
from coati.utils.text_table import places


def test_rows_are_padded_on_the_left():
    ids, mask = left_pad([[5], [6, 7, 8]], pad=7)
    assert ids.tolist() == [[7, 7, 5], [6, 7, 8]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_the_stop_sequence_is_taken_off():
    assert without_stop([5, 7, 8], [[8], [7, 8]]) == [5]  # the longest that fits
    assert without_stop([5, 7], [[8], [7, 8]]) == [5, 7]


def test_the_table():
    table = format_samples(
        [("hello there", "hi"), ("a" * 30, "word " * 40), ("again", "")], width=45
    )
    assert table.splitlines()[:3] == [
        "prompt           | response",
        "-----------------+---------------------------",
        "hello there      | hi",
    ]
    assert all(len(line) <= 45 for line in table.splitlines())
    wide = format_samples([("数学" * 20, "\x1b[2J")], width=40)
    assert all(places(line) <= 40 for line in wide.splitlines()) and "\x1b" not in wide
    assert (
        table.count("word") < 40 and "..." in table and table.splitlines()[-1].endswith("(empty)")
    )
