"""Conversations with scores: what each kind of row becomes, which tokens are actions, and what is
refused."""

import pytest
import torch

from coati.dataset import DataCollatorForScoredDataset
from coati.dataset.chat.conversation import setup_conversation_template
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.rows.column_names import Layout
from coati.dataset.rows.formats import read_row
from coati.dataset.rows.row_errors import RowError
from tests.tiny import tiny_tokenizer

SCORED = DATA_TYPES["scored"]


@pytest.fixture(scope="module")
def conversation():
    return setup_conversation_template(tiny_tokenizer())


def talk(*texts: str) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[k % 2], "content": text} for k, text in enumerate(texts)]


def rows_of(row, conversation, max_length: int = 200, **reading) -> list[dict]:
    found = read_row("scored", row, **reading)
    made = [SCORED.tokenize(one, conversation, max_length) for one in (found, *found.branches)]
    return [columns for rows in made for columns, _ in rows]


def actions(columns: dict) -> str:
    chosen = [
        token
        for token, marked in zip(columns["input_ids"], columns["loss_mask"], strict=True)
        if marked
    ]
    return tiny_tokenizer().decode(chosen)


@pytest.mark.parametrize(
    "row, wanted",
    [
        ({"messages": talk("q", "a"), "score": 0.5}, [("a", 0.5)]),
        ({"messages": talk("q", "a"), "reward": "-2"}, [("a", -2.0)]),
        ({"messages": talk("q", "a"), "label": False}, [("a", 0.0)]),
        ({"messages": talk("q", "a"), "label": True, "score": 7}, [("a", 7.0)]),
        ({"prompt": "q", "completion": "a", "label": True}, [("a", 1.0)]),
        ({"question": "q", "answer": "a", "score": 3}, [("a", 3.0)]),
        ({"instruction": "q", "output": "a", "score": 3}, [("a", 3.0)]),
        ({"prompt": "q", "response": "a", "helpfulness": 0}, [("a", 0.0)]),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, [("a", 1.0), ("b", 0.0)]),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 9, "score_rejected": 4},
            [("a", 9.0), ("b", 4.0)],
        ),
        (
            {"prompt": "q", "responses": ["a", "b", "c", "d"], "scores": [2, 5, None, 1]},
            [("a", 2.0), ("b", 5.0), ("d", 1.0)],
        ),
        # Ranks count from the best.
        (
            {"prompt": "q", "answers": [{"answer": "a", "rank": 2}, {"answer": "b", "rank": 1}]},
            [("a", -2.0), ("b", -1.0)],
        ),
    ],
)
def test_what_rows_become(conversation, row, wanted):
    found = rows_of(row, conversation)
    assert [(actions(one), one["reward"]) for one in found] == [
        (f"{text}<|im_end|>", reward) for text, reward in wanted
    ]


def test_every_turn_of_the_assistant_is_an_action_and_nothing_else(conversation):
    row = {"messages": talk("q", "one", "user says", "two"), "score": 1}
    (columns,) = rows_of(row, conversation)
    assert actions(columns) == "one<|im_end|>two<|im_end|>"
    assert columns["loss_mask"][-1] and columns["seq_length"] == len(columns["input_ids"])
    # A conversation whose last response is judged, likewise.
    (judged,) = rows_of({"messages": row["messages"], "label": True}, conversation)
    assert judged == columns


def test_turns_of_weight_0_are_no_actions(conversation):
    messages = talk("q", "one", "more", "two")
    messages[1]["weight"] = 0
    (columns,) = rows_of({"messages": messages, "score": 1}, conversation)
    assert actions(columns) == "two<|im_end|>"


def test_a_column_of_another_name(conversation):
    layout = Layout({"score": "stars", "prompt": "ask", "response": "reply"})
    row = {"ask": "q", "reply": "a", "stars": 4}
    (columns,) = rows_of(row, conversation, layout=layout)
    assert (actions(columns), columns["reward"]) == ("a<|im_end|>", 4.0)


@pytest.mark.parametrize(
    "row, reason, said",
    [
        ({"messages": talk("q", "a")}, "no_score", "score (or reward)"),
        ({"prompt": "q", "response": "a", "score": "good"}, "bad_scores", "score is 'good'"),
        ({"prompt": "q", "response": "a", "score": float("nan")}, "bad_scores", "score is nan"),
        ({"prompt": "q", "response": "a", "score": 1e39}, "bad_scores", "expected a number"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": 1},
            "bad_scores",
            "none of the other",
        ),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [None, "N/A"]}, "no_score", "number"),
        ({"messages": talk("q")}, "no_assistant_turn", "user"),
        ({"what": 1}, "wrong_keys", "score=NAME"),
    ],
)
def test_what_is_refused(row, reason, said):
    with pytest.raises(RowError) as error:
        read_row("scored", row)
    assert error.value.reason == reason and said in error.value.detail


def test_a_row_that_is_too_long_is_dropped_whole(conversation):
    row = {"messages": talk("q", "one", "more", "two"), "score": 1}
    (columns,) = rows_of(row, conversation)
    length = columns["seq_length"]
    assert rows_of(row, conversation, length) == [columns]
    with pytest.raises(RowError) as error:
        rows_of(row, conversation, length - 1)
    assert error.value.reason == "too_long"


def test_other_types_read_the_same_rows_as_before():
    """A score is a column that they do not read."""
    found = read_row("sft", {"prompt": "q", "response": "a", "score": 1})
    assert found.reward is None and found.unused == {"score": False}
    pair = read_row(
        "preference", {"prompt": "q", "responses": ["a", "b", "c"], "scores": [2, 5, 1]}
    )
    assert (pair.chosen[0]["content"], pair.rejected[0]["content"]) == ("b", "c")
    with pytest.raises(RowError) as error:
        read_row("sft", {"prompt": "q", "response": "a", "helpfulness": 0})
    assert error.value.reason == "judged_bad"


def test_batches():
    collate = DataCollatorForScoredDataset(tiny_tokenizer(), 4)
    first = {"input_ids": [5, 6, 7], "loss_mask": [False, True, True], "reward": 0.25}
    batch = collate([first, collate.blank(first)])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 6, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["loss_mask"].tolist() == [[False, True, True], [False] * 3]
    assert batch["reward"].tolist() == [0.25, 0.0] and batch["reward"].dtype == torch.float32
    with pytest.raises(ValueError, match="cutting it would take the end of a response"):
        collate([first | {"input_ids": [1] * 5, "loss_mask": [True] * 5}])
