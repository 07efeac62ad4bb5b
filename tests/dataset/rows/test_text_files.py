"""The documents of .txt files: units, pieces of large files that put together are the file, what is
wrong with a file."""

import gzip
import io
import pickle

import pytest

from coati.dataset.rows.readers import read_rows
from coati.dataset.rows.row_errors import DOCUMENTS, RowError
from coati.dataset.rows.text_files import PIECE, Piece, documents_of, pieces_of

TEXT = "\ufeffone\ntwo\n\n \n  three\r\nfour  \n\n\nfive\n\n"
UNITS = {
    "file": [(1, "one\ntwo\n\n \n  three\nfour  \n\n\nfive")],
    "paragraph": [(1, "one\ntwo"), (5, "  three\nfour"), (9, "five")],
    "line": [(1, "one"), (2, "two"), (5, "  three"), (6, "four"), (9, "five")],
}


@pytest.mark.parametrize("unit", UNITS)
def test_units(tmp_path, unit):
    assert tuple(UNITS) == DOCUMENTS
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    for name in ("a.txt", "a.txt.gz"):
        assert list(read_rows(tmp_path / name, unit)) == UNITS[unit]
    assert len(list(read_rows(tmp_path / "a.txt"))) == 5  # prompts, as ever
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')  # the unit is of .txt files alone
    assert list(read_rows(tmp_path / "rows.jsonl", unit)) == [(1, b'{"text": "a"}\n')]
    for blank in ("", "\n \n\n"):
        assert list(documents_of(io.BytesIO(blank.encode()), unit)) == []


CONTENTS = {
    "words": "the quick brown fox. " * 50_000,
    "lines": ("x" * 70 + "\n") * 9_000,
    "no blank": "字" * 300_000,
    "cyrillic, paragraphs": ("привет мир\n\n" + "ещё одна строка " * 20 + "\n") * 1500,
    "carriage returns": "x\r\n" * 150_000,
    "one byte more than a piece": "a b" * (PIECE // 3) + "c" * 5,
}


@pytest.mark.parametrize("content", CONTENTS)
def test_pieces_put_together_are_the_file(content):
    text = CONTENTS[content]
    found = [piece for _, piece in documents_of(io.BytesIO(text.encode()), "file")]
    assert "".join(found) == text.replace("\r\n", "\n").rstrip()
    if len(found) > 1:
        assert [piece.begins for piece in found] == [True] + [False] * (len(found) - 1)
        assert [piece.ends for piece in found] == [False] * (len(found) - 1) + [True]
    assert max(len(piece.encode()) for piece in found) <= PIECE + 5000
    assert len(found) >= len(text.encode()) // (PIECE + 5000)
    pieces = list(pieces_of(text))
    assert "".join(pieces) == text and len(pieces) >= len(text) // (PIECE + 5000)
    assert max(map(len, pieces)) <= PIECE + 5000


def test_words_are_not_parted_and_lines_are_counted():
    text = "".join(f"line {number} of many words in it\n" for number in range(20_000))
    found = list(documents_of(io.BytesIO(text.encode()), "file"))
    assert len(found) > 3
    for line, piece in found[1:]:
        assert piece.startswith(" ")
        before = text.index(piece[:-1] if piece.ends else piece)
        assert line == text.count("\n", 0, before) + 1


def test_a_piece_travels_to_other_processes():
    piece = pickle.loads(pickle.dumps(Piece.of("text", False, True)))
    assert (piece, piece.begins, piece.ends) == ("text", False, True)


@pytest.mark.parametrize("unit", DOCUMENTS)
def test_other_encodings_are_named(unit):
    ((line, error),) = documents_of(io.BytesIO("é".encode("latin-1")), unit)
    assert (
        isinstance(error, RowError)
        and error.reason == "bad_text"
        and "not UTF-8 text (byte 0)" in error.detail
        and line == 1
    )
