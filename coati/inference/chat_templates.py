"""A model's chat template under the arguments of single requests, each with the format in which it
writes responses."""

import json
import re
from collections import OrderedDict
from typing import Any, NamedTuple

from coati.dataset.chat.conversation import Conversation
from coati.dataset.chat.response_format import response_format
from coati.dataset.chat.response_reader import ResponseFormat
from coati.dataset.chat.template import arguments_of

KEPT = 16  # sets of arguments
EFFORTS = ("low", "medium", "high")  # that every template with a reasoning_effort knows
NO_EFFORT = "none"
# Variables by which templates switch thinking on and off.
SWITCHES = ("enable_thinking", "thinking")


def effort_args(template: str, effort: str) -> dict[str, Any]:
    """The arguments of a template that an OpenAI ``reasoning_effort`` stands for: its own variable
    of that name, or else its switch of thinking. Raises ValueError where it has neither, or does
    not know ``effort``."""
    read = arguments_of(template)
    if "reasoning_effort" in read:
        if effort not in EFFORTS and not re.search(rf"['\"]{re.escape(effort)}['\"]", template):
            raise ValueError(
                f"reasoning_effort: {effort!r} is none that the chat template knows; send one of "
                f"{', '.join(EFFORTS)}"
            )
        return {"reasoning_effort": effort}
    for name in SWITCHES:
        if name in read:
            return {name: effort != NO_EFFORT}
    if effort == NO_EFFORT:
        return {}
    raise ValueError(
        "reasoning_effort: the chat template reads neither reasoning_effort nor "
        f"{' nor '.join(SWITCHES)}; leave it out"
    )


class ChatTemplate(NamedTuple):
    """A template and how it writes responses."""

    conversation: Conversation
    format: ResponseFormat

    def lacking(self) -> str:
        """What keeps tools from being used with it; "" where nothing does."""
        return self.format.lacking(self.conversation.abilities)


class ChatTemplates:
    """The template of ``conversation`` with its own arguments, and others. Not thread-safe."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self._kept: OrderedDict[str, ChatTemplate] = OrderedDict()

    def of(self, args: dict[str, Any] | None = None, effort: str | None = None) -> ChatTemplate:
        """With ``args`` beside the template's own, and what ``effort`` stands for. Raises
        ValueError for one that it does not read."""
        if effort is not None:
            asked = effort_args(self.conversation.chat_template, effort)
            if any((args or {}).get(name, value) != value for name, value in asked.items()):
                raise ValueError(
                    f"reasoning_effort: {effort!r} and chat_template_kwargs say different things"
                )
            args = {**(args or {}), **asked}
        key = json.dumps(args or {}, sort_keys=True)
        if key not in self._kept:
            conversation = self._with(args) if args else self.conversation
            self._kept[key] = ChatTemplate(conversation, response_format(conversation))
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _with(self, args: dict[str, Any]) -> Conversation:
        own = self.conversation
        config = own.to_config() | {"template_args": own.template_args | args}
        return Conversation.from_config(
            own.tokenizer, config, own.template_mode, "chat_template_kwargs", options=own.options
        )
