"""Conversations as text, token ids and loss mask: the only place that knows chat templates.

Assistant turn k spans from the end of the text of the messages before it, generation prompt
included, to just past the first end_of_assistant after it. The text is tokenized once and spans
become token ranges through character offsets.
"""

import copy
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import jinja2

from coati.dataset.chat.chat_encoder import ChatEncoder, Span
from coati.dataset.chat.template import compile_template, render_template, special_tokens
from coati.dataset.chat.template_file import FIELDS, open_config, read_fields
from coati.dataset.chat.template_probe import examine
from coati.dataset.rows.row_errors import ROLES, TEMPLATE_MODES, RowError
from coati.utils.json_io import save_json
from coati.utils.logging import get_logger
from coati.utils.resources import template_path

logger = get_logger(__name__)


@dataclass
class Encoded:
    """One encoded text: ``input_ids`` and ``loss_mask`` of equal length, ``spans`` the token range
    of each response."""

    input_ids: list[int]
    text: str
    spans: list[Span]
    truncated: bool = False

    @property
    def loss_mask(self) -> list[bool]:
        mask = [False] * len(self.input_ids)
        for start, end in self.spans:
            mask[start:end] = [True] * (end - start)
        return mask

    def responses(self) -> list[list[int]]:
        """The supervised ids, one list per response."""
        return [self.input_ids[start:end] for start, end in self.spans]

    def cut(self, max_length: int) -> "Encoded":
        """The first complete rounds that fit into ``max_length`` tokens. Raises RowError when not
        one does."""
        if len(self.input_ids) <= max_length:
            return self
        kept = [span for span in self.spans if span[1] <= max_length]
        if not kept:
            needed = self.spans[0][1] if self.spans else len(self.input_ids)
            raise RowError("too_long", f"{needed} tokens are needed, max_length is {max_length}")
        return Encoded(
            self.input_ids[: kept[-1][1]], self.text, kept, truncated=len(kept) < len(self.spans)
        )


@dataclass
class Conversation:
    """A chat template with its end markers, and the messages of one conversation.

    ``stop_ids`` are alternatives, each a token sequence. Making one checks the template on a probe
    dialogue, derives what is None or empty (then named in ``derived``) and sets
    ``tokenizer.chat_template``. Raises ValueError with the rendered text when the template cannot
    be trained on.
    """

    tokenizer: Any
    system_message: str | None
    chat_template: str
    stop_ids: list[list[int]] = field(default_factory=list)
    end_of_assistant: str | None = None
    template_mode: str = "per_turn"
    response_format_tags: dict | None = None

    roles: ClassVar[list[str]] = ["user", "assistant"]

    def __post_init__(self):
        if self.template_mode not in TEMPLATE_MODES:
            raise ValueError(
                f"template_mode must be one of {', '.join(TEMPLATE_MODES)}, found "
                f"{self.template_mode!r}"
            )
        compile_template(self.chat_template)
        self.messages: list[dict[str, str]] = []
        self.derived: dict[str, Any] = {}
        self.header = ""
        self.starts_at_content = False
        self.rewrites = False
        self._special_tokens = special_tokens(self.tokenizer)
        self._bos = self.tokenizer.bos_token_id
        self.encoder = ChatEncoder(self.tokenizer, self.end_of_assistant or "")
        examine(self)
        if "end_of_assistant" in self.derived:
            self.encoder = ChatEncoder(self.tokenizer, self.end_of_assistant)
        if self.system_message and self.encoder.hide([{"content": self.system_message}])[1]:
            logger.warning_once(
                "system_message holds control markers; they are encoded as text, control tokens "
                "belong in chat_template"
            )
        self.tokenizer.chat_template = self.chat_template

    @classmethod
    def from_config(
        cls,
        tokenizer,
        config: dict,
        template_mode: str = "per_turn",
        source: str = "conversation template",
        folder: str | os.PathLike = ".",
    ) -> "Conversation":
        """From the fields of a template file, any of which may be missing (``{}``: the tokenizer's
        own template).

        ``source`` names that file in what a ValueError says.
        """
        fields = read_fields(config, tokenizer, source, Path(folder))
        try:
            return cls(tokenizer, template_mode=template_mode, **fields)
        except ValueError as error:
            raise ValueError(
                f"{source}: {str(error).removeprefix('conversation template: ')}"
            ) from error

    def clear(self) -> None:
        self.messages = []

    def copy(self) -> "Conversation":
        """The same template with messages of its own."""
        twin = copy.copy(self)
        twin.messages = [dict(message) for message in self.messages]
        return twin

    def append_message(self, role: str, text: str) -> None:
        """Add a turn. Raises ValueError for an unknown role."""
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r}; known roles: {', '.join(ROLES)}")
        self.messages.append({"role": ROLES[role], "content": text})

    def get_prompt(self, length: int | None = None, add_generation_prompt: bool = False) -> str:
        """The text of the system message and the first ``length`` messages (None: all)."""
        return self.render(self.messages[:length], add_generation_prompt)

    def save_prompt(self) -> str:
        return self.get_prompt()

    def get_conversation_template_keys(self) -> list[str]:
        return ["system_message", "chat_template"]

    def to_config(self) -> dict[str, Any]:
        """The template file's fields, complete; :meth:`from_config` gives the same conversation
        again."""
        return {
            name: getattr(self, name)
            for name in FIELDS
            if name != "response_format_tags" or self.response_format_tags
        }

    def save(self, path: str | os.PathLike) -> None:
        save_json(self.to_config(), path)

    def __str__(self) -> str:
        return json.dumps(self.to_config(), ensure_ascii=False, indent=4)

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        """The text of ``messages`` ({role, content} each). Raises RowError when the template
        refuses them."""
        try:
            text = render_template(
                self.chat_template,
                self._with_system(messages),
                self._special_tokens,
                add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            raise RowError("template_refused", str(error)) from error
        return text + self.header if add_generation_prompt else text

    def _with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        if not self.system_message or (messages and messages[0]["role"] == "system"):
            return messages
        return [{"role": "system", "content": self.system_message}, *messages]

    def encode(
        self,
        messages: list[dict[str, str]],
        *,
        add_generation_prompt: bool = False,
        max_length: int | None = None,
    ) -> Encoded:
        """Token ids and loss mask of ``messages`` ({role, content} each, contents as the user typed
        them).

        With ``max_length`` only the first complete rounds that fit are kept. Raises RowError when
        the conversation cannot be encoded or nothing fits.
        """
        shown, key = self.encoder.hide(self._with_system(messages))
        text = self.render(shown, add_generation_prompt)
        turns = [k for k, message in enumerate(shown) if message["role"] == "assistant"]
        return self._encode(text, [self._span(text, shown, k) for k in turns], key, max_length)

    def encode_prompt(self, messages: list[dict[str, str]], begun: str = "") -> Encoded:
        """What generation is given for ``messages``, which end with the user: no spans. ``begun``:
        the first words of the response, which generation continues. Raises RowError."""
        response = {"role": "assistant", "content": begun}
        shown, key = self.encoder.hide([*self._with_system(messages), response])
        text = self.render(shown[:-1], add_generation_prompt=True)
        answers = self._answers_in(text, shown[:-1])
        if begun:
            start = len(text)
            text += shown[-1]["content"]
            answers.append((start, start))  # no token reaches over the border
        return self._encode(text, [], key, None, answers)

    def encode_response(
        self, messages: list[dict[str, str]], max_length: int | None = None
    ) -> Encoded:
        """``messages`` with the last response alone supervised, and nothing after it; never cut.

        Works with templates that rewrite earlier turns. Raises RowError when it cannot be encoded
        or is too long.
        """
        shown, key = self.encoder.hide(self._with_system(messages))
        text = self.render(shown)
        earlier = self._answers_in(text, shown[:-1])
        encoded = self._encode(
            text, [self._span(text, shown, len(shown) - 1)], key, max_length, earlier
        )
        return Encoded(encoded.input_ids[: encoded.spans[0][1]], encoded.text, encoded.spans)

    def encode_text(self, text: str) -> tuple[list[int], int]:
        """``(ids, tokens before the text)`` of a text that no template surrounds: bos if there is
        one, text, eos.

        Raises ValueError when the tokenizer has no eos token.
        """
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no eos token, with which a plain text must end; set eos_token"
            )
        shown, key = self.encoder.hide([{"content": text}])
        ids = self._encode(shown[0]["content"], [], key, None).input_ids
        return [*ids, self.tokenizer.eos_token_id], int(self._bos is not None)

    def encode_turns(
        self, messages: list[dict[str, str]], max_length: int | None = None
    ) -> list[Encoded]:
        """The training rows of ``messages``: one, or one per assistant turn if the template
        rewrites earlier turns."""
        if not self.rewrites:
            return [self.encode(messages, max_length=max_length)]
        shown, key = self.encoder.hide(self._with_system(messages))
        rows = []
        for k in [k for k, message in enumerate(shown) if message["role"] == "assistant"]:
            text = self.render(shown[: k + 1])
            try:
                rows.append(self._encode(text, [self._span(text, shown, k)], key, max_length))
            except RowError as error:
                if not rows or error.reason != "too_long":
                    raise
                rows[-1].truncated = True
                break
        return rows

    def _answers_in(self, text: str, messages: list[dict[str, str]]) -> list[Span]:
        """Responses that are not trained in ``text``, yet tokenized as where they are; none of a
        template that rewrites them."""
        turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        return [] if self.rewrites else [self._span(text, messages, k) for k in turns]

    def _encode(
        self,
        text: str,
        spans: list[Span],
        key: str | None,
        max_length: int | None,
        others: list[Span] | None = None,
    ) -> Encoded:
        text, ids, ranges = self.encoder.encode(text, spans, key, others or [])
        if self._bos is not None and ids[:1] != [self._bos]:
            ids, ranges = [self._bos, *ids], [(start + 1, end + 1) for start, end in ranges]
        encoded = Encoded(ids, text, ranges)
        return encoded if max_length is None else encoded.cut(max_length)

    def _span(self, text: str, messages: list[dict[str, str]], k: int) -> Span:
        """Characters of assistant turn ``k`` in ``text``, its end marker included."""
        if self.starts_at_content:
            mark = "\U0010fffd"
            turn = {"role": "assistant", "content": mark}
            prefix = self.render([*messages[:k], turn]).partition(mark)[0]
        else:
            prefix = self.render(messages[:k], add_generation_prompt=True)
        if not text.startswith(prefix):
            raise RowError(
                "template_rewrites",
                f"the text before assistant turn {k} changes when the dialogue goes on",
            )
        end = text.find(self.end_of_assistant, len(prefix))
        if end < 0:
            raise RowError(
                "no_end_marker", f"{self.end_of_assistant!r} does not follow assistant turn {k}"
            )
        return len(prefix), end + len(self.end_of_assistant)


def setup_conversation_template(
    tokenizer,
    chat_template_config: dict | str | os.PathLike | None = None,
    save_path: str | os.PathLike | None = None,
    template_mode: str = "per_turn",
) -> Conversation:
    """A checked Conversation from a template file, the name of a template that comes with coati,
    a dict of its fields, or (None, ``{}``) the tokenizer's template.

    A path at which nothing is, ending in .json, gets the resolved template. ``save_path`` gets it
    when the configuration was a dict or lacked something; a file that exists is never changed.
    Raises ValueError naming the field that is wrong.
    """
    path = None
    if isinstance(chat_template_config, str | os.PathLike):
        path = template_path(chat_template_config, may_be_new=True)
    config, source, folder = open_config(chat_template_config)
    if not config and getattr(tokenizer, "name_or_path", None):
        source = f"{tokenizer.name_or_path}: chat template"
    conversation = Conversation.from_config(tokenizer, config, template_mode, source, folder)
    missing_file = path is not None and not os.path.exists(path)
    if missing_file or conversation.derived or path is None:
        target = path if missing_file else save_path
        if target is not None and not os.path.exists(target) and os.environ.get("RANK", "0") == "0":
            conversation.save(target)
            logger.info(f"conversation template stored at {target}")
    return conversation
