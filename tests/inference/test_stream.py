"""Streaming shows whole characters and no stop marker."""

import pytest

from coati.inference.stream import TextStream
from tests.tiny import tiny_tokenizer

END = [[2]]  # <|im_end|>


def pieces(text, stops=END, ending=(2,)):
    tokenizer = tiny_tokenizer()
    stream = TextStream(tokenizer, stops)
    given = [stream.push(token) for token in [*tokenizer(text).input_ids, *ending]]
    return [*given, stream.finish()], stream


@pytest.mark.parametrize(
    "text", ["hello there", " indented\n\n  twice ", "né 你好 😀🏳️‍🌈!", "a�b", ""]
)
def test_the_pieces_make_the_text_without_the_stop_marker(text):
    given, stream = pieces(text)
    assert "".join(given) == stream.text == text
    assert stream.stopped


def test_no_piece_holds_half_a_character():
    given, _ = pieces("你好😀")
    assert [piece for piece in given if piece] == [
        "你",
        "好",
        "😀",
    ]  # three, three and four bytes, a token each


def test_text_comes_as_soon_as_it_is_certain():
    given, _ = pieces("hi")
    assert given == ["h", "i", "", ""]


def test_a_stop_sequence_of_several_tokens_is_held_back_until_it_is_one_or_is_not():
    tokenizer = tiny_tokenizer()
    hash_, other = tokenizer("#").input_ids[0], tokenizer("!").input_ids[0]
    stream = TextStream(tokenizer, [[hash_, hash_, hash_], [other, hash_]])
    assert [stream.push(token) for token in (hash_, hash_, other)] == ["", "", "##"]
    assert stream.push(hash_) == "" and stream.stopped  # "!#"
    assert stream.finish() == "" and stream.text == "##"


def test_what_is_held_back_at_the_end_is_given_if_it_is_no_stop_sequence():
    given, stream = pieces("well #", stops=[[tiny_tokenizer()("#").input_ids[0]] * 2], ending=())
    assert "".join(given) == "well #" and not stream.stopped


def test_an_answer_cut_in_the_middle_of_a_character_says_so_at_the_end_only():
    tokenizer = tiny_tokenizer()
    stream = TextStream(tokenizer, END)
    first = tokenizer("你").input_ids[0]
    assert stream.push(first) == ""
    assert stream.finish() == "\ufffd"
