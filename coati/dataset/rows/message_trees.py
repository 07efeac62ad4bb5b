"""Trees of messages, as Open Assistant's: a prompt, its ranked replies, and what follows each."""

from typing import Any

from coati.dataset.rows.column_use import ColumnUse, Fields
from coati.dataset.rows.messages import Messages, spoken
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.source_row import PartRow, SourceRow

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
    _check_standing(row["prompt"])
    found = [
        SourceRow(messages=messages)
        for messages in _paths(row["prompt"], [], row.use)
        if any(one["role"] == "assistant" for one in messages)
    ]
    if not found:
        raise RowError("no_assistant_turn", "no reply of the assistant")
    return _with_branches(found)


def _check_standing(prompt: dict) -> None:
    if _is_turned_down(prompt):
        raise RowError("judged_bad", "the prompt was turned down by reviewers")


def _is_turned_down(node: dict) -> bool:
    return bool(node.get("deleted")) or node.get("review_result") is False


def ranked_replies(row: Fields) -> SourceRow:
    """At each prompt with ranked replies the best one and the worst; the pairs after the first are
    its branches."""
    _check_standing(row["prompt"])
    found = list(_pairs(row["prompt"], [], row.use))
    if not found:
        raise RowError("no_preference", "no prompt has two replies with ranks that differ")
    return _with_branches(found)


def _with_branches(found: list[SourceRow]) -> SourceRow:
    first, *rest = found
    first.branches = rest
    return first


def _turn(node: Any, use: ColumnUse) -> dict[str, Any]:
    if not isinstance(node, dict) or not isinstance(node.get("text"), str):
        raise RowError("wrong_keys", "a reply of the tree has no text")
    fields = Fields(node, use, "" if isinstance(node, PartRow) else "prompt.replies[].")
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
        if isinstance(one, dict) and _is_turned_down(one):
            below = "" if isinstance(one, PartRow) else "prompt.replies[] "
            use.leave(f"{below}turned down by reviewers", one)
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
