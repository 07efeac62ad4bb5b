"""A model's chat template under the arguments of single requests, each with the format in which it
writes responses."""

import json
from collections import OrderedDict
from typing import Any, NamedTuple

from coati.dataset.chat.conversation import Conversation
from coati.dataset.chat.response_format import response_format
from coati.dataset.chat.response_reader import ResponseFormat

KEPT = 16  # sets of arguments


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

    def of(self, args: dict[str, Any] | None = None) -> ChatTemplate:
        """With ``args`` beside the template's own. Raises ValueError for one that it does not
        read."""
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
