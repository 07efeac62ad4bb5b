"""Trees of messages, as Open Assistant's: a prompt, its ranked replies, and what follows each."""

from typing import Any

from coati.dataset.rows.column_use import ColumnUse, Fields
from coati.dataset.rows.messages import Messages, spoken
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.source_row import SourceRow

ROLES = {"prompter": "user", "user": "user", "human": "user", "assistant": "assistant"}


def is_tree(row: Any) -> bool:
    prompt = row.get("prompt") if isinstance(row, dict) else None
    return isinstance(prompt, dict) and isinstance(prompt.get("replies"), list) and "text" in prompt


def is_single_message(row: Any) -> bool:
    """A row of a table with one message each, whose parents stand in other rows."""
    return isinstance(row, dict) and "parent_id" in row and "message_id" in row and "text" in row


def threads(row: Fields) -> SourceRow:
    """Every conversation of the tree, from the prompt to a last reply; the rows after the first are
    its branches. Replies that reviewers turned down are left out."""
    found = [
        SourceRow(messages=messages)
        for messages in _paths(row["prompt"], [], row.use)
        if any(one["role"] == "assistant" for one in messages)
    ]
    return _with_branches(found, "no reply of the assistant")


def ranked_replies(row: Fields) -> SourceRow:
    """At each prompt with ranked replies the best one and the worst; the pairs after the first are
    its branches."""
    found = list(_pairs(row["prompt"], [], row.use))
    return _with_branches(found, "no prompt has two replies with ranks")


def _with_branches(found: list[SourceRow], lacking: str) -> SourceRow:
    if not found:
        raise RowError("no_assistant_turn", lacking)
    first, *rest = found
    first.branches = rest
    return first


def _turn(node: Any, use: ColumnUse) -> dict[str, Any]:
    if not isinstance(node, dict) or not isinstance(node.get("text"), str):
        raise RowError("wrong_keys", "a reply of the tree has no text")
    fields = Fields(node, use, "prompt.replies[].")
    role = ROLES.get(str(fields.get("role")).lower())
    if role is None:
        raise RowError(
            "unknown_role", f"a reply is from {node.get('role')!r:.60}", str(node.get("role"))
        )
    for name in ("text", "replies", "rank", "review_result", "deleted"):
        fields.get(name)
    fields.close()
    return spoken(role, node["text"], "a reply", use)


def _replies(node: dict, use: ColumnUse) -> list[dict]:
    """The replies that reviewers let stand."""
    found = node.get("replies")
    standing = []
    for one in found if isinstance(found, list) else ():
        if isinstance(one, dict) and (one.get("deleted") or one.get("review_result") is False):
            use.leave("prompt.replies[] turned down by reviewers", one)
        else:
            standing.append(one)
    return standing


def _paths(node: Any, before: Messages, use: ColumnUse) -> list[Messages]:
    messages = [*before, _turn(node, use)]
    below = [path for reply in _replies(node, use) for path in _paths(reply, messages, use)]
    return below or [messages]


def _pairs(node: Any, before: Messages, use: ColumnUse) -> list[SourceRow]:
    messages = [*before, _turn(node, use)]
    replies = _replies(node, use)
    found = []
    ranked = [one for one in replies if isinstance(one, dict) and isinstance(one.get("rank"), int)]
    if messages[-1]["role"] == "user" and len({one["rank"] for one in ranked}) > 1:
        best = min(ranked, key=lambda one: one["rank"])
        worst = max(ranked, key=lambda one: one["rank"])
        pair = {
            "chosen": [_turn(best, ColumnUse())],
            "rejected": [_turn(worst, ColumnUse())],
        }
        found.append(SourceRow(messages=messages, **pair))
    return found + [pair for reply in replies for pair in _pairs(reply, messages, use)]
