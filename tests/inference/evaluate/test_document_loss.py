"""Cross-entropy of rows of any length: against one forward pass, and token by token."""

import json
import math

import pytest
import torch

from coati.dataset.chat.conversation import setup_conversation_template
from coati.inference.evaluate.document_loss import (
    loss_rows,
    perplexity_of,
    row_loss,
    windows,
)
from coati.inference.export.measures import perplexity
from coati.models.generation.value_guidance import guided
from coati.models.ilql_heads import ILQLHeads
from coati.utils.constants import IGNORE_INDEX
from tests.tiny import tiny_llama, tiny_tokenizer


def by_token(model, ids: list[int], labels: list[int], most: int, stride: int):
    """Each learned token by a forward pass of its own over the context of its window."""
    total = 0.0
    count = 0
    start = 0
    end = min(most, len(ids))
    for place in range(1, len(ids)):
        if place >= end:
            start += stride
            end = min(start + most, len(ids))
        if labels[place] == IGNORE_INDEX:
            continue
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:place]])).logits[0, -1].float()
        total -= float(logits.log_softmax(-1)[labels[place]])
        count += 1
    return total, count


@pytest.fixture(scope="module")
def model():
    return tiny_llama(layers=1).eval()


def test_a_row_that_fits_is_one_forward_pass(model):
    ids = [5, 9, 200, 31, 7, 8]
    labels = [IGNORE_INDEX, IGNORE_INDEX, 200, 31, IGNORE_INDEX, 8]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = -sum(float(logprobs[place - 1, ids[place]]) for place in (2, 3, 5))
    total, count = row_loss(model, ids, labels, most=6)
    assert count == 3 and total == pytest.approx(wanted, rel=1e-5)
    assert perplexity(model, [(ids, labels)]) == pytest.approx(math.exp(wanted / 3), rel=1e-5)


def test_of_a_model_that_decodes_by_values_the_policy_is_measured(model):
    """Outside the best tokens its scores are -inf."""
    ids = list(range(3, 13))
    plain = row_loss(model, ids, ids, most=10)
    with guided(model, ILQLHeads(64, 384), top_k=2):
        assert row_loss(model, ids, ids, most=10) == plain


@pytest.mark.parametrize(("most", "stride"), [(8, 3), (8, 7), (5, 1), (2, 1), (40, 11)])
def test_windows_score_every_token_once_with_the_context_of_its_window(model, most, stride):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 380, (37,), generator=generator).tolist()
    labels = [token if place % 5 else IGNORE_INDEX for place, token in enumerate(ids)]
    found = row_loss(model, ids, labels, most, stride)
    wanted = by_token(model, ids, labels, most, stride)
    assert found[1] == wanted[1] == sum(label != IGNORE_INDEX for label in labels[1:])
    assert found[0] == pytest.approx(wanted[0], rel=1e-4)


def test_windows_by_hand():
    assert list(windows(10, 4, 3)) == [(0, 0, 4), (3, 4, 7), (6, 7, 10)]
    assert list(windows(4, 4, 3)) == [(0, 0, 4)] and list(windows(0, 4, 3)) == []


def test_more_context_is_what_a_smaller_stride_gives(model):
    """Windows of a stride below their length see more than cut ones, so their losses differ."""
    ids = list(range(3, 63))
    labels = [IGNORE_INDEX, *ids[1:]]
    assert row_loss(model, ids, labels, 10, 9)[0] != row_loss(model, ids, labels, 10, 1)[0]
    for stride in (0, 10):
        with pytest.raises(ValueError, match="a stride of"):
            row_loss(model, ids, labels, 10, stride)


def test_the_mean_is_over_tokens_not_rows():
    assert perplexity_of([(10.0, 5), (30.0, 5), (0.0, 0)]) == pytest.approx(math.exp(4.0))
    with pytest.raises(ValueError, match="no token"):
        perplexity_of([(0.0, 0)])


def test_texts_and_conversations_are_told_apart(tmp_path):
    conversation = setup_conversation_template(tiny_tokenizer(), {})
    (tmp_path / "a.txt").write_text("hello there\n\nhow are you\n")
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]
    rows = [{"text": "hello there"}, {"messages": talk}, {"nothing": 1}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    found, skipped = loss_rows(names, conversation)
    assert [row.place.rpartition("/")[2] for row in found] == ["a.txt:1", "b.jsonl:1", "b.jsonl:2"]
    text, column, talked = found
    assert text.labels[1:] == text.ids[1:] and column.labels[1:] == column.ids[1:]
    assert talked.labels.count(IGNORE_INDEX) > len(talked.labels) / 2  # the question is not learned
    assert len(skipped) == 1 and skipped[0][0].endswith("b.jsonl:3")
    assert [len(loss_rows(names[:1], conversation, unit)[0]) for unit in ("paragraph", "line")] == [
        2,
        2,
    ]


def test_a_document_that_is_read_in_pieces_is_one_row(tmp_path, monkeypatch):
    conversation = setup_conversation_template(tiny_tokenizer(), {})
    file = tmp_path / "a.txt"
    file.write_text("hello there, how are you today? " * 60)
    whole, _ = loss_rows([str(file)], conversation)
    monkeypatch.setattr("coati.dataset.rows.text_files.PIECE", 300)
    pieces, _ = loss_rows([str(file)], conversation)
    assert len(pieces) == 1 and pieces[0].ids == whole[0].ids
    assert pieces[0].labels == whole[0].labels
