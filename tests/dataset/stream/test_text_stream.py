"""Documents in a stream: each token once an epoch, whatever a document is, beside conversations."""

import pytest

from coati.dataset.chat.plain_text import PlainText, encode_document
from coati.dataset.clean.cleaning import Cleaning
from coati.dataset.prepare.validation import BadRowBudget
from coati.dataset.prepare.write_pass import TokenizeWorker
from coati.dataset.stream import row_stream
from coati.dataset.stream.row_sources import sources_of
from coati.dataset.stream.row_stream import RowStream, StreamOptions
from coati.dataset.stream.source_order import SourceOrder, SourceRows
from tests.dataset.stream.streams import template, write_files


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(row_stream, "WINDOW", 20)


def text_stream(path, documents: str, talks=None, buffer: int = 8) -> RowStream:
    """Of texts, and of conversations at ``talks``."""
    sources = sources_of(str(path), documents=documents)
    others = sources_of(str(talks)) if talks else []
    files = [source.name for source in [*sources, *others]]
    plain = PlainText(template().tokenizer)

    def worker(type, conversation):
        return TokenizeWorker(type, None, files, conversation, 50, False, Cleaning(), None)

    order = SourceOrder([*sources, *others], seed=1, buffer=buffer)
    return RowStream(
        SourceRows([order], [1.0], 1),
        worker("text", plain),
        StreamOptions("text", 50, 1, buffer > 0),
        BadRowBudget(False, 0.0),
        others={len(sources) + n: worker("sft", template()) for n in range(len(others))},
    )


def epoch_of(found: RowStream) -> list[dict]:
    rows = []
    for window in found.windows():
        rows += [window.rows[int(entry)] for entry in window.entries]
        if window.next_epoch:
            return rows
    raise AssertionError


@pytest.fixture
def book(tmp_path):
    text = "\n\n".join(f"Paragraph {number}. " + "More of it. " * number for number in range(90))
    path = tmp_path / "book.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize("documents", ["file", "paragraph", "line"])
def test_each_token_of_a_text_is_trained_on_once_an_epoch(book, documents):
    rows = epoch_of(text_stream(book, documents, buffer=0))
    ids = [token for row in rows for token in row["input_ids"].tolist()]
    text = book.read_text()
    parts = [text] if documents == "file" else text.split("\n\n")
    plain = PlainText(template().tokenizer)
    expected = [
        token
        for part in parts
        for token in encode_document(plain.tokenizer, plain.encoder, part.rstrip(), True, True)
    ]
    assert ids == expected and max(row["seq_length"] for row in rows) == 50
    shuffled = epoch_of(text_stream(book, documents))
    assert sorted(tuple(row["input_ids"]) for row in shuffled) == sorted(
        tuple(row["input_ids"]) for row in rows
    )


def test_conversations_beside_texts_keep_their_masks(book, tmp_path):
    talks = write_files(tmp_path / "talks", 30)
    rows = epoch_of(text_stream(book, "paragraph", talks))
    masked = [row for row in rows if (row["labels"][1:5] == -100).all()]
    assert len(masked) == 30 and len(rows) > 130
