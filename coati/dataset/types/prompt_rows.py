"""Prompts that responses are generated for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from coati.dataset.rows.messages import without_response
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.scored_pairs import LISTS, judged_messages
from coati.dataset.rows.source_row import SOURCES
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


# The column of what an environment begins with, or of judged responses: JSON of "ids", those of
# each, and "scores".
DIALOGUE = "dialogue"
UNREWARDED = "no_reward_for_source"  # why a row cannot be used


def _known_source(row: SourceRow, known: list[str]) -> str | None:
    """The source of ``row``. Raises RowError for one that is not among ``known`` (with "*" all
    are)."""
    source = row.source if row.source is not None else row.category
    for name in SOURCES:
        row.unused.pop(name, None)
    if source not in known and "*" not in known:
        raise RowError(UNREWARDED, "no source" if source is None else f"source {source!r:.60}")
    return source


def _judged(
    row: SourceRow, conversation: Conversation, count: int, prompt: list[int]
) -> tuple[dict[str, Any], list[int]]:
    """The ids of the first ``count`` judged responses and their scores; and what they all follow:
    ``prompt``, with the empty thought behind it that a template may write before each. Raises
    RowError for fewer, and where the template writes the prompt otherwise before a response."""
    if len(row.group) < count:
        found = f"{len(row.group)} responses with scores"
        raise RowError("bad_scores", f"{found}, --num_generations is {count}")
    for name in [name for name in row.unused if name.split()[0] in LISTS]:
        row.unused.pop(name)
    written = []
    before = []
    for judged in row.group[:count]:
        said, unread = judged_messages(judged)
        row.unused |= unread
        encoded = conversation.encode_response([*row.messages, *said], tools=row.tools)
        written.append(encoded.input_ids)
        before.append(encoded.input_ids[: encoded.spans[0][0]])
        if before[-1][: len(prompt)] != prompt:
            raise RowError("template_rewrites", "the prompt before a judged response")
    shared = before[0] if all(one == before[0] for one in before) else prompt
    ids = [one[len(shared) :] for one in written]
    return {"ids": ids, "scores": [judged.score for judged in row.group[:count]]}, shared


class Prompt(DataType):
    """The ids that generation starts from, and the right answer where there is one."""

    name = "prompt"
    reads = ("pair", "judged", "conversation", "prompt")
    columns = {"input_ids": "ids", "inputs_decode": "text", **COMMON, "gt_answer": "text"}
    optional_columns = {DIALOGUE: "text"}
    texts = ReportTexts(
        title="prompts (prompt)",
        what="The model writes responses of its own to each, which are then scored.",
        longer="a longer row is dropped, never cut.",
        heading="What the model is asked",
        learned="This is the text that the model continues.",
    )
    responses = "prompts"
    supervised = False
    leaves_room = True

    def finish(self, row: SourceRow) -> None:
        whole = len(row.messages)
        row.messages = without_response(row.messages)
        row.unanswered = len(row.messages) < whole
        row.chosen = []
        row.rejected = []
        row.undecided = ""
        row.completion = row.response = row.label = row.margin = None

    def tokenize(self, row: SourceRow, conversation: Conversation, max_length: int) -> TrainingRows:
        tools = row.tools
        environment = conversation.options.for_environment
        if environment is not None:
            tools = json.loads(environment) or tools
        encoded = conversation.encode_prompt(row.messages, tools=tools)
        ids = encoded.input_ids
        bos = conversation.tokenizer.bos_token
        if len(ids) > max_length:
            raise RowError("too_long", f"{len(ids)} tokens are needed, max_length is {max_length}")
        # The ids are those of the rendered text, behind the begin token where the template writes
        # none: no need to decode.
        begins = bos is None or encoded.text.startswith(bos)
        columns = {
            "input_ids": ids,
            "inputs_decode": encoded.text if begins else bos + encoded.text,
            "seq_length": len(ids),
            "seq_category": row.category,
            "gt_answer": row.gt_answer,
        }
        if environment is not None:
            kept = {"messages": row.messages, "tools": row.tools}
            columns[DIALOGUE] = json.dumps(kept, ensure_ascii=False)
        if row.group and (count := conversation.options.for_groups):
            held, shared = _judged(row, conversation, count, ids)
            columns[DIALOGUE] = json.dumps(held)
            if shared != ids:
                columns["input_ids"] = shared
                columns["inputs_decode"] = conversation.encoder.decode(shared)
                columns["seq_length"] = len(shared)
        if (known := conversation.options.for_sources) is not None:
            columns["seq_category"] = _known_source(row, json.loads(known))
        return [(columns, False)]

    def filled(self, columns: Columns) -> Columns:
        return {DIALOGUE: None, **columns}

    def sides(self, columns: Columns) -> list[Side]:
        return [Side("", columns["input_ids"], [0] * len(columns["input_ids"]))]

    def collator(self) -> Callable[..., Any]:
        from coati.dataset.load.collator import DataCollatorForPromptDataset

        return DataCollatorForPromptDataset

    def warnings(self, report: dict[str, Any]) -> Iterator[str]:
        rows = report["rows_kept"]
        traits = report["traits"]
        having = traits.get("gt_answer", 0)
        if 0 < having < rows and report.get("verifiable", True):
            yield (
                f"only {having} of {rows} prompts have a gt_answer: verifiable rewards cannot "
                "score the rest"
            )
        if without := traits.get("answer left out", 0):
            yield (
                f"{without} of {rows} prompts ended with a response, which was left out: the model "
                "is to give its own"
            )
