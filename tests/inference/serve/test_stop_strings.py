"""Stop strings and filtered words: found wherever the pieces part, and never given, not even in
half."""

import pytest

from coati.inference.serve.stop_strings import StopStringFilter, read_words


def given(text, cut, sizes=(1,)):
    """What ``cut`` gives of ``text`` in pieces of ``sizes``, and the pieces."""
    pieces, at, turn = [], 0, 0
    while at < len(text):
        size = sizes[turn % len(sizes)]
        pieces.append(cut.push(text[at : at + size]))
        at, turn = at + size, turn + 1
    pieces.append(cut.push("", final=True))
    return "".join(pieces), pieces


@pytest.mark.parametrize("sizes", [(1,), (2,), (3, 1), (100,)])
@pytest.mark.parametrize(
    ("text", "stops", "expected", "reason"),
    [
        ("one END two", ["END"], "one ", "stop"),
        ("one EN two", ["END"], "one EN two", None),
        ("EEND", ["END"], "E", "stop"),  # the first E is not the beginning
        ("ends in EN", ["END"], "ends in EN", None),
        ("a\n\nb", ["\n\n", "b"], "a", "stop"),
        ("x,y;z", [";", ","], "x", "stop"),  # the first in the text, not in the list
    ],
)
def test_stop_strings(text, stops, expected, reason, sizes):
    cut = StopStringFilter(stops)
    assert given(text, cut, sizes)[0] == expected and cut.reason == reason


def test_text_that_begins_no_stop_string_is_given_at_once():
    assert StopStringFilter(["END"]).push("hello") == "hello"
    assert StopStringFilter(["END"]).push("hello E") == "hello "


@pytest.mark.parametrize("sizes", [(1,), (4,), (100,)])
@pytest.mark.parametrize(
    ("text", "expected", "reason"),
    [
        ("so it is DARN good", "so it is ", "content_filter"),
        ("so it is darn", "so it is ", "content_filter"),
        ("darning a sock", "darning a sock", None),  # a longer word
        ("a heck, no", "a ", "content_filter"),
        ("what the duck says", "", "content_filter"),  # of several words
    ],
)
def test_words(text, expected, reason, sizes):
    cut = StopStringFilter(words=["darn", "heck", "what the duck"])
    whole, pieces = given(text, cut, sizes)
    assert whole == expected and cut.reason == reason and len(pieces) > 1


@pytest.mark.parametrize("text", ['["darn", " heck "]', "darn\n\nheck\n"])
def test_words_are_read_from_json_or_lines(tmp_path, text):
    (tmp_path / "words").write_text(text)
    assert read_words(tmp_path / "words") == ["darn", "heck"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1]", "expected a JSON list"), ("[", "not valid JSON"), (None, "not readable")],
)
def test_what_is_no_list_of_words_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "words").write_text(text)
    with pytest.raises(ValueError, match=f"words: {message}"):
        read_words(tmp_path / "words")
