"""Pairs of responses to one prompt, of which one is better."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from coati.dataset.rows.messages import continuation, question, turn_text
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
    from coati.dataset.rows.source_row import SourceRow

SIDES = ("chosen", "rejected")
LONGER = 1.5  # chosen to rejected responses, or the reverse, above which length may be learned


class Preference(DataType):
    """Both conversations of a pair, each whole, with its last response marked in ``loss_mask``."""

    name = "preference"
    reads = ("pair",)
    columns = {
        **{
            f"{side}_{name}": kind
            for side in SIDES
            for name, kind in {
                "input_ids": "ids",
                "loss_mask": "mask",
                "label_decode": "texts",
            }.items()
        },
        "margin": "number",
        **COMMON,
    }
    optional_columns = {"weight": "number"}
    texts = ReportTexts(
        title="preference pairs (preference)",
        what="Each is a prompt with two responses, of which the chosen one is the better.",
        longer="of a pair the longer side counts, and a longer pair is dropped, never cut.",
        heading="What the model compares",
        learned="The model is trained to prefer the text marked green to the text marked red; the "
        "rest is context.",
    )
    traits = {f"{side} tokens": f"tokens of {side} responses" for side in SIDES}
    raw_keys = ("rejected",)
    responses = "chosen responses"

    def finish(self, row: SourceRow) -> None:
        row.messages = question(row.messages)
        if row.undecided:
            raise RowError("no_preference", row.undecided)
        row.chosen = continuation(row.chosen, "chosen")
        row.rejected = continuation(row.rejected, "rejected")
        if row.chosen == row.rejected:
            raise RowError("same_answers", f"both are {turn_text(row.chosen[-1])[:60]!r}")

    def tokenize(self, row: SourceRow, conversation: Conversation, max_length: int) -> TrainingRows:
        columns: Columns = {}
        notes: set[str] = set()
        for side, turns in zip(SIDES, (row.chosen, row.rejected), strict=True):
            try:
                encoded = conversation.encode_response(
                    [*row.messages, *turns], max_length, row.tools
                )
            except RowError as error:
                raise RowError(error.reason, f"{side}: {error.detail}") from error
            notes |= encoded.notes
            columns[f"{side}_input_ids"] = encoded.input_ids
            columns[f"{side}_loss_mask"] = encoded.loss_mask
            columns[f"{side}_label_decode"] = encoded.decoded_responses(conversation.encoder.decode)
        if columns["chosen_input_ids"] == columns["rejected_input_ids"]:
            raise RowError(
                "same_rendering", f"both are {columns['chosen_label_decode'][-1][:60]!r}"
            )
        row.notes = frozenset(notes)
        longer = max(len(columns[f"{side}_input_ids"]) for side in SIDES)
        columns |= {"margin": row.margin, "seq_length": longer, "seq_category": row.category}
        if row.weight is not None:
            columns["weight"] = row.weight
        return [(columns, False)]

    def filled(self, columns: Columns) -> Columns:
        return {"weight": 1.0, **columns}

    def sides(self, columns: Columns) -> list[Side]:
        return [
            Side(side, columns[f"{side}_input_ids"], columns[f"{side}_loss_mask"]) for side in SIDES
        ]

    def collator(self) -> Callable[..., Any]:
        from coati.dataset.load.collator import DataCollatorForPreferenceDataset

        return DataCollatorForPreferenceDataset

    def warnings(self, report: dict[str, Any]) -> Iterator[str]:
        tokens = {side: report["traits"].get(f"{side} tokens", 0) for side in SIDES}
        longer = max(tokens, key=tokens.get)
        shorter = min(tokens, key=tokens.get)
        if tokens[shorter] > 0 and tokens[longer] > LONGER * tokens[shorter]:
            yield (
                f"{longer} responses are on average {tokens[longer] / tokens[shorter]:.1f} times "
                f"as long as {shorter} ones: a model may learn the length instead of what makes a "
                "response good"
            )
