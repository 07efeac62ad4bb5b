"""Whether a template writes what a row has of tools."""

from typing import TYPE_CHECKING

from coati.dataset.chat.message_forms import Messages, Tools
from coati.dataset.rows.row_errors import RowError

if TYPE_CHECKING:
    from coati.dataset.chat.conversation import Conversation


def check_tools(template: "Conversation", messages: Messages, tools: Tools | None) -> None:
    """Raise RowError where the template cannot write what the row has of tools."""
    abilities = template.abilities
    calls = any("tool_calls" in message for message in messages)
    results = any(message["role"] == "tool" for message in messages)
    wanted = (
        ("tools", bool(tools) and not abilities.tools),
        ("calls of tools", calls and not abilities.calls),
        ("results of tools", results and not abilities.results),
    )
    if lacking := [what for what, lacks in wanted if lacks]:
        raise RowError(
            "tools_unsupported",
            f"it writes no {' and no '.join(lacking)}; {template.way_to_tools}",
        )
    for k, message in enumerate(messages):
        if given := message.get("tool_calls"):
            _check_calls(template, messages, k, len(given))


def _check_calls(template: "Conversation", messages: Messages, k: int, calls: int) -> None:
    """Raise RowError for ``calls`` of message ``k``, or their results, that the template drops."""
    abilities = template.abilities
    if calls > 1 and not abilities.parallel_calls:
        raise RowError(
            "tools_unsupported", f"it writes one call a turn, and message {k} has {calls}"
        )
    if messages[k]["content"].strip() and not abilities.calls_beside_text:
        raise RowError(
            "tools_unsupported",
            f"it leaves out the calls of message {k}, which has a text beside them",
        )
    following = messages[k + 1 : k + 3]
    if len(following) == 2 and all(each["role"] == "tool" for each in following):
        if not abilities.parallel_results:
            raise RowError(
                "tools_unsupported", f"it leaves out results of the calls of message {k}"
            )
