"""Single responses, each judged good or bad."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from coati.dataset.rows.messages import question, turn_text
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


class Kto(DataType):
    """The conversation split where its last response begins, and whether that one is wanted."""

    name = "kto"
    reads = ("judged",)
    columns = {
        "prompt": "ids",
        "completion": "ids",
        "label": "flag",
        "input_id_decode": "text",
        "completion_decode": "text",
        **COMMON,
    }
    texts = ReportTexts(
        title="responses labeled good or bad (kto)",
        what="Each is a prompt with one response and a label: true for a good response, false for "
        "a bad one.",
        longer="a longer row is dropped, never cut.",
        heading="What the model is trained on",
        learned="The model is trained toward the text marked green (label true) and away from the "
        "text marked red (label false).",
    )
    traits = {
        "label true": "good responses (label true)",
        "label false": "bad responses (label false)",
    }
    raw_keys = ("completion", "label")

    def finish(self, row: SourceRow) -> None:
        row.messages = question(row.messages)
        if not turn_text(row.response or {"content": row.completion, "role": ""}).strip():
            raise RowError("empty_answer", "completion is empty")

    def tokenize(self, row: SourceRow, conversation: Conversation, max_length: int) -> TrainingRows:
        response = row.response or {"role": "assistant", "content": row.completion}
        encoded = conversation.encode_response([*row.messages, response], max_length, row.tools)
        row.notes = encoded.notes
        start = encoded.spans[0][0]
        completion = encoded.input_ids[start:]
        decode = conversation.encoder.decode
        columns = {
            "prompt": encoded.input_ids[:start],
            "completion": completion,
            "label": row.label,
            "input_id_decode": encoded.decoded(decode),
            "completion_decode": encoded.decoded_responses(decode)[0],
            "seq_length": len(encoded.input_ids),
            "seq_category": row.category,
        }
        return [(columns, False)]

    def sides(self, columns: Columns) -> list[Side]:
        prompt = columns["prompt"]
        completion = columns["completion"]
        return [Side("", prompt + completion, [0] * len(prompt) + [1] * len(completion))]

    def collator(self) -> Callable[..., Any]:
        from coati.dataset.load.collator import DataCollatorForKTODataset

        return DataCollatorForKTODataset

    def traits_of(self, row: SourceRow) -> Iterable[str]:
        return (f"label {str(row.label).lower()}",)

    def notes_of(self, row: SourceRow) -> dict[str, Any]:
        return {"label": str(row.label).lower()}

    def warnings(self, report: dict[str, Any]) -> Iterator[str]:
        for label, what in (("true", "good"), ("false", "bad")):
            if not report["traits"].get(f"label {label}"):
                yield (
                    f"no row has label {label}: KTO learns from {what} responses too, and needs "
                    "both"
                )
