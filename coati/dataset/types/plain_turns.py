"""Rows in the plain form that every chat template can write: role and text alone."""

from dataclasses import replace
from typing import Any

from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.source_row import SourceRow


def plain_turns(row: SourceRow) -> SourceRow:
    """``row`` with its thoughts as ``<think>`` text before their answers. Raises RowError for one
    with calls of tools, or with weights that are not 1."""
    if row.tools:
        raise RowError("unsupported_role", "the row has tools")
    turns = (row.messages, row.chosen, row.rejected, [row.response] if row.response else [])
    if all(len(one) == 2 for side in turns for one in side):
        return row
    messages, chosen, rejected, response = ([_plain(one) for one in side] for side in turns)
    completion = response[0]["content"] if response else row.completion
    return replace(row, messages=messages, chosen=chosen, rejected=rejected, completion=completion)


def _plain(one: dict[str, Any]) -> dict[str, Any]:
    role = one["role"]
    if role == "tool" or "tool_calls" in one:
        raise RowError("unsupported_role", "a call of a tool or its result", role)
    if "spans" in one or (role == "assistant" and one.get("weight", 1) != 1):
        raise RowError("unsupported_role", f"a turn of weight {one.get('weight', 'by spans')}")
    thought = one.get("reasoning_content")
    content = (
        one["content"] if thought is None else f"<think>\n{thought}\n</think>\n\n{one['content']}"
    )
    return {"role": role, "content": content}
