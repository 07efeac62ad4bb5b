"""Conversations with a score each, for offline reinforcement learning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from coati.dataset.rows.messages import complete_rounds, continuation, question
from coati.dataset.rows.row_errors import RowError
from coati.dataset.types.data_type import (
    COMMON,
    Columns,
    DataType,
    ReportTexts,
    Side,
    TrainingRows,
)

if TYPE_CHECKING:
    from coati.dataset.chat.conversation import Conversation
    from coati.dataset.chat.encoded import Encoded
    from coati.dataset.rows.source_row import SourceRow

GOOD = 1.0  # the reward of a chosen response, and of one that is labeled good
BAD = 0.0


class Scored(DataType):
    """Whole conversations with all that the assistant wrote marked in ``loss_mask``, and their
    reward. A pair becomes two of them, a list of scored responses as many as it has."""

    name = "scored"
    reads = ("scored", "judged", "pair", "conversation")
    scored = True
    columns = {
        "input_ids": "ids",
        "loss_mask": "mask",
        "reward": "number",
        "inputs_decode": "text",
        "labels_decode": "texts",
        **COMMON,
    }
    texts = ReportTexts(
        title="conversations with a score each (scored)",
        what="In each, the turns of the assistant are actions, and the score is the reward of the "
        "last one.",
        longer="a longer row is dropped, never cut.",
        heading="What is learned from",
        learned="The text marked green are the actions, whose values are learned; the rest is "
        "context.",
    )

    @property
    def needed_columns(self) -> tuple[str, ...]:
        return ("input_ids", "loss_mask", "reward")

    def finish(self, row: SourceRow) -> None:
        if row.chosen or row.rejected or row.undecided:
            _finish_pair(row)
        elif row.completion is not None:
            response = row.response or {"role": "assistant", "content": row.completion}
            row.messages = complete_rounds([*question(row.messages), response])
            if row.reward is None:
                row.reward = GOOD if row.label else BAD
        else:
            row.messages = complete_rounds(row.messages)
            if row.reward is None:
                raise RowError(
                    "no_score",
                    "a conversation without a column score (or reward), which says how good it is",
                )

    def tokenize(self, row: SourceRow, conversation: Conversation, max_length: int) -> TrainingRows:
        if not row.chosen:
            return [_row(row, conversation, max_length)]
        rows = []
        for side, turns, reward in (
            ("chosen", row.chosen, row.chosen_reward),
            ("rejected", row.rejected, row.rejected_reward),
        ):
            one = replace(row, messages=[*row.messages, *turns], reward=reward)
            try:
                rows.append(_row(one, conversation, max_length))
            except RowError as error:
                raise RowError(error.reason, f"{side}: {error.detail}") from error
            row.notes |= one.notes
        return rows

    def sides(self, columns: Columns) -> list[Side]:
        return [Side("", columns["input_ids"], columns["loss_mask"])]

    def collator(self) -> Callable[..., Any]:
        from coati.dataset.load.collator import DataCollatorForScoredDataset

        return DataCollatorForScoredDataset

    def notes_of(self, row: SourceRow) -> dict[str, Any]:
        return {} if row.reward is None else {"score": f"{row.reward:g}"}


def _finish_pair(row: SourceRow) -> None:
    row.messages = question(row.messages)
    if row.undecided:
        raise RowError("no_preference", row.undecided)
    row.chosen = continuation(row.chosen, "chosen")
    row.rejected = continuation(row.rejected, "rejected")
    if (row.chosen_reward is None) != (row.rejected_reward is None):
        raise RowError("bad_scores", "a score of one response of the pair, none of the other")
    if row.chosen_reward is None:
        row.chosen_reward = GOOD
        row.rejected_reward = BAD


def _row(row: SourceRow, conversation: Conversation, max_length: int) -> tuple[Columns, bool]:
    """Every turn of the assistant that ``--learn`` names; where the template writes earlier turns
    otherwise later on, those of the last response's text alone are there to be seen."""
    encoded = conversation.encode_turns(row.messages, None, row.tools)[-1]
    row.notes = encoded.notes
    end = encoded.spans[-1][1]
    if end > max_length:
        raise RowError("too_long", f"{end} tokens are needed, max_length is {max_length}")
    ids = encoded.input_ids[:end]
    decode = conversation.encoder.decode
    columns = {
        "input_ids": ids,
        "loss_mask": _mask(encoded, end),
        "reward": row.reward,
        "inputs_decode": encoded.decoded(decode),
        "labels_decode": encoded.decoded_responses(decode),
        "seq_length": end,
        "seq_category": row.category,
    }
    return columns, False


def _mask(encoded: Encoded, end: int) -> list[bool]:
    mask = [False] * end
    for start, stop in encoded.spans:
        mask[start:stop] = [True] * (stop - start)
    if encoded.weights:
        mask = [
            marked and weight > 0 for marked, weight in zip(mask, encoded.weights, strict=False)
        ]
    return mask
